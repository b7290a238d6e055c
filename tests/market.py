"""Prices for tests: a market whose volatility clusters, and the real one of GOOG."""

import numpy as np
import pandas as pd
from bokeh_sampledata.stocks import GOOG

from forecasting.contract import COLUMNS


def market(rows: int, seed: int = 0) -> pd.DataFrame:
    """`rows` business days from 2005-01-03; volatility follows a slow autoregression."""
    rng = np.random.default_rng(seed)
    log_sigma = np.empty(rows)
    level = 0.0
    for i in range(rows):
        level = 0.96 * level + 0.2 * rng.normal()
        log_sigma[i] = np.log(0.015) + level
    sigma = np.exp(log_sigma)
    steps = sigma[:, None] * rng.normal(size=(rows, 16)) / 4
    paths = np.cumsum(steps, axis=1)
    close = 100 * np.exp(np.cumsum(paths[:, -1]))
    opened = close * np.exp(-paths[:, -1])
    return pd.DataFrame(
        {
            "open": opened,
            "high": opened * np.exp(np.maximum(paths.max(axis=1), 0)),
            "low": opened * np.exp(np.minimum(paths.min(axis=1), 0)),
            "close": close,
            "volume": np.round(1e6 * np.exp(rng.normal(0, 0.4, rows))),
        },
        index=pd.bdate_range("2005-01-03", periods=rows, name="date"),
    )


def goog(as_of: str) -> pd.DataFrame:
    """Daily rows of GOOG from 2004-08-19 to `as_of`, as traded."""
    frame = pd.DataFrame(GOOG)
    frame.index = pd.DatetimeIndex(frame.pop("date"), name="date")
    return frame.loc[:as_of, list(COLUMNS)].astype(float)
