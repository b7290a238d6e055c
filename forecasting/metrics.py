"""Scores of probabilistic forecasts. NumPy only; every array carries its own units.

Shapes: n windows, h horizons, k quantile levels. Scores are proper: lower is better, and only the
true distribution minimises them in expectation.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr, stdtrit  # scipy.stats takes a second to import

Array = NDArray[np.float64]

BASIS_POINTS = 1e4
"""Log returns times this are basis points, the unit of every CRPS that perennial reports."""


def pinball(y: ArrayLike, q: ArrayLike, levels: ArrayLike) -> Array:
    """Pinball loss max(p (y - q), (p - 1) (y - q)) of each quantile (Koenker & Bassett 1978).

    Args:
        y: outcomes [...].
        q: quantiles [..., k].
        levels: probabilities p in (0, 1) [k].

    Returns:
        Loss [..., k], in units of `y`.
    """
    p = np.asarray(levels, dtype=np.float64)
    gap = np.asarray(y, dtype=np.float64)[..., None] - np.asarray(q, dtype=np.float64)
    return np.maximum(p * gap, (p - 1.0) * gap)


def crps(y: ArrayLike, q: ArrayLike, levels: ArrayLike) -> Array:
    """Continuous ranked probability score as twice the mean pinball loss over the levels.

    With evenly spaced levels this is the quantile form of the CRPS (Gneiting & Ranjan 2011, eq. 6)
    on a grid. NaN in either argument gives NaN.

    Args:
        y: outcomes [...], e.g. [n, h].
        q: quantiles [..., k].
        levels: probabilities [k].

    Returns:
        Score [...], in units of `y`.
    """
    score: Array = 2.0 * pinball(y, q, levels).mean(axis=-1)
    return score


def most_better(q: ArrayLike, other: ArrayLike, levels: ArrayLike) -> Array:
    """The most by which the CRPS of one forecast can be below another's, whatever comes.

    The difference of both scores is linear between quantiles and constant beyond them, so it is
    largest at one of the quantiles.

    Args:
        q: quantiles of the one [..., k].
        other: quantiles of the other [..., k].
        levels: probabilities of both [k].

    Returns:
        Never negative [...], in units of the quantiles.
    """
    own, reference = np.asarray(q, dtype=np.float64), np.asarray(other, dtype=np.float64)
    most: Array = np.zeros(np.broadcast_shapes(own.shape, reference.shape)[:-1])
    for step in range(own.shape[-1]):
        for y in (own[..., step], reference[..., step]):
            most = np.maximum(most, crps(y, reference, levels) - crps(y, own, levels))
    return most


def expected_crps(q: ArrayLike, levels: ArrayLike) -> Array:
    """The CRPS that a forecast expects of itself: its mean where outcomes follow the forecast.

    Between two levels outcomes are taken to lie halfway, beyond the outermost as far out as an
    exponential tail through the last two levels does on average (the score is linear there).

    Args:
        q: quantiles [..., k], ascending, at least two.
        levels: probabilities [k], ascending, in (0, 1).

    Returns:
        Score [...], in units of the quantiles.
    """
    p, own = np.asarray(levels, dtype=np.float64), np.asarray(q, dtype=np.float64)
    low = own[..., 0] - (own[..., 1] - own[..., 0]) / np.log(p[1] / p[0])
    high = own[..., -1] + (own[..., -1] - own[..., -2]) / np.log((1 - p[-2]) / (1 - p[-1]))
    total: Array = p[0] * crps(low, own, p) + (1 - p[-1]) * crps(high, own, p)
    for step in range(len(p) - 1):
        middle = (own[..., step] + own[..., step + 1]) / 2
        total = total + (p[step + 1] - p[step]) * crps(middle, own, p)
    return total


def coverage(y: ArrayLike, q: ArrayLike, levels: ArrayLike, mass: float) -> Array:
    """Share of outcomes inside the central interval of probability `mass`, per horizon.

    Args:
        y: outcomes [n, h].
        q: quantiles [n, h, k], ascending levels.
        levels: probabilities [k].
        mass: probability of the interval, e.g. 0.8.

    Returns:
        Shares [h].

    Raises:
        ValueError: see `inside`.
    """
    share: Array = inside(y, q, levels, mass).mean(axis=0)
    return share


def inside(y: ArrayLike, q: ArrayLike, levels: ArrayLike, mass: float) -> NDArray[np.bool_]:
    """Whether each outcome lies in the central interval of probability `mass`.

    Bounds between two levels are interpolated; an outcome on a bound counts as inside.

    Args:
        y: outcomes [...].
        q: quantiles [..., k], ascending levels.
        levels: probabilities [k].
        mass: probability of the interval, e.g. 0.8.

    Returns:
        [...].

    Raises:
        ValueError: the levels do not reach as far out as the interval.
    """
    p = np.asarray(levels, dtype=np.float64)
    low, high = (1.0 - mass) / 2.0, (1.0 + mass) / 2.0
    slack = 1e-9
    if not p[0] - slack <= low <= high <= p[-1] + slack:
        raise ValueError(f"levels {p[0]:g}..{p[-1]:g} hold no central interval of mass {mass:g}")
    outcome, quantiles = np.asarray(y, dtype=np.float64), np.asarray(q, dtype=np.float64)
    held: NDArray[np.bool_] = (outcome >= at_level(quantiles, p, low)) & (
        outcome <= at_level(quantiles, p, high)
    )
    return held


def at_level(q: ArrayLike, levels: ArrayLike, level: float) -> Array:
    """Quantile at one level, linear between its neighbours.

    Args:
        q: quantiles [..., k].
        levels: probabilities [k], ascending.
        level: which, within the levels.

    Returns:
        [...].
    """
    p, quantiles = np.asarray(levels, dtype=np.float64), np.asarray(q, dtype=np.float64)
    right = int(np.clip(np.searchsorted(p, level - 1e-9), 1, len(p) - 1))
    weight = (level - p[right - 1]) / (p[right] - p[right - 1])
    weight = min(max(round(float(weight), 9), 0.0), 1.0)  # a level itself gives its quantile
    between: Array = (1.0 - weight) * quantiles[..., right - 1] + weight * quantiles[..., right]
    return between


def pit(y: ArrayLike, q: ArrayLike, levels: ArrayLike) -> Array:
    """Probability integral transform: the level at which each outcome lies (Dawid 1984).

    Uniform on (0, 1) if the forecasts are calibrated. Linear between quantiles; an outcome below
    the lowest or above the highest quantile gets 0 or 1.

    Args:
        y: outcomes [...].
        q: quantiles [..., k], not decreasing along k.
        levels: probabilities [k], ascending.

    Returns:
        Levels [...].
    """
    p = np.asarray(levels, dtype=np.float64)
    outcome = np.asarray(y, dtype=np.float64)
    rows = np.asarray(q, dtype=np.float64).reshape(-1, len(p))
    flat = [
        np.interp(value, row, p, left=0.0, right=1.0)
        for value, row in zip(outcome.ravel(), rows, strict=True)
    ]
    return np.asarray(flat, dtype=np.float64).reshape(outcome.shape)


def mase(actual: ArrayLike, forecast: ArrayLike, history: ArrayLike, step: int = 1) -> float:
    """Mean absolute scaled error (Hyndman & Koehler 2006).

    Args:
        actual: outcomes [n].
        forecast: point forecasts [n], in units of `actual`.
        history: the series before the first origin [m], which gives the scale.
        step: the naive forecast in the scale is the value `step` rows earlier.

    Returns:
        Mean absolute error over that of the naive forecast within `history`; 1 is as good.

    Raises:
        ValueError: the history is too short, or constant, so there is no scale.
    """
    past = np.asarray(history, dtype=np.float64)
    if past.size <= step:
        raise ValueError(f"history of {past.size} rows gives no difference over {step} rows")
    scale = float(np.abs(past[step:] - past[:-step]).mean())
    if scale == 0.0:
        raise ValueError("history is constant: the naive error that scales MASE is zero")
    error = np.abs(np.asarray(actual, dtype=np.float64) - np.asarray(forecast, dtype=np.float64))
    return float(error.mean()) / scale


def hac_variance(d: ArrayLike, lag: int) -> float:
    """Variance of the mean of an autocorrelated series (Newey & West 1987, Bartlett weights).

    Args:
        d: series [n], in time order.
        lag: autocovariances taken into account; at least h - 1 for errors that overlap h days.

    Returns:
        Variance of `mean(d)`; never negative.

    Raises:
        ValueError: the lag is negative or the series has no more than `lag` + 1 values.
    """
    x = np.asarray(d, dtype=np.float64)
    n = x.size
    if lag < 0 or n <= lag + 1:
        raise ValueError(f"a lag of {lag} needs more than {lag + 1} values in time order, got {n}")
    x = x - x.mean()
    total = float(x @ x)
    for k in range(1, lag + 1):
        total += 2.0 * (1.0 - k / (lag + 1)) * float(x[k:] @ x[:-k])
    return max(total, 0.0) / n**2


def _standard_error(d: ArrayLike, lag: int) -> float:
    """HAC standard error of the mean with the small-sample factor of Harvey et al. (1997)."""
    n, steps, variance = np.size(d), lag + 1, hac_variance(d, lag)
    factor = (n + 1 - 2 * steps + steps * (steps - 1) / n) / n
    if factor <= 0.0:
        raise ValueError(f"{n} values are too few for errors that overlap {steps} days")
    return float(np.sqrt(variance / factor))


def diebold_mariano(d: ArrayLike, lag: int) -> tuple[float, float]:
    """Test that two forecasts are equally good, from the difference of their losses.

    Diebold & Mariano (1995) with Newey-West variance, the correction of Harvey, Leybourne &
    Newbold (1997) and n - 1 degrees of freedom.

    Args:
        d: loss of the first minus loss of the second [n], in time order.
        lag: see `hac_variance`.

    Returns:
        (t, two-sided p). Negative t favours the first. All-zero differences give (0, 1).
    """
    x = np.asarray(d, dtype=np.float64)
    mean, error = float(x.mean()), _standard_error(x, lag)
    if error == 0.0:
        return (0.0, 1.0) if mean == 0.0 else (float(np.copysign(np.inf, mean)), 0.0)
    t = mean / error
    return t, float(2.0 * stdtr(x.size - 1, -abs(t)))


def mean_ci(d: ArrayLike, lag: int, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of an autocorrelated series with a two-sided confidence interval.

    Args:
        d: series [n], in time order.
        lag: see `hac_variance`.
        level: probability of the interval. The upper end at level 0.9 is a one-sided 95 % bound.

    Returns:
        (mean, lower, upper), in units of `d`.
    """
    x = np.asarray(d, dtype=np.float64)
    mean = float(x.mean())
    half = float(stdtrit(x.size - 1, 0.5 + level / 2.0)) * _standard_error(x, lag)
    return mean, mean - half, mean + half


def relative_ci(
    loss: ArrayLike, base: ArrayLike, lag: int, level: float = 0.95
) -> tuple[float, float, float]:
    """Relative difference of two mean losses, mean(loss) / mean(base) - 1, with its interval.

    The standard error is that of a ratio of means to first order (delta method), HAC as above.

    Args:
        loss: losses [n], in time order.
        base: losses on the same windows [n], of positive mean.
        lag: see `hac_variance`.
        level: probability of the two-sided interval.

    Returns:
        (relative difference, lower, upper); -0.02 means 2 % better than `base`.

    Raises:
        ValueError: the mean of `base` is not positive, or there are too few values for the lag.
    """
    a, b = np.asarray(loss, dtype=np.float64), np.asarray(base, dtype=np.float64)
    mean = float(b.mean())
    if not mean > 0.0:
        raise ValueError(f"mean loss of the base must be positive, got {mean:g}")
    ratio = float(a.mean()) / mean
    _, low, high = mean_ci((a - ratio * b) / mean, lag, level)
    return ratio - 1.0, ratio - 1.0 + low, ratio - 1.0 + high
