"""What is answered, and what it is asked about: predictions that drift, clients that send oddities.

Neither says that anything is wrong. Intervals get wider with the market, as they should; a client
may ask about any day it likes. So both are told as scores and tables, and nobody is alarmed.
"""

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
from sqlalchemy import Engine, func, select

from forecasting.drift import distance
from forecasting.metrics import BASIS_POINTS, Array, at_level
from forecasting.sessions import last_due
from forecasting.store import answer_counts, predictions

REFERENCE_DAYS = 250
"""Newest origins that the version knew when it was trained: what it answers to them is usual."""
LEAST_DAYS = 20
TRAFFIC_DAYS = 90
MOST_FORECASTS = 50_000
"""Newest ones that are looked at."""
PRICE_SLACK = 0.01
"""How far a client's last close may be from ours, relative, before it counts as another price."""
_MARKET = ZoneInfo("America/New_York")


@dataclass(frozen=True)
class PredictionDrift:
    """Predictions of one horizon against those that are usual for the version.

    Attributes:
        horizon: trading days ahead.
        days: newest origins compared, and as many of the reference.
        width: distance of the log width of the 80 % interval, in standard deviations of the
            reference's (Evidently's normed Wasserstein).
        skew: the same of how far the median lies from the middle of the interval, in its widths.
        mean_width_bp: of log return, basis points.
        usual_width_bp: of the reference.
    """

    horizon: int
    days: int
    width: float
    skew: float
    mean_width_bp: float
    usual_width_bp: float


@dataclass(frozen=True)
class Traffic:
    """Forecasts of one symbol that were computed in the last `TRAFFIC_DAYS`, by their source.

    Attributes:
        source: see `predictions.Source`.
        forecasts: how many were computed.
        repeated: answers of one of them that was computed before.
        share: of all forecasts of the symbol.
        stale: share from an origin older than the newest session at the time.
        other_price: share whose last close is neither ours of that day nor ours adjusted.
        unknown_day: share from an origin that is no session of ours.
    """

    source: str
    forecasts: int
    repeated: int
    share: float
    stale: float
    other_price: float
    unknown_day: float


def shapes(quantiles: Array, levels: tuple[float, ...]) -> tuple[Array, Array]:
    """Log width of the 80 % interval, and its skew.

    Args:
        quantiles: of log returns [..., k].
        levels: probabilities [k].

    Returns:
        ([...], [...]). Skew is 0 for a median in the middle, 0.5 for one on the lower end.
    """
    low, middle, high = (at_level(quantiles, levels, level) for level in (0.1, 0.5, 0.9))
    width = np.maximum(high - low, 1e-9)
    return np.log(width), (low + high - 2 * middle) / (2 * width)


def prediction_drift(
    reference: Array, recent: Array, levels: tuple[float, ...]
) -> list[PredictionDrift]:
    """Compare the newest predictions with those that are usual.

    Distances depend on the number of rows, so the reference is brought to that of the newest by
    evenly spaced quantiles, as in `forecasting.drift`.

    Args:
        reference: quantiles of log returns of days that the version knew [m, h, k].
        recent: of the newest days that it answered [n, h, k].
        levels: probabilities of both [k].

    Returns:
        One entry a horizon; none where one of them has less than `LEAST_DAYS`.
    """
    rows = len(recent)
    if min(rows, len(reference)) < LEAST_DAYS:
        return []
    even = (np.arange(rows) + 0.5) / rows
    found = []
    for step in range(recent.shape[1]):
        usual, newest = (shapes(each[:, step], levels) for each in (reference, recent))
        width, skew = (
            distance(np.quantile(old, even), new) for old, new in zip(usual, newest, strict=True)
        )
        widths = (float(np.exp(each[0]).mean()) * BASIS_POINTS for each in (newest, usual))
        found.append(PredictionDrift(step + 1, rows, width, skew, *widths))
    return found


def traffic(
    engine: Engine,
    symbol: str,
    as_of: date,
    closes: pd.DataFrame,
) -> list[Traffic]:
    """What was asked about a symbol up to the end of `as_of`.

    Args:
        engine: of the prediction log.
        symbol: who is asked about.
        as_of: last day that is looked at.
        closes: ours by session, a column as traded and one adjusted.

    Returns:
        One entry a source, most forecasts first.
    """
    end = datetime.combine(as_of + timedelta(days=1), time(), _MARKET).astimezone(UTC)
    since = end - timedelta(days=TRAFFIC_DAYS)
    of = predictions.c
    query = (
        select(of.source, of.made_at, of.origin, of.origin_close)
        .where(of.symbol == symbol, of.horizon == 1, of.made_at >= since, of.made_at < end)
        .order_by(of.made_at.desc())
        .limit(MOST_FORECASTS)
    )
    counted = select(func.sum(answer_counts.c.answers)).where(
        answer_counts.c.symbol == symbol,
        answer_counts.c.last_at >= since,
        answer_counts.c.last_at < end,
    )
    with engine.connect() as connection:
        table = pd.DataFrame(connection.execute(query).mappings().all())
        repeated = int(connection.execute(counted).scalar_one_or_none() or 0)
    if table.empty:
        return []
    ours = closes.reindex(pd.DatetimeIndex(table["origin"])).to_numpy()
    off = np.abs(table["origin_close"].to_numpy()[:, None] / ours - 1)
    table["unknown_day"] = np.isnan(ours).all(axis=1)
    table["other_price"] = (off > PRICE_SLACK).all(axis=1)
    table["stale"] = list(map(_was_stale, table["origin"], table["made_at"]))
    return _by_source(table, repeated)


def _was_stale(origin: date, made_at: datetime) -> bool:
    """Whether the prices of a later session were due when a forecast was made."""
    aware = made_at if made_at.tzinfo else made_at.replace(tzinfo=UTC)
    return origin < last_due(aware)


def _by_source(table: pd.DataFrame, repeated: int) -> list[Traffic]:
    """One entry a source; only answers to GET are repeated without being computed again."""
    return [
        Traffic(
            source=str(source),
            forecasts=len(rows),
            repeated=repeated if source == "get" else 0,
            share=len(rows) / len(table),
            stale=float(rows["stale"].mean()),
            other_price=float(rows["other_price"].mean()),
            unknown_day=float(rows["unknown_day"].mean()),
        )
        for source, rows in sorted(table.groupby("source"), key=lambda each: -len(each[1]))
    ]
