import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import ttest_1samp

from forecasting import metrics
from forecasting.contract import QUANTILE_LEVELS

FINE = (np.arange(4000) + 0.5) / 4000
numbers = st.floats(-1e3, 1e3, allow_nan=False, width=32)


def normal_quantiles(levels, mu=0.0, sigma=1.0):
    return np.array([NormalDist(mu, sigma).inv_cdf(float(level)) for level in levels])


def slow_pinball(y, q, p):
    return p * (y - q) if y >= q else (1 - p) * (q - y)


def test_pinball_against_a_loop():
    rng = np.random.default_rng(0)
    y, q = rng.normal(size=(4, 3)), rng.normal(size=(4, 3, 5))
    levels = (0.1, 0.3, 0.5, 0.7, 0.9)
    got = metrics.pinball(y, q, levels)
    for i, j, k in np.ndindex(4, 3, 5):
        assert got[i, j, k] == pytest.approx(slow_pinball(y[i, j], q[i, j, k], levels[k]))


@pytest.mark.parametrize("y", [-2.0, 0.0, 0.7, 3.1])
def test_crps_of_a_normal_is_the_closed_form(y):
    """Gneiting & Raftery 2007, eq. 5; at y = 0 it is 0.2337."""
    density, mass = NormalDist().pdf(y), NormalDist().cdf(y)
    exact = y * (2 * mass - 1) + 2 * density - 1 / math.sqrt(math.pi)
    got = metrics.crps(np.array([y]), normal_quantiles(FINE)[None, :], FINE)[0]
    assert got == pytest.approx(exact, abs=2e-3)
    if y == 0.0:
        assert got == pytest.approx(0.2337, abs=1e-3)


def test_crps_of_a_point_forecast_is_the_absolute_error():
    q = np.full((1, len(FINE)), 2.0)
    assert metrics.crps([5.0], q, FINE)[0] == pytest.approx(3.0)


def test_crps_prefers_the_truth():
    rng = np.random.default_rng(3)
    y = rng.normal(size=(4000, 1))
    score = {
        (mu, sigma): metrics.crps(
            y,
            np.broadcast_to(normal_quantiles(QUANTILE_LEVELS, mu, sigma), (4000, 1, 39)),
            QUANTILE_LEVELS,
        ).mean()
        for mu, sigma in [(0, 1), (0.4, 1), (-0.4, 1), (0, 0.6), (0, 1.6)]
    }
    assert min(score, key=score.__getitem__) == (0, 1)


@given(
    arrays(np.float64, (3, 2), elements=numbers),
    arrays(np.float64, (3, 2, 39), elements=numbers),
    numbers,
    st.floats(0.01, 100),
)
@settings(max_examples=50, deadline=None)
def test_crps_is_shift_free_scales_and_is_not_negative(y, q, shift, scale):
    base = metrics.crps(y, q, QUANTILE_LEVELS)
    assert base.shape == (3, 2)
    assert (base >= 0).all()
    moved = metrics.crps(y * scale + shift, q * scale + shift, QUANTILE_LEVELS)
    np.testing.assert_allclose(moved, base * scale, rtol=1e-6, atol=1e-8 * (1 + scale) * 1e3)


def test_crps_passes_on_what_is_not_a_number():
    q = np.zeros((2, 1, 39))
    q[1, 0, 5] = np.nan
    got = metrics.crps([[np.nan], [0.0]], q, QUANTILE_LEVELS)
    assert np.isnan(got).all()


def test_coverage_of_a_known_distribution():
    rng = np.random.default_rng(5)
    y = rng.normal(size=(20_000, 2)) * [1.0, 2.0]
    q = np.broadcast_to(normal_quantiles(QUANTILE_LEVELS), (20_000, 2, 39))
    for mass in (0.5, 0.8, 0.95):
        half = NormalDist().inv_cdf(0.5 + mass / 2)
        expected = [mass, 2 * NormalDist(0, 2).cdf(half) - 1]
        got = metrics.coverage(y, q, QUANTILE_LEVELS, mass)
        np.testing.assert_allclose(got, expected, atol=0.01)


def test_coverage_interpolates_and_counts_the_bounds():
    q = np.array([[[0.0, 1.0, 2.0, 3.0]]])
    levels = (0.1, 0.3, 0.7, 0.9)
    assert metrics.coverage([[0.5]], q, levels, 0.6) == 1.0  # 0.2 .. 0.8 is 0.5 .. 2.5
    assert metrics.coverage([[0.49]], q, levels, 0.6) == 0.0
    assert metrics.coverage([[3.0]], q, levels, 0.8) == 1.0
    with pytest.raises(ValueError, match=r"no central interval of mass 0\.9"):
        metrics.coverage([[0.5]], q, levels, 0.9)


def test_pit_is_the_level_of_the_outcome():
    q = normal_quantiles(FINE)
    y = np.array([-1.0, 0.0, 1.5])
    got = metrics.pit(y, np.broadcast_to(q, (3, len(q))), FINE)
    np.testing.assert_allclose(got, [NormalDist().cdf(v) for v in y], atol=1e-3)
    outside = metrics.pit([[-99.0, 99.0]], np.broadcast_to(q, (1, 2, len(q))), FINE)
    assert outside.tolist() == [[0.0, 1.0]]


def test_mase_by_hand():
    history = [1.0, 3.0, 2.0, 5.0]  # naive errors 2, 1, 3: mean 2
    assert metrics.mase([6.0, 7.0], [5.0, 9.0], history) == pytest.approx(1.5 / 2)
    assert metrics.mase([6.0], [5.0], history, step=2) == pytest.approx(1 / 1.5)
    with pytest.raises(ValueError, match="constant"):
        metrics.mase([1.0], [1.0], [2.0, 2.0])
    with pytest.raises(ValueError, match="no difference"):
        metrics.mase([1.0], [1.0], [2.0])


def slow_hac(d, lag):
    n, mean = len(d), sum(d) / len(d)
    total = 0.0
    for i in range(n):
        for j in range(n):
            weight = 1 - abs(i - j) / (lag + 1)
            if weight > 0:
                total += weight * (d[i] - mean) * (d[j] - mean)
    return total / n**2


@given(arrays(np.float64, 25, elements=numbers), st.integers(0, 8))
@settings(max_examples=50, deadline=None)
def test_hac_variance_against_a_double_loop(d, lag):
    got = metrics.hac_variance(d, lag)
    assert got >= 0
    assert got == pytest.approx(slow_hac(d.tolist(), lag), rel=1e-6, abs=1e-6)


def test_diebold_mariano_without_lags_is_the_t_test():
    d = np.random.default_rng(2).normal(0.2, 1, 80)
    t, p = metrics.diebold_mariano(d, 0)
    expected = ttest_1samp(d, 0.0)
    assert t == pytest.approx(expected.statistic)
    assert p == pytest.approx(expected.pvalue)
    mean, low, high = metrics.mean_ci(d, 0)
    interval = expected.confidence_interval(0.95)
    assert mean == pytest.approx(d.mean())
    assert (low, high) == pytest.approx((interval.low, interval.high))


def test_diebold_mariano_applies_the_small_sample_factor():
    d = np.random.default_rng(4).normal(0.2, 1, 60)
    lag, n = 4, 60
    factor = (n + 1 - 2 * 5 + 5 * 4 / n) / n  # Harvey, Leybourne & Newbold 1997, eq. 9
    plain = d.mean() / math.sqrt(slow_hac(d.tolist(), lag))
    t, _ = metrics.diebold_mariano(d, lag)
    assert t == pytest.approx(plain * math.sqrt(factor))
    back, _ = metrics.diebold_mariano(-d, lag)
    assert back == pytest.approx(-t)


def test_diebold_mariano_holds_its_size_on_overlapping_errors():
    """Equal forecasts are told apart at 5 % in about 5 % of samples, overlap or not."""
    rng = np.random.default_rng(9)
    steps = rng.normal(size=(600, 254))
    overlapping = np.lib.stride_tricks.sliding_window_view(steps, 5, axis=1).mean(axis=-1)
    rejected = np.mean([metrics.diebold_mariano(d, 10)[1] < 0.05 for d in overlapping])
    assert 0.02 < rejected < 0.10
    naive = np.mean([metrics.diebold_mariano(d, 0)[1] < 0.05 for d in overlapping])
    assert naive > 0.25


def test_differences_without_spread():
    assert metrics.diebold_mariano(np.zeros(30), 4) == (0.0, 1.0)
    assert metrics.diebold_mariano(np.full(30, -2.0), 4) == (-math.inf, 0.0)
    with pytest.raises(ValueError, match="needs more than 5 values"):
        metrics.diebold_mariano(np.zeros(5), 4)


def test_relative_ci_covers_the_true_ratio():
    rng = np.random.default_rng(11)
    inside = 0
    for _ in range(300):
        base = np.exp(rng.normal(4, 0.5, 150))
        loss = base * 0.97 + rng.normal(0, 8, 150)
        _, low, high = metrics.relative_ci(loss, base, 4)
        inside += low <= -0.03 <= high
    assert 0.90 < inside / 300 < 0.99


def test_relative_ci_is_free_of_units_and_needs_a_positive_base():
    rng = np.random.default_rng(12)
    base, loss = rng.uniform(50, 150, 60), rng.uniform(50, 150, 60)
    one, other = metrics.relative_ci(loss, base, 4), metrics.relative_ci(loss / 7, base / 7, 4)
    assert one == pytest.approx(other)
    assert one[0] == pytest.approx(loss.mean() / base.mean() - 1)
    with pytest.raises(ValueError, match="positive"):
        metrics.relative_ci(loss, np.zeros(60), 4)


def test_the_most_that_one_forecast_can_win_by_is_that_of_a_fine_grid_of_outcomes():
    rng = np.random.default_rng(8)
    levels = np.arange(1, 20) / 20
    own, other = np.sort(rng.normal(size=(2, 6, 19)))
    grid = np.linspace(-9, 9, 20_001)
    for q, reference, most in zip(
        own, 2 * other, metrics.most_better(own, 2 * other, levels), strict=True
    ):
        won = metrics.crps(grid, reference, levels) - metrics.crps(grid, q, levels)
        assert most >= won.max() - 1e-12
        assert most == pytest.approx(won.max(), abs=1e-3)


def test_a_forecast_that_is_its_own_best_cannot_win():
    q = np.array([-1.0, 0.0, 1.0])
    assert metrics.most_better(q, q, [0.25, 0.5, 0.75]) == 0


def test_a_normal_forecast_expects_what_normal_outcomes_bring():
    levels = np.arange(1, 40) / 40
    q = np.array([NormalDist().inv_cdf(level) for level in levels])
    outcomes = np.array([NormalDist().inv_cdf((i + 0.5) / 20_000) for i in range(20_000)])
    came = metrics.crps(outcomes, q, levels).mean()
    assert metrics.expected_crps(q, levels) == pytest.approx(came, rel=0.01)
    assert metrics.expected_crps(3 * q + 1, levels) == pytest.approx(
        3 * metrics.expected_crps(q, levels)
    )
