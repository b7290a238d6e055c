"""The median of quantiles, as the server answers it and the flow `forecast` writes it."""

import numpy as np
import pytest

from forecasting.contract import QUANTILE_LEVELS
from forecasting.quantiles import medians


def test_a_level_of_one_half_is_the_median_itself():
    quantiles = np.random.default_rng(0).normal(size=(3, 5, 39)).astype(np.float32)
    assert QUANTILE_LEVELS[19] == 0.5
    assert (medians(quantiles, QUANTILE_LEVELS) == quantiles[..., 19]).all()


@pytest.mark.parametrize(
    "levels",
    [(0.1, 0.4, 0.7, 0.9), (0.05, 0.95), (0.1, 0.2, 0.45), (0.6, 0.8)],
    ids=["between two", "of two", "above all", "below all"],
)
def test_between_levels_it_is_interpolated_and_outside_them_it_is_the_nearest(levels):
    rng = np.random.default_rng(1)
    quantiles = np.sort(rng.normal(size=(4, 2, len(levels)))).astype(np.float32)
    found = medians(quantiles, levels)
    assert found.dtype == np.float32
    assert found.shape == (4, 2)
    for window in range(4):
        for step in range(2):
            slow = np.interp(0.5, levels, quantiles[window, step])
            assert found[window, step] == pytest.approx(slow, rel=1e-6, abs=1e-7)
