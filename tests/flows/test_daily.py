"""The flow `daily`: every missed market day in order, once, and resumed where it was killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pandas as pd
import pyarrow.parquet as parquet
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.flow_engine import run_flow
from prefect.settings import PREFECT_API_URL

from flows.daily import DailyResult, daily
from flows.ingest import ingest
from forecasting import datasets
from forecasting.errors import BadPricesError, ContractError, SourceError
from forecasting.sessions import sessions_between
from forecasting.settings import Settings
from forecasting.store import checks, market_days, outbox, predictions
from tests import series
from tests.flows.support import QUICK, configured, put_into_production, rows_of
from tests.serving.running import until

NAME = "perennial-goog"
TRAINED, FRIDAY = date(2006, 12, 29), date(2007, 1, 12)
MONDAY_CLOSED, THURSDAY = date(2007, 1, 15), date(2007, 1, 18)
MISSED = [date(2007, 1, 16), date(2007, 1, 17), THURSDAY]

pytestmark = pytest.mark.usefixtures("prefect_server")


@dataclass
class Feed:
    """A vendor's file of a symbol that nobody serves."""

    path: Path
    table: pd.DataFrame
    settings: Settings | None = None

    def write(self, rows: int, broken: bool = False) -> None:
        shown = self.table.head(rows).copy()
        if broken:
            shown.loc[50, "high"] = 1.0
        series.write_csv(shown, self.path)

    def day(self, number: int) -> date:
        """Session of a row, from 1."""
        return date.fromisoformat(self.table["date"].iloc[number - 1])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prices, and a version in production that was trained before the days of the tests."""
    made = tmp_path_factory.mktemp("daily")
    put_into_production(made, TRAINED)
    return made


@pytest.fixture
def settings(home: Path, tmp_path: Path) -> Iterator[Settings]:
    """The home of all, and tables of the test's own."""
    with configured(home, database_url=f"sqlite:///{tmp_path / 'perennial.db'}") as made:
        yield made


def done(settings: Settings) -> list[date]:
    """In the order in which they were done."""
    return [row["day"] for row in rows_of(settings, market_days, "done_at")]


def origins(settings: Settings) -> list[date]:
    rows = rows_of(settings, predictions, "made_at")
    return sorted({row["origin"] for row in rows})


def test_missed_days_are_made_up_for_in_order_and_once(settings):
    first = daily(symbols=["GOOG"], as_of=FRIDAY)
    assert DailyResult.model_validate_json(first.model_dump_json()) == first
    assert first == DailyResult(until=FRIDAY, done=[FRIDAY])
    closed = daily(symbols=["GOOG"], as_of=MONDAY_CLOSED)
    assert closed == DailyResult(until=MONDAY_CLOSED), "no trading, nothing to do"
    later = daily(symbols=["GOOG"], as_of=THURSDAY)
    assert later == DailyResult(until=THURSDAY, done=MISSED)
    assert done(settings) == [FRIDAY, *MISSED]
    assert [row["as_of"] for row in rows_of(settings, checks, "created_at")] == done(settings)
    assert origins(settings) == done(settings), "each was forecast from what was known on it"
    table = parquet.read_table(settings.home / "forecasts" / f"{THURSDAY}.parquet")
    assert set(table["as_of"].to_pylist()) == {THURSDAY}
    answers = len(rows_of(settings, predictions))
    assert daily(symbols=["GOOG"], as_of=THURSDAY) == DailyResult(until=THURSDAY)
    assert (done(settings), len(rows_of(settings, predictions))) == ([FRIDAY, *MISSED], answers)


RUN = """
from datetime import date
from flows.daily import daily
daily(symbols=["GOOG"], as_of=date.fromisoformat({day!r}))
"""


@pytest.mark.slow
def test_a_killed_round_is_taken_up_on_the_day_that_it_was_in(settings):
    daily(symbols=["GOOG"], as_of=FRIDAY)
    last = date(2007, 1, 23)
    told = QUICK | {"home": settings.home, "database_url": settings.database_url}
    environment = {f"PERENNIAL_{name.upper()}": str(value) for name, value in told.items()}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN.format(day=last.isoformat())],
        env=os.environ | environment | {"PREFECT_API_URL": PREFECT_API_URL.value()},
    )
    until(lambda: len(done(settings)) >= 2, "the round to be on its way", 120)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = done(settings)
    expected = sessions_between(FRIDAY, last)
    assert before == expected[: len(before)]
    assert len(before) < len(expected), "killed before it was through"
    result = daily(symbols=["GOOG"], as_of=last)
    assert result.done == expected[len(before) :]
    assert done(settings) == origins(settings) == expected
    checked = [row["as_of"] for row in rows_of(settings, checks, "as_of")]
    assert checked == expected


def test_what_runs_inside_has_the_tags_by_which_our_runs_are_judged(settings):
    """The automations hear of a run by its tag; Prefect gives a nested run none of its own."""
    asked = {"symbols": ["GOOG"], "as_of": FRIDAY}
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(daily, parameters=asked, tags=["ours"])
        run_flow(daily, flow_run=run, parameters=asked)
        wanted = FlowRunFilterParentFlowRunId(any_=[run.id])
        inside = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=wanted))
    assert len(inside) == 2
    assert all(each.tags == ["ours"] for each in inside)


def test_what_nobody_serves_is_ingested_and_said(settings):
    result = daily(symbols=["IBM"], as_of=FRIDAY)
    assert result.done == [FRIDAY]
    assert result.notes == [f"{FRIDAY}: IBM has no version in production."]
    assert "IBM" in datasets.current(settings).symbols


def test_a_day_that_production_has_seen_is_done_without_a_look(settings):
    result = daily(symbols=["GOOG"], as_of=date(2006, 12, 15))
    assert result.done == [date(2006, 12, 15)]
    assert "was not monitored" in result.notes[0]
    assert "nothing was forecast" in result.notes[1]


def test_a_symbol_whose_monitor_fails_holds_up_no_other(tmp_path):
    for symbol in ("GOOG", "IBM"):
        put_into_production(tmp_path, TRAINED, symbol)
    both = {"symbols": ["GOOG", "IBM"]}
    with configured(tmp_path) as settings:
        daily(**both, as_of=FRIDAY)
        (contract,) = (
            path
            for path in settings.mlflow_artifacts.rglob("contract.json")
            if '"perennial-ibm"' in path.read_text()
        )
        whole = contract.read_text()
        contract.write_text("{")
        with pytest.raises(ExceptionGroup, match="of IBM; run daily again") as told:
            daily(**both, as_of=THURSDAY)
        assert [type(error) for error in told.value.exceptions] == [ContractError]
        by_symbol = pd.DataFrame(rows_of(settings, market_days)).groupby("symbol")["day"].max()
        assert by_symbol.to_dict() == {"GOOG": THURSDAY, "IBM": FRIDAY}
        contract.write_text(whole)
        assert daily(**both, as_of=THURSDAY).done == MISSED
        table = parquet.read_table(settings.home / "forecasts" / f"{THURSDAY}.parquet")
        assert set(table["symbol"].to_pylist()) == {"GOOG", "IBM"}
        assert table.num_rows == 10


@pytest.fixture
def feed(tmp_path: Path) -> Iterator[Feed]:
    """A file of prices that grows, and settings that read it."""
    made = Feed(tmp_path / "TEST.csv", series.table(102))
    changes = {"source": "file", "source_url": made.path}
    with configured(tmp_path / "home", **changes) as made.settings:
        yield made


def test_prices_that_come_late_are_waited_for(feed):
    feed.write(100)
    assert daily(symbols=["TEST"], as_of=feed.day(100)).done == [feed.day(100)]
    early = daily(symbols=["TEST"], as_of=feed.day(101))
    assert (early.done, early.waiting) == ([], ["TEST"])
    feed.write(101)
    late = daily(symbols=["TEST"], as_of=feed.day(101))
    assert (late.done, late.waiting) == ([feed.day(101)], [])
    assert done(feed.settings) == [feed.day(100), feed.day(101)]


def test_a_source_that_gives_nothing_is_told_once_a_day_and_made_up_for(feed):
    feed.write(99)
    assert daily(symbols=["TEST"], as_of=feed.day(99)).done == [feed.day(99)]
    feed.path.unlink()
    asked = {"symbols": ["TEST"], "as_of": feed.day(100)}
    for flow in (daily, daily, ingest):
        with pytest.raises(SourceError, match=r"TEST\.csv"):
            flow(**asked)
    (event,) = rows_of(feed.settings, outbox)
    assert (event["name"], event["delivered_at"] is None) == ("perennial.data.missing", False)
    assert event["payload"]["symbols"] == ["TEST"]
    assert "TEST.csv" in event["payload"]["reason"]
    with pytest.raises(SourceError):
        daily(symbols=["TEST"], as_of=feed.day(101))
    assert len(rows_of(feed.settings, outbox)) == 2
    feed.write(102)
    made_up = [feed.day(100), feed.day(101)]
    assert daily(symbols=["TEST"], as_of=feed.day(101)).done == made_up


def test_refused_prices_stop_the_round_until_they_are_put_right(feed):
    feed.write(100)
    daily(symbols=["TEST"], as_of=feed.day(100))
    feed.write(102, broken=True)
    with pytest.raises(BadPricesError, match="high is below low"):
        daily(symbols=["TEST"], as_of=feed.day(102))
    assert done(feed.settings) == [feed.day(100)]
    (event,) = rows_of(feed.settings, outbox)
    assert (event["name"], event["delivered_at"] is None) == ("perennial.data.rejected", False)
    feed.write(102)
    result = daily(symbols=["TEST"], as_of=feed.day(102))
    assert result.done == [feed.day(101), feed.day(102)]
