"""MLflow's scoring protocol, against MLflow's own client and server."""

import asyncio
import json
from contextlib import suppress
from datetime import date, timedelta

import httpx
import mlflow
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.deployments import PredictionsResponse
from mlflow.pyfunc import scoring_server
from mlflow.utils.proto_json_utils import dump_input_data

from forecasting.contract import COLUMNS
from forecasting.registry import Registry
from serving import oip, scoring
from serving.problems import ProblemError
from serving.schemas import Forecast, HorizonForecast
from serving.windows import Rows
from tests.models import price_rows, ratios, write_model_folder

EPOCH = date(1970, 1, 1)
ROWS, STEPS = 8, 2
DAYS, VALUES = price_rows(ROWS)
NUMBERS = [(day - EPOCH).days for day in DAYS]
JSON = "application/json"


def frame(symbols=("GOOG", "AAPL")) -> pd.DataFrame:
    table = pd.DataFrame(VALUES, columns=list(COLUMNS))
    table.insert(0, "date", pd.to_datetime(DAYS))
    return pd.concat([table.assign(symbol=name) for name in symbols], ignore_index=True)


def tensors(windows=2):
    return {
        "ohlcv": [[list(row) for row in VALUES]] * windows,
        "dates": [NUMBERS] * windows,
        "symbol": [number % 2 for number in range(windows)],
    }


def instances():
    whole = tensors()
    return [{name: whole[name][i] for name in whole} for i in range(2)]


def parse(body, content_type=JSON, symbol=None):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return scoring.parse(raw, content_type, symbol)


def refusal(body, content_type=JSON, symbol=None):
    with pytest.raises(ProblemError) as caught:
        parse(body, content_type, symbol)
    assert len(caught.value.detail) < 800
    return f"{caught.value.status} {caught.value.kind}: {caught.value.detail}"


def assert_windows(got, symbols=("GOOG", "AAPL"), digits=None):
    assert all(isinstance(window, Rows) for window in got)
    assert [window.symbol for window in got] == list(symbols)
    for window in got:
        assert window.days.tolist() == NUMBERS
        assert (window.days.dtype, window.ohlcv.dtype) == (np.int64, np.float64)
        np.testing.assert_allclose(window.ohlcv, VALUES, rtol=0 if digits is None else 10**-digits)


@pytest.fixture(scope="module")
def contract(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return write_model_folder(folder, symbols=("GOOG", "AAPL"), context=ROWS, horizon=STEPS)


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory):
    """`mlflow models serve` of a registered version, in this process."""
    home = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{home}/mlflow.db"
    registry = Registry(uri, home / "artifacts")
    run_id = registry.start_run("run", {})
    folder = home / "model"
    write_model_folder(folder, run_id=run_id, symbols=("GOOG", "AAPL"), context=ROWS, horizon=STEPS)
    version = registry.register(folder, "perennial-goog", run_id)
    with pytest.MonkeyPatch.context() as patch:  # set_tracking_uri would change the environment
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        model = mlflow.pyfunc.load_model(f"models:/perennial-goog/{version}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")  # as `init` leaves it
        app = scoring_server.init(model)

        async def ask(raw: bytes, content_type: str) -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://mlflow") as client:
                headers = {"content-type": content_type}
                return await client.post("/invocations", content=raw, headers=headers)

        yield lambda raw, content_type=JSON: asyncio.run(ask(raw, content_type))


# against MLflow's own


@pytest.mark.parametrize("form", [{"inputs": tensors()}, {"instances": instances()}])
def test_tensors_get_the_answer_of_mlflows_server(mlflow_server, contract, form):
    theirs = mlflow_server(json.dumps(form).encode())
    assert theirs.status_code == 200, theirs.text
    ours = scoring.tensors(parse(form), contract)
    assert ours.symbol.tolist() == [0, 1]
    quantiles = ours.ohlcv[:, -1, 3, None, None] * ratios(STEPS)
    assert json.loads(scoring.render_tensors(quantiles)) == theirs.json()
    assert theirs.headers["content-type"] == JSON


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        ({"inputs": tensors(), "dataframe_split": {}}, JSON),
        ({"inputs": {"ohlcv": tensors()["ohlcv"]}}, JSON),
        ({"instances": [{**instances()[0], "symbol": [1]}]}, JSON),
        ({}, JSON),
        ([], JSON),
        (b"{", JSON),
        (b"{}", "text/plain"),
        (b"{}", "application/json; charset=latin-1"),
    ],
)
def test_what_mlflows_server_refuses_is_refused(mlflow_server, contract, body, content_type):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    theirs = mlflow_server(raw, content_type)
    assert 400 <= theirs.status_code < 500
    with pytest.raises(ProblemError) as caught:
        scoring.tensors(parse(raw, content_type), contract)
    assert (caught.value.status == 415) == (theirs.status_code == 415)


def test_frames_of_mlflows_client_are_read():
    assert_windows(parse(dump_input_data(frame()).encode()))
    days = frame().assign(date=[moment.date() for moment in frame()["date"]])
    assert_windows(parse(dump_input_data(days).encode()))
    zoned = frame().assign(date=frame()["date"].dt.tz_localize("America/New_York"))
    assert_windows(parse(dump_input_data(zoned).encode()))
    assert_windows(parse(dump_input_data(frame(), params={}).encode()))


def test_a_table_is_answered_with_a_frame_for_mlflows_client():
    steps = [HorizonForecast(h, date(2008, 1, 2 + h), 100.0, [99.0, 100.0, 101.0]) for h in (1, 2)]
    day = date(2008, 1, 2)
    answers = [
        Forecast(
            id="1",
            symbol=symbol,
            forecaster="perennial-goog",
            model_version=3,
            run_id="r",
            dataset_md5="d",
            prices_md5=None,
            as_of=day,
            origin=day,
            origin_close=100.0,
            levels=[0.025, 0.5, 0.975],
            forecast=steps,
        )
        for symbol in ("GOOG", "AAPL")
    ]
    body = scoring.render_rows(answers)
    assert json.loads(body)["predictions"][1] == {
        "symbol": "GOOG",
        "origin": "2008-01-02",
        "horizon": 2,
        "target": "2008-01-04",
        "median": 100.0,
        "q0.025": 99.0,
        "q0.5": 100.0,
        "q0.975": 101.0,
    }
    table = PredictionsResponse.from_json(body.decode()).get_predictions()
    assert table["symbol"].tolist() == ["GOOG", "GOOG", "AAPL", "AAPL"]
    assert table["horizon"].tolist() == [1, 2, 1, 2]


# tables


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("date_format", ["iso", "epoch"])
@pytest.mark.filterwarnings("ignore:'epoch' date format is deprecated")
def test_frames_as_pandas_writes_them_are_read(unit, date_format):
    table = frame().assign(date=frame()["date"].astype(f"datetime64[{unit}]"))
    for form, orient in (("dataframe_split", "split"), ("dataframe_records", "records")):
        text = table.to_json(orient=orient, date_format=date_format, double_precision=15)
        assert_windows(parse(f'{{"{form}": {text}}}'.encode()), digits=12)


@pytest.mark.parametrize("nanos", [1, 10**3, 10**6])
def test_integers_are_days_in_whichever_unit(nanos):
    table = frame()
    table["date"] = [number * 86_400 * 10**9 // nanos for number in NUMBERS] * 2
    assert_windows(parse({"dataframe_split": table.to_dict("split")}))


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("content_type", ["text/csv", 'text/csv; charset="UTF-8"; header=present'])
def test_csv_as_pandas_writes_it_is_read(index, content_type):
    text = frame().to_csv(index=index)
    for raw in (text.encode(), text.encode("utf-8-sig"), text.replace("\n", "\r\n\r\n").encode()):
        assert_windows(parse(raw, content_type))


def test_symbols_come_in_the_order_of_first_appearance_and_may_interleave():
    table = frame(("B", "A", "C"))
    mixed = table.sort_values("date", kind="stable")
    assert_windows(parse(dump_input_data(mixed).encode()), ("B", "A", "C"))


def test_the_symbol_column_may_be_left_out_where_one_is_meant():
    table = frame(("GOOG",)).drop(columns="symbol")
    for raw, kind in ((dump_input_data(table), JSON), (table.to_csv(), "text/csv")):
        assert_windows(parse(raw.encode(), kind, "GOOG"), ("GOOG",))
        assert "missing: 'symbol'" in refusal(raw.encode(), kind)
    both = dump_input_data(frame()).encode()
    assert_windows(parse(both, JSON, "MSFT"))


def test_many_symbols_are_split_in_no_time():
    count = 20_000
    names = [f"S{number}" for number in range(count)]
    got = scoring.windows(names, np.arange(count), np.ones((count, 5)))
    assert [window.symbol for window in got] == names
    assert [int(window.days[0]) for window in got] == list(range(count))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("ABC"), min_size=1, max_size=30))
def test_windows_against_a_slow_loop(names):
    values = np.arange(5.0 * len(names)).reshape(-1, 5)
    got = scoring.windows(names, np.arange(len(names)), values)
    for window in got:
        rows = [row for row, name in enumerate(names) if name == window.symbol]
        assert window.days.tolist() == rows
        assert np.array_equal(window.ohlcv, values[rows])
    assert [window.symbol for window in got] == list(dict.fromkeys(names))


def split(**change):
    table = frame(("GOOG",)).assign(date=[day.isoformat() for day in DAYS]).to_dict("split")
    return {"dataframe_split": table | change}


def records(row=2, **change):
    rows = frame(("GOOG",)).assign(date=[day.isoformat() for day in DAYS]).to_dict("records")
    rows[row] |= change
    return {"dataframe_records": rows}


def csv_text(**replace):
    text = frame(("GOOG",)).to_csv(index=False)
    for old, new in replace.items():
        text = text.replace(old, new)
    return text.encode()


# refusals


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "400 malformed-json"),
        (b"[" * 100_000, "400 malformed-json"),
        (b"\xff", "400 malformed-json"),
        (b'{"dataframe_records": [{"open": NaN}]}', "NaN and infinities are no JSON"),
        (b'{"dataframe_records": [{"open": 1e400}]}', "400 malformed-json"),
        (7, "an object with one of dataframe_split"),
        ({"input": {}}, "exactly one of dataframe_split, dataframe_records, instances, inputs"),
        ({"params": {}}, "got none"),
        ({"inputs": tensors(), "more": 1}, "got 'inputs', 'more'"),
        ({"inputs": tensors(), "params": {"x": 1}}, "these models have no parameters"),
        ({"inputs": [1, 2]}, "`inputs`: an object of tensors"),
        ({"inputs": tensors() | {"x": 1}}, "unknown: 'x'"),
        ({"inputs": {"dates": [[1]]}}, "missing: 'ohlcv'"),
        ({"inputs": tensors() | {"ohlcv": []}}, "arrays nested 3 deep"),
        ({"inputs": tensors() | {"ohlcv": [1.0]}}, "arrays nested 3 deep"),
        ({"inputs": tensors() | {"ohlcv": [[[1.0], []]]}}, "at depth 2"),
        ({"inputs": tensors() | {"ohlcv": [[["1"]]]}}, "got `str`"),
        ({"inputs": tensors() | {"dates": [[1.5]]}}, "got `float`"),
        ({"inputs": tensors() | {"symbol": ["GOOG", 1]}}, "got `int`"),
        ({"instances": []}, "`instances`: a list of objects"),
        ({"instances": [[1.0]]}, "`instances`: a list of objects"),
        ({"instances": [instances()[0], {"ohlcv": [[1.0]]}]}, "`instances[1]`"),
        (
            {"instances": [instances()[0], {**tensors(), "symbol": None} | {"x": 1}]},
            "unknown: 'x'",
        ),
        (
            {
                "instances": [
                    {k: v for k, v in instances()[0].items() if k != "symbol"},
                    *instances(),
                ]
            },
            "all of them or none",
        ),
        (split(columns=None), "`dataframe_split`"),
        (split(more=1), "unknown field `more`"),
        (split(data=[]), "at least one row"),
        (split(data=[[1, 2]]), "row 0: 7 values were expected, one a column; got 2"),
        (split(data=[1]), "$.data[0]"),
        (split(columns=["Date", "open", "high", "low", "close", "volume", "symbol"]), "'Date'"),
        (split(columns=["date"] * 7), "twice: 'date'"),
        (split(columns=["date"] * 100_000), "twice: 'date'"),
        ({"dataframe_records": []}, "at least one"),
        ({"dataframe_records": {"open": [1]}}, "a list of objects"),
        (records(adjusted=1.0), "`dataframe_records[2]`"),
        (records(0, adjusted=1.0), "unknown: 'adjusted'"),
        (records(open="100"), "row 2, column open: a number was expected; got '100'"),
        (records(open=None), "row 2, column open: a number was expected; got None"),
        (records(volume=True), "row 2, column volume"),
        (records(symbol=None), "row 2: a symbol was expected in text; got None"),
        (records(symbol=""), "row 2: a symbol"),
        (records(date=None), "row 2, column date"),
        (records(date="2008-02-30"), "row 2, column date"),
        (records(date="0000-01-01"), "row 2, column date"),
        (records(date="2008-W01-1"), "row 2, column date"),
        (records(date="20080102"), "row 2, column date"),
        (records(date="2008-01-02T09:30:00"), "a day was expected, as YYYY-MM-DD"),
        (records(date="NaT"), "row 2, column date"),
        (records(date=1199232000000), "row 2, column date"),
        (records(0, date=1199232000000), "row 1, column date"),
        (split(data=[[1199232000001, *VALUES[0], "GOOG"]]), "row 0, column date"),
        (split(data=[[-(10**15), *VALUES[0], "GOOG"]]), "row 0, column date"),
        (split(data=[[2**64 - 1, *VALUES[0], "GOOG"]]), "row 0, column date"),
    ],
)
def test_other_bodies_are_refused_by_name(body, said):
    assert said in refusal(body)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "missing: 'symbol', 'date', 'open'"),
        (b"\xff", "UTF-8 text with commas was expected"),
        (b'"a', "UTF-8 text with commas was expected"),
        (b"x" * 200_000, "UTF-8 text with commas was expected"),
        (b"a\n" * 100_000, "unknown: 'a'"),
        (b"a,b\n1\n", "row 0: 2 values were expected, one a column; got 1"),
        (csv_text(date="day"), "unknown: 'day'; missing: 'date'"),
        (csv_text(**{"2008-01-02": "02.01.2008"}), "row 7, column date"),
        (csv_text(**{",100.0,": ",,"}), "row 7, column close: a number was expected; got ''"),
        (csv_text(**{",100.0,": ",1_0,"}), "got '1_0'"),
        (csv_text(**{",100.0,": ",$1,"}), "got '$1'"),
        (frame().to_csv(index=False).split("\n")[0].encode(), "at least one row"),
    ],
)
def test_other_csv_is_refused_by_name(body, said):
    assert said in refusal(body, "text/csv")


def test_csv_numbers_that_are_no_prices_are_left_to_the_price_check():
    for word, value in (("nan", np.nan), ("inf", np.inf), ("-inf", -np.inf), ("1e400", np.inf)):
        (window,) = parse(csv_text(**{",100.0,": f",{word},"}), "text/csv")
        assert np.array_equal(window.ohlcv[-1, 3], value, equal_nan=True)


@pytest.mark.parametrize(
    "content_type",
    ["text/html", "application/json; charset=utf-16", "json", ";", "application/xml"],
)
def test_other_media_types_are_refused(content_type):
    assert "415 unsupported-media-type" in refusal(b"{}", content_type)


@pytest.mark.parametrize("content_type", [None, "", JSON, "Application/JSON; charset=UTF-8"])
def test_json_is_known_by_its_media_type_or_none(content_type):
    assert scoring.media_kind(content_type) == "json"


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec="latin-1"), max_size=40))
def test_any_content_type_is_a_problem_or_known(text):
    with suppress(ProblemError):
        scoring.media_kind(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(scoring.FORMATS), st.sampled_from(scoring.TABLE_COLUMNS), json_values)
def test_any_json_in_any_place_is_a_problem_or_a_request(form, column, value):
    for body in ({form: value}, records(**{column: value}), records(0, **{column: value})):
        with suppress(ProblemError):
            parse(body)
    for name in scoring.TENSORS:
        for body in ({"inputs": tensors() | {name: value}}, {"instances": [{name: value}]}):
            with suppress(ProblemError):
                parse(body)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 400), st.sampled_from([JSON, "text/csv"]))
def test_damaged_bodies_are_a_problem_or_a_request(noise, place, content_type):
    raw = csv_text() if content_type == "text/csv" else json.dumps(split()).encode()
    with suppress(ProblemError):
        parse(raw[:place] + noise + raw[place + len(noise) :], content_type)


@settings(max_examples=50, deadline=None)
@given(
    st.dates(date(1, 1, 1), date(9990, 1, 1)),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=5, max_size=5),
)
def test_values_come_back_as_they_went(first, numbers):
    days = [(first + timedelta(days=more)).isoformat() for more in range(3)]
    rows = [[day, *numbers, "X"] for day in days]
    body = {"columns": ["date", *COLUMNS, "symbol"], "data": rows}
    text = "\n".join([",".join(body["columns"]), *(",".join(map(str, row)) for row in rows)])
    for window in (
        *parse({"dataframe_split": body}),
        *parse(text.encode(), "text/csv"),
    ):
        assert window.days.tolist() == [(first - EPOCH).days + more for more in range(3)]
        assert np.array_equal(window.ohlcv, [numbers] * 3)


def test_tensors_beyond_the_contract_are_refused(contract):
    arrays = parse({"inputs": tensors() | {"symbol": ["GOOG", "MSFT"]}})
    with pytest.raises(ProblemError, match="got 'MSFT'"):
        scoring.tensors(arrays, contract)
    with pytest.raises(ProblemError, match=r"\[windows, 8, 5\] was expected"):
        scoring.tensors(arrays._replace(ohlcv=arrays.ohlcv[:, :3]), contract)
    assert oip.OUTPUT == "quantiles"
