"""Add newly fetched prices to what is stored, without rewriting what was known before.

New sessions and new factors are appended. A value that a vendor changed later becomes a second row
(or factor) known from the day of the ingest on, so that an earlier `as_of` still sees the first.
A source that keeps its whole history in today's shares changes all of it at a split: that is
recognised as one new factor.
"""

from dataclasses import dataclass
from datetime import date

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from forecasting.contract import COLUMNS
from forecasting.prices import (
    PRICES,
    TIME,
    RawPrices,
    factors_frame,
    scale_before,
    visible_factors,
    visible_rows,
)
from forecasting.sessions import sessions_after

_SAME = 1e-9
_SAME_FACTOR = 1e-5
_ROUNDED = 0.0051
"""Half a cent, the rounding of a vendor that recomputes its history."""


@dataclass(frozen=True)
class Merged:
    """Stored and fetched prices together, with what was new.

    Attributes:
        raw: everything known now.
        new_rows: sessions not stored before.
        revised_rows: sessions whose values the vendor changed.
        new_factors: splits, dividends and changes of them.
    """

    raw: RawPrices
    new_rows: int
    revised_rows: int
    new_factors: int

    @property
    def changed(self) -> bool:
        """Whether anything is to be stored."""
        return bool(self.new_rows or self.revised_rows or self.new_factors)


def merge(stored: RawPrices | None, fetched: RawPrices, as_of: date) -> Merged:
    """Add `fetched` (one row a session, validated, up to `as_of`) to `stored`.

    Where more is stored than was known on `as_of` (an ingest of an earlier date), only sessions
    that are missing altogether are added: what a vendor revised later is not dated back.
    """
    if stored is None:
        return Merged(_sorted(fetched), len(fetched.rows), 0, len(fetched.factors))
    forward = np.datetime64(as_of) >= stored.rows["known_on"].max().to_datetime64()
    before = visible_rows(stored, as_of)
    rescale = _rescaling(stored, before, fetched, as_of) if forward else factors_frame([])
    scale = _rescaled(pd.concat([visible_factors(stored, as_of), rescale]))
    new = fetched.rows[~fetched.rows["date"].isin(stored.rows["date"])]
    revised = _revised(before, fetched, scale, as_of) if forward else fetched.rows.iloc[:0]
    events = _new_factors(stored, fetched, as_of) if forward else factors_frame([])
    rows = _append(stored.rows, [_unscaled(new, scale), revised], ["date", "known_on"])
    keys = ["ex_date", "reason", "known_on"]
    factors = _append(stored.factors, [events, rescale], keys)
    raw = RawPrices(stored.symbol, rows, factors, fetched.tells_actions)
    return Merged(_sorted(raw), len(new), len(revised), len(events) + len(rescale))


def _append(old: pd.DataFrame, parts: list[pd.DataFrame], keys: list[str]) -> pd.DataFrame:
    """`old` with `parts`; the later of two with the same keys stays."""
    filled = [part for part in parts if len(part)]
    return pd.concat([old, *filled]).drop_duplicates(keys, keep="last") if filled else old


def _sorted(raw: RawPrices) -> RawPrices:
    rows = raw.rows.sort_values(["date", "known_on"], ignore_index=True)
    factors = raw.factors.sort_values(["ex_date", "reason", "known_on"], ignore_index=True)
    return RawPrices(raw.symbol, rows, factors, raw.tells_actions)


# --- a source that changed the unit of its history -------------------------------------------


def _rescaled(factors: pd.DataFrame) -> pd.DataFrame:
    return factors[factors["reason"] == "rescaled"].sort_values("ex_date")


def _scale_at(factors: pd.DataFrame, dates: pd.Series) -> NDArray[np.float64]:
    return scale_before(
        factors["ex_date"].to_numpy(), factors["factor"].to_numpy(), dates.to_numpy()
    )


def _unscaled(rows: pd.DataFrame, scale: pd.DataFrame) -> pd.DataFrame:
    """Rows of a rescaled source in the units in which they were stored first."""
    if not len(scale) or not len(rows):
        return rows
    factor = _scale_at(scale, rows["date"])
    return rows.assign(**{name: rows[name] / factor for name in PRICES})


def _rescaling(
    stored: RawPrices, before: pd.DataFrame, fetched: RawPrices, as_of: date
) -> pd.DataFrame:
    """One factor if every session known before came back multiplied by the same number."""
    both = before.merge(fetched.rows, on="date", suffixes=("", "_now"))
    if len(both) < 2:
        return factors_frame([])
    expected = both["close"] * _scale_at(_rescaled(visible_factors(stored, as_of)), both["date"])
    ratio = (both["close_now"] / expected).to_numpy()
    slack = (1e-4 + _ROUNDED * (1 / both["close_now"] + 1 / expected)).to_numpy()
    middle = float(np.average(ratio, weights=1 / slack))
    steady = np.all(np.abs(ratio / middle - 1) <= slack)
    if not steady or abs(middle - 1) <= 2 * float(slack.min()):
        return factors_frame([])
    later = fetched.rows["date"][fetched.rows["date"] > both["date"].max()]
    last = both["date"].max().date()
    ex_date = later.min().date() if len(later) else sessions_after(last, 1)[0]
    event = (np.datetime64(ex_date), _plain_ratio(middle, float(slack.min())))
    return factors_frame([event], np.datetime64(max(ex_date, as_of)), "rescaled")


def _plain_ratio(ratio: float, slack: float) -> float:
    """The nearest ratio of small whole numbers where it lies within `slack`."""
    for below in range(1, 11):
        for above in (round(ratio * below), 1):
            plain = above / below if above > 1 else 1 / max(1, round(1 / ratio))
            if abs(plain / ratio - 1) <= slack:
                return plain
    return ratio


# --- revisions -------------------------------------------------------------------------------


def _revised(
    before: pd.DataFrame, fetched: RawPrices, scale: pd.DataFrame, as_of: date
) -> pd.DataFrame:
    """Rows whose values differ from those known before, known from `as_of` on."""
    now = fetched.rows[fetched.rows["date"].isin(before["date"])].reset_index(drop=True)
    old = before[before["date"].isin(now["date"])].reset_index(drop=True)
    factor = _scale_at(scale, old["date"])
    same = np.ones(len(old), dtype=bool)
    for name in COLUMNS:
        was, new = old[name].to_numpy(), now[name].to_numpy()
        if name == "volume":  # a vendor may or may not restate volumes after a split
            differs = (factor == 1.0) & (np.abs(new - was) > _SAME * was)
        else:
            rounding = np.where(factor == 1.0, 0.0, _ROUNDED * (1 + factor) + 1e-4 * new)
            differs = np.abs(new - was * factor) > _SAME * was * factor + rounding
        same &= ~differs
    changed = _unscaled(now[~same], scale)
    return changed.assign(known_on=np.array(as_of, dtype=TIME))


def _new_factors(stored: RawPrices, fetched: RawPrices, as_of: date) -> pd.DataFrame:
    """Factors not known before, changed, or withdrawn (then 1.0)."""
    if not fetched.tells_actions:
        return factors_frame([])
    known = _source_factors(visible_factors(stored, as_of))
    now = _source_factors(fetched.factors)
    first = fetched.rows["date"].min().to_datetime64()
    last_stored = stored.rows["date"].max().to_datetime64()
    changed = [
        (day, factor)
        for day, factor in now.items()
        if abs(factor / known.get(day, 1.0) - 1) > _SAME_FACTOR
    ]
    withdrawn = [
        (day, 1.0) for day, was in known.items() if day > first and day not in now and was != 1
    ]
    fresh = [event for event in changed if event[0] > last_stored]
    late = [event for event in changed if event[0] <= last_stored] + withdrawn
    parts = [factors_frame(fresh), factors_frame(late, np.datetime64(as_of))]
    return pd.concat(parts, ignore_index=True)


def _source_factors(factors: pd.DataFrame) -> dict[np.datetime64, float]:
    told = factors[factors["reason"] == "source"]
    return dict(zip(told["ex_date"].to_numpy(), told["factor"].tolist(), strict=True))
