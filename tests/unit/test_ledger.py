"""The retrain ledger: cooldown between two retrains, and requests that come at once."""

from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from threading import Barrier

import pytest
from sqlalchemy import Engine, select, update

from forecasting import ledger
from forecasting.ledger import Entry
from forecasting.store import now, retrains

DAY = date(2008, 10, 10)  # a Friday
AT_ONCE = 8


def claim(engine: Engine, as_of: date = DAY, run: str = "run", **changes: object) -> Entry:
    asked = {"symbol": "GOOG", "trigger": "a drift event", "cooldown_days": 5} | changes
    return ledger.claim(engine, as_of=as_of, flow_run_id=run, **asked)


def lines(engine: Engine) -> list[tuple[str, str, str]]:
    """Symbol, state and reason of every line, oldest first."""
    query = select(retrains.c.symbol, retrains.c.state, retrains.c.reason)
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(query.order_by(retrains.c.created_at))]


def test_a_first_request_passes_and_is_written_down(engine):
    entry = claim(engine)
    assert (entry.skipped, entry.reason) == (False, "")
    with engine.connect() as connection:
        row = connection.execute(select(retrains)).one()
    assert (row.id, row.symbol, row.as_of) == (entry.id, "GOOG", DAY)
    assert (row.trigger, row.flow_run_id, row.state) == ("a drift event", "run", "running")


def test_the_cooldown_counts_trading_days(engine):
    ledger.close(engine, claim(engine).id, "promoted", "better")
    soon = claim(engine, date(2008, 10, 16), "next")  # four sessions and a weekend later
    assert soon.skipped
    assert "retrained (promoted) as of 2008-10-10, 4 trading days from 2008-10-16" in soon.reason
    assert "the cooldown is 5 (PERENNIAL_RETRAIN_COOLDOWN_DAYS)" in soon.reason
    assert not claim(engine, date(2008, 10, 17), "later").skipped
    assert [state for _, state, _ in lines(engine)] == ["promoted", "skipped", "running"]


def test_the_cooldown_holds_for_an_earlier_day_too(engine):
    claim(engine)
    assert claim(engine, date(2008, 10, 6), "earlier").skipped
    assert not claim(engine, date(2008, 10, 3), "much earlier").skipped


@pytest.mark.parametrize("state", ledger.COUNTED)
def test_states_that_start_a_cooldown(engine, state):
    ledger.close(engine, claim(engine).id, state, "")
    assert claim(engine, run="next").skipped


def test_a_killed_retrain_does_not_block_its_symbol_for_ever(engine):
    lost, other = claim(engine).id, claim(engine, symbol="IBM").id
    long_ago = now() - ledger.LOST_AFTER - timedelta(minutes=1)
    with engine.begin() as connection:
        connection.execute(update(retrains).values(created_at=long_ago))
    assert not claim(engine, run="next").skipped
    with engine.connect() as connection:
        rows = {row.id: row for row in connection.execute(select(retrains))}
    assert (rows[lost].state, rows[lost].reason) == (
        "failed",
        "lost: it did not end within 3:00:00",
    )
    assert rows[other].state == "running"


def test_a_failed_retrain_starts_no_cooldown(engine):
    ledger.close(engine, claim(engine).id, "failed", "no disk")
    assert not claim(engine, run="next").skipped
    assert lines(engine)[0] == ("GOOG", "failed", "no disk")


def test_a_skipped_request_does_not_prolong_the_cooldown(engine):
    claim(engine)
    assert claim(engine, date(2008, 10, 16), "next").skipped
    assert not claim(engine, date(2008, 10, 17), "later").skipped


def test_symbols_cool_on_their_own(engine):
    claim(engine)
    assert not claim(engine, run="other", symbol="IBM").skipped


def test_the_same_run_is_granted_again(engine):
    claim(engine)
    assert not claim(engine).skipped
    assert claim(engine, run="another").skipped


def test_without_a_cooldown_every_request_passes(engine):
    claim(engine, cooldown_days=0)
    assert not claim(engine, run="next", cooldown_days=0).skipped


@pytest.mark.parametrize("attempt", range(3))
def test_of_requests_at_once_one_passes(engine, attempt):
    """Every thread has a connection of its own, as every process would."""
    start = Barrier(AT_ONCE)

    def ask(number: int) -> Entry:
        with engine.connect():  # its connection is open before the race
            start.wait(30)
        return claim(engine, run=f"run {number}")

    with ThreadPoolExecutor(AT_ONCE) as threads:
        entries = list(threads.map(ask, range(AT_ONCE)))
    assert sum(not entry.skipped for entry in entries) == 1
    states = sorted(state for _, state, _ in lines(engine))
    assert states == ["running"] + ["skipped"] * (AT_ONCE - 1)


def test_a_rollback_starts_a_cooldown_once(engine):
    for _ in range(2):
        reason = "version 2 was rolled back"
        ledger.hold(
            engine, "probation", symbol="GOOG", as_of=DAY, flow_run_id="monitor", reason=reason
        )
    assert lines(engine) == [("GOOG", "rolled-back", reason)]
    soon = claim(engine, date(2008, 10, 16), "next")
    assert soon.skipped
    assert "rolled-back" in soon.reason
    assert not claim(engine, DAY, "other", symbol="IBM").skipped
