"""Forecasts that a model has to beat: random walk, drift, HAR volatility.

Each gives quantiles of the cumulative log return close[t+h] / close[t] for h = 1..horizon, built
only from rows up to its origin t. A frame is a pandas DataFrame indexed by session with float
columns open, high, low, close, volume.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from forecasting.errors import HistoryError
from forecasting.metrics import Array

Origins = NDArray[np.datetime64]

_LEAST_RESIDUALS = 20
_HAR_WARMUP = 22
_VARIANCE_FLOOR = 1e-8


def random_walk_quantiles(
    frame: pd.DataFrame,
    origins: Origins,
    horizon: int,
    levels: Sequence[float],
    window: int | None = None,
) -> Array:
    """The last price, with the spread of past h-day returns around it.

    Args:
        frame: prices; rows after an origin are not used for it.
        origins: sessions from which forecasts start [n].
        horizon: days ahead h.
        levels: quantile levels [k].
        window: how many of the latest residuals to use; None takes all.

    Returns:
        Log-return quantiles [n, h, k].

    Raises:
        HistoryError: an origin is not a row of the frame, or has too few residuals behind it.
    """
    logs = _log_close(frame)
    rows = positions(frame, origins)
    residuals = [logs[step:] - logs[:-step] for step in range(1, horizon + 1)]
    return _residual_quantiles(residuals, rows, levels, window)


def drift_quantiles(
    frame: pd.DataFrame,
    origins: Origins,
    horizon: int,
    levels: Sequence[float],
    window: int | None = None,
) -> Array:
    """Random walk with drift: the mean daily return up to the origin goes on.

    The residuals are those that this forecast would have left in the past, with the drift known
    then. Arguments, shapes and errors as in `random_walk_quantiles`.
    """
    logs = _log_close(frame)
    rows = positions(frame, origins)
    days = np.arange(len(logs), dtype=np.float64)
    mean = np.divide(logs - logs[0], days, out=np.zeros_like(logs), where=days > 0)
    skip = _LEAST_RESIDUALS  # the mean of a few days is noise
    residuals = []
    for step in range(1, horizon + 1):
        error = logs[step:] - logs[:-step] - step * mean[:-step]
        error[:skip] = np.nan
        residuals.append(error)
    spread = _residual_quantiles(residuals, rows, levels, window)
    steps = np.arange(1, horizon + 1, dtype=np.float64)
    shift: Array = spread + (mean[rows][:, None] * steps)[:, :, None]
    return shift


def har_quantiles(
    frame: pd.DataFrame, origins: Origins, horizon: int, levels: Sequence[float]
) -> Array:
    """HAR volatility (Corsi 2009) on daily ranges, with filtered historical simulation.

    The log of the mean variance of the next h days is regressed on the log of the last day's,
    week's and month's; the spread is the forecast volatility times the quantiles of past returns
    in units of the volatility forecast for them. Fitted anew at each origin. Arguments, shapes
    and errors as in `random_walk_quantiles`.
    """
    rows = positions(frame, origins)
    logs, variance = _log_close(frame), range_variance(frame)
    design = _har_design(variance)
    out = np.empty((len(rows), horizon, len(levels)))
    for step in range(1, horizon + 1):
        target = np.log(_forward_mean(variance, step))
        returns = logs[step:] - logs[:-step]
        for i, row in enumerate(rows):
            past = slice(_HAR_WARMUP - 1, row - step + 1)
            if row - step + 1 - past.start < _LEAST_RESIDUALS:
                _too_short(frame, int(row), _HAR_WARMUP + _LEAST_RESIDUALS + step)
            beta = np.linalg.lstsq(design[past], target[past], rcond=None)[0]
            scaled = returns[past] * np.exp(-0.5 * design[past] @ beta)
            sigma = np.exp(0.5 * design[row] @ beta)
            out[i, step - 1] = sigma * np.quantile(scaled, levels)
    return out


def range_variance(frame: pd.DataFrame) -> Array:
    """Daily variance from the range: Parkinson (1980) plus the squared overnight gap [rows]."""
    high, low = frame["high"].to_numpy(np.float64), frame["low"].to_numpy(np.float64)
    opened, closed = frame["open"].to_numpy(np.float64), frame["close"].to_numpy(np.float64)
    gap = np.zeros(len(frame))
    gap[1:] = np.log(opened[1:] / closed[:-1])
    variance: Array = np.maximum(
        np.log(high / low) ** 2 / (4.0 * np.log(2.0)) + gap**2, _VARIANCE_FLOOR
    )
    return variance


def _har_design(variance: Array) -> Array:
    """Intercept and log variance of the last day, week (5) and month (22) [rows, 4]."""
    series = pd.Series(variance)
    columns = [np.log(series.rolling(days).mean().to_numpy()) for days in (1, 5, _HAR_WARMUP)]
    return np.column_stack([np.ones(len(variance)), *columns])


def _forward_mean(x: Array, step: int) -> Array:
    """Mean of the `step` values after each one [len(x) - step]."""
    total = np.concatenate([[0.0], np.cumsum(x)])
    mean: Array = (total[step + 1 :] - total[1:-step]) / step
    return mean


def log_returns(frame: pd.DataFrame) -> Array:
    """Log of each close over the one before it [rows - 1]."""
    returns: Array = np.diff(_log_close(frame))
    return returns


def _log_close(frame: pd.DataFrame) -> Array:
    logs: Array = np.log(frame["close"].to_numpy(np.float64))
    return logs


def positions(frame: pd.DataFrame, origins: Origins) -> NDArray[np.intp]:
    """Rows of origins [n].

    Raises:
        HistoryError: an origin is not a row of the frame.
    """
    index = pd.DatetimeIndex(frame.index)
    rows = index.get_indexer(pd.DatetimeIndex(np.asarray(origins, dtype="datetime64[D]")))
    if (rows < 0).any():
        missing = np.asarray(origins, dtype="datetime64[D]")[rows < 0]
        raise HistoryError(
            f"{len(missing)} forecast origins are no rows of the prices, first {missing[0]}; "
            f"the prices run from {index[0].date()} to {index[-1].date()}."
        )
    return rows


def _residual_quantiles(
    residuals: Sequence[Array],
    rows: NDArray[np.intp],
    levels: Sequence[float],
    window: int | None,
) -> Array:
    """Quantiles of the residuals known at each row; `residuals[h-1][s]` is known at row s + h."""
    out = np.empty((len(rows), len(residuals), len(levels)))
    for step, errors in enumerate(residuals, start=1):
        known = np.maximum(rows - step + 1, 0)  # how many of the residuals
        full = _full_windows(errors, known, window)
        if window is not None and full.any():  # all at once; sorting first is faster
            windows = sliding_window_view(errors, window)[known[full] - window]
            out[full, step - 1] = np.quantile(np.sort(windows, axis=1), levels, axis=1).T
        for i in np.flatnonzero(~full):
            out[i, step - 1] = _quantiles_known(errors[: known[i]], levels, window, step, rows[i])
    return out


def _full_windows(errors: Array, known: NDArray[np.intp], window: int | None) -> NDArray[np.bool_]:
    """Where the latest `window` residuals are there and all of them are numbers."""
    if window is None:
        return np.zeros(len(known), dtype=np.bool_)
    first = len(errors) - len(np.trim_zeros(np.isfinite(errors), "f"))
    full: NDArray[np.bool_] = known - window >= first
    return full


def _quantiles_known(
    errors: Array, levels: Sequence[float], window: int | None, step: int, row: int
) -> Array:
    known = errors[np.isfinite(errors)]
    known = known if window is None else known[-window:]
    if len(known) < _LEAST_RESIDUALS:
        raise HistoryError(
            f"A {step}-day forecast from row {row} knows {len(known)} past residuals; "
            f"at least {_LEAST_RESIDUALS} are needed. Start at a later origin."
        )
    quantiles: Array = np.quantile(known, levels)
    return quantiles


def _too_short(frame: pd.DataFrame, row: int, needed: int) -> None:
    raise HistoryError(
        f"HAR from {pd.DatetimeIndex(frame.index)[row].date()} has {row + 1} rows behind it; "
        f"at least {needed} are needed. Start at a later origin."
    )
