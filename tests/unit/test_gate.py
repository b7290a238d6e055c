"""The rule alone, on scores that are made up; real candidates are in `test_planted`."""

import json
from dataclasses import asdict, replace
from statistics import NormalDist

import numpy as np
import pytest

from forecasting.contract import QUANTILE_LEVELS
from forecasting.gate import (
    BETTER,
    CANDIDATE,
    IMPLAUSIBLE,
    INTERVALS,
    PRODUCTION,
    SLICE_DAYS,
    WALK,
    Evidence,
    GateVerdict,
    Rule,
    judge,
)
from forecasting.metrics import coverage, hac_variance, inside

RNG = np.random.default_rng(21)
WINDOWS, HORIZON = 120, 5
WALKED = RNG.gamma(2.0, 60.0, (WINDOWS, HORIZON))
NORMAL = np.array([NormalDist().inv_cdf(level) for level in QUANTILE_LEVELS])
RETURNS = RNG.normal(0.0, 0.02, (WINDOWS, HORIZON))
DAYS = np.arange(WINDOWS) + np.datetime64("2007-01-03")


def evidence(candidate, walk=WALKED, production=None, classical=None, **changes) -> Evidence:
    """Of one symbol whose intervals hold; HAR is as good as the walk if it is not given."""
    n = len(walk)
    crps = {CANDIDATE: candidate, WALK: walk, "HAR": walk if classical is None else classical}
    if production is not None:
        crps[PRODUCTION] = production
    quantiles = np.broadcast_to(0.02 * NORMAL, (n, HORIZON, len(NORMAL)))
    found = Evidence(
        origins=np.arange(n) + DAYS[0],
        symbols=np.full(n, "GOOG"),
        last_close=np.full(n, 100.0),
        returns=RETURNS[:n] if n <= WINDOWS else np.resize(RETURNS, (n, HORIZON)),
        levels=QUANTILE_LEVELS,
        quantiles=quantiles,
        crps=crps,
        classical="HAR",
        volatility=(np.arange(n) + 0.5) / n,
        slices={},
        served=np.ones(n, dtype=bool),
        fresher=True,
    )
    return replace(found, **changes)


def decide(
    candidate, walk=WALKED, production=None, classical=None, uses=0.0, tolerance=0.01, **changes
) -> GateVerdict:
    min_days = changes.pop("min_days", 100)
    found = evidence(candidate, walk, production, classical, **changes)
    return judge(found, Rule(tolerance, 0.03, min_days, uses))


def noisy(factor: float, spread: float = 3.0) -> np.ndarray:
    return WALKED * factor + np.random.default_rng(5).normal(0, spread, WALKED.shape)


def against(verdict: GateVerdict, opponent: str):
    (found,) = [each for each in verdict.pairings if each.opponent == opponent]
    return found


# --- random walk ---------------------------------------------------------------------------------


def test_a_better_first_model_passes():
    verdict = decide(noisy(0.95))
    assert verdict.promote
    assert verdict.reasons == ()
    assert verdict.relative_to_random_walk == pytest.approx(-0.05, abs=0.01)
    assert verdict.upper < 0
    assert verdict.production_crps is None
    assert (verdict.windows, verdict.days) == (WINDOWS, WINDOWS)
    assert (verdict.first_day, verdict.last_day) == ("2007-01-03", str(DAYS[-1]))
    assert verdict.random_walk_crps == pytest.approx(WALKED.mean())
    assert "Promoted: CRPS" in verdict.summary()
    assert "(upper 95 % bound -" in verdict.summary()


def test_a_first_model_equal_to_the_walk_is_no_worse():
    verdict = decide(WALKED.copy())
    assert verdict.promote
    assert verdict.relative_to_random_walk == verdict.upper == 0.0


def test_a_worse_first_model_is_refused_with_the_figures():
    verdict = decide(noisy(1.04), classical=WALKED * 1.04)
    assert not verdict.promote
    assert len(verdict.reasons) == 1
    assert "random walk" in verdict.reasons[0]
    assert "+4." in verdict.reasons[0]
    assert "at most +1.00% allowed" in verdict.reasons[0]
    assert verdict.summary().startswith("Refused: ")


def test_a_lucky_mean_with_a_wide_bound_is_refused():
    verdict = decide(WALKED * np.where(np.arange(WINDOWS) % 40 < 20, 0.7, 1.28)[:, None])
    assert verdict.relative_to_random_walk < 0.01
    assert not verdict.promote
    assert "upper 95 % bound" in verdict.reasons[0]


def test_the_bound_is_exactly_the_tolerance():
    found = decide(noisy(1.0, 8.0))
    assert found.upper is not None
    assert found.upper > 0
    assert decide(noisy(1.0, 8.0), tolerance=found.upper).promote
    assert not decide(noisy(1.0, 8.0), tolerance=found.upper - 1e-9).promote


def test_the_bound_covers_one_sided():
    """A model that is truly 1 % worse passes in about one of twenty samples."""
    rng = np.random.default_rng(8)
    passed = 0
    for _ in range(400):
        walk = rng.gamma(4.0, 30.0, (150, HORIZON))
        candidate = walk * 1.01 + rng.normal(0, 10, walk.shape)
        passed += decide(candidate, walk).promote
    assert 0.01 < passed / 400 < 0.10


# --- the best classical baseline -----------------------------------------------------------------


def test_a_classical_baseline_that_is_far_better_refuses():
    verdict = decide(noisy(0.99, 1.0), classical=WALKED * 0.94)
    assert len(verdict.reasons) == 1
    assert verdict.reasons[0].startswith("Not shown to be as good as HAR: ")
    assert "at most +3.00% allowed" in verdict.reasons[0]


def test_a_classical_baseline_that_is_a_little_better_does_not():
    verdict = decide(noisy(0.96, 1.0), classical=WALKED * 0.95)
    assert verdict.promote
    assert against(verdict, "HAR").limit == 0.03
    assert verdict.classical_crps == pytest.approx(WALKED.mean() * 0.95)
    assert f"HAR {verdict.classical_crps:.1f}." in verdict.summary()


def test_one_that_was_not_the_best_on_validation_is_shown_only():
    other = evidence(noisy(0.96, 1.0)).crps | {"GARCH": WALKED * 0.85}
    verdict = decide(noisy(0.96, 1.0), crps=other)
    assert verdict.promote
    assert against(verdict, "GARCH").limit is None
    assert [row["contestant"] for row in verdict.table][-1] == "GARCH"


def test_without_a_classical_baseline_there_is_no_verdict():
    verdict = decide(noisy(0.9), classical=None, crps={CANDIDATE: noisy(0.9), WALK: WALKED})
    assert verdict.reasons == ("No classical baseline could be computed to compare with.",)


# --- production ----------------------------------------------------------------------------------


def test_better_beyond_doubt_passes_whatever_it_has_learned_from():
    good = noisy(0.95)
    for fresher in (True, False):
        verdict = decide(good * 0.98, production=good, fresher=fresher)
        assert verdict.promote
        assert verdict.production_crps == pytest.approx(good.mean())
        assert "production" in verdict.summary()
        assert against(verdict, PRODUCTION).upper < 0


def test_of_equals_the_one_that_has_learned_from_later_days_passes():
    good = noisy(0.95)
    assert decide(good.copy(), production=good, fresher=True).promote
    refused = decide(good.copy(), production=good, fresher=False)
    assert len(refused.reasons) == 1
    assert "Not shown to be better than the model in production" in refused.reasons[0]
    assert (
        "below zero is needed of a candidate that has learned from no later days"
        in (refused.reasons[0])
    )


def test_thin_evidence_of_a_gain_is_not_enough_on_the_same_data():
    """The mean is lower, the bound is not below zero: chance may have chosen it."""
    good = noisy(0.95)
    lucky = good * 0.999 + np.random.default_rng(1).normal(0, 6, good.shape)
    found = against(decide(lucky, production=good), PRODUCTION)
    assert found.relative < 0 < found.upper < 0.01
    assert decide(lucky, production=good, fresher=True).promote
    assert not decide(lucky, production=good, fresher=False).promote


def test_a_fresher_one_that_may_be_worse_is_refused():
    good = noisy(0.95)
    verdict = decide(good * 1.02, production=good)
    assert len(verdict.reasons) == 1
    assert verdict.reasons[0].startswith("Not shown to be as good as the model in production: ")
    assert "at most +1.00% allowed" in verdict.reasons[0]


def test_being_as_good_as_a_weak_production_is_not_enough():
    production = noisy(1.05) + np.random.default_rng(6).normal(0.2, 3.0, WALKED.shape)
    verdict = decide(noisy(1.05), production=production)
    assert 0.0 < against(verdict, PRODUCTION).upper < 0.01
    assert [each.split(":")[0] for each in verdict.reasons] == [
        "Not shown to be as good as the random walk",
        "Not shown to be as good as HAR",
    ]


def test_every_reason_is_given():
    verdict = decide(noisy(1.05), production=noisy(0.95))
    assert len(verdict.reasons) == 3


# --- better than production beyond doubt ---------------------------------------------------------


def test_what_is_better_beyond_doubt_replaces_production():
    verdict = decide(noisy(1.05), production=WALKED * 1.15)
    assert verdict.promote
    assert verdict.provisional
    better, walk, classical = verdict.notes
    assert better == BETTER
    assert walk.startswith("Not shown to be as good as the random walk: mean CRPS ")
    assert classical.startswith("Not shown to be as good as HAR: ")
    assert walk in verdict.summary()
    assert verdict.summary().startswith("Promoted provisionally: CRPS ")


def test_only_if_it_is_better_beyond_doubt():
    production = WALKED * np.where(np.arange(WINDOWS) % 40 < 20, 0.8, 1.35)[:, None]
    verdict = decide(noisy(1.05), production=production)
    pair = against(verdict, PRODUCTION)
    assert pair.relative < 0 < pair.upper
    assert "Not shown to be as good as the random walk" in verdict.reasons[0]
    assert verdict.notes == ()
    assert not verdict.provisional


def test_what_passes_without_that_is_not_provisional():
    verdict = decide(noisy(0.95), production=WALKED * 1.15)
    assert against(verdict, PRODUCTION).upper < 0
    assert (verdict.promote, verdict.provisional, verdict.notes) == (True, False, ())


def test_symbols_that_production_does_not_serve_would_get_a_first_model():
    served = np.arange(WINDOWS) % 2 == 0
    verdict = decide(noisy(1.05), production=WALKED * 1.15, served=served)
    assert "Not shown to be as good as the random walk" in verdict.reasons[0]
    assert verdict.notes == ()


def test_a_slice_that_is_worse_than_the_walks_makes_it_provisional():
    calm = np.arange(WINDOWS) < 60
    shape = np.where(calm, 1.05, 0.85)[:, None]
    slices = {"calm": calm, "volatile": ~calm}
    verdict = decide(noisy(shape), production=WALKED * 1.15, slices=slices, tolerance=0.1)
    assert (verdict.promote, verdict.provisional) == (True, True)
    assert [note.split(":")[0] for note in verdict.notes[1:]] == [
        "Worse than the random walk on the 60 days that are calm"
    ]
    production = WALKED * np.where(calm, 1.0, 1.5)[:, None]
    refused = decide(noisy(shape), production=production, slices=slices, tolerance=0.1)
    assert [each.split(":")[0] for each in refused.reasons] == [
        "Worse than the random walk on the 60 days that are calm",
        "Worse than the production on the 60 days that are calm",
    ]


def test_width_is_paid_for_in_crps_then():
    wide = np.broadcast_to(0.06 * NORMAL, (WINDOWS, HORIZON, len(NORMAL)))
    verdict = decide(noisy(0.95), production=WALKED * 1.15, quantiles=wide)
    assert (verdict.promote, verdict.provisional) == (True, True)
    assert [note.split(":")[0] for note in verdict.notes[1:]] == ["Too cautious"]
    first = decide(noisy(0.95), quantiles=wide)
    assert [each.split(":")[0] for each in first.reasons] == ["Too cautious"]


def test_a_graver_fault_refuses_with_all_that_is_wrong():
    narrow = np.broadcast_to(0.01 * NORMAL, (WINDOWS, HORIZON, len(NORMAL)))
    verdict = decide(noisy(1.05), production=WALKED * 1.15, quantiles=narrow)
    assert [each.split(":")[0] for each in verdict.reasons] == [
        "Not shown to be as good as the random walk",
        "Not shown to be as good as HAR",
        *["Overconfident"] * 2,
    ]
    assert (verdict.provisional, verdict.notes) == (False, ())


def production_held(width: float) -> dict[float, np.ndarray]:
    """What intervals hold that are `width` times as wide as is right."""
    quantiles = evidence(0).quantiles * width
    return {mass: inside(RETURNS, quantiles, QUANTILE_LEVELS, mass) for mass in INTERVALS}


def test_overconfident_replaces_only_what_holds_no_more():
    narrow = evidence(0).quantiles * 0.6
    better = {"production": WALKED * 1.15, "quantiles": narrow}
    verdict = decide(noisy(0.95), held=production_held(0.5), **better)
    assert (verdict.promote, verdict.provisional) == (True, True)
    assert [note.split(" interval")[0] for note in verdict.notes[1:]] == [
        "Overconfident: the 80 %",
        "Overconfident: the 95 %",
    ]
    low, _ = verdict.intervals
    assert low.production == pytest.approx(production_held(0.5)[0.8].mean())
    assert f"{low.production:.1%} in production" in verdict.notes[1]
    assert decide(noisy(0.95), held=production_held(0.6), **better).promote  # it loses nothing
    refused = decide(noisy(0.95), held=production_held(0.7), **better)
    assert [each.split(":")[0] for each in refused.reasons] == ["Overconfident"] * 2


def test_one_interval_that_holds_less_than_productions_refuses():
    held = {0.8: production_held(0.5)[0.8], 0.95: production_held(0.7)[0.95]}
    narrow = evidence(0).quantiles * 0.6
    verdict = decide(noisy(0.95), production=WALKED * 1.15, quantiles=narrow, held=held)
    assert [each.split(" interval")[0] for each in verdict.reasons] == [
        "Overconfident: the 80 %",
        "Overconfident: the 95 %",
    ]


def test_overconfident_is_refused_where_production_is_not_shown_to_be_worse():
    narrow = evidence(0).quantiles * 0.6
    verdict = decide(noisy(0.95), production=noisy(0.95), quantiles=narrow, held=production_held(0))
    assert [each.split(":")[0] for each in verdict.reasons] == ["Overconfident"] * 2


def test_production_that_does_not_answer_all_is_no_measure_of_intervals():
    served = np.arange(WINDOWS) % 2 == 0
    held = production_held(0.5)
    verdict = decide(noisy(0.95), production=WALKED * 1.15, served=served, held=held)
    assert [each.production for each in verdict.intervals] == [None, None]


# --- thin evidence against the random walk -------------------------------------------------------

SWINGS = np.where(np.arange(WINDOWS) % 40 < 20, 0.7, 1.25)[:, None]
"""In the mean a little better than the walk, in stretches far better or far worse."""


def test_thin_evidence_does_not_keep_out_what_is_no_worse_than_production():
    scores = WALKED * SWINGS
    first = decide(scores, classical=scores)
    assert first.relative_to_random_walk < 0 < 0.01 < first.upper
    assert [each.split(":")[0] for each in first.reasons] == [
        "Not shown to be as good as the random walk"
    ]
    later = decide(scores, classical=scores, production=scores * 1.001)
    assert later.promote
    (note,) = later.notes
    assert note.startswith("Evidence against the random walk is thin (bound +")
    assert later.summary().endswith(note)


def test_it_keeps_out_what_is_worse_than_production():
    scores = WALKED * SWINGS
    refused = decide(scores, classical=scores, production=scores * 0.98)
    assert [each.split(":")[0] for each in refused.reasons] == [
        "Not shown to be as good as the random walk",
        "Not shown to be as good as the model in production",
    ]
    assert refused.notes == ()
    equal = decide(scores, classical=scores, production=scores, fresher=False)
    assert len(equal.reasons) == 2


def test_a_mean_above_the_walks_is_not_thin_evidence():
    scores = WALKED * (SWINGS + 0.035)
    production = scores + np.random.default_rng(6).normal(0.2, 3.0, WALKED.shape)
    refused = decide(scores, classical=scores, production=production)
    assert 0 < against(refused, PRODUCTION).upper < 0.01
    assert 0 < refused.relative_to_random_walk < 0.01
    assert [each.split(":")[0] for each in refused.reasons] == [
        "Not shown to be as good as the random walk"
    ]


# --- the figures ---------------------------------------------------------------------------------


def test_windows_of_several_symbols_count_once_a_day():
    """Twice the same symbol is no more evidence than once."""
    one = decide(noisy(0.97, 8.0))
    twice = {
        name: np.concatenate([getattr(evidence(noisy(0.97, 8.0)), name)] * 2)
        for name in ("origins", "symbols", "last_close", "returns", "quantiles", "volatility")
    }
    crps = {CANDIDATE: noisy(0.97, 8.0), WALK: WALKED, "HAR": WALKED}
    both = decide(
        noisy(0.97, 8.0),
        crps={name: np.concatenate([values, values]) for name, values in crps.items()},
        served=np.ones(2 * WINDOWS, dtype=bool),
        **twice,
    )
    assert (both.windows, both.days) == (2 * WINDOWS, WINDOWS)
    assert both.upper == pytest.approx(one.upper)
    assert both.intervals[0].low == pytest.approx(one.intervals[0].low)
    assert both.table == one.table


def test_production_is_compared_on_the_symbols_that_it_serves():
    served = np.arange(WINDOWS) < 80
    production = np.where(served[:, None], WALKED * 0.99, np.nan)
    verdict = decide(noisy(0.95), production=production, served=served)
    assert verdict.promote
    assert against(verdict, PRODUCTION).crps == pytest.approx(WALKED[:80].mean() * 0.99)
    assert verdict.production_crps == pytest.approx(WALKED[:80].mean() * 0.99)
    none = decide(noisy(0.95), production=production * np.nan, served=np.zeros(WINDOWS, dtype=bool))
    assert "The model in production serves none of the candidate's symbols." in none.reasons


def test_differences_and_their_interval_are_in_basis_points():
    found = against(decide(noisy(0.95)), WALK)
    gaps = (noisy(0.95) - WALKED).mean(axis=1)
    assert found.difference == pytest.approx(gaps.mean())
    assert found.low < found.difference < found.high
    assert found.dm_t == pytest.approx(found.difference / (found.high - found.low) * 2 * 1.98, 0.01)
    assert found.dm_p < 0.05


def test_the_table_has_a_row_a_contestant():
    verdict = decide(noisy(0.95), production=noisy(0.97))
    rows = {row["contestant"]: row for row in verdict.table}
    assert list(rows) == ["candidate", "random walk", "HAR", "production"]
    assert rows["candidate"]["crps_bp"] == pytest.approx(verdict.candidate_crps, abs=1e-3)
    assert rows["random walk"]["day_3"] == pytest.approx(WALKED[:, 2].mean(), abs=1e-3)
    assert rows["candidate"]["dm_t"] < -2
    assert rows["random walk"]["dm_p"] == 1.0
    json.dumps(asdict(verdict), allow_nan=False)


def test_verdicts_are_values():
    verdict = decide(noisy(0.95))
    assert verdict == decide(noisy(0.95))
    assert replace(verdict, promote=False) != verdict


# --- slices --------------------------------------------------------------------------------------


def test_a_slice_that_is_shown_to_be_worse_refuses():
    calm = np.arange(WINDOWS) < 40
    scores = noisy(np.where(calm, 1.1, 0.9)[:, None])
    slices = {"calm": calm, "volatile": ~calm}
    # the pattern makes the errors of the whole wide: the question here is the slice
    verdict = decide(scores, slices=slices, tolerance=0.1)
    assert len(verdict.reasons) == 1
    assert verdict.reasons[0].startswith("Worse than the random walk on the 40 days that are calm")
    assert "at most +2.00% allowed" in verdict.reasons[0]
    worse, better = verdict.slices
    assert (worse.name, worse.opponent, worse.days) == ("calm", WALK, 40)
    assert 0.02 < worse.lower < worse.relative < 0.12
    assert better.lower < better.relative < 0
    by_production = decide(
        scores,
        walk=WALKED * 1.2,
        classical=WALKED * 1.2,
        production=WALKED,
        slices=slices,
        tolerance=0.1,
    )
    assert [each.split(" on ")[0] for each in by_production.reasons] == [
        "Worse than the production"
    ]


def test_a_slice_that_may_only_seem_worse_does_not():
    calm = np.arange(WINDOWS) < 40
    verdict = decide(noisy(np.where(calm, 1.015, 0.95)[:, None]), slices={"calm": calm})
    assert verdict.promote
    assert 0 < verdict.slices[0].lower < 0.02


def test_too_short_a_slice_is_not_judged():
    short = np.arange(WINDOWS) < SLICE_DAYS - 1
    verdict = decide(
        noisy(np.where(short, 1.3, 0.8)[:, None]), tolerance=0.1, slices={"odd": short}
    )
    assert verdict.promote
    assert (verdict.slices[0].days, verdict.slices[0].lower) == (SLICE_DAYS - 1, None)


# --- intervals -----------------------------------------------------------------------------------


def test_intervals_hold_what_they_say_within_error():
    low, high = decide(noisy(0.95)).intervals
    expected = coverage(RETURNS, evidence(0).quantiles, QUANTILE_LEVELS, 0.8).mean()
    assert (low.mass, low.share) == (0.8, pytest.approx(expected))
    assert low.low < 0.8 < low.high
    assert high.low < 0.95 <= high.high <= 1.0


@pytest.mark.parametrize(
    ("width", "complaints"),
    [
        (0.5, ["Overconfident: the 80 %", "Overconfident: the 95 %"]),
        (0.9, []),
        (1.2, []),
        (3.0, ["Too cautious: the 80 %"]),
    ],
)
def test_intervals_out_of_bounds_refuse_however_good_the_score(width, complaints):
    verdict = decide(noisy(0.85), quantiles=evidence(0).quantiles * width)
    assert [each.split(" interval")[0] for each in verdict.reasons] == complaints
    assert verdict.promote is (not complaints)


def test_a_run_of_misses_is_less_evidence_than_as_many_scattered():
    """The error is HAC: 40 % of misses in one stretch, as overlapping forecasts have them."""
    missed = np.arange(WINDOWS) >= 72
    scattered = np.arange(WINDOWS) % 5 >= 3
    errors = []
    for each in (missed, scattered):
        returns = np.where(each[:, None], 1.0, 0.0) * np.ones(HORIZON)
        interval = decide(noisy(0.95), returns=returns).intervals[0]
        assert interval.share == pytest.approx(0.6)
        errors.append(interval.high - interval.share)
    assert errors[0] > 1.5 * errors[1]
    assert hac_variance(scattered, 10) < 0.8 * 0.2 / WINDOWS  # so that the binomial one holds
    assert errors[1] == pytest.approx(1.658 * np.sqrt(0.8 * 0.2 / WINDOWS), rel=0.01)


# --- leaks ---------------------------------------------------------------------------------------


def test_too_good_to_be_true_is_refused():
    verdict = decide(WALKED * (1 - IMPLAUSIBLE - 0.02))
    assert len(verdict.reasons) == 1
    assert verdict.reasons[0].startswith("Too good to be true: ")
    assert "22% below random walk's" in verdict.reasons[0]
    assert decide(WALKED * (1 - IMPLAUSIBLE + 0.02)).promote


def test_a_market_that_suits_a_baseline_is_no_leak():
    """The random walk is far too wide; what adapts is not."""
    assert decide(WALKED * 0.6, classical=WALKED * 0.65).promote


def test_what_was_found_before_any_score_refuses_and_the_figures_stay():
    verdict = decide(noisy(0.95), problems=("Leak: it has seen the answer.",))
    assert verdict.reasons == ("Leak: it has seen the answer.",)
    assert verdict.upper is not None


def test_a_candidate_that_cannot_be_loaded_is_refused_for_that_alone():
    verdict = judge(Evidence.nothing("The candidate cannot be loaded."), Rule(0.01, 0.03, 100))
    assert verdict.reasons == ("The candidate cannot be loaded.",)
    assert (verdict.windows, verdict.days, verdict.first_day) == (0, 0, "")
    json.dumps(asdict(verdict), allow_nan=False)


# --- reserved days -------------------------------------------------------------------------------


def test_days_that_were_used_ask_for_more_certainty():
    fresh, used = decide(noisy(1.0, 8.0)), decide(noisy(1.0, 8.0), uses=3.0)
    assert (fresh.confidence, used.confidence) == (0.95, 0.9875)
    assert fresh.relative_to_random_walk == used.relative_to_random_walk
    assert used.upper > fresh.upper
    between = (fresh.upper + used.upper) / 2
    assert decide(noisy(1.0, 8.0), tolerance=between).promote
    refused = decide(noisy(1.0, 8.0), tolerance=between, uses=3.0)
    assert "upper 98.8 % bound" in refused.reasons[0]


def test_trying_until_one_passes_does_not_pay():
    """Ten candidates a span, each truly as much worse than allowed: any of them passes as rarely
    as a single one should."""
    rng = np.random.default_rng(3)
    lucky = {True: 0, False: 0}
    for _ in range(100):
        walk = rng.gamma(4.0, 30.0, (120, HORIZON))
        tried = [walk * 1.01 + rng.normal(0, 10, walk.shape) for _ in range(10)]
        for counted in lucky:
            verdicts = (
                decide(each, walk, uses=float(number) * counted)
                for number, each in enumerate(tried)
            )
            lucky[counted] += any(verdict.promote for verdict in verdicts)
    assert lucky[False] > 25
    assert lucky[True] < 0.7 * lucky[False]


# --- what cannot be judged -----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("who", ["candidate", "walk", "production", "classical"])
def test_anything_but_finite_numbers_is_refused(bad, who):
    scores = {"candidate": noisy(0.9), "walk": WALKED.copy(), "production": noisy(0.95)}
    scores["classical"] = WALKED.copy()
    scores[who][7, 2] = bad
    verdict = decide(**scores)
    assert not verdict.promote
    named = {"walk": "random walk", "classical": "HAR"}.get(who, who)
    assert f"1 of 600 scores of the {named} are not finite numbers" in verdict.reasons[0]
    json.dumps(asdict(verdict), allow_nan=False)


def test_too_few_windows_are_refused():
    verdict = decide(noisy(0.9)[:99], WALKED[:99])
    assert not verdict.promote
    assert "Only 99 windows to judge on; at least 100 are required." in verdict.reasons
    assert verdict.windows == 99


def test_a_low_minimum_still_needs_enough_for_a_bound():
    verdict = decide(noisy(0.9)[:8], WALKED[:8], min_days=1)
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


@pytest.mark.parametrize("missing", [CANDIDATE, WALK])
def test_a_contestant_that_is_missing_is_refused(missing):
    crps = {CANDIDATE: noisy(0.9), WALK: WALKED, "HAR": WALKED}
    del crps[missing]
    assert decide(None, crps=crps).reasons == (f"There are no scores of the {missing}.",)


def test_a_walk_without_error_allows_no_comparison():
    nothing = np.zeros_like(WALKED)
    verdict = decide(nothing, nothing)
    assert not verdict.promote
    assert "must be positive" in verdict.reasons[0]


def test_quantiles_that_cross_are_refused():
    quantiles = evidence(0).quantiles.copy()
    quantiles[3, 2, 10] = quantiles[3, 2, 12]
    verdict = decide(noisy(0.9), quantiles=quantiles)
    assert verdict.reasons[0].startswith("Quantiles of the candidate cross in 1 forecasts")
