"""What is wrong with the newest prices though each row keeps the rules: told on the same day.

Ingest refuses rows that no market could have made (`prices.validate`). Here are those that one
could have made and none makes: a feed that stands still, a row that comes twice, a volume or price
of another unit.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from datetime import date, datetime
from typing import Literal

import numpy as np
import pandas as pd

from forecasting.contract import COLUMNS
from forecasting.sessions import HERE, ROW_HOUR, sessions_between

USUAL_ROWS = 64
"""Sessions before a row that say what volume is usual."""
VOLUME_LOW, VOLUME_HIGH, PRICE_UNIT = 1 / 20, 40.0, 3.0
"""Ratios of a day's volume to the usual one, and, up or down, of an open to the last close after
all factors, beyond which the unit is another. Of AAPL, GOOG, IBM and MSFT from 2000 to 2013 the
furthest are 1/6, 28 and 1.9."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, and of which session."""

    kind: Literal["stale", "repeated", "volume", "unit"]
    day: date
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def find(
    frame: pd.DataFrame,
    as_of: date,
    closures: Collection[date] = (),
    now: datetime | None = None,
) -> tuple[Fault, ...]:
    """Faults of the newest row, and rows that should be there.

    Args:
        frame: adjusted prices by session as known on `as_of`, columns open, high, low, close,
            volume.
        as_of: the day that is looked from.
        closures: days without trading that the calendar does not know.
        now: the present, timezone-aware; on `as_of` itself a row is due after the market's close.
    """
    last = frame.index[-1].date()
    missing = [day for day in due(last, as_of, now) if day not in closures]
    found: list[Fault] = []
    if missing:
        later = f" and {len(missing) - 1} later sessions" if len(missing) > 1 else ""
        told = f"no prices of {missing[0]}{later} are known on {as_of}; the newest is {last}"
        found.append(Fault("stale", missing[0], told))
    return (*found, *_of_row(frame, last))


def due(last: date, as_of: date, now: datetime | None = None) -> list[date]:
    """Sessions after `last` whose prices should be known on `as_of`."""
    days = [day for day in sessions_between(last, as_of) if day > last]
    here = (now or datetime.now(HERE)).astimezone(HERE)
    is_early = here.hour < ROW_HOUR
    return [day for day in days if day < here.date() or (day == here.date() and not is_early)]


def _of_row(frame: pd.DataFrame, day: date) -> list[Fault]:
    rows = frame[list(COLUMNS)].iloc[-USUAL_ROWS - 1 :].to_numpy(np.float64)
    if len(rows) < 2:
        return []
    found, newest, before = [], rows[-1], rows[-2]
    opened, volume, close_before = newest[0], newest[4], before[3]
    if np.array_equal(newest, before):
        found.append(Fault("repeated", day, f"the row of {day} is the one before it, to the digit"))
    usual = float(np.median(rows[:-1, 4]))
    if _is_off(volume, usual, VOLUME_LOW, VOLUME_HIGH):
        told = f"the volume of {day} is {volume:g}, where {usual:g} is usual"
        found.append(Fault("volume", day, f"{told}; missing, or of another unit?"))
    if _is_off(opened, close_before, 1 / PRICE_UNIT, PRICE_UNIT):
        told = f"{day} opens at {opened:g} after a close of {close_before:g}"
        found.append(Fault("unit", day, f"{told}; a price of another unit, or a split untold?"))
    return found


def _is_off(value: float, usual: float, low: float, high: float) -> bool:
    """Whether a number is further from the usual one than any market goes; none at all is."""
    if not (math.isfinite(value) and value > 0):
        return True
    return usual > 0 and not low <= value / usual <= high
