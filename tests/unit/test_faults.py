"""Prices that keep the rules and cannot be right: found on the same day, and never made up."""

from datetime import UTC, date, datetime

import numpy as np
import pandas as pd
import pytest
from bokeh_sampledata.stocks import AAPL, GOOG, IBM, MSFT

from benchmarks.markets import garch
from forecasting import faults
from tests.market import goog

DAY = date(2012, 6, 29)  # a Friday


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return goog(DAY.isoformat())


def _planted(frame: pd.DataFrame, kind: str) -> tuple[pd.DataFrame, str]:
    """The same prices with something wrong on the last day, and the fault that it is."""
    prices, last = ["open", "high", "low", "close"], frame.index[-1]
    changed = frame.copy()
    match kind:
        case "no volume":
            changed.loc[last, "volume"] = 0.0
        case "volume in lots":
            changed.loc[last, "volume"] /= 100
        case "volume in thousandths":
            changed.loc[last, "volume"] *= 1000
        case "cents":
            changed.loc[last, prices] *= 100
            return changed, "unit"
        case "other currency":
            changed.loc[last, prices] /= 7.8
            return changed, "unit"
        case "repeated":
            changed.iloc[-1] = changed.iloc[-2]
            return changed, "repeated"
        case "stale":
            return changed.iloc[:-1], "stale"
    return changed, "volume"


KINDS = (
    *("no volume", "volume in lots", "volume in thousandths"),
    *("cents", "other currency", "repeated", "stale"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_is_found_on_its_day_in_every_market(kind):
    for market in garch(100, 100, seed=4, start="2012-02-13"):
        day = market.index[-1].date()
        changed, wanted = _planted(market, kind)
        # the calendar of the synthetic markets knows no holidays
        found = faults.find(changed, day)
        assert [each.kind for each in found] == [wanted]
        assert found[0].day == day
        assert faults.find(market, day) == ()


@pytest.mark.parametrize("columns", [AAPL, GOOG, IBM, MSFT], ids=["AAPL", "GOOG", "IBM", "MSFT"])
def test_no_real_day_is_at_fault(columns):
    table = pd.DataFrame(columns)
    table.index = pd.DatetimeIndex(pd.to_datetime(table.pop("date")), name="date")
    table = table.astype(float)
    ratio = table.pop("adj_close") / table["close"]
    prices = ["open", "high", "low", "close"]
    table[prices] = table[prices].mul(ratio, axis=0)
    made_up = []
    for row in range(2, len(table)):
        known = table.iloc[max(0, row - 66) : row + 1]
        made_up += faults.find(known, known.index[-1].date())
    assert made_up == []


def test_a_feed_that_stands_still_is_told_with_how_much_is_missing(frame):
    (fault,) = faults.find(frame, date(2012, 7, 6))
    assert fault.kind == "stale"
    assert fault.day == date(2012, 7, 2)
    assert str(fault) == (
        "stale: no prices of 2012-07-02 and 3 later sessions are known on 2012-07-06; "
        "the newest is 2012-06-29"
    )
    assert faults.find(frame, date(2012, 7, 1)) == ()  # a weekend
    assert faults.find(frame, date(2012, 7, 2), closures=[date(2012, 7, 2)]) == ()


@pytest.mark.parametrize(
    ("hour", "missing"),
    [(13, []), (21, []), (22, [date(2012, 7, 2)])],  # 9, 17 and 18 o'clock in New York
)
def test_a_row_is_due_in_the_evening_of_its_day(hour, missing):
    now = datetime(2012, 7, 2, hour, 30, tzinfo=UTC)
    assert faults.due(DAY, date(2012, 7, 2), now) == missing
    assert faults.due(DAY, date(2012, 7, 9), now) == missing


def test_a_fault_says_what_was_seen_and_what_is_usual(frame):
    changed, _ = _planted(frame, "volume in thousandths")
    (fault,) = faults.find(changed, DAY)
    assert "the volume of 2012-06-29 is" in fault.detail
    assert "is usual" in fault.detail
    changed, _ = _planted(frame, "cents")
    (fault,) = faults.find(changed, DAY)
    assert "opens at" in fault.detail
    bad = frame.copy()
    bad.iloc[-1, 4] = np.nan
    (fault,) = faults.find(bad, DAY)
    assert fault.kind == "volume"
