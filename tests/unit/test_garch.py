"""GARCH against the library that estimates it, and against a market whose law is known."""

import numpy as np
import pandas as pd
import pytest
from arch import arch_model

from forecasting.contract import QUANTILE_LEVELS
from forecasting.errors import HistoryError
from forecasting.garch import LEAST_RETURNS, _filtered, _simulated, garch_quantiles
from forecasting.metrics import coverage
from tests.market import market

OMEGA, ALPHA, BETA = 2e-6, 0.08, 0.9


def planted(rows: int, seed: int = 0) -> pd.DataFrame:
    """Closes whose returns follow a GARCH(1,1) with normal shocks; nothing else is looked at."""
    rng = np.random.default_rng(seed)
    variance, returns = OMEGA / (1 - ALPHA - BETA), np.empty(rows)
    for t in range(rows):
        returns[t] = np.sqrt(variance) * rng.normal()
        variance = OMEGA + ALPHA * returns[t] ** 2 + BETA * variance
    days = pd.bdate_range("2000-01-03", periods=rows, name="date")
    return pd.DataFrame({"close": 100 * np.exp(np.cumsum(returns))}, index=days)


@pytest.mark.parametrize("innovations", ["residuals", "t"])
def test_intervals_hold_what_they_say_where_the_law_is_garch(innovations):
    frame = planted(3000)
    origins = frame.index[2000:-5].to_numpy()
    found = garch_quantiles(frame, origins, 5, QUANTILE_LEVELS, innovations=innovations, paths=1000)
    logs = np.log(frame["close"].to_numpy())
    returns = np.stack([logs[2000 + h : -5 + h or None] - logs[2000:-5] for h in range(1, 6)], 1)
    assert (np.diff(found, axis=-1) >= 0).all()
    for mass in (0.8, 0.95):
        inside = coverage(returns, found, QUANTILE_LEVELS, mass)
        np.testing.assert_allclose(inside, mass, atol=0.05)


def test_the_filter_is_that_of_the_library():
    returns = np.diff(np.log(planted(1500)["close"].to_numpy())) * 100
    fitted = arch_model(returns, mean="Zero", vol="GARCH", p=1, q=1, dist="t").fit(disp="off")
    omega, alpha, beta = (fitted.params[name] for name in ("omega", "alpha[1]", "beta[1]"))
    mine = _filtered(returns, omega, alpha, beta, start=float(returns.var()))
    theirs = fitted.conditional_volatility**2
    np.testing.assert_allclose(mine[300:-1], theirs[300:], rtol=1e-6)  # the start is forgotten
    ahead = fitted.forecast(horizon=5).variance.to_numpy()[-1]
    shocks = np.random.default_rng(0).normal(size=(5, 400_000))
    moves = _simulated(shocks, mine[-1], omega, alpha, beta)
    np.testing.assert_allclose(moves.var(axis=1), np.cumsum(ahead), rtol=0.02)


def test_later_rows_change_nothing():
    frame = market(700)
    origins = frame.index[600:650].to_numpy()
    seen = garch_quantiles(frame, origins, 5, QUANTILE_LEVELS, paths=200)
    frame.iloc[650:, :4] *= 3
    np.testing.assert_array_equal(
        garch_quantiles(frame, origins, 5, QUANTILE_LEVELS, paths=200), seen
    )


def test_too_little_history_is_said():
    frame = market(LEAST_RETURNS + 20)
    with pytest.raises(HistoryError, match=f"at least {LEAST_RETURNS}"):
        garch_quantiles(frame, frame.index[100:110].to_numpy(), 5, QUANTILE_LEVELS)
