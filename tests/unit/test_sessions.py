from datetime import date, timedelta

import pytest
from bokeh_sampledata import stocks
from hypothesis import given
from hypothesis import strategies as st

from forecasting.sessions import count_sessions, is_session, sessions_after, sessions_between

days = st.dates(date(1990, 1, 1), date(2040, 12, 31))
spans = st.tuples(days, st.integers(-60, 400)).map(
    lambda pair: (pair[0], pair[0] + timedelta(pair[1]))
)

CLOSED = {
    "attacks of September 11": [date(2001, 9, day) for day in (11, 12, 13, 14)],
    "Reagan's funeral": [date(2004, 6, 11)],
    "Ford's funeral": [date(2007, 1, 2)],
    "hurricane Sandy": [date(2012, 10, 29), date(2012, 10, 30)],
    "Bush's funeral": [date(2018, 12, 5)],
    "Carter's funeral": [date(2025, 1, 9)],
    "Good Friday": [date(2007, 4, 6), date(2008, 3, 21), date(2021, 4, 2), date(2024, 3, 29)],
    "Juneteenth": [date(2022, 6, 20), date(2023, 6, 19), date(2024, 6, 19)],
    "New Year": [date(2008, 1, 1), date(2023, 1, 2)],
    "Christmas": [date(2004, 12, 24), date(2008, 12, 25), date(2022, 12, 26)],
    "a weekend": [date(2008, 1, 5), date(2008, 1, 6)],
}
OPEN = {
    "the first day after the attacks": date(2001, 9, 17),
    "the first day after Sandy": date(2012, 10, 31),
    "the day after Ford's funeral": date(2007, 1, 3),
    "Juneteenth before it was a holiday": date(2020, 6, 19),
    "the Friday before the first Juneteenth of the calendar": date(2021, 6, 18),
    "the last day of 2021, as New Year fell on a Saturday": date(2021, 12, 31),
    "a Columbus Day": date(2008, 10, 13),
    "a Veterans Day": date(2008, 11, 11),
    "the half day after Thanksgiving": date(2008, 11, 28),
}


@pytest.mark.parametrize("reason", CLOSED)
def test_the_exchange_was_closed(reason):
    assert [day for day in CLOSED[reason] if is_session(day)] == []


@pytest.mark.parametrize("reason", OPEN)
def test_the_exchange_was_open(reason):
    assert is_session(OPEN[reason])


@pytest.mark.parametrize("symbol", ["GOOG", "AAPL", "IBM", "MSFT"])
def test_sessions_are_the_days_of_real_prices(symbol):
    traded = [date.fromisoformat(day) for day in getattr(stocks, symbol)["date"]]
    assert sessions_between(traded[0], traded[-1]) == traded
    assert count_sessions(traded[0], traded[-1]) == len(traded) - 1
    assert sessions_after(traded[0], len(traded) - 1) == traded[1:]


@given(days, st.integers(0, 30))
def test_sessions_after_are_those_of_a_slow_walk(day, count):
    walked, at = [], day
    while len(walked) < count:
        at += timedelta(1)
        if is_session(at):
            walked.append(at)
    assert sessions_after(day, count) == walked


@given(spans)
def test_sessions_between_are_those_of_a_slow_walk(span):
    first, last = span
    length = max((last - first).days + 1, 0)
    walked = [first + timedelta(step) for step in range(length)]
    assert sessions_between(first, last) == [day for day in walked if is_session(day)]


@given(spans)
def test_count_is_that_of_a_slow_walk_and_negative_if_reversed(span):
    first, last = min(span), max(span)
    steps = range(1, (last - first).days + 1)
    walked = sum(is_session(first + timedelta(step)) for step in steps)
    assert count_sessions(first, last) == walked
    assert count_sessions(last, first) == -walked


@given(days, days, days)
def test_counts_add_up(one, two, three):
    assert count_sessions(one, two) + count_sessions(two, three) == count_sessions(one, three)


@given(days)
def test_weekends_are_never_sessions_and_answers_are_plain_dates(day):
    assert not (is_session(day) and day.weekday() >= 5)
    assert [type(each) for each in sessions_after(day, 2)] == [date, date]
