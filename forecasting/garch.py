"""GARCH(1,1) (Bollerslev 1986), the baseline that volatility forecasts are measured by.

Estimated by `arch`; kept out of `baselines`, since `arch` takes a second to import.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from arch import arch_model
from numpy.typing import NDArray
from scipy.special import stdtrit

from forecasting.baselines import Origins, log_returns, positions
from forecasting.errors import HistoryError
from forecasting.metrics import Array

Innovations = Literal["residuals", "t"]
LEAST_RETURNS = 250
"""Below it the likelihood has no clear maximum."""
_PERCENT = 100.0
"""`arch` asks for returns near one."""


def garch_quantiles(
    frame: pd.DataFrame,
    origins: Origins,
    horizon: int,
    levels: Sequence[float],
    *,
    innovations: Innovations = "residuals",
    paths: int = 4000,
    seed: int = 0,
) -> Array:
    """Zero-mean GARCH(1,1) with Student-t likelihood, simulated forward from each origin.

    Estimated once, on the returns up to the first origin; the variance is filtered through every
    return up to each one. With `residuals` the shocks are drawn from all standardized residuals so
    far (filtered historical simulation, Barone-Adesi et al. 1999), with `t` from the Student-t
    that was estimated.

    Args:
        frame: prices; rows after an origin are not used for it.
        origins: sessions from which forecasts start [n], ascending.
        horizon: days ahead h.
        levels: quantile levels [k].
        innovations: where shocks come from.
        paths: simulated a forecast.
        seed: of the simulation.

    Returns:
        Log-return quantiles [n, h, k].

    Raises:
        HistoryError: an origin is not a row of the frame, or there are too few returns before the
            first.
    """
    rows, returns = positions(frame, origins), log_returns(frame) * _PERCENT
    if rows[0] < LEAST_RETURNS:
        raise HistoryError(
            f"GARCH from {origins[0]} has {rows[0]} returns behind it; at least {LEAST_RETURNS} "
            "are needed. Start at a later origin."
        )
    model = arch_model(returns[: rows[0]], mean="Zero", vol="GARCH", p=1, q=1, dist="t")
    found = model.fit(disp="off", show_warning=False).params
    omega, alpha, beta, degrees = (found[n] for n in ("omega", "alpha[1]", "beta[1]", "nu"))
    variance = _filtered(returns, omega, alpha, beta, start=float(returns[: rows[0]].var()))
    residuals = returns / np.sqrt(variance[:-1])
    rng = np.random.default_rng(seed)
    out = np.empty((len(rows), horizon, len(levels)))
    for i, row in enumerate(rows):
        shape = (horizon, paths)
        if innovations == "t":
            uniform = rng.random(shape)
            shocks = stdtrit(degrees, uniform) * np.sqrt((degrees - 2) / degrees)
        else:
            shocks = rng.choice(residuals[:row], shape)
        moves = _simulated(shocks, variance[row], omega, alpha, beta)
        out[i] = np.quantile(moves, levels, axis=1).T / _PERCENT
    return out


def _filtered(
    returns: NDArray[np.float64], omega: float, alpha: float, beta: float, start: float
) -> Array:
    """Variance of each return as known before it, and of the one to come [rows]."""
    variance = np.empty(len(returns) + 1)
    variance[0] = start
    for t, move in enumerate(returns):
        variance[t + 1] = omega + alpha * move**2 + beta * variance[t]
    return variance


def _simulated(shocks: Array, variance: float, omega: float, alpha: float, beta: float) -> Array:
    """Cumulative returns [horizon, paths] from unit shocks [horizon, paths]."""
    moves = np.empty_like(shocks)
    ahead = np.full(shocks.shape[1], variance)
    for step, shock in enumerate(shocks):
        moves[step] = np.sqrt(ahead) * shock
        ahead = omega + alpha * moves[step] ** 2 + beta * ahead
    total: Array = np.cumsum(moves, axis=0)
    return total
