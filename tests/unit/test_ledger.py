"""The retrain ledger: cooldown, budget, one at a time, and requests that come at once."""

import subprocess
import sys
from datetime import date, timedelta
from itertools import count

import pytest
from sqlalchemy import Engine, select, update

from forecasting import ledger
from forecasting.events import ModelAged, ModelProvisional
from forecasting.ledger import WEEK, Entry, Limits
from forecasting.sessions import sessions_after
from forecasting.settings import Settings
from forecasting.store import now, retrains

DAY = date(2008, 10, 10)  # a Friday
AT_ONCE = 20
RUNS = count()

ASK = """
import sys
from datetime import date
from forecasting import ledger
from forecasting.ledger import Limits
from forecasting.store import engine_of

with engine_of(sys.argv[1]) as engine:
    print("ready", flush=True)
    sys.stdin.readline()
    limits = Limits(cooldown_days=5, runs=5, clock="market")
    entry = ledger.claim(
        engine,
        symbol="GOOG",
        as_of=date(2008, 10, 10),
        trigger="a drift event",
        flow_run_id=sys.argv[2],
        limits=limits,
    )
    print("skipped" if entry.skipped else "running", flush=True)
    sys.stdin.readline()
"""


def claim(
    engine: Engine,
    as_of: date = DAY,
    run: str = "run",
    symbol: str = "GOOG",
    trigger: str = "a drift event",
    **limits: object,
) -> Entry:
    return ledger.claim(
        engine,
        symbol=symbol,
        as_of=as_of,
        trigger=trigger,
        flow_run_id=run,
        limits=Limits(**({"cooldown_days": 5, "clock": "market"} | limits)),
    )


def retrained(engine: Engine, as_of: date = DAY, seconds: float = 1.0, **asked: object) -> None:
    """A retrain that was let start and ended."""
    entry = claim(engine, as_of, f"earlier run {next(RUNS)}", **asked)
    assert not entry.skipped, entry.reason
    ledger.close(engine, entry.id, "unchanged", "", seconds)


def moved_back(engine: Engine, ago: timedelta) -> None:
    """All lines so far are as old as that."""
    with engine.begin() as connection:
        connection.execute(update(retrains).values(created_at=now() - ago))


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
    retrained(engine)
    assert claim(engine, date(2008, 10, 6), "earlier").skipped
    assert not claim(engine, date(2008, 10, 3), "much earlier").skipped


@pytest.mark.parametrize("state", ledger.COUNTED)
def test_states_that_start_a_cooldown(engine, state):
    ledger.close(engine, claim(engine).id, state, "")
    assert f"was retrained ({state})" in claim(engine, run="next").reason


def test_what_was_asked_for_last_and_how_often_age_had_by_then(engine):
    age = f"{ModelAged.name} an event"
    assert ledger.last_asked(engine, "GOOG") == (None, 0)
    retrained(engine, DAY)
    later = sessions_after(DAY, 40)
    assert claim(engine, later[1], "skipped").skipped
    retrained(engine, later[9], symbol="AAPL")
    assert ledger.last_asked(engine, "GOOG") == (DAY, 0)
    for number, day in enumerate((later[7], later[14]), start=1):
        retrained(engine, day, trigger=age)
        assert ledger.last_asked(engine, "GOOG") == (day, number)
    entry = claim(engine, later[21], "a failed run", trigger=age)
    ledger.close(engine, entry.id, "failed", "it broke")
    assert ledger.last_asked(engine, "GOOG") == (later[21], 2), "not again every day"
    retrained(engine, later[28])
    assert ledger.last_asked(engine, "GOOG") == (later[28], 0)


def test_age_asks_after_a_cooldown_then_after_twice_the_time_each_up_to_the_most():
    def waits(**changes: int) -> list[int]:
        settings = Settings(**changes)
        return [ledger.wait_for_age(settings, row) for row in (*range(6), 10**6)]

    assert waits() == [20, 40, 80, 126, 126, 126, 126]
    assert waits(retrain_after_days=0) == [0] * 7
    assert waits(retrain_after_days=15) == [20] * 7, "the ledger would skip it"
    assert waits(retrain_cooldown_days=0) == [20, 40, 80, 126, 126, 126, 126]


def test_what_comes_to_no_other_version_makes_a_provisional_one_wait_longer(engine):
    assert ledger.last_retrain(engine, "GOOG") == (None, 0)
    days = [DAY, *sessions_after(DAY, 50)]
    states = ["refused", "promoted", "refused", "unchanged", "failed", "rolled-back"]
    rows = [(0, 1), (10, 0), (20, 1), (30, 2), (30, 2), (50, 0)]
    for number, (state, row) in enumerate(zip(states, rows, strict=True)):
        entry = claim(engine, days[10 * number], f"run {number}")
        ledger.close(engine, entry.id, state, "why")
        assert not claim(engine, days[10 * number], "of another", symbol="IBM").skipped
        assert ledger.last_retrain(engine, "GOOG") == (days[row[0]], row[1])

    def waits(**changes: int) -> list[int]:
        settings = Settings(**changes)
        return [ledger.wait_if_provisional(settings, row) for row in (*range(5), 10**6)]

    assert waits() == [20, 40, 80, 126, 126, 126]
    assert waits(retrain_after_days=0) == [20, 40, 80, 160, 160, 160]
    assert waits(retrain_cooldown_days=0) == waits()
    assert waits(retrain_cooldown_days=200) == [200] * 6, "the ledger would skip it"


@pytest.mark.parametrize("asking", [ModelAged, ModelProvisional])
def test_the_calendar_leaves_some_of_the_weeks_budget_to_alarms(engine, asking):
    age, limits = f"{asking.name} an event", {"runs": 3, "cooldown_days": 0}
    retrained(engine, trigger=age, **limits)
    held = claim(engine, run="another of age", symbol="IBM", trigger=age, **limits)
    assert (held.skipped, "2 are kept for alarms" in held.reason) == (True, True)
    for symbol in ("IBM", "MSFT"):
        retrained(engine, symbol=symbol, **limits)
    assert claim(engine, run="an alarm too many", symbol="AAPL", **limits).skipped


def test_on_the_wall_the_cooldown_counts_sessions_since_the_claim(engine):
    """A week has no more than five of them, and whatever the request is about does not matter."""
    retrained(engine, clock="wall")
    moved_back(engine, timedelta(days=7))
    soon = claim(engine, date(1999, 1, 4), "next", clock="wall", cooldown_days=6)
    assert soon.skipped
    assert "GOOG was retrained (unchanged) on 2" in soon.reason
    assert "trading days ago; the cooldown is 6" in soon.reason
    assert not claim(engine, DAY, "later", clock="wall", cooldown_days=3).skipped


def test_a_killed_retrain_does_not_block_its_symbol_for_ever(engine):
    lost, other = claim(engine).id, claim(engine, symbol="IBM").id
    assert claim(engine, run="too soon").skipped
    moved_back(engine, ledger.LOST_AFTER + timedelta(minutes=1))
    assert not claim(engine, run="next").skipped
    with engine.connect() as connection:
        rows = {row.id: row for row in connection.execute(select(retrains))}
    assert (rows[lost].state, rows[lost].reason) == (
        "failed",
        f"lost: it did not end within {ledger.LOST_AFTER}",
    )
    assert rows[other].state == "running"


def test_one_that_waits_for_a_person_is_not_lost(engine, settings):
    waiting = settings.model_copy(update={"approval": True, "approval_hours": 24.0})
    limits = Limits.of(waiting)
    asked = {"symbol": "GOOG", "as_of": DAY, "trigger": "drift"}
    ledger.claim(engine, flow_run_id="waits", limits=limits, **asked)
    moved_back(engine, timedelta(hours=26))
    assert "one at a time" in ledger.claim(engine, flow_run_id="a", limits=limits, **asked).reason
    moved_back(engine, ledger.LOST_AFTER + timedelta(hours=25))
    assert not ledger.claim(engine, flow_run_id="b", limits=limits, **asked).skipped


def test_a_rollback_starts_a_cooldown_and_is_no_retrain_of_the_budget(engine):
    held = {"symbol": "GOOG", "as_of": DAY, "flow_run_id": "monitor", "reason": "it was worse"}
    ledger.hold(engine, "a promotion", **held)
    assert "was retrained (rolled-back)" in claim(engine, run="next").reason
    assert not claim(engine, run="other", symbol="IBM", runs=1).skipped


def test_a_failed_retrain_starts_no_cooldown(engine):
    ledger.close(engine, claim(engine).id, "failed", "no disk")
    assert not claim(engine, run="next").skipped
    assert lines(engine)[0] == ("GOOG", "failed", "no disk")


def test_a_skipped_request_does_not_prolong_the_cooldown(engine):
    retrained(engine)
    assert claim(engine, date(2008, 10, 16), "next").skipped
    assert not claim(engine, date(2008, 10, 17), "later").skipped


def test_symbols_cool_on_their_own(engine):
    claim(engine)
    assert not claim(engine, run="other", symbol="IBM").skipped


def test_the_same_run_is_granted_again_and_its_first_line_is_closed(engine):
    claim(engine)
    assert not claim(engine).skipped
    assert claim(engine, run="another").skipped
    again = ("GOOG", "failed", "lost: its flow run started again")
    assert lines(engine)[:2] == [again, ("GOOG", "running", "")]


def test_one_at_a_time_whatever_the_cooldown(engine):
    claim(engine, cooldown_days=0)
    refused = claim(engine, date(2010, 1, 4), "next", cooldown_days=0)
    assert refused.skipped
    assert "A retrain of GOOG as of 2008-10-10 is running since" in refused.reason
    assert refused.reason.endswith("UTC (flow run run); one at a time.")


def test_without_a_cooldown_one_follows_the_other(engine):
    retrained(engine, cooldown_days=0)
    assert not claim(engine, run="next", cooldown_days=0).skipped


def test_the_budget_of_runs_is_for_all_symbols_together(engine):
    retrained(engine, symbol="GOOG", runs=2)
    ledger.close(engine, claim(engine, run="fails", symbol="IBM").id, "failed", "no disk")
    third = claim(engine, run="third", symbol="AAPL", runs=2)
    assert third.reason == (
        "2 retrains were started within a week; the budget is 2 (PERENNIAL_RETRAIN_BUDGET_RUNS)."
    )
    assert not claim(engine, run="fourth", symbol="AAPL", runs=3).skipped


def test_a_skipped_request_costs_no_budget(engine):
    retrained(engine)
    for number in range(3):
        assert claim(engine, run=f"again {number}", runs=2).skipped
    assert not claim(engine, run="other", symbol="IBM", runs=2).skipped


def test_a_run_that_starts_again_is_one_of_the_budget(engine):
    claim(engine, runs=2)
    assert not claim(engine, runs=2).skipped
    assert not claim(engine, run="another", symbol="IBM", runs=2).skipped
    assert claim(engine, run="third", symbol="AAPL", runs=2).skipped


def test_the_budget_of_cpu_minutes(engine):
    retrained(engine, seconds=90, symbol="IBM")
    retrained(engine, seconds=29, symbol="AAPL")
    assert not claim(engine, run="next", symbol="MSFT", cpu_minutes=2).skipped
    retrained(engine, seconds=1, symbol="FB")
    refused = claim(engine, run="last", cpu_minutes=2)
    assert refused.reason == (
        "Retrains took 2.0 CPU minutes within a week; the budget is 2 "
        "(PERENNIAL_RETRAIN_BUDGET_CPU_MINUTES)."
    )


def test_what_runs_or_was_killed_costs_as_much_as_the_last_that_ended(engine):
    for symbol in ("AAPL", "IBM"):
        retrained(engine, seconds=600, symbol=symbol)
    claim(engine, run="in flight", symbol="MSFT")
    assert not claim(engine, run="next", symbol="FB", cpu_minutes=31).skipped
    assert "took 40.0 CPU minutes" in claim(engine, run="last", cpu_minutes=31).reason
    moved_back(engine, ledger.LOST_AFTER + timedelta(minutes=1))
    refused = claim(engine, run="later", symbol="MSFT", cpu_minutes=31)
    assert "took 40.0 CPU minutes" in refused.reason, "of which two were killed"


def test_the_week_slides_with_the_market_days(engine):
    for day in sessions_after(DAY, 3):  # Monday to Wednesday
        retrained(engine, day, cooldown_days=0, runs=3)
    asked = {
        day.day: claim(engine, day, f"of {day}", "IBM", runs=3).skipped
        for day in sessions_after(date(2008, 10, 15), 3)
    }
    assert asked == {16: True, 17: True, 20: False}, "a week after the first there is room again"


def test_the_week_slides_on_the_wall(engine):
    retrained(engine, clock="wall", runs=1)
    moved_back(engine, WEEK - timedelta(minutes=1))
    assert claim(engine, run="next", symbol="IBM", clock="wall", runs=1).skipped
    moved_back(engine, WEEK + timedelta(minutes=1))
    assert not claim(engine, run="later", symbol="IBM", clock="wall", runs=1).skipped


@pytest.fixture
def asking(url):
    """Processes that have opened the database and wait for the word to ask."""
    started = []

    def start(number: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", ASK, url, f"run {number}"]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.communicate()


def ask(process: subprocess.Popen[str]) -> None:
    process.stdin.write("now\n")
    process.stdin.flush()


def test_of_twenty_processes_at_once_one_passes(engine, asking):
    processes = [asking(number) for number in range(AT_ONCE)]
    assert [each.stdout.readline() for each in processes] == ["ready\n"] * AT_ONCE
    for each in processes:
        ask(each)
    answers = sorted(each.stdout.readline() for each in processes)
    assert answers == ["running\n"] + ["skipped\n"] * (AT_ONCE - 1)
    written = lines(engine)
    assert sorted(state for _, state, _ in written) == ["running"] + ["skipped"] * (AT_ONCE - 1)
    assert all("one at a time" in reason for _, state, reason in written if state == "skipped")


def test_a_holder_that_is_killed_leaves_a_line_that_costs_budget(engine, asking):
    holder = asking(0)
    holder.stdout.readline()
    ask(holder)
    assert holder.stdout.readline() == "running\n"
    holder.kill()
    holder.wait()
    assert claim(engine, run="next").skipped
    moved_back(engine, ledger.LOST_AFTER + timedelta(minutes=1))
    refused = claim(engine, run="later", clock="wall", runs=1)
    assert "1 retrains were started within a week" in refused.reason
    assert sorted(state for _, state, _ in lines(engine)) == ["failed", "skipped", "skipped"]
    assert not claim(engine, run="last", runs=2).skipped


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
