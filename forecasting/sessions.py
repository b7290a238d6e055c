"""Trading sessions of the New York Stock Exchange: which days, and which come next.

Closures, special ones (storms, funerals) included, come from the package `holidays`. Light on
purpose (no pandas): the web workers use it for target dates.
"""

from datetime import date, datetime, timedelta
from functools import cache
from zoneinfo import ZoneInfo

import holidays
import numpy as np
from numpy.typing import NDArray

EXCHANGE = "NYSE"
HERE = ZoneInfo("America/New_York")
ROW_HOUR = 18
"""Of the exchange's clock; from then on the day's row is due."""
_FIRST_YEAR, _LAST_YEAR = 1985, 2050


@cache
def _calendar() -> np.busdaycalendar:
    closed = holidays.financial_holidays(EXCHANGE, years=range(_FIRST_YEAR, _LAST_YEAR + 1))
    return np.busdaycalendar(holidays=[np.datetime64(day) for day in sorted(closed)])


def is_session(day: date) -> bool:
    """Whether the exchange trades on `day`."""
    return bool(np.is_busday(np.datetime64(day), busdaycal=_calendar()))


def sessions_after(day: date, count: int) -> list[date]:
    """The `count` sessions that follow `day` (itself excluded), oldest first."""
    start = np.busday_offset(np.datetime64(day), 0, roll="preceding", busdaycal=_calendar())
    found: NDArray[np.datetime64] = np.busday_offset(
        start, np.arange(1, count + 1), busdaycal=_calendar()
    )
    return [value.astype(object) for value in found]


def sessions_between(first: date, last: date) -> list[date]:
    """Every session from `first` to `last`, both included."""
    days = np.arange(np.datetime64(first), np.datetime64(last) + 1)
    return [value.astype(object) for value in days[np.is_busday(days, busdaycal=_calendar())]]


def count_sessions(first: date, last: date) -> int:
    """How many sessions lie after `first` up to and including `last` (negative if reversed)."""
    if last < first:  # numpy's own count of a reversed span is another one
        return -count_sessions(last, first)
    one = np.timedelta64(1, "D")
    return int(
        np.busday_count(
            np.datetime64(first) + one, np.datetime64(last) + one, busdaycal=_calendar()
        )
    )


def exchange_day(moment: datetime) -> date:
    """The date in New York at a moment, which is timezone-aware."""
    return moment.astimezone(HERE).date()


def last_due(moment: datetime) -> date:
    """The newest session whose row is due at a moment, which is timezone-aware."""
    day, hour = exchange_day(moment), moment.astimezone(HERE).hour
    newest = day if hour >= ROW_HOUR else day - timedelta(days=1)
    rolled = np.busday_offset(np.datetime64(newest), 0, "preceding", busdaycal=_calendar())
    found: date = rolled.astype(object)
    return found
