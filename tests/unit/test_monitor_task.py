"""When the monitor has Evidently draw a page."""

import itertools
from datetime import date

import pytest

from forecasting.sessions import sessions_between
from tasks.monitor import page_due

DAYS = sessions_between(date(2007, 1, 3), date(2007, 3, 30))


@pytest.mark.parametrize("every", [1, 5, 21])
def test_a_page_comes_every_so_many_sessions_of_a_daily_monitor(every):
    drawn = [
        position
        for position, (before, day) in enumerate(itertools.pairwise(DAYS))
        if page_due(every, before, day)
    ]
    assert len(drawn) in (len(DAYS[1:]) // every, len(DAYS[1:]) // every + 1)
    assert {later - first for first, later in itertools.pairwise(drawn)} == {every}


def test_a_monitor_that_missed_days_draws_one():
    assert page_due(5, DAYS[0], DAYS[30])


def test_the_first_check_has_a_page_unless_there_are_none():
    assert page_due(5, None, DAYS[0])
    assert not page_due(0, None, DAYS[0])
    assert not page_due(0, DAYS[0], DAYS[30])


def test_a_day_that_was_looked_at_has_no_second_page():
    assert not page_due(1, DAYS[3], DAYS[3])
