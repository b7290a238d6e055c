"""Synthetic markets whose truth is known: GARCH(1,1) days that are made of intraday steps.

Volatility clusters as in daily stock returns (alpha 0.07, beta 0.91: a shock halves in 34 days;
25 % a year on average). A day's move is a quarter overnight and the rest a Brownian path of 78 five
minute steps, whose highest and lowest point are the day's range. Volume follows the day's
volatility and its own past. With `tails` each day has a scale of its own, so that returns are
Student-t of so many degrees of freedom.
"""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

ALPHA, BETA, YEARLY = 0.07, 0.91, 0.25
NIGHT, STEPS = 0.25, 78
_WARM = 500


def garch(
    series: int, days: int, seed: int, tails: float = math.inf, start: str = "2001-01-02"
) -> Iterator[pd.DataFrame]:
    """Price frames as the model sees them, columns open, high, low, close, volume.

    Args:
        series: how many.
        days: rows of each.
        seed: of everything.
        tails: degrees of freedom of the daily scale; infinite for normal days.
        start: first day; the others are the weekdays after it.
    """
    rng = np.random.default_rng(seed)
    long_run = YEARLY**2 / 252
    variance, busy = np.full(series, long_run), np.zeros(series)
    rows = np.empty((days, 4, series))
    volume = np.empty((days, series))
    close = np.full(series, math.log(100))
    for day in range(-_WARM, days):
        sd = np.sqrt(variance) * _scale(rng, series, tails)
        opened = close + sd * math.sqrt(NIGHT) * rng.standard_normal(series)
        steps = rng.standard_normal((STEPS, series)) * (sd * math.sqrt((1 - NIGHT) / STEPS))
        path = opened + np.vstack([np.zeros(series), np.cumsum(steps, axis=0)])
        variance = (1 - ALPHA - BETA) * long_run + BETA * variance + ALPHA * (path[-1] - close) ** 2
        busy = 0.7 * busy + 0.25 * rng.standard_normal(series)
        close = path[-1] if day >= 0 else close
        if day >= 0:
            rows[day] = opened, path.max(axis=0), path.min(axis=0), close
            volume[day] = 1e6 * np.exp(busy + 0.6 * np.log(sd / math.sqrt(long_run)))
    index = pd.bdate_range(start, periods=days, name="date")
    for each in range(series):
        frame = pd.DataFrame(np.exp(rows[:, :, each]), index, ["open", "high", "low", "close"])
        yield frame.assign(volume=np.round(volume[:, each]))


def _scale(rng: np.random.Generator, series: int, tails: float) -> np.ndarray:
    if math.isinf(tails):
        return np.ones(series)
    return np.sqrt((tails - 2) / rng.chisquare(tails, series))


def louder(frame: pd.DataFrame, day: int, factor: float = 2.0) -> pd.DataFrame:
    """The same market, all its moves `factor` times as large from row `day` on."""
    prices = ["open", "high", "low", "close"]
    logs = np.log(frame[prices].to_numpy())
    before = np.concatenate([logs[:1, 0], logs[:-1, 3]])
    moves = logs - before[:, None]
    moves[day:] *= factor
    closes = logs[0, 0] + np.cumsum(moves[:, 3])
    base = np.concatenate([logs[:1, 0], closes[:-1]])
    changed = pd.DataFrame(np.exp(base[:, None] + moves), frame.index, prices)
    return changed.assign(volume=frame["volume"])


def overnight(frame: pd.DataFrame, day: int, share: float) -> pd.DataFrame:
    """The same market, whose moves within a day are `share` as large from row `day` on.

    What is left of each day's return comes before the open: closes are as they were, the day's
    range no longer tells of them. (News that used to come in trading hours comes at night.)
    """
    logs = np.log(frame[["open", "high", "low", "close"]].to_numpy())
    opened, high, low, close = logs.T.copy()
    after = np.arange(len(frame)) >= day
    top, bottom = np.maximum(opened, close), np.minimum(opened, close)
    moved = np.where(after, close - share * (close - opened), opened)
    above = np.where(after, share, 1.0) * (high - top)
    below = np.where(after, share, 1.0) * (bottom - low)
    changed = {
        "open": moved,
        "high": np.maximum(moved, close) + above,
        "low": np.minimum(moved, close) - below,
        "close": close,
    }
    prices = pd.DataFrame({name: np.exp(values) for name, values in changed.items()}, frame.index)
    return prices.assign(volume=frame["volume"])
