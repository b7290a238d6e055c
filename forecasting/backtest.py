"""Rolling-origin scores of any forecaster on the same windows.

Everything is scored as a cumulative log return in basis points: price quantiles q become
log(q / last_close), so that days of different price levels weigh the same.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from forecasting.baselines import random_walk_quantiles
from forecasting.contract import QUANTILE_LEVELS
from forecasting.errors import ModelError
from forecasting.metrics import BASIS_POINTS, Array, crps

BATCH = 256


class HasLevels(Protocol):
    """The part of a contract that scoring needs."""

    @property
    def quantile_levels(self) -> tuple[float, ...]:
        """Probabilities of the quantiles [k]."""
        ...


class PriceForecaster(Protocol):
    """Anything that answers like `inference.Forecaster`."""

    @property
    def contract(self) -> HasLevels:
        """What it is and how to call it."""
        ...

    def predict(self, ohlcv: Any, dates: Any, symbol: Any) -> NDArray[Any]:  # noqa: ANN401
        """Price quantiles [b, h, k] from ohlcv [b, context, 5], dates [b, context], symbol [b]."""
        ...


class ScoredWindows(Protocol):
    """The part of `windows.Windows` that scoring needs; n windows, h horizons."""

    @property
    def ohlcv(self) -> NDArray[np.float32]:
        """Raw rows [n, context, 5]."""
        ...

    @property
    def dates(self) -> NDArray[np.int64]:
        """Days since 1970-01-01 [n, context]."""
        ...

    @property
    def symbol(self) -> NDArray[np.int64]:
        """Symbol indices [n]."""
        ...

    @property
    def last_close(self) -> NDArray[np.float64]:
        """Close at the origin [n]."""
        ...

    @property
    def returns(self) -> NDArray[np.float64]:
        """Cumulative log returns that came true [n, h]; NaN where not yet known."""
        ...

    @property
    def origins(self) -> NDArray[np.datetime64]:
        """Last session of each window [n]."""
        ...


def return_quantiles(
    forecaster: PriceForecaster, windows: ScoredWindows, batch: int = BATCH
) -> Array:
    """Log-return quantiles of a forecaster, asked in batches.

    Args:
        forecaster: answers with price quantiles.
        windows: what to ask.
        batch: most windows in one call.

    Returns:
        Quantiles [n, h, k]; NaN where a price quantile is not positive and finite.

    Raises:
        ModelError: the answer does not have the shape [n, h, k].
    """
    n, horizon = windows.returns.shape
    expected = (n, horizon, len(forecaster.contract.quantile_levels))
    parts = [
        forecaster.predict(
            windows.ohlcv[start : start + batch],
            windows.dates[start : start + batch],
            windows.symbol[start : start + batch],
        )
        for start in range(0, n, batch)
    ]
    prices = np.concatenate(parts).astype(np.float64) if parts else np.empty(expected)
    if prices.shape != expected:
        raise ModelError(
            f"The forecaster answered {n} windows with shape {prices.shape}; "
            f"{expected} expected (windows, horizon, quantiles)."
        )
    usable = np.isfinite(prices) & (prices > 0.0)
    prices = np.where(usable, prices, np.nan)
    return np.log(prices / windows.last_close[:, None, None])


def score(returns: Array, quantiles: Array, levels: Sequence[float]) -> Array:
    """CRPS in basis points [n, h] of log-return quantiles [n, h, k] against returns [n, h]."""
    return crps(returns, quantiles, levels) * BASIS_POINTS


def score_random_walk(
    frame: pd.DataFrame,
    windows: ScoredWindows,
    levels: Sequence[float] = QUANTILE_LEVELS,
    window: int | None = None,
) -> Array:
    """CRPS of the random walk on the same windows.

    Args:
        frame: prices from which the windows were cut, with the history before them.
        windows: what to score; all of the frame's symbol.
        levels: quantile levels, those of the model it is compared with.
        window: residuals kept, see `baselines.random_walk_quantiles`.

    Returns:
        Basis points [n, h].

    Raises:
        HistoryError: too little history before the first window.
    """
    horizon = windows.returns.shape[1]
    quantiles = random_walk_quantiles(frame, windows.origins, horizon, levels, window)
    return score(windows.returns, quantiles, levels)
