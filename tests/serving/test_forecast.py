"""What the server answers, to good requests and to bad ones."""

import json
import re
from datetime import date

import httpx
import numpy as np
import pytest

from forecasting.contract import QUANTILE_LEVELS
from forecasting.predictions import open_segments
from forecasting.sessions import sessions_after
from tests.models import ratios
from tests.serving.running import install, put_prices, request_body, until, web


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    install(home, 3, symbols=("GOOG", "AAPL"))
    put_prices(home, "GOOG", 100.0)
    with web(home) as running:
        yield running


def post(server, body) -> httpx.Response:
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    return server.client.post("/v1/forecast", content=content)


def assert_problem(response: httpx.Response, status: int, kind: str, *said: str) -> None:
    problem = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert (response.status_code, problem["status"]) == (status, status), problem
    assert problem["type"] == f"/problems/{kind}"
    assert problem["title"]
    for text in said:
        assert text in problem["detail"]


def test_latest_forecast_says_where_it_came_from(server):
    answer = server.get("/v1/forecast/GOOG").json()
    assert re.fullmatch(r"[0-9a-f-]{36}", answer.pop("id"))
    steps = answer.pop("forecast")
    assert answer == {
        "symbol": "GOOG",
        "forecaster": "perennial-goog",
        "model_version": 3,
        "run_id": f"{3:032d}",
        "dataset_md5": "d" * 32,
        "prices_md5": "p" * 32,
        "as_of": "2008-01-02",
        "origin": "2008-01-02",
        "origin_close": 100.0,
        "levels": list(QUANTILE_LEVELS),
    }
    assert [step["horizon"] for step in steps] == [1, 2, 3, 4, 5]
    expected = sessions_after(date(2008, 1, 2), 5)
    assert [step["target"] for step in steps] == [day.isoformat() for day in expected]
    assert [step["median"] for step in steps] == [100.0] * 5
    np.testing.assert_allclose([step["quantiles"] for step in steps], 100 * ratios(5), rtol=1e-6)


def test_own_rows_are_forecast_and_older_ones_ignored(server):
    enough, more = request_body(64, close=50.0), request_body(90, close=50.0)
    answers = [post(server, body).json() for body in (enough, more)]
    assert [answer["forecast"] for answer in answers] == [answers[0]["forecast"]] * 2
    assert answers[0]["prices_md5"] is None
    assert (answers[0]["origin"], answers[0]["origin_close"]) == ("2008-01-02", 50.0)
    got = [step["quantiles"] for step in answers[0]["forecast"]]
    np.testing.assert_allclose(got, 50 * ratios(5), rtol=1e-6)


def test_every_answer_is_in_the_log_under_its_id(server):
    answers = [server.get("/v1/forecast/GOOG").json(), post(server, request_body()).json()]
    with open_segments(server.home / "spool") as segments:
        batches = [segment.read() for segment in segments]
    logged = {record.id: record for batch in batches if batch for record in batch.records}
    for answer, source in zip(answers, ("get", "post"), strict=True):
        record = logged[answer["id"]]
        assert (record.source, record.model_version) == (source, 3)
        assert record.quantiles == [step["quantiles"] for step in answer["forecast"]]
        assert [d.isoformat() for d in record.targets] == [s["target"] for s in answer["forecast"]]


def test_models_lists_what_is_served(server):
    listed = server.get("/v1/models").json()
    (model,) = listed["models"]
    assert (model["forecaster"], model["version"]) == ("perennial-goog", 3)
    assert (model["symbols"], model["context"], model["horizon"]) == (["GOOG", "AAPL"], 64, 5)
    assert model["loaded_at"]
    assert listed["refused"] == []
    assert [(p["symbol"], p["as_of"]) for p in listed["prices"]] == [("GOOG", "2008-01-02")]


def test_health(server):
    assert server.get("/health/live").json() == {"status": "live"}
    assert server.get("/health/ready").json() == {"status": "ready"}


def test_unknown_symbol(server):
    known = "AAPL, GOOG"
    assert_problem(server.get("/v1/forecast/GOGO"), 404, "unknown-symbol", known, "'GOGO'")
    body = request_body(symbol="goog")
    assert_problem(post(server, body), 404, "unknown-symbol", known, "'goog'")


def test_a_forecaster_that_is_named_answers_for_rows_of_any_symbol(server):
    """Its rows decide: the same as of a symbol that it serves."""
    listed = post(server, request_body(close=50.0)).json()
    named = post(server, request_body(symbol="TSLA", close=50.0) | {"forecaster": "perennial-goog"})
    assert named.status_code == 200
    answer = named.json()
    assert (answer["symbol"], answer["forecaster"]) == ("TSLA", "perennial-goog")
    assert answer["forecast"] == listed["forecast"]
    many = [
        request_body(symbol=symbol, close=50.0) | {"forecaster": "perennial-goog"}
        for symbol in ("TSLA", "GOOG", "NEW")
    ]
    told = server.client.post("/v1/forecasts", json={"windows": [*many, request_body()]})
    answers = told.json()["forecasts"]
    assert [each["symbol"] for each in answers] == ["TSLA", "GOOG", "NEW", "GOOG"]
    assert [each["forecast"] for each in answers[:3]] == [listed["forecast"]] * 3
    with open_segments(server.home / "spool") as segments:
        batches = [segment.read() for segment in segments]
    logged = {record.id: record for batch in batches if batch for record in batch.records}
    assert (logged[answer["id"]].symbol, logged[answer["id"]].forecaster) == (
        "TSLA",
        "perennial-goog",
    )


def test_a_forecaster_that_nobody_serves_and_a_symbol_that_is_none(server):
    unknown = request_body() | {"forecaster": "perennial-gogo"}
    assert_problem(post(server, unknown), 404, "unknown-model", "perennial-goog", "perennial-gogo")
    for symbol in ("", "two words", "GOOG\n", "G" * 33):
        body = request_body(symbol=symbol) | {"forecaster": "perennial-goog"}
        assert_problem(post(server, body), 422, "bad-symbol", "letters, digits")
    wrong = request_body() | {"forecaster": 7}
    assert_problem(post(server, wrong), 422, "invalid-request", "forecaster")


def test_symbol_without_prices(server):
    response = server.get("/v1/forecast/AAPL")
    assert_problem(response, 503, "no-prices", "AAPL", "none were published yet")
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("column", "value"),
    [("close", 0), ("open", -1.5), ("low", 1e39), ("high", 1e-50), ("volume", -1)],
)
def test_values_that_are_no_prices(server, column, value):
    body = request_body()
    body["rows"][10][column] = value
    day = body["rows"][10]["date"]
    assert_problem(post(server, body), 422, "bad-prices", f"row 10 ({day})", f"{column} {value}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_does_not_have(server, value):
    body = request_body()
    body["rows"][5]["close"] = value
    assert_problem(post(server, body), 422, "bad-prices", "finite", json.dumps(value))


def test_high_below_low(server):
    body = request_body(70)
    row = body["rows"][20]
    row["high"], row["low"] = row["low"], row["high"]
    assert_problem(post(server, body), 422, "bad-prices", "high not below low", "row 20 (")


def test_bad_rows_are_counted_and_the_first_are_named(server):
    body = request_body()
    for row in body["rows"]:
        row["close"] = -1
    detail = post(server, body).json()["detail"]
    assert "64 rows break this" in detail
    assert detail.count("row ") == 5


def test_rows_out_of_order_or_twice(server):
    body = request_body()
    body["rows"][3], body["rows"][4] = body["rows"][4], body["rows"][3]
    assert_problem(post(server, body), 422, "bad-dates", "row 4", "out of order", "Sort")
    body = request_body()
    body["rows"][8]["date"] = body["rows"][7]["date"]
    assert_problem(post(server, body), 422, "bad-dates", "row 8", "twice")


@pytest.mark.parametrize("last", [date(1915, 1, 4), date(9999, 12, 31)])
def test_dates_beyond_the_calendar(server, last):
    body = request_body()
    for back, row in enumerate(reversed(body["rows"])):
        row["date"] = date.fromordinal(last.toordinal() - back).isoformat()
    assert_problem(post(server, body), 422, "bad-dates", "calendar", last.isoformat())


def test_too_few_rows(server):
    assert_problem(post(server, request_body(63)), 422, "too-few-rows", "At least 64", "got 63")
    empty = {"symbol": "GOOG", "rows": []}
    assert_problem(post(server, empty), 422, "too-few-rows", "got 0")


def test_wrong_columns(server):
    missing, extra, text, null = (request_body() for _ in range(4))
    del missing["rows"][2]["volume"]
    assert_problem(post(server, missing), 422, "invalid-request", "volume", "$.rows[2]", "exactly")
    extra["rows"][1]["adj_close"] = 1.0
    assert_problem(post(server, extra), 422, "invalid-request", "adj_close", "$.rows[1]")
    text["rows"][0]["open"] = "12,5"
    assert_problem(post(server, text), 422, "invalid-request", "got `str`", "$.rows[0].open")
    null["rows"][0]["open"] = None
    assert_problem(post(server, null), 422, "invalid-request", "got `null`")
    arrays = {"symbol": "GOOG", "rows": [[1, 2, 3, 4]] * 64}
    assert_problem(post(server, arrays), 422, "invalid-request", "`array`", "$.rows[0]")
    unknown = {**request_body(), "horizon": 3}
    assert_problem(post(server, unknown), 422, "invalid-request", "horizon")
    assert_problem(post(server, []), 422, "invalid-request", "Expected `object`")
    date_less = request_body()
    date_less["rows"][0]["date"] = "02/01/2008"
    assert_problem(post(server, date_less), 422, "invalid-request", "$.rows[0].date")


@pytest.mark.parametrize("body", [b"", b"{", b"GOOG", b"\xff\xfe", b'{"symbol": "GOOG",, }'])
def test_malformed_json(server, body):
    assert_problem(post(server, body), 400, "malformed-json", "JSON object")


def test_ten_megabytes(server):
    body = b'{"symbol": "' + b"x" * 10_000_000 + b'"}'
    assert_problem(post(server, body), 413, "body-too-large", "4 MB", "PERENNIAL_MAX_BODY_MB")

    def pieces():
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    chunked = server.client.post("/v1/forecast", content=pieces())
    assert_problem(chunked, 413, "body-too-large")
    assert server.get("/v1/forecast/GOOG").is_success


def test_wrong_path_or_method(server):
    assert_problem(server.get("/v2/forecast/GOOG"), 404, "not-found", "/schema")
    assert_problem(server.client.delete("/v1/models"), 405, "method-not-allowed")


def test_metrics(server):
    server.get("/nowhere")
    server.get("/v1/forecast/GOOG")
    response = server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    text = response.text
    route = 'method="GET",route="/v1/forecast/{symbol}"'
    assert f'perennial_requests_total{{{route},status="200"}}' in text
    assert f'perennial_request_seconds_bucket{{le="0.005",{route},version="3"}}' in text
    assert 'perennial_requests_total{method="GET",route="unmatched",status="404"}' in text
    assert 'perennial_model_swaps_total{forecaster="perennial-goog",role="champion"} 1.0' in text
    assert 'perennial_model_version{forecaster="perennial-goog",role="champion"} 3.0' in text
    written = re.search(r"^perennial_spool_writes_total (\S+)", text, re.MULTILINE)
    assert written
    assert float(written[1]) >= 1


def test_openapi_has_examples_of_answers_and_problems(server):
    schema = server.get("/schema/openapi.json").json()
    post_spec = schema["paths"]["/v1/forecast"]["post"]
    body = post_spec["requestBody"]["content"]["application/json"]
    assert body["examples"]["example"]["value"]["symbol"] == "GOOG"
    assert set(post_spec["responses"]) >= {"200", "400", "404", "413", "422", "503"}
    problems = post_spec["responses"]["422"]["content"]["application/problem+json"]
    assert set(problems["examples"]) >= {
        "invalid-request",
        "too-few-rows",
        "bad-prices",
        "bad-dates",
    }
    get_spec = schema["paths"]["/v1/forecast/{symbol}"]["get"]
    assert get_spec["responses"]["200"]["content"]["application/json"]["examples"]
    assert server.get("/schema").headers["content-type"].startswith("text/html")


def test_prices_too_short_for_the_model_say_so(server):
    put_prices(server.home, "AAPL", 20.0, count=10)
    until(lambda: len(server.get("/v1/models").json()["prices"]) == 2, "AAPL's prices")
    response = server.get("/v1/forecast/AAPL")
    assert_problem(response, 503, "no-prices", "At least 64 rows", "got 10")
