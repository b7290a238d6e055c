"""The quality benchmark's splits look at nothing ahead, and its scores are those of the metrics."""

import numpy as np
import pytest

from benchmarks.quality import HORIZON, PARTS, SYMBOLS, Scores, figures, held_out, splits
from forecasting import metrics
from forecasting.contract import QUANTILE_LEVELS


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.split} {part.first}")
def test_nothing_learned_from_reaches_into_what_is_tested(part):
    cut = splits(part)
    days = np.unique(np.concatenate([cut.train.origins, cut.validation.origins, cut.gate.origins]))
    first, last = np.datetime64(part.first), np.datetime64(part.last)
    assert first <= cut.gate.origins.min()
    assert cut.gate.origins.max() <= last
    assert np.unique(cut.gate.symbol).tolist() == [SYMBOLS.index("GOOG")]
    for earlier, later in ((cut.train, cut.validation), (cut.validation, cut.gate)):
        gap = np.searchsorted(days, later.origins.min()) - np.searchsorted(
            days, earlier.origins.max()
        )
        told = np.busday_count(earlier.origins.max(), later.origins.min())
        assert gap >= 1
        assert told > HORIZON  # five sessions and more lie between
    assert set(np.unique(cut.train.symbol)) == set(range(len(SYMBOLS)))


def test_scores_are_means_over_seeds_of_the_metrics():
    test = held_out(PARTS[0])
    rng = np.random.default_rng(0)
    shape = (*test.returns.shape, len(QUANTILE_LEVELS))
    runs = [np.sort(rng.normal(0, 0.02, shape), axis=-1) for _ in range(3)]
    scores = Scores.of(runs, test.returns, test.last_close)
    expected = [metrics.crps(test.returns, q, QUANTILE_LEVELS).mean(axis=0) * 1e4 for q in runs]
    np.testing.assert_allclose(scores.seeds, expected)
    np.testing.assert_allclose(scores.crps.mean(axis=0), np.mean(expected, axis=0))
    inside = [metrics.coverage(test.returns, q, QUANTILE_LEVELS, 0.8) * 100 for q in runs]
    np.testing.assert_allclose(scores.coverage(0), np.mean(inside, axis=0))
    still = Scores.of([np.zeros(shape)], test.returns, test.last_close)
    np.testing.assert_array_equal(still.mae, 1.0)


def test_a_contestant_against_itself_is_as_good():
    walk = {}
    for split in ("fixed", "walk-forward"):
        parts = [part for part in PARTS if part.split == split]
        returns = np.concatenate([held_out(part).returns for part in parts])
        close = np.concatenate([held_out(part).last_close for part in parts])
        spread = np.linspace(-0.05, 0.05, len(QUANTILE_LEVELS))
        same = Scores.of([np.tile(spread, (*returns.shape, 1))], returns, close)
        for name in (
            "perennial",
            "random walk, all residuals",
            "random walk, last 250",
            "GARCH(1,1), filtered history",
        ):
            walk[split, name] = same
    found = figures(walk)
    assert found["crps_wf_vs_rw"] == found["crps_fixed_vs_rw250"] == [1.0, 1.0]
    assert found["dm_t_vs_garch"] == [0.0, 0.0]
    assert found["price_mae_vs_rw"] == [1.0, 1.0]
