"""The ingest step by itself, without Prefect's server."""

import asyncio
from datetime import date

import pytest
from prefect.states import exception_to_failed_state

from forecasting import datasets
from forecasting.errors import BadPricesError, DataError, DatasetError, HistoryError, SourceError
from tasks.ingest import _may_pass, headline, ingest_prices, summary

DAY = date(2008, 9, 15)


def test_the_step_runs_without_a_server(settings):
    version = ingest_prices.fn(settings, ["GOOG"], DAY)
    assert version == datasets.current(settings)


def test_the_summary_says_what_the_version_holds(settings):
    version = ingest_prices.fn(settings, ["AAPL", "GOOG"], DAY)
    assert summary(settings, version, "AAPL") == {
        "symbol": "AAPL",
        "first day": "2000-03-01",
        "last day": "2008-09-15",
        "rows": 2148,
        "new rows": 2148,
        "revised rows": 0,
        "splits and dividends": 2,
        "new splits and dividends": 2,
        "last close": 140.36,
    }
    assert headline(version).startswith(f"As of 2008-09-15: new version {version.md5} (git ")
    again = ingest_prices.fn(settings, ["GOOG"], DAY)
    assert headline(again).startswith(f"As of 2008-09-15: unchanged, version {version.md5}")


@pytest.mark.parametrize(
    ("error", "cause", "retried"),
    [
        (SourceError("away"), OSError("reset"), True),
        (DatasetError("remote away"), OSError("reset"), True),
        (SourceError("unknown symbol"), None, False),
        (HistoryError("too early"), None, False),
        (BadPricesError("bad"), ValueError("cell"), False),
        (DataError("other"), None, False),
    ],
)
def test_only_what_may_pass_is_retried(error, cause, retried):
    error.__cause__ = cause

    async def asked() -> bool:
        state = await exception_to_failed_state(error)
        return await _may_pass(ingest_prices, None, state)

    assert asyncio.run(asked()) is retried
