"""The clients that people have, against a running server: Triton's, MLflow's, SageMaker's, Arrow's.

Whichever way a window comes in, the same numbers go out, and into the prediction log.
"""

import io
import json
import time
from datetime import date

import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow.pyfunc.scoring_server.client import ScoringServerClient
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from forecasting.contract import COLUMNS, QUANTILE_LEVELS
from forecasting.predictions import open_segments
from serving.columnar import FILE, PARQUET, STREAM
from tests.models import EPOCH, price_rows, ratios
from tests.serving.running import FORECASTER, install, put_prices, request_body, web

MSFT = "perennial-msft"
TARGET = "x-amzn-sagemaker-target-model"
LAST = date(2008, 1, 2)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One forecaster of two symbols."""
    home = tmp_path_factory.mktemp("home")
    install(home, 3, symbols=("GOOG", "AAPL"))
    put_prices(home, "GOOG", 100.0)
    with web(home) as running:
        yield running


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Two forecasters of one symbol each, which forecast differently."""
    home = tmp_path_factory.mktemp("several")
    install(home, 3)
    install(home, 5, forecaster=MSFT, symbols=("MSFT",), scale=2.0)
    with web(home) as running:
        yield running


@pytest.fixture(scope="module")
def triton(server):
    with InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


@pytest.fixture(scope="module")
def mlflow_client(server):
    return ScoringServerClient("127.0.0.1", server.client.base_url.port)


# the same windows in every form -------------------------------------------------------------------
def arrays(*closes: float):
    """float32 [windows, 64, 5], int64 [windows, 64], one window for each close."""
    ohlcv = np.array([price_rows(64, LAST, close)[1] for close in closes], dtype=np.float32)
    days = [(day - EPOCH).days for day in price_rows(64, LAST)[0]]
    return ohlcv, np.array([days] * len(closes), dtype=np.int64)


def frame(closes: dict[str, float]) -> pd.DataFrame:
    days, _ = price_rows(64, LAST)
    tables = []
    for symbol, close in closes.items():
        ohlcv, _ = arrays(close)
        table = pd.DataFrame(ohlcv[0].astype(float), columns=list(COLUMNS))
        table.insert(0, "symbol", symbol)
        table.insert(1, "date", pd.to_datetime(days))
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def native_body(close: float, symbol: str = "GOOG") -> dict:
    """The float32 values that tensors hold, so that every protocol gets the same numbers."""
    body = request_body(symbol=symbol, close=close)
    for row, values in zip(body["rows"], arrays(close)[0][0].tolist(), strict=True):
        row |= dict(zip(COLUMNS, values, strict=True))
    return body


def triton_inputs(closes, names=None, binary=True):
    ohlcv, dates = arrays(*closes)
    given = [("ohlcv", ohlcv, "FP32"), ("dates", dates, "INT64")]
    if names is not None:
        given.append(("symbol", np.array(names, dtype=np.object_), "BYTES"))
    inputs = []
    for name, values, datatype in given:
        item = InferInput(name, list(values.shape), datatype)
        item.set_data_from_numpy(values, binary_data=binary)
        inputs.append(item)
    return inputs


def expected(close: float, scale: float = 1.0):
    return np.float32(close) * ratios(5, scale)


def quantiles_of(forecast: dict):
    return np.array([step["quantiles"] for step in forecast["forecast"]], dtype=np.float32)


def logged(server, close: float):
    """Records of the prediction log whose last close that is."""
    with open_segments(server.home / "spool") as segments:
        batches = [segment.read() for segment in segments]
    records = [record for batch in batches if batch for record in batch.records]
    return [record for record in records if record.origin_close == pytest.approx(close)]


# Triton -------------------------------------------------------------------------------------------
def test_triton_asks_for_health_and_metadata(triton):
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready(FORECASTER)
    assert triton.is_model_ready(FORECASTER, "3")
    assert not triton.is_model_ready(FORECASTER, "4")
    assert not triton.is_model_ready("nobody")
    metadata = triton.get_server_metadata()
    assert metadata["name"] == "perennial"
    assert metadata["extensions"] == ["binary_tensor_data"]
    model = triton.get_model_metadata(FORECASTER)
    assert (model["name"], model["versions"]) == (FORECASTER, ["3"])
    shapes = {tensor["name"]: tensor["shape"] for tensor in model["inputs"]}
    assert shapes == {"ohlcv": [-1, 64, 5], "dates": [-1, 64], "symbol": [-1]}
    assert model["outputs"][0]["shape"] == [-1, 5, len(QUANTILE_LEVELS)]


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("version", ["", "3"])
def test_triton_infers(triton, binary, compression, version):
    result = triton.infer(
        FORECASTER,
        triton_inputs([40.0, 41.0], ["GOOG", "AAPL"], binary),
        model_version=version,
        outputs=[InferRequestedOutput("quantiles", binary_data=binary)],
        request_id="seven",
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    got = result.as_numpy("quantiles")
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [expected(40.0), expected(41.0)], rtol=1e-6)
    answer = result.get_response()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == (
        "seven",
        FORECASTER,
        "3",
    )


def test_triton_infers_without_naming_outputs(triton):
    result = triton.infer(FORECASTER, triton_inputs([42.0], ["GOOG"]))
    np.testing.assert_allclose(result.as_numpy("quantiles"), [expected(42.0)], rtol=1e-6)


def test_triton_shows_what_was_wrong(triton):
    def said(model, inputs, **more):
        with pytest.raises(InferenceServerException) as caught:
            triton.infer(model, inputs, **more)
        return f"{caught.value.status()}: {caught.value.message()}"

    assert "One of perennial-goog was expected; got 'nobody'" in said(
        "nobody", triton_inputs([1.0])
    )
    assert "symbol" in said(FORECASTER, triton_inputs([1.0]))
    assert "'GOGO'" in said(FORECASTER, triton_inputs([1.0], ["GOGO"]))
    assert "finite and above zero" in said(FORECASTER, triton_inputs([-1.0], ["GOOG"]))
    assert "version 4" in said(FORECASTER, triton_inputs([1.0], ["GOOG"]), model_version="4")
    short = InferInput("ohlcv", [1, 2, 5], "FP32")
    short.set_data_from_numpy(np.ones((1, 2, 5), dtype=np.float32))
    assert "[windows, 64, 5]" in said(FORECASTER, [short, triton_inputs([1.0])[1]])


# MLflow -------------------------------------------------------------------------------------------
def test_mlflow_finds_the_server_ready(mlflow_client, server):
    mlflow_client.ping()
    mlflow_client.wait_server_ready(timeout=5)
    assert mlflow_client.get_version() == server.get("/v2").json()["version"]
    assert server.get("/health").status_code == 200


def test_mlflow_sends_a_frame(mlflow_client):
    predictions = mlflow_client.invoke(frame({"GOOG": 43.0, "AAPL": 44.0})).get_predictions()
    assert predictions["symbol"].tolist() == ["GOOG"] * 5 + ["AAPL"] * 5
    assert predictions["horizon"].tolist() == [1, 2, 3, 4, 5] * 2
    columns = [f"q{level:g}" for level in QUANTILE_LEVELS]
    got = predictions[columns].to_numpy().reshape(2, 5, -1)
    np.testing.assert_allclose(got, [expected(43.0), expected(44.0)], rtol=1e-6)


def test_mlflow_sends_arrays(mlflow_client):
    ohlcv, dates = arrays(45.0, 46.0)
    inputs = {"ohlcv": ohlcv.tolist(), "dates": dates.tolist(), "symbol": [0, 1]}
    # as text: of a dict of arrays MLflow 3.17's client unpacks the names in place of the items
    answer = json.loads(mlflow_client.invoke(json.dumps({"inputs": inputs})).to_json())
    got = np.array(answer["predictions"]["quantiles"])
    np.testing.assert_allclose(got, [expected(45.0), expected(46.0)], rtol=1e-6)


def test_mlflow_shows_what_was_wrong(mlflow_client):
    with pytest.raises(Exception, match=r"error code 422.*missing: 'volume'"):
        mlflow_client.invoke(frame({"GOOG": 1.0}).drop(columns="volume"))
    with pytest.raises(Exception, match=r"error code 404.*unknown-symbol.*'GOGO'"):
        mlflow_client.invoke(frame({"GOGO": 1.0}))


# SageMaker ----------------------------------------------------------------------------------------
def test_sagemaker_pings(server):
    began = time.monotonic()
    ping = server.get("/ping")
    assert (ping.status_code, ping.content) == (200, b"")
    assert time.monotonic() - began < 2


def test_sagemaker_pings_an_empty_server(tmp_path):
    with web(tmp_path, ready=False) as empty:
        ping = empty.get("/ping")
    assert ping.status_code == 503
    assert ping.json()["type"] == "/problems/no-model"


def invoke(server, content, media_type="application/json", **headers) -> httpx.Response:
    return server.client.post(
        "/invocations", content=content, headers={"content-type": media_type, **headers}
    )


@pytest.mark.parametrize("media_type", ["text/csv", "text/csv; charset=utf-8"])
@pytest.mark.parametrize("index", [True, False])
def test_csv(server, media_type, index):
    content = frame({"GOOG": 47.0}).to_csv(index=index)
    records = invoke(server, content, media_type).json()["predictions"]
    got = [[record[f"q{level:g}"] for level in QUANTILE_LEVELS] for record in records]
    np.testing.assert_allclose(got, expected(47.0), rtol=1e-6)


def test_of_several_forecasters_tensors_need_a_name(several):
    ohlcv, dates = arrays(10.0)
    body = json.dumps({"inputs": {"ohlcv": ohlcv.tolist(), "dates": dates.tolist()}})
    refused = invoke(several, body)
    assert refused.status_code == 422
    for named in (TARGET, FORECASTER, MSFT):
        assert named in refused.json()["detail"]
    for name, scale in ((FORECASTER, 1.0), (MSFT, 2.0)):
        answer = invoke(several, body, **{TARGET: name}).json()
        got = answer["predictions"]["quantiles"]
        np.testing.assert_allclose(got, [expected(10.0, scale)], rtol=1e-6)
    unknown = invoke(several, body, **{TARGET: "nobody"})
    assert (unknown.status_code, unknown.json()["type"]) == (404, "/problems/unknown-model")


def test_of_several_forecasters_tables_name_their_symbols(several):
    content = frame({"MSFT": 11.0, "GOOG": 12.0}).to_csv(index=False)
    records = invoke(several, content, "text/csv").json()["predictions"]
    got = [[record[f"q{level:g}"] for level in QUANTILE_LEVELS] for record in records]
    wanted = np.concatenate([expected(11.0, 2.0), expected(12.0)])
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    no_symbol = frame({"MSFT": 11.0}).drop(columns="symbol").to_csv(index=False)
    assert invoke(several, no_symbol, "text/csv").status_code == 422
    named = invoke(several, no_symbol, "text/csv", **{TARGET: MSFT})
    assert {record["symbol"] for record in named.json()["predictions"]} == {"MSFT"}


# Arrow and Parquet --------------------------------------------------------------------------------
def written(table: pa.Table, media_type: str) -> bytes:
    sink = io.BytesIO()
    if media_type == PARQUET:
        pq.write_table(table, sink)
    else:
        opened = pa.ipc.new_stream if media_type == STREAM else pa.ipc.new_file
        with opened(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def read(content: bytes, media_type: str) -> pa.Table:
    if media_type == PARQUET:
        return pq.read_table(io.BytesIO(content))
    opened = pa.ipc.open_stream if media_type == STREAM else pa.ipc.open_file
    return opened(io.BytesIO(content)).read_all()


@pytest.mark.parametrize("media_type", [STREAM, FILE, PARQUET])
def test_tables_are_answered_as_json_is(server, media_type):
    closes = {"GOOG": 48.0, "AAPL": 49.0}
    sent = written(pa.Table.from_pandas(frame(closes), preserve_index=False), media_type)
    response = server.client.post(
        "/v1/forecasts", content=sent, headers={"content-type": media_type}
    )
    assert response.headers["content-type"] == media_type
    got = read(response.content, media_type).to_pylist()
    body = {"windows": [native_body(close, symbol) for symbol, close in closes.items()]}
    forecasts = server.client.post("/v1/forecasts", json=body).json()["forecasts"]
    wanted = [{"symbol": each["symbol"], **step} for each in forecasts for step in each["forecast"]]
    assert [
        {**{name: row[name] for name in wanted[0]}, "target": row["target"].isoformat()}
        for row in got
    ] == wanted
    for name in ("forecaster", "model_version", "run_id", "dataset_md5", "origin_close", "levels"):
        assert {json.dumps(row[name]) for row in got} == {
            json.dumps(each[name]) for each in forecasts
        }
    assert len({row["id"] for row in got}) == 2


# all of them --------------------------------------------------------------------------------------
def ask_triton(triton, close, binary):
    return triton.infer(
        FORECASTER,
        triton_inputs([close], ["GOOG"], binary),
        outputs=[InferRequestedOutput("quantiles", binary_data=binary)],
    ).as_numpy("quantiles")[0]


def ask_invocations(server, close, form):
    ohlcv, dates = arrays(close)
    if form == "csv":
        content = frame({"GOOG": close}).to_csv(index=False)
        records = invoke(server, content, "text/csv").json()["predictions"]
        return np.array([[r[f"q{level:g}"] for level in QUANTILE_LEVELS] for r in records])
    whole = {"ohlcv": ohlcv.tolist(), "dates": dates.tolist(), "symbol": ["GOOG"]}
    one = {name: values[0] for name, values in whole.items()}
    body = {"inputs": whole} if form == "inputs" else {"instances": [one]}
    return np.array(invoke(server, json.dumps(body)).json()["predictions"]["quantiles"][0])


def ask_table(server, close, media_type):
    sent = written(pa.Table.from_pandas(frame({"GOOG": close}), preserve_index=False), media_type)
    answer = server.client.post("/v1/forecasts", content=sent, headers={"content-type": media_type})
    return np.array(read(answer.content, media_type)["quantiles"].to_pylist())


def ask_native(server, close):
    return quantiles_of(server.client.post("/v1/forecast", json=native_body(close)).json())


ASK = {
    "native": lambda server, _, close: ask_native(server, close),
    "triton binary": lambda _, triton, close: ask_triton(triton, close, True),
    "triton json": lambda _, triton, close: ask_triton(triton, close, False),
    "csv": lambda server, _, close: ask_invocations(server, close, "csv"),
    "inputs": lambda server, _, close: ask_invocations(server, close, "inputs"),
    "instances": lambda server, _, close: ask_invocations(server, close, "instances"),
    "arrow": lambda server, _, close: ask_table(server, close, STREAM),
    "parquet": lambda server, _, close: ask_table(server, close, PARQUET),
}


@pytest.mark.parametrize("way", ASK)
def test_one_window_has_one_answer(server, triton, way):
    close = 61.37
    reference, got = ask_native(server, close), ASK[way](server, triton, close)
    assert np.array_equal(got.astype(np.float32), reference)


@pytest.mark.parametrize(("place", "way"), list(enumerate(ASK)))
def test_every_answer_is_in_the_log(server, triton, place, way):
    close = 701.5 + place
    got = ASK[way](server, triton, close)
    (record,) = logged(server, close)
    assert (record.symbol, record.source, record.model_version) == ("GOOG", "post", 3)
    assert (record.forecaster, record.origin) == (FORECASTER, LAST)
    assert len(record.targets) == 5
    assert np.array_equal(np.array(record.quantiles, np.float32), got.astype(np.float32))
