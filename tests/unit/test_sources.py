"""The sample, files of several styles, HTTP with retries, Yahoo's tables, what bad input gets."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from forecasting.errors import BadPricesError, ConfigError, HistoryError, SourceError
from forecasting.prices import adjusted, validate
from forecasting.settings import Settings, load_settings
from forecasting.sources import (
    SAMPLES,
    Payload,
    _number,
    as_traded,
    check_symbol,
    download,
    factors_from_actions,
    fetch,
    final_days,
    parse,
)
from tests import series

LAST = date(2013, 3, 1)


def read(text: str | bytes, as_of: date = LAST, symbol: str = "TEST"):
    content = text.encode() if isinstance(text, str) else text
    return parse(Payload(symbol, "file", f"/data/{symbol}.csv", content), as_of)


def from_file(tmp_path: Path, address: str, attempts: int = 2) -> Settings:
    return load_settings(
        home=tmp_path / "home", source="file", source_url=address, fetch_attempts=attempts
    )


# --- the sample ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("symbol", "rows", "first"),
    [
        ("GOOG", 2148, "2004-08-19"),
        ("AAPL", 3270, "2000-03-01"),
        ("IBM", 3270, "2000-03-01"),
        ("MSFT", 3270, "2000-03-01"),
        ("FB", 196, "2012-05-18"),
    ],
)
def test_every_sample_is_real_and_valid(settings, symbol, rows, first):
    raw = validate(fetch(settings, symbol, LAST))
    assert len(raw.rows) == rows
    assert f"{raw.rows['date'].iloc[0]:%Y-%m-%d}" == first
    assert raw.rows["date"].iloc[-1] == pd.Timestamp(LAST)
    assert symbol in SAMPLES


def test_splits_and_dividends_of_apple(settings):
    factors = fetch(settings, "AAPL", LAST).factors.set_index("ex_date")["factor"]
    assert [f"{day:%Y-%m-%d}" for day in factors.index] == [
        "2000-06-21",
        "2005-02-28",
        "2012-08-09",
        "2012-11-07",
        "2013-02-07",
    ]
    assert factors.iloc[:2].tolist() == [0.5, 0.5]
    assert factors["2012-08-09"] == pytest.approx(1 - 2.65 / 620, rel=1e-3)


@pytest.mark.parametrize("symbol", ["AAPL", "IBM", "MSFT"])
def test_adjusted_returns_are_those_of_the_vendor(settings, symbol):
    payload = download(settings, symbol)
    frame = adjusted(parse(payload, LAST), LAST)
    vendor = np.diff(np.log(payload.content["adj_close"].to_numpy()))
    assert np.diff(np.log(frame["close"].to_numpy())) == pytest.approx(vendor, abs=1e-8)
    assert frame["close"].iloc[-1] == payload.content["close"].iloc[-1]


def test_google_and_facebook_have_no_events_before_march_2013(settings):
    for symbol in ("GOOG", "FB"):
        assert fetch(settings, symbol, LAST).factors.empty


def test_dividends_of_ibm_are_quarterly(settings):
    factors = fetch(settings, "IBM", LAST).factors
    assert len(factors) == 52
    assert factors["ex_date"].diff().dt.days.dropna().between(85, 97).all()
    assert factors["factor"].between(0.99, 0.9995).all()


def test_only_what_was_known_is_fetched(settings):
    raw = fetch(settings, "AAPL", date(2005, 2, 26))  # a Saturday, two days before the split
    assert raw.rows["date"].iloc[-1] == pd.Timestamp(2005, 2, 25)
    assert len(raw.factors) == 1


def test_an_unknown_symbol_names_the_known_ones(settings):
    with pytest.raises(SourceError, match=r"'goog'; it knows AAPL, FB, GOOG.*Did you mean GOOG"):
        fetch(settings, "goog", LAST)


@pytest.mark.parametrize("symbol", ["", "../etc", "A/B", "-A", "A" * 40, "GO OG"])
def test_what_cannot_be_a_symbol_is_refused(symbol):
    with pytest.raises(SourceError, match="is no symbol"):
        check_symbol(symbol)


def test_before_the_first_row_and_after_today(settings):
    with pytest.raises(HistoryError, match="first known day is 2004-08-19"):
        fetch(settings, "GOOG", date(2004, 8, 18))
    with pytest.raises(HistoryError, match="in the future"):
        fetch(settings, "GOOG", date(2999, 1, 1))


# --- file styles -----------------------------------------------------------------------------

YAHOO = """Date,Open,High,Low,Close,Adj Close,Volume
2013-02-27,"1,794.80",804.75,791.11,799.78,400.1,"2,026,100"
2013-02-28,801.1,806.99,801.03,801.2,400.8,2265800
2013-03-01,797.8,807.14,796.15,806.19,403.3,2175400
"""
STOOQ = """<TICKER>,<PER>,<DATE>,<TIME>,<OPEN>,<HIGH>,<LOW>,<CLOSE>,<VOL>,<OPENINT>
AAPL.US,D,20130228,000000,1,1,1,1,5,0
GOOG.US,D,20130227,000000,794.8,804.75,791.11,799.78,2026100,0
GOOG.US,D,20130228,000000,801.1,806.99,801.03,801.2,2265800,0
"""
STOOQ_SHORT = "Date,Open,High,Low,Close,Volume\n2013-02-27,794.8,804.75,791.11,799.78,2026100\n"


def test_yahoo_columns_and_thousands_separators():
    raw = read(YAHOO)
    assert raw.rows["open"].iloc[0] == 1794.80
    assert raw.rows["volume"].iloc[0] == 2_026_100
    assert raw.rows["close"].tolist() == [799.78, 801.2, 806.19]
    assert raw.tells_actions


def test_stooq_columns_and_the_right_ticker():
    raw = read(STOOQ, symbol="GOOG")
    assert raw.rows["close"].tolist() == [799.78, 801.2]
    assert raw.rows["date"].dt.strftime("%Y-%m-%d").tolist() == ["2013-02-27", "2013-02-28"]
    assert not raw.tells_actions
    assert read(STOOQ_SHORT).rows["volume"].tolist() == [2_026_100]
    with pytest.raises(SourceError, match=r"no symbol IBM; it knows AAPL\.US, GOOG\.US"):
        read(STOOQ, symbol="IBM")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n"])
def test_delimiters_line_ends_and_byte_order_marks(delimiter, newline, start):
    text = start + STOOQ_SHORT.replace(",", delimiter).replace("\n", newline)
    assert read(text).rows["close"].tolist() == [799.78]


@pytest.mark.parametrize(
    "written", ["2013-02-27", "20130227", '"Feb 27, 2013"', "2013-02-27 00:00:00-05:00"]
)
def test_dates(written):
    raw = read(STOOQ_SHORT.replace("2013-02-27", written))
    assert raw.rows["date"].tolist() == [pd.Timestamp(2013, 2, 27)]


@hypothesis_settings(deadline=None)
@given(
    st.decimals(0, 10**9, places=4, allow_nan=False),
    st.sampled_from([",", " ", "'", "_", "\u00a0", "\u202f"]),
)
def test_grouped_numbers_read_as_written(value, separator):
    assert _number(f"{value:,}".replace(",", separator)) == float(value)
    assert _number(f" {value} ") == float(value)


@pytest.mark.parametrize(
    "cell", ["1,23", "1,2345", "12,34,567", "1,234'567", "null", "", "1_2", "x"]
)
def test_what_does_not_group_by_three_is_no_number(cell):
    assert np.isnan(_number(cell))


@hypothesis_settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 40),
    seed=st.integers(0, 999),
    delimiter=st.sampled_from(",;\t"),
    grouped=st.booleans(),
    stooq=st.booleans(),
    compact=st.booleans(),
)
def test_any_style_reads_the_same_prices(rows, seed, delimiter, grouped, stooq, compact):
    table = series.table(rows, seed).drop(columns="adj_close")
    written = table.astype({"volume": "float64"}).astype("object")
    for name in ("open", "high", "low", "close", "volume"):
        pattern = "{:,}" if grouped else "{}"
        written[name] = [pattern.format(value) for value in table[name]]
    if compact:
        written["date"] = written["date"].str.replace("-", "")
    names = {name: f"<{name.upper()}>" if stooq else name.title() for name in written}
    raw = read(written.rename(columns=names).to_csv(index=False, sep=delimiter))
    for name in ("open", "high", "low", "close", "volume"):
        assert raw.rows[name].tolist() == table[name].tolist()
    assert raw.rows["date"].dt.strftime("%Y-%m-%d").tolist() == table["date"].tolist()


def test_parquet_with_columns_or_an_index_of_dates(tmp_path):
    table = series.table(5)
    plain, indexed = tmp_path / "plain.parquet", tmp_path / "indexed.parquet"
    table.to_parquet(plain)
    zoned = pd.to_datetime(table["date"]).dt.tz_localize("America/New_York")
    table.drop(columns="date").set_index(zoned.rename("Date")).to_parquet(indexed)
    expected = read(table.to_csv(index=False)).rows
    assert read(plain.read_bytes()).rows.equals(expected)
    assert read(indexed.read_bytes()).rows.equals(expected)


def test_compressed_files_and_placeholders(tmp_path):
    series.table(5).to_csv(tmp_path / "TEST.csv.gz", index=False)
    settings = from_file(tmp_path, f"file://{tmp_path}/{{symbol}}.csv.gz")
    assert download(settings, "TEST").file_name == "TEST.csv", "it is kept unpacked"
    raw = fetch(settings, "TEST", LAST)
    assert len(raw.rows) == 5


def test_rows_after_as_of_are_not_even_looked_at():
    table = series.table(10)
    spoilt = table.astype("object")
    spoilt.loc[6:, ["open", "close", "volume", "adj_close"]] = "broken"
    as_of = date.fromisoformat(table["date"][5])
    seen, clean = read(spoilt.to_csv(index=False), as_of), read(table.to_csv(index=False), as_of)
    assert validate(seen).rows.equals(clean.rows)
    assert len(seen.rows) == 6


def test_a_split_in_the_adjusted_close_is_a_factor():
    table = series.split_at(series.table(20), 12, 2.0)
    table.loc[12:, "adj_close"] *= 2
    table["adj_close"] = np.where(np.arange(20) < 12, table["close"] / 2, table["close"])
    raw = validate(read(table.to_csv(index=False)))
    assert raw.factors["factor"].tolist() == [0.5]
    assert raw.factors["ex_date"].tolist() == [raw.rows["date"][12]]


# --- bad files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b" \n \n", "the file is empty"),
        (b"<html>\n<body>Too many requests</body>", "column date, open"),
        (b"Date,Open,High,Low,Close\n2013-02-27,1,1,1,1\n", "column volume missing"),
        (b"\xff\xfe\x00rubbish", "neither Parquet nor UTF-8"),
        (b"PAR1 but no more", "damaged Parquet"),
        (YAHOO.encode() + b"2013-03-04,1,2\n", "row 4 has 3 cells, the header 7"),
        (b"Date,Open,High,Low,Close,Close,Volume\n", "named twice"),
        (STOOQ_SHORT.replace("2013-02-27", "27/02/2013").encode(), "no readable date"),
    ],
)
def test_what_is_no_price_table_is_refused(content, says):
    with pytest.raises(BadPricesError) as caught:
        read(content)
    assert says in str(caught.value)
    assert "/data/TEST.csv" in str(caught.value)


def test_a_table_without_rows_says_so():
    with pytest.raises(HistoryError, match="there are no rows"):
        read("Date,Open,High,Low,Close,Volume\n")


def test_cells_that_are_no_numbers_are_named():
    raw = read(YAHOO.replace("801.03", "n/a"))
    with pytest.raises(BadPricesError, match=r"row 2 \(2013-02-28\): low is nan"):
        validate(raw)


def test_an_unreadable_date_among_others_is_named():
    raw = read(YAHOO.replace("2013-02-28", "28 Feb"))
    with pytest.raises(BadPricesError, match="row 2: the date is missing or cannot be read"):
        validate(raw)


# --- where files come from -------------------------------------------------------------------


@contextmanager
def web(answers: list[tuple[int, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """A server that gives these answers one after the other, the last one for ever."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(405)
            self.end_headers()

        def do_GET(self):
            status, body = answers[min(len(asked), len(answers) - 1)]
            asked.append(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_url_is_read_again_after_a_failure(tmp_path):
    with web([(503, b""), (500, b""), (200, YAHOO.encode())]) as (address, asked):
        raw = fetch(from_file(tmp_path, f"{address}/{{symbol}}.csv", attempts=4), "TEST", LAST)
    assert len(raw.rows) == 3
    assert asked.count("/TEST.csv") >= 3


def test_a_source_that_stays_away_is_named_with_its_address(tmp_path):
    with web([(503, b"")]) as (address, _):
        settings = from_file(tmp_path, f"{address}/x.csv")
        with pytest.raises(SourceError) as caught:
            fetch(settings, "TEST", LAST)
    assert f"Source file could not be read at {address}/x.csv after 2 attempt(s)" in str(
        caught.value
    )


def test_a_refused_connection_is_retried_then_named(tmp_path):
    with web([]) as (address, _):
        pass
    with pytest.raises(SourceError, match=r"after 2 attempt\(s\)"):
        fetch(from_file(tmp_path, f"{address}/x.csv"), "TEST", LAST)


@pytest.mark.parametrize("status", [404, 403])
def test_what_will_not_pass_is_not_retried(tmp_path, status):
    with (
        web([(status, b"")]) as (address, _),
        pytest.raises(SourceError, match=r"after 1 attempt\(s\)"),
    ):
        fetch(from_file(tmp_path, f"{address}/x.csv", attempts=4), "TEST", LAST)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("/nowhere/{symbol}.csv", "/nowhere/TEST.csv after 1 attempt"),
        ("nosuch://host/x.csv", "nosuch"),
        ("/", "could not be read at /"),
    ],
)
def test_a_file_that_cannot_be_opened_is_named(tmp_path, address, says):
    with pytest.raises(SourceError, match=says):
        fetch(from_file(tmp_path, address), "TEST", LAST)


def test_a_truncated_archive_is_named(tmp_path):
    series.table(50).to_csv(tmp_path / "whole.csv.gz", index=False)
    part = tmp_path / "part.csv.gz"
    part.write_bytes((tmp_path / "whole.csv.gz").read_bytes()[:200])
    with pytest.raises(SourceError, match=r"part\.csv\.gz after 1 attempt\(s\): EOFError"):
        fetch(from_file(tmp_path, str(part)), "TEST", LAST)


def test_the_file_source_needs_an_address(tmp_path):
    with pytest.raises(ConfigError, match="PERENNIAL_SOURCE_URL"):
        fetch(from_file(tmp_path, ""), "TEST", LAST)


# --- Yahoo -----------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("yfinance") is not None, reason="the extra is installed")
def test_yfinance_names_its_extra(tmp_path):
    with pytest.raises(ConfigError, match=r"pip install 'perennial\[yfinance\]'"):
        fetch(load_settings(home=tmp_path, source="yfinance"), "GOOG", LAST)


def yahoo_history() -> pd.DataFrame:
    """As yfinance gives it, in today's shares: 2:1 on the third day, dividend on the fourth."""
    index = pd.DatetimeIndex(
        ["2006-01-03", "2006-01-04", "2006-01-05", "2006-01-06"], tz="America/New_York", name="Date"
    )
    close = [50.0, 51.0, 52.0, 51.0]
    return pd.DataFrame(
        {
            "Open": close,
            "High": [price + 1 for price in close],
            "Low": [price - 1 for price in close],
            "Close": close,
            "Adj Close": close,
            "Volume": [200, 200, 200, 200],
            "Dividends": [0.0, 0.0, 0.0, 0.52],
            "Stock Splits": [0.0, 0.0, 2.0, 0.0],
        },
        index=index,
    )


def test_yahoo_prices_go_back_to_as_traded():
    table = as_traded(yahoo_history())
    assert table["close"].tolist() == [100.0, 102.0, 52.0, 51.0]
    assert table["volume"].tolist() == [100, 100, 200, 200]
    raw = validate(parse(Payload("TEST", "yfinance", "yahoo", table), LAST))
    assert raw.factors["factor"].tolist() == [0.5, pytest.approx(0.99)]
    frame = adjusted(raw, date(2006, 1, 6))
    assert frame["close"].to_numpy() == pytest.approx([49.5, 50.49, 51.48, 51.0])
    before = adjusted(raw, date(2006, 1, 4))
    assert before["close"].tolist() == [100.0, 102.0]


def test_a_split_and_a_dividend_on_one_day():
    days = np.datetime64("2006-01-03") + np.arange(2)
    factors = factors_from_actions(
        days, np.array([100.0, 49.0]), np.array([1.0, 2.0]), np.array([0.0, 0.5])
    )
    assert factors["factor"].tolist() == [pytest.approx(0.5 * 0.99)]  # 0.5 a new share = 1 an old


def test_a_day_that_still_trades_is_left_out():
    table = as_traded(yahoo_history())
    assert len(final_days(table, datetime(2006, 1, 6, 12, 0))) == 3
    assert len(final_days(table, datetime(2006, 1, 6, 17, 30))) == 4
