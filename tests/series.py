"""Synthetic prices on real trading days, for tests."""

from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd

from forecasting.prices import RawPrices, factors_frame, rows_frame
from forecasting.sessions import sessions_between

FIRST = date(2006, 1, 3)


def table(rows: int, seed: int = 0, start: date = FIRST) -> pd.DataFrame:
    """Columns date, open, high, low, close, volume, adj_close of `rows` sessions; no events."""
    rng = np.random.default_rng(seed)
    days = sessions_between(start, start + timedelta(days=2 * rows + 10))[:rows]
    close = np.round(100 * np.exp(np.cumsum(rng.normal(0, 0.01, rows))), 2)
    opened = np.round(close * np.exp(rng.normal(0, 0.005, rows)), 2)
    return pd.DataFrame(
        {
            "date": [day.isoformat() for day in days],
            "open": opened,
            "high": np.round(np.maximum(opened, close) * 1.01, 2),
            "low": np.round(np.minimum(opened, close) * 0.99, 2),
            "close": close,
            "volume": rng.integers(1_000, 2_000, rows),
            "adj_close": close,
        }
    )


def raw(rows: int, seed: int = 0) -> RawPrices:
    """`table` as raw prices of TEST without factors."""
    frame = table(rows, seed)
    frame["date"] = pd.to_datetime(frame["date"])
    return RawPrices("TEST", rows_frame(frame), factors_frame([]))


def split_at(frame: pd.DataFrame, position: int, ratio: float) -> pd.DataFrame:
    """Prices as traded with a split: from `position` on divided by `ratio`; `adj_close` follows."""
    out = frame.copy()
    later = np.arange(len(out)) >= position
    for name in ("open", "high", "low", "close"):
        out[name] = np.where(later, out[name] / ratio, out[name])
    out["volume"] = np.where(later, out["volume"] * ratio, out["volume"])
    out["adj_close"] = out["adj_close"] / ratio
    return out


def write_csv(frame: pd.DataFrame, path: Path) -> str:
    """Write the columns as Yahoo names them; its path."""
    names = {name: name.title() for name in frame} | {"adj_close": "Adj Close"}
    path.write_text(frame.rename(columns=names).to_csv(index=False))
    return str(path)
