"""Prices as traded with their adjustment factors: types, `as_of` view, adjustment, checks.

A price is kept as it was traded and never rewritten. Splits and dividends are *factors*: a factor
multiplies the prices of every session before its ex-date. Each row and each factor says on which
day it became known, so the world as of any date can be rebuilt.
"""

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd
import pandera.pandas as pa
from numpy.typing import NDArray

from forecasting.contract import COLUMNS
from forecasting.errors import BadPricesError, HistoryError
from forecasting.sessions import exchange_day, is_session, sessions_between
from forecasting.settings import Settings

Frame: TypeAlias = pd.DataFrame
"""Indexed by DatetimeIndex `date` (naive, midnight, ascending, unique), float64 `COLUMNS`,
adjusted as known on a day: the last row is as traded."""

TIME = "datetime64[us]"
PRICES = ("open", "high", "low", "close")
ROW_COLUMNS = ("date", *COLUMNS, "known_on")
FACTOR_COLUMNS = ("ex_date", "factor", "known_on", "reason")
NAMED_ROWS = 20
"""Offending rows that an error names; it counts the others."""

_CALENDAR_FROM = date(1985, 1, 1)
_SPLITS = tuple(
    ratio
    for n in (1.5, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20, 25, 30, 50, 100)
    for ratio in (1 / n, float(n))
)
_SPLIT_NEAR = 0.06
_BUSY = 4.0


@dataclass(frozen=True)
class RawPrices:
    """What is known of one symbol.

    Attributes:
        symbol: ticker.
        rows: columns `ROW_COLUMNS`; prices as traded, several rows a session where a vendor
            revised it (differing in `known_on`).
        factors: columns `FACTOR_COLUMNS`; `factor` multiplies prices before `ex_date` (split 2:1:
            0.5; dividend d: 1 - d / last close); `reason` is `source`, or `rescaled` where a source
            silently changed the unit of its history.
        tells_actions: whether the source tells of splits and dividends at all.
    """

    symbol: str
    rows: pd.DataFrame
    factors: pd.DataFrame
    tells_actions: bool = True


def rows_frame(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` with the columns, types and order of `RawPrices.rows` (`known_on` = session)."""
    known_on = rows["known_on"] if "known_on" in rows else rows["date"]
    frame = rows.assign(known_on=known_on)[list(ROW_COLUMNS)]
    types = dict.fromkeys(("date", "known_on"), TIME) | dict.fromkeys(COLUMNS, "float64")
    return frame.astype(types).reset_index(drop=True)


def factors_frame(
    events: Iterable[tuple[np.datetime64, float]],
    known_on: np.datetime64 | None = None,
    reason: str = "source",
) -> pd.DataFrame:
    """Factors from (ex_date, factor) pairs, known on their ex-date unless told otherwise."""
    events = list(events)
    return pd.DataFrame(
        {
            "ex_date": np.array([ex for ex, _ in events], dtype=TIME),
            "factor": np.array([factor for _, factor in events], dtype="float64"),
            "known_on": np.array([known_on or ex for ex, _ in events], dtype=TIME),
            "reason": pd.Series([reason] * len(events), dtype="str"),
        }
    )


def check_as_of(as_of: date) -> None:
    """Refuse a date of which nothing can be known yet.

    Raises:
        HistoryError: `as_of` is after today, here and at the exchange.
    """
    today = max(date.today(), exchange_day(datetime.now(UTC)))
    if as_of > today:
        raise HistoryError(
            f"as_of {as_of} is in the future; a date up to today ({today}) is expected."
        )


# --- what was known when ---------------------------------------------------------------------


def visible_rows(raw: RawPrices, as_of: date) -> pd.DataFrame:
    """One row a session, ascending: the latest known on `as_of`."""
    rows, limit = raw.rows, np.datetime64(as_of)
    known = rows[(rows["known_on"] <= limit) & (rows["date"] <= limit)]
    ordered = known.sort_values(["date", "known_on"], kind="stable")
    return ordered.drop_duplicates("date", keep="last").reset_index(drop=True)


def visible_factors(raw: RawPrices, as_of: date) -> pd.DataFrame:
    """One factor an ex-date and reason, ascending: the latest known on `as_of`."""
    factors, limit = raw.factors, np.datetime64(as_of)
    known = factors[(factors["known_on"] <= limit) & (factors["ex_date"] <= limit)]
    ordered = known.sort_values(["ex_date", "reason", "known_on"], kind="stable")
    return ordered.drop_duplicates(["ex_date", "reason"], keep="last").reset_index(drop=True)


def adjusted(raw: RawPrices, as_of: date) -> Frame:
    """Prices as known on `as_of`, in units of their last row.

    Prices before an ex-date are multiplied by its factor; volumes are divided by it where it looks
    like a split (at most 0.8 or at least 1.25).

    Raises:
        HistoryError: nothing was known by then; names the first known day.
    """
    rows = visible_rows(raw, as_of)
    if rows.empty:
        raise nothing_known(raw.symbol, raw.rows["date"], as_of)
    factors = visible_factors(raw, as_of)
    dates = rows["date"].to_numpy()
    factors = factors[factors["ex_date"] <= dates[-1]]
    ex_dates, values = factors["ex_date"].to_numpy(), factors["factor"].to_numpy()
    price_scale = scale_before(ex_dates, values, dates)
    is_split = (values <= 0.8) | (values >= 1.25)
    volume_scale = scale_before(ex_dates, np.where(is_split, values, 1.0), dates)
    columns = {name: rows[name].to_numpy() * price_scale for name in PRICES}
    columns["volume"] = rows["volume"].to_numpy() / volume_scale
    return pd.DataFrame(columns, index=pd.DatetimeIndex(dates, name="date"))


def scale_before(
    ex_dates: NDArray[np.datetime64], factors: NDArray[np.float64], dates: NDArray[np.datetime64]
) -> NDArray[np.float64]:
    """Product of the factors whose ex-date lies after each of `dates` (ex-dates ascending)."""
    tail = np.append(np.cumprod(factors[::-1])[::-1], 1.0)
    return np.asarray(tail[np.searchsorted(ex_dates, dates, side="right")], dtype=np.float64)


def nothing_known(symbol: str, dates: pd.Series, as_of: date) -> HistoryError:
    """The error for an `as_of` before the first row."""
    first = f"the first known day is {dates.min():%Y-%m-%d}" if len(dates) else "there are no rows"
    return HistoryError(
        f"Nothing is known of {symbol} as of {as_of}; {first}. Choose a later as_of."
    )


# --- factors from an adjusted close ----------------------------------------------------------


def factors_from_adjusted(
    dates: NDArray[np.datetime64], close: NDArray[np.float64], adjusted_close: NDArray[np.float64]
) -> pd.DataFrame:
    """Splits and dividends from a vendor's adjusted close.

    `adjusted_close / close` is constant between events, but both are rounded: each row allows an
    interval of ratios. Rows share a segment while their intervals have a point in common; where
    that ends, an event lies. A factor is computed from the rows up to its ex-date only, so later
    rows never change it.

    Args:
        dates: sessions, ascending. close, adjusted_close: same length, positive.
    """
    usable = np.isfinite(close) & np.isfinite(adjusted_close)
    usable &= (close > 0) & (adjusted_close > 0)
    dates, close, adjusted_close = dates[usable], close[usable], adjusted_close[usable]
    lows, highs = _ratio_bounds(close, adjusted_close)
    if not len(lows):
        return factors_frame([])
    events: list[tuple[np.datetime64, float]] = []
    low, high = lows[0], highs[0]
    for day, row_low, row_high in zip(dates[1:], lows[1:], highs[1:], strict=True):
        both_low, both_high = max(low, row_low), min(high, row_high)
        if both_low <= both_high:
            low, high = both_low, both_high
        else:
            events.append((day, _plain(low / row_high, high / row_low)))
            low, high = row_low, row_high
    return factors_frame(events)


def _ratio_bounds(
    close: NDArray[np.float64], adjusted_close: NDArray[np.float64]
) -> tuple[list[float], list[float]]:
    off_adjusted = _rounding(adjusted_close) + 1e-9 * adjusted_close
    decimals = _decimals(close)
    off_close = 0.0 if decimals <= 4 else _rounding(close)  # four decimals are the price itself
    lows = np.maximum(adjusted_close - off_adjusted, 1e-12) / (close + off_close)
    highs = (adjusted_close + off_adjusted) / np.maximum(close - off_close, 1e-12)
    return lows.tolist(), highs.tolist()


def _decimals(values: NDArray[np.float64]) -> int:
    """Decimals to which `values` are rounded; 9 if they are not."""
    for count in range(9):
        if np.all(np.abs(np.round(values, count) - values) <= 1e-12 * np.maximum(1, values)):
            return count
    return 9


def _rounding(values: NDArray[np.float64]) -> float:
    count = _decimals(values)
    return 0.0 if count == 9 else float(0.5 * 10.0**-count)


def _plain(low: float, high: float) -> float:
    """The split ratio between the bounds if there is one, else their middle."""
    middle = (low + high) / 2
    if middle <= 0.8 or middle >= 1.25:
        ratio = float(Fraction(middle).limit_denominator(50))
        if low <= ratio <= high:
            return ratio
    return round(middle, 12)


# --- checks ----------------------------------------------------------------------------------


def _price_column() -> pa.Column:
    finite = pa.Check(np.isfinite, ignore_na=False, error="a finite number is expected")
    positive = pa.Check.gt(0, error="a positive number is expected")
    return pa.Column("float64", [finite, positive], nullable=True)


_SCHEMA = pa.DataFrameSchema(
    {
        "date": pa.Column(TIME, nullable=True),
        **{name: _price_column() for name in COLUMNS},
        "known_on": pa.Column(TIME, nullable=True),
    },
    checks=[
        pa.Check(lambda rows: ~(rows["high"] < rows["low"]), error="high is below low"),
        pa.Check(
            lambda rows: ~(rows["high"] < rows[["open", "close"]].max(axis=1)),
            error="high is below open or close",
        ),
        pa.Check(
            lambda rows: ~(rows["low"] > rows[["open", "close"]].min(axis=1)),
            error="low is above open or close",
        ),
    ],
    strict=True,
)

Problem: TypeAlias = tuple[int, str]
"""Position of a row, and what is wrong with it."""


def validate(raw: RawPrices, closures: Collection[date] = ()) -> RawPrices:
    """Check one row a session against the schema and the exchange's calendar.

    Args:
        raw: prices with one row a session, in the order of the source.
        closures: days without trading that the calendar does not know.

    Returns:
        `raw`, unchanged.

    Raises:
        BadPricesError: names up to 20 offending rows, and counts all.
    """
    problems = _schema_problems(raw.rows) + _order_problems(raw.rows)
    problems += _calendar_problems(raw.rows, frozenset(closures))
    if not problems:
        problems = _jump_problems(raw)
    if problems:
        raise bad_prices(raw.symbol, problems)
    return raw


def bad_prices(symbol: str, problems: list[Problem]) -> BadPricesError:
    """The error that names the first offending rows and counts the rest."""
    by_row: dict[int, list[str]] = {}
    for position, text in sorted(problems):
        by_row.setdefault(position, []).append(text)
    lines = ["; ".join(dict.fromkeys(texts)) for texts in by_row.values()]
    more = len(lines) - NAMED_ROWS
    tail = [f"... and {more} more"] if more > 0 else []
    count = "1 row breaks" if len(lines) == 1 else f"{len(lines)} rows break"
    return BadPricesError(
        f"Prices of {symbol} are refused whole: {count} the rules.\n  "
        + "\n  ".join(lines[:NAMED_ROWS] + tail)
        + "\nCorrect these rows at the source and ingest again."
    )


def _name(rows: pd.DataFrame, position: int) -> str:
    day = rows["date"].iloc[position]
    return f"row {position + 1} ({day:%Y-%m-%d})" if pd.notna(day) else f"row {position + 1}"


def _schema_problems(rows: pd.DataFrame) -> list[Problem]:
    try:
        _SCHEMA.validate(rows, lazy=True)
    except pa.errors.SchemaErrors as error:
        return [_schema_problem(rows, case) for case in error.failure_cases.to_dict("records")]
    return []


def _schema_problem(rows: pd.DataFrame, case: dict[str, object]) -> Problem:
    position, check, column = case["index"], case["check"], case["column"]
    if not isinstance(position, int):  # a whole column: missing, or of another type
        return -1, f"column {column}: {check} ({case['failure_case']})"
    where = _name(rows, position)
    if case["schema_context"] == "Column":
        return position, f"{where}: {column} is {case['failure_case']}, {check}"
    shown = ", ".join(f"{name} {rows[name].iloc[position]:g}" for name in PRICES)
    return position, f"{where}: {check} ({shown})"


def _order_problems(rows: pd.DataFrame) -> list[Problem]:
    days = rows["date"]
    problems = [
        (i, f"row {i + 1}: the date is missing or cannot be read (YYYY-MM-DD is expected)")
        for i in np.flatnonzero(days.isna()).tolist()
    ]
    twice = days.duplicated() & days.notna()
    problems += [
        (i, f"{_name(rows, i)}: duplicate of an earlier row")
        for i in np.flatnonzero(twice).tolist()
    ]
    earlier = (days < days.cummax()) & ~twice
    problems += [
        (i, f"{_name(rows, i)}: out of order, rows must run from oldest to newest")
        for i in np.flatnonzero(earlier).tolist()
    ]
    return problems


def _calendar_problems(rows: pd.DataFrame, closures: frozenset[date]) -> list[Problem]:
    days = [day.date() for day in rows["date"].dropna()]
    if not days:
        return []
    first, last = max(min(days), _CALENDAR_FROM), max(days)
    expected = set(sessions_between(first, last)) - closures if first <= last else set()
    seen = set(days)
    ordered = rows["date"].to_numpy()
    problems = []
    for day in sorted(expected - seen):
        position = int(np.searchsorted(ordered, np.datetime64(day))) if len(ordered) else 0
        problems.append((position, f"{day}: session missing before row {position + 1}"))
    for position, value in enumerate(rows["date"]):
        if pd.notna(value) and value.date() not in expected and not _trades(value.date(), closures):
            problems.append((position, f"{_name(rows, position)}: the exchange was closed"))
    return problems


def _trades(day: date, closures: frozenset[date]) -> bool:
    if day in closures:
        return False
    return day.weekday() < 5 if day < _CALENDAR_FROM else is_session(day)


def _jump_problems(raw: RawPrices) -> list[Problem]:
    """Overnight gaps near a split's ratio that no factor explains, on a day of usual trading.

    A real crash or take-over of that size comes with several times the usual turnover; a split
    does not.
    """
    rows = raw.rows
    if len(rows) < 2:
        return []
    close, volume = rows["close"].to_numpy(), rows["volume"].to_numpy()
    gaps = rows["open"].to_numpy()[1:] / (close[:-1] * _factor_on_row(raw)[1:])
    near = np.abs(np.log(gaps)[:, None] - np.log(_SPLITS)[None, :]).min(axis=1) <= _SPLIT_NEAR
    problems = []
    for position in (np.flatnonzero(near) + 1).tolist():
        gap = gaps[position - 1]
        usual = float(np.median(volume[max(0, position - 20) : position]))
        if volume[position] * min(1.0, gap) < _BUSY * usual:
            text = (
                f"{_name(rows, position)}: open {rows['open'].iloc[position]:g} after close "
                f"{close[position - 1]:g} looks like an unadjusted split (gap {gap:.3f} once the "
                "factors of that day are applied)"
            )
            problems.append((position, text))
    return problems


def _factor_on_row(raw: RawPrices) -> NDArray[np.float64]:
    """Per row, the product of the factors that took effect since the row before."""
    dates = raw.rows["date"].to_numpy()
    product = np.ones(len(dates))
    at = np.searchsorted(dates, raw.factors["ex_date"].to_numpy(), side="left")
    inside = at < len(dates)
    np.multiply.at(product, at[inside], raw.factors["factor"].to_numpy()[inside])
    return product


# --- quarantine ------------------------------------------------------------------------------


def quarantine(
    settings: Settings, symbol: str, name: str, content: bytes, error: Exception
) -> Path:
    """Keep a refused file and the reason; the same bytes are kept once.

    Args:
        name: file name, whose ending says what `content` is.

    Returns:
        The folder: the file as it came, and `reason.json`.
    """
    digest = hashlib.sha256(content).hexdigest()
    folder = settings.quarantine_dir / f"{symbol}-{digest[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    reason = {"symbol": symbol, "file": name, "sha256": digest, "error": str(error)}
    (folder / "reason.json").write_text(json.dumps(reason, indent=1) + "\n")
    return folder
