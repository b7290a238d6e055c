"""The Open Inference Protocol: bodies as Triton's own client writes and reads them."""

import json
import math
import struct
from contextlib import suppress

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

from forecasting.contract import QUANTILE_LEVELS
from serving import oip
from serving.problems import ProblemError
from tests.models import write_model_folder

ROWS = 4


@pytest.fixture(scope="module")
def contract(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return write_model_folder(folder, symbols=("GOOG", "AAPL"), context=ROWS, horizon=2)


@pytest.fixture(scope="module")
def single(contract):
    return msgspec.structs.replace(contract, symbols=("GOOG",))


def arrays(windows: int = 3, seed: int = 0):
    random = np.random.default_rng(seed)
    ohlcv = (random.random((windows, ROWS, 5)) * 700).astype(np.float32)
    dates = np.arange(windows * ROWS).reshape(windows, ROWS) + 13_000
    return ohlcv, dates, np.arange(windows) % 2


OHLCV, DATES, SYMBOL = arrays()
NAMES = np.array(["GOOG", "AAPL", "GOOG"], dtype=np.object_)


def triton_input(name, values, datatype, binary):
    item = InferInput(name, list(values.shape), datatype)
    item.set_data_from_numpy(values, binary_data=binary)
    return item


def triton_body(binary=True, symbol=SYMBOL, outputs=None, **more):
    inputs = [
        triton_input("ohlcv", OHLCV, "FP32", binary),
        triton_input("dates", DATES, "INT64", binary),
    ]
    if symbol is not None:
        kind = "BYTES" if symbol.dtype == np.object_ else "INT64"
        inputs.append(triton_input("symbol", symbol, kind, binary))
    return InferenceServerClient.generate_request_body(inputs, outputs=outputs, **more)


def document(**change):
    body = {
        "id": "7",
        "inputs": [
            {
                "name": "ohlcv",
                "shape": list(OHLCV.shape),
                "datatype": "FP32",
                "data": OHLCV.ravel().tolist(),
            },
            {
                "name": "dates",
                "shape": list(DATES.shape),
                "datatype": "INT64",
                "data": DATES.ravel().tolist(),
            },
            {"name": "symbol", "shape": [3], "datatype": "INT64", "data": SYMBOL.tolist()},
        ],
    }
    return body | change


def with_input(index, **change):
    body = document()
    body["inputs"][index] |= change
    return body


def parse(body, header_length=None):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return oip.parse(raw, header_length)


def refusal(body, header_length=None, contract=None):
    def ask():
        request = parse(body, header_length)
        return request if contract is None else oip.tensors(request, contract)

    with pytest.raises(ProblemError) as caught:
        ask()
    assert 400 <= caught.value.status < 500
    return f"{caught.value.kind}: {caught.value.detail}"


def assert_same(tensors):
    assert np.array_equal(tensors.ohlcv, OHLCV)
    assert np.array_equal(tensors.dates, DATES)
    assert np.array_equal(tensors.symbol, SYMBOL)
    assert [array.dtype for array in tensors] == [np.float32, np.int64, np.int64]
    assert all(array.flags.c_contiguous and array.flags.aligned for array in tensors)


# requests


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("symbol", [SYMBOL, NAMES], ids=["indices", "names"])
def test_bodies_of_tritons_client_are_read(contract, binary, symbol):
    body, header_length = triton_body(binary, symbol)
    assert (header_length is not None) == binary
    request = oip.parse(body, header_length)
    assert_same(oip.tensors(request, contract))
    assert request.outputs == (oip.InferOutput("quantiles", True),)  # Triton's client asks so


def test_binary_and_json_tensors_mix_in_one_body(contract):
    inputs = [
        triton_input("symbol", NAMES, "BYTES", True),
        triton_input("ohlcv", OHLCV, "FP32", False),
        triton_input("dates", DATES, "INT64", True),
    ]
    body, header_length = InferenceServerClient.generate_request_body(inputs)
    assert_same(oip.tensors(oip.parse(body, header_length), contract))


def test_unaligned_binary_tensors_are_aligned(contract):
    for pad in range(4):
        body, header_length = triton_body(request_id="x" * (pad + 1))
        assert_same(oip.tensors(oip.parse(body, header_length), contract))


@pytest.mark.parametrize("nested", [True, False])
def test_json_tensors_may_be_nested_or_flat(contract, nested):
    shaped = (lambda x: x.tolist()) if nested else (lambda x: x.ravel().tolist())
    body = document()
    for item, values in zip(body["inputs"], (OHLCV, DATES, SYMBOL), strict=True):
        item["data"] = shaped(values)
    request = parse(body)
    assert_same(oip.tensors(request, contract))
    assert request.id == "7"
    assert request.outputs == (oip.InferOutput("quantiles", False),)


@pytest.mark.parametrize("binary", [True, False])
def test_wider_and_narrower_datatypes_are_converted(contract, binary):
    inputs = [
        triton_input("ohlcv", OHLCV.astype(np.float64), "FP64", binary),
        triton_input("dates", DATES.astype(np.int32), "INT32", binary),
        triton_input("symbol", SYMBOL.astype(np.int32), "INT32", binary),
    ]
    body, header_length = InferenceServerClient.generate_request_body(inputs)
    assert_same(oip.tensors(oip.parse(body, header_length), contract))


def test_the_symbol_may_be_left_out_where_there_is_one(contract, single):
    body, header_length = triton_body(symbol=None)
    request = oip.parse(body, header_length)
    assert oip.tensors(request, single).symbol.tolist() == [0, 0, 0]
    said = refusal(body, header_length, contract)
    assert "symbol" in said
    assert "0 (GOOG), 1 (AAPL)" in said


@pytest.mark.parametrize(
    ("outputs", "parameters", "binary"),
    [
        ([], {}, False),
        ([], {"binary_data_output": True}, True),
        ([{"name": "quantiles"}], {"binary_data_output": True}, True),
        ([{"name": "quantiles", "parameters": {"binary_data": True}}], {}, True),
        (
            [{"name": "quantiles", "parameters": {"binary_data": False}}],
            {"binary_data_output": True},
            False,
        ),
    ],
)
def test_outputs_say_json_or_binary(outputs, parameters, binary):
    request = parse(document(outputs=outputs, parameters=parameters))
    assert request.outputs == (oip.InferOutput("quantiles", binary),)


def test_parameters_of_other_servers_are_ignored(contract):
    body, header_length = triton_body(
        sequence_id=3, priority=1, timeout=5, parameters={"mine": "x"}
    )
    assert_same(oip.tensors(oip.parse(body, header_length), contract))


def test_binary_tensors_may_carry_what_json_cannot():
    values = OHLCV.astype(np.float64)
    values[0, 0] = (np.nan, np.inf, -np.inf, 1e300, 1e-300)
    inputs = [triton_input("ohlcv", values, "FP64", True)]
    body, header_length = InferenceServerClient.generate_request_body(inputs)
    first = oip.parse(body, header_length).inputs["ohlcv"].values[0, 0].tolist()
    assert math.isnan(first[0])
    assert first[1:] == [math.inf, -math.inf, math.inf, 0.0]


def test_numbers_beyond_float32_are_infinite_for_the_price_check():
    data = [1e39, 3e38, 2**64 - 1, 10**300, -1e39] + [1.0] * 55
    request = parse(with_input(0, data=data))
    assert request.inputs["ohlcv"].values[0, 0].tolist()[::4] == [math.inf, -math.inf]


# refusals


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "malformed-json"),
        (b"{", "malformed-json"),
        (b"\xff\xfe", "malformed-json"),
        (b"[" * 100_000, "malformed-json"),
        (b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}", "malformed-json"),
        (b'{"inputs": [], "id": "\\ud800"}', "malformed-json"),
        ([], "Expected `object`"),
        ({}, "missing required field `inputs`"),
        ({"inputs": 3}, "$.inputs"),
        (document(ouputs=[]), "unknown field `ouputs`"),
        (document(id=7), "$.id"),
        (with_input(0, datatpye="FP32"), "datatpye"),
        (
            with_input(0, name="prices"),
            "'prices': there is no input of that name; inputs are ohlcv",
        ),
        (with_input(1, name="ohlcv", shape=[3, 4, 5]), "'ohlcv': the input comes more than once"),
        (with_input(0, datatype="INT64"), "FP32 or FP64 was expected; got 'INT64'"),
        (with_input(2, datatype="FP32"), "INT64 or INT32 or BYTES was expected; got 'FP32'"),
        (with_input(0, shape=[3, 20]), "a shape of 3 dimensions"),
        (with_input(0, shape=[3, 4, 5, 1]), "a shape of 3 dimensions"),
        (with_input(0, shape=[-1, 4, 5]), "each at least 1"),
        (with_input(0, shape=[0, 4, 5], data=[]), "each at least 1"),
        (with_input(0, shape=[3, 4, 2**40]), "each at least 1"),
        (with_input(0, shape=[3, 4, 10**30]), "$.inputs[0].shape[2]"),
        (with_input(0, shape=[3, 4, 6]), "72 elements were expected for shape [3, 4, 6]; got 60"),
        (with_input(0, data=[]), "60 elements were expected"),
        (with_input(0, data=7), "an array was expected in `data`; got 7"),
        (with_input(0, data=None), "either `data` or the parameter `binary_data_size`"),
        (with_input(0, data=["1.5"] * 60), "Expected `float`, got `str` - at `$[0]`"),
        (with_input(0, data=[1.0] * 59 + [True]), "Expected `float`, got `bool` - at `$[59]`"),
        (with_input(0, data=[1.0] * 59 + [None]), "got `null`"),
        (with_input(0, data=[1.0] * 59 + [[1.0]]), "got `array`"),
        (with_input(0, data=OHLCV[:2].tolist()), "at depth 0 not every entry is an array of 3"),
        (with_input(0, data=[*OHLCV[:2].tolist(), [[1.0]]]), "at depth 1"),
        (with_input(0, data=[*OHLCV[:2].tolist(), 1.0]), "at depth 1"),
        (with_input(0, data=OHLCV.reshape(3, 5, 4).tolist()), "at depth 1"),
        (with_input(0, data=OHLCV[:, :, :, None].tolist()), "Expected `float`, got `array`"),
        (with_input(1, data=[1.5] * 12), "Expected `int`, got `float`"),
        (with_input(1, data=[2**63] * 12), "integers of 64 bits"),
        (with_input(1, data=[2**40] * 12, datatype="INT32"), "integers of 32 bits"),
        (with_input(2, data=["GOOG"] * 3), "Expected `int`, got `str`"),
        (with_input(2, data=[1, 2, 3], datatype="BYTES"), "Expected `str`, got `int`"),
        (with_input(0, parameters={"binary_data_size": 240}), "got both"),
        (with_input(0, data=None, parameters={"binary_data_size": 240}), "which is missing"),
        (with_input(0, parameters={"shared_memory_region": "x"}), "there is no shared memory"),
        (document(outputs=[{"name": "median"}]), "there is no output of that name"),
        (document(outputs=[{"name": "quantiles"}] * 2), "the output comes more than once"),
        (
            document(outputs=[{"name": "quantiles", "parameters": {"classification": 3}}]),
            "there is no classification",
        ),
        (document(parameters={"binary_data_output": 1}), "should be true or false; got 1"),
    ],
)
def test_other_bodies_are_refused_by_name(body, said):
    assert said in refusal(body)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e400", b"1_0"])
def test_numbers_that_json_does_not_have_are_refused(number):
    body = json.dumps(with_input(0, data=[7777] + [1.0] * 59)).encode()
    assert "malformed-json" in refusal(body.replace(b"7777", number))


def test_errors_stay_short():
    for body in (
        with_input(0, name="x" * 100_000),
        with_input(0, datatype="x" * 100_000),
        with_input(0, shape=[1] * 100_000),
        document(**{"x" * 100_000: 1}),
    ):
        assert len(refusal(body)) < 600


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda o, d, s: (o[:, :3], d[:, :3], s), "[windows, 4, 5] was expected"),
        (lambda o, d, s: (o[:, :, :4], d, s), "open, high, low, close, volume; got [3, 4, 4]"),
        (lambda o, d, s: (o, d[:2], s), "'dates': shape [3, 4] was expected"),
        (lambda o, d, s: (o, d[:, :3], s), "got [3, 3]"),
        (lambda o, d, s: (o, d, s[:2]), "'symbol': shape [3] was expected, one a window; got [2]"),
        (lambda o, d, s: (o, d, s + 1), "got 2"),
        (lambda o, d, s: (o, d, s - 1), "got -1"),
    ],
)
def test_tensors_that_do_not_fit_the_contract_are_refused(contract, change, said):
    names, kinds = ("ohlcv", "dates", "symbol"), ("FP32", "INT64", "INT64")
    inputs = [
        triton_input(name, values, kind, True)
        for name, values, kind in zip(names, change(OHLCV, DATES, SYMBOL), kinds, strict=True)
    ]
    body, header_length = InferenceServerClient.generate_request_body(inputs)
    assert said in refusal(body, header_length, contract)


def test_a_missing_input_and_an_unknown_symbol_are_named(contract):
    body = document()
    del body["inputs"][1]
    assert "dates is missing" in refusal(body, contract=contract)
    said = refusal(with_input(2, datatype="BYTES", data=["GOOG", "MSFT", "X"]), contract=contract)
    assert "0 (GOOG), 1 (AAPL)" in said
    assert "got 'MSFT', 'X'" in said


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_wrong_header_length_is_refused(shift):
    body, header_length = triton_body()
    assert refusal(body, header_length + shift)


@pytest.mark.parametrize("length", [0, -1, 10**9])
def test_a_header_length_outside_the_body_is_refused(length):
    assert "Inference-Header-Content-Length" in refusal(triton_body()[0], length)


def test_bytes_left_over_or_missing_are_refused():
    body, header_length = triton_body()
    assert "360 bytes of binary tensors" in refusal(body + b"x", header_length)
    assert "binary_data_size 24 was announced; 23 bytes" in refusal(body[:-1], header_length)


@pytest.mark.parametrize("size", [0, -8, 239, 241, 10**30, 1.5, "240", True])
def test_wrong_binary_sizes_are_refused(size):
    header = json.dumps(with_input(0, data=None, parameters={"binary_data_size": size})).encode()
    assert "'ohlcv'" in refusal(header + OHLCV.tobytes(), len(header))


@pytest.mark.parametrize(
    "raw",
    [
        b"\x04\0\0\0GOOG\x04\0\0\0AAPL",
        b"\x04\0\0\0GOOG" * 4,
        b"\x04\0\0\0GOOG\x04\0\0\0AAPL\xff\0\0\0GOOG",
        b"\x04\0\0\0GOOG\x04\0\0\0AAPL\x04\0\0",
        b"\x04\0\0\0GOOG\x04\0\0\0AAPL\x02\0\0\0\xff\xfe",
    ],
)
def test_names_that_do_not_fill_their_bytes_are_refused(raw):
    change = {"datatype": "BYTES", "data": None, "parameters": {"binary_data_size": len(raw)}}
    header = json.dumps(with_input(2, **change)).encode()
    assert "'symbol'" in refusal(header + raw, len(header))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2),
    st.sampled_from(["name", "shape", "datatype", "data", "parameters"]),
    json_values,
)
def test_any_json_in_any_place_is_a_problem_or_a_request(index, key, value):
    with suppress(ProblemError):
        parse(with_input(index, **{key: value}))


@settings(max_examples=100, deadline=None)
@given(st.data(), st.booleans())
def test_damaged_bodies_are_a_problem_or_a_request(contract, data, binary):
    body, header_length = triton_body(binary, NAMES)
    raw = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)) | st.just(len(raw)))
    length = data.draw(st.just(header_length) | st.none() | st.integers(-1, len(raw) + 1))
    with suppress(ProblemError):
        oip.tensors(oip.parse(bytes(raw[:cut]), length), contract)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(0, 2**32),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.permutations(range(3)),
)
def test_arrays_come_back_as_they_went(contract, windows, seed, binary, order):
    sent = arrays(windows, seed)
    names, kinds = ("ohlcv", "dates", "symbol"), ("FP32", "INT64", "INT64")
    inputs = [triton_input(names[i], sent[i], kinds[i], binary[i]) for i in order]
    body, header_length = InferenceServerClient.generate_request_body(inputs)
    got = oip.tensors(oip.parse(body, header_length), contract)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(got, sent, strict=True))


# answers


@pytest.mark.parametrize("binary", [True, False])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_answers_are_read_by_tritons_client(contract, binary, seed):
    wanted = [InferRequestedOutput("quantiles", binary_data=binary)]
    request = oip.parse(*triton_body(outputs=wanted, request_id="42"))
    scale = 10.0 ** np.random.default_rng(seed).integers(-30, 30, (3, 2, len(QUANTILE_LEVELS)))
    quantiles = (np.random.default_rng(seed).random(scale.shape) * scale).astype(np.float32)
    body, header_length = oip.render(request, contract, 3, quantiles)
    result = InferenceServerClient.parse_response_body(body, header_length=header_length)
    assert np.array_equal(result.as_numpy("quantiles"), quantiles)
    assert result.as_numpy("quantiles").dtype == np.float32
    answer = result.get_response()
    assert (answer["model_name"], answer["model_version"]) == ("perennial-goog", "3")
    assert answer["id"] == "42"
    assert answer["parameters"] == {
        "run_id": contract.run_id,
        "dataset_md5": contract.dataset_md5,
    }
    (output,) = answer["outputs"]
    assert (output["datatype"], output["shape"]) == ("FP32", [3, 2, len(QUANTILE_LEVELS)])
    assert ("data" in output) == (not binary)


def test_an_answer_without_id_has_none_and_binary_data_follow_the_header(contract):
    quantiles = np.ones((1, 2, 39), dtype=np.float32)
    body, length = oip.render(oip.parse(*triton_body()), contract, 1, quantiles[:, ::1])
    assert length is not None
    assert "id" not in json.loads(body[:length])
    assert body[length:] == struct.pack("<78f", *[1.0] * 78)


def test_metadata(contract):
    answer = json.loads(msgspec.json.encode(oip.model_metadata(contract, [1, 3])))
    assert answer == {
        "name": "perennial-goog",
        "versions": ["1", "3"],
        "platform": "onnx_onnxv1",
        "inputs": [
            {"name": "ohlcv", "datatype": "FP32", "shape": [-1, ROWS, 5]},
            {"name": "dates", "datatype": "INT64", "shape": [-1, ROWS]},
            {"name": "symbol", "datatype": "INT64", "shape": [-1]},
        ],
        "outputs": [{"name": "quantiles", "datatype": "FP32", "shape": [-1, 2, 39]}],
    }
    server = json.loads(msgspec.json.encode(oip.server_metadata("0.1.0")))
    assert server == {
        "name": "perennial",
        "version": "0.1.0",
        "extensions": ["binary_tensor_data"],
    }
