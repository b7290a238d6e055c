import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from forecasting.gate import GateVerdict, judge

RNG = np.random.default_rng(21)
WINDOWS, HORIZON = 120, 5
WALK = RNG.gamma(2.0, 60.0, (WINDOWS, HORIZON))


def decide(candidate, walk=WALK, production=None, tolerance=0.01, min_windows=100) -> GateVerdict:
    return judge(candidate, walk, production, tolerance=tolerance, min_windows=min_windows)


def noisy(factor: float, spread: float = 3.0) -> np.ndarray:
    return WALK * factor + np.random.default_rng(5).normal(0, spread, WALK.shape)


def test_a_better_first_model_passes():
    verdict = decide(noisy(0.95))
    assert verdict.promote
    assert verdict.reasons == ()
    assert verdict.relative_to_random_walk == pytest.approx(-0.05, abs=0.01)
    assert verdict.upper95 < 0
    assert verdict.production_crps is None
    assert verdict.windows == WINDOWS
    assert verdict.random_walk_crps == pytest.approx(WALK.mean())
    assert "Promoted: CRPS" in verdict.summary()


def test_a_first_model_equal_to_the_walk_is_no_worse():
    verdict = decide(WALK.copy())
    assert verdict.promote
    assert verdict.relative_to_random_walk == verdict.upper95 == 0.0


def test_a_worse_first_model_is_refused_with_the_figures():
    verdict = decide(noisy(1.04))
    assert not verdict.promote
    assert len(verdict.reasons) == 1
    assert "random walk" in verdict.reasons[0]
    assert "+4." in verdict.reasons[0]
    assert "at most +1.00% allowed" in verdict.reasons[0]
    assert verdict.summary().startswith("Refused: ")


def test_a_lucky_mean_with_a_wide_bound_is_refused():
    verdict = decide(WALK * np.where(np.arange(WINDOWS) % 40 < 20, 0.7, 1.28)[:, None])
    assert verdict.relative_to_random_walk < 0.01
    assert not verdict.promote
    assert "upper 95 % bound" in verdict.reasons[0]


def test_the_bound_is_exactly_the_tolerance():
    found = decide(noisy(0.99, 8.0))
    assert found.upper95 is not None
    assert decide(noisy(0.99, 8.0), tolerance=found.upper95).promote
    assert not decide(noisy(0.99, 8.0), tolerance=found.upper95 - 1e-9).promote


def test_the_bound_covers_one_sided():
    """A model that is truly 1 % worse passes in about one of twenty samples."""
    rng = np.random.default_rng(8)
    passed = 0
    for _ in range(400):
        walk = rng.gamma(4.0, 30.0, (150, HORIZON))
        candidate = walk * 1.01 + rng.normal(0, 10, walk.shape)
        passed += decide(candidate, walk).promote
    assert 0.01 < passed / 400 < 0.10


def test_a_later_model_must_beat_the_one_in_production():
    good = noisy(0.95)
    better = decide(good * 0.99, production=good)
    assert better.promote
    assert better.production_crps == pytest.approx(good.mean())
    assert "production" in better.summary()
    equal = decide(good.copy(), production=good)
    assert not equal.promote
    assert "No better than the model in production" in equal.reasons[0]
    worse = decide(good * 1.01, production=good)
    assert not worse.promote
    assert len(worse.reasons) == 1


def test_beating_a_weak_model_in_production_is_not_enough():
    verdict = decide(noisy(1.05), production=WALK * 2.0)
    assert not verdict.promote
    assert "random walk" in verdict.reasons[0]


def test_both_reasons_are_given():
    verdict = decide(noisy(1.05), production=noisy(0.95))
    assert len(verdict.reasons) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("who", ["candidate", "walk", "production"])
def test_anything_but_finite_numbers_is_refused(bad, who):
    scores = {"candidate": noisy(0.9), "walk": WALK.copy(), "production": noisy(0.95)}
    scores[who][7, 2] = bad
    verdict = decide(**scores)
    assert not verdict.promote
    named = {"walk": "random walk"}.get(who, who)
    assert f"1 of 600 scores of the {named} are not finite numbers" in verdict.reasons[0]
    json.dumps(asdict(verdict), allow_nan=False)


def test_too_few_windows_are_refused():
    verdict = decide(noisy(0.9)[:99], WALK[:99])
    assert not verdict.promote
    assert "Only 99 windows to judge on; at least 100 are required." in verdict.reasons
    assert verdict.windows == 99


def test_a_low_minimum_still_needs_enough_for_a_bound():
    verdict = decide(noisy(0.9)[:8], WALK[:8], min_windows=1)
    assert not verdict.promote
    assert "cannot be compared" in verdict.reasons[0]


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (np.ones((WINDOWS - 1, HORIZON)), "do not cover the same windows and horizons"),
        (np.ones((WINDOWS, HORIZON - 1)), "do not cover the same windows and horizons"),
        (np.ones(WINDOWS), r"shape (120,); [windows, horizons] expected"),
        (np.ones((WINDOWS, 0)), "[windows, horizons] expected"),
        (np.float64(3.0), "[windows, horizons] expected"),
        ("high", "are not numbers"),
        (None, "[windows, horizons] expected"),
        ([[1.0, 2.0], [3.0]], "are not numbers"),
    ],
)
def test_wrong_shapes_are_refused(candidate, reason):
    verdict = decide(candidate)
    assert not verdict.promote
    assert any(reason in each for each in verdict.reasons)


def test_a_walk_without_error_allows_no_comparison():
    verdict = decide(np.zeros_like(WALK), np.zeros_like(WALK))
    assert not verdict.promote
    assert "must be positive" in verdict.reasons[0]


def test_the_table_has_a_row_a_contestant():
    verdict = decide(noisy(0.95), production=noisy(0.97))
    rows = {row["contestant"]: row for row in verdict.table}
    assert list(rows) == ["candidate", "random walk", "production"]
    assert rows["candidate"]["crps_bp"] == pytest.approx(verdict.candidate_crps, abs=1e-3)
    assert rows["random walk"]["day_3"] == pytest.approx(WALK[:, 2].mean(), abs=1e-3)
    assert rows["candidate"]["dm_t"] < -2
    assert rows["random walk"]["dm_p"] == 1.0
    json.dumps(asdict(verdict), allow_nan=False)


def test_verdicts_are_values():
    verdict = decide(noisy(0.95))
    assert verdict == decide(noisy(0.95))
    assert replace(verdict, promote=False) != verdict
