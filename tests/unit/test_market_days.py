"""Days of the daily round: which are due, in order, and each once."""

from datetime import UTC, date, datetime

import pytest

from forecasting import market_days
from forecasting.sessions import exchange_day, last_due

FRIDAY = date(2012, 10, 26)
AFTER = [date(2012, 10, 31), date(2012, 11, 1)]  # the hurricane Sandy closed the exchange


def record(engine, day, *symbols):
    market_days.record(engine, symbols, day, "m" * 32, "a run")


def test_a_first_round_is_of_the_newest_session_alone(engine):
    assert market_days.due(engine, ["GOOG"], date(2012, 10, 28)) == [(FRIDAY, ["GOOG"])]


def test_missed_days_are_due_in_order_without_those_without_trading(engine):
    record(engine, FRIDAY, "GOOG")
    due = market_days.due(engine, ["GOOG"], date(2012, 11, 1))
    assert due == [(day, ["GOOG"]) for day in AFTER]
    assert market_days.due(engine, ["GOOG"], date(2012, 10, 30)) == []
    assert market_days.due(engine, ["GOOG"], date(2012, 11, 1), AFTER[:1]) == [(AFTER[1], ["GOOG"])]


def test_symbols_have_days_of_their_own_and_share_a_round(engine):
    record(engine, FRIDAY, "GOOG")
    record(engine, AFTER[0], "GOOG", "IBM")
    record(engine, FRIDAY, "AAPL")
    due = market_days.due(engine, ["IBM", "AAPL", "MSFT", "AAPL"], AFTER[1])
    assert due == [(AFTER[0], ["AAPL"]), (AFTER[1], ["IBM", "AAPL", "MSFT"])]


def test_a_day_recorded_twice_is_one_day(engine):
    for _ in range(2):
        record(engine, FRIDAY, "GOOG")
    assert market_days.last_done(engine, "GOOG") == FRIDAY
    assert market_days.last_done(engine, "IBM") is None
    assert market_days.due(engine, ["GOOG"], FRIDAY) == []
    record(engine, FRIDAY, "IBM")
    assert sorted(market_days.done_on(engine, FRIDAY)) == ["GOOG", "IBM"]
    assert market_days.done_on(engine, AFTER[0]) == []


@pytest.mark.parametrize(
    ("moment", "day", "session"),
    [
        (datetime(2012, 11, 27, 0, 30, tzinfo=UTC), date(2012, 11, 26), date(2012, 11, 26)),
        (datetime(2012, 11, 26, 15, 0, tzinfo=UTC), date(2012, 11, 26), date(2012, 11, 23)),
        (datetime(2012, 11, 25, 23, 59, tzinfo=UTC), date(2012, 11, 25), date(2012, 11, 23)),
        (datetime(2012, 7, 3, 21, 59, tzinfo=UTC), date(2012, 7, 3), date(2012, 7, 2)),
        (datetime(2012, 7, 3, 22, 0, tzinfo=UTC), date(2012, 7, 3), date(2012, 7, 3)),
        (datetime(2012, 7, 5, 3, 0, tzinfo=UTC), date(2012, 7, 4), date(2012, 7, 3)),
    ],
)
def test_the_exchange_has_its_own_date_and_rows_are_due_in_its_evening(moment, day, session):
    assert exchange_day(moment) == day
    assert last_due(moment) == session
