import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from forecasting.sequential import STAKES, coverage_wealth, evidence, wealth

LOSSES = arrays.arrays(np.float64, st.integers(0, 40), elements=st.floats(0, 1e6))


def pairs(rng, days: int, series: int, worse: float):
    """Losses of two forecasters of one wild series of days, the first worse by a factor."""
    day = rng.lognormal(0, 0.8, (series, days))  # both see the same day
    own = day * rng.lognormal(0, 0.15, (series, days))
    other = day * rng.lognormal(0, 0.15, (series, days))
    return own * (1 + worse), other


def purse_of(outcomes, lag: int) -> list[float]:
    """What a gambler has after each outcome, who begins with 1 and bets every stake."""
    path, purses = [], [[1.0] * len(STAKES) for _ in range(lag)]
    for day, x in enumerate(outcomes):
        purse = purses[day % lag]
        for number, stake in enumerate(STAKES):
            purse[number] *= 1 + stake * x
        path.append(sum(sum(each) / len(each) for each in purses) / lag)
    return path


def with_fresh(outcomes, lag: int, fresh: int) -> list[float]:
    """Half of the wealth with the first gambler, the rest with those who begin later."""
    path = [each / 2 for each in purse_of(outcomes, lag)]
    for number in range(1, 10_000):
        late = purse_of(outcomes[number * fresh :], lag)
        share = 1 / (2 * number * (number + 1))
        for day in range(len(path)):
            path[day] += share * (late[day - number * fresh] if day >= number * fresh else 1)
        if number * fresh >= len(path):  # of all that begin later still
            return [each + 1 / (2 * (number + 1)) for each in path]
    raise AssertionError


def slow(losses, reference, lag: int) -> list[float]:
    path, purses = [], [[1.0] * len(STAKES) for _ in range(lag)]
    for day, (loss, other) in enumerate(zip(losses, reference, strict=True)):
        largest = max(loss, other)
        x = (loss - other) / largest if largest > 0 else 0.0
        purse = purses[day % lag]
        for number, stake in enumerate(STAKES):
            purse[number] *= 1 + stake * x
        path.append(sum(sum(each) / len(each) for each in purses) / lag)
    return path


@given(LOSSES, st.integers(1, 6), st.randoms(use_true_random=False))
def test_it_is_what_a_slow_gambler_gets(losses, lag, random):
    reference = np.array([random.random() * 1e3 for _ in losses])
    np.testing.assert_allclose(
        wealth(losses, reference, lag), slow(losses, reference, lag), rtol=1e-9, atol=1e-300
    )


@given(LOSSES)
def test_equal_losses_say_nothing(losses):
    found = evidence(losses, losses.copy())
    assert (found.value, found.peak, found.days) == (1.0, 1.0, len(losses))


@pytest.mark.parametrize("lag", [1, 5])
def test_looked_at_every_day_for_four_years_it_rarely_alarms_falsely(lag):
    own, other = pairs(np.random.default_rng(1), 1000, 400, 0.0)
    alarms = [evidence(a, b, lag).found(0.05) for a, b in zip(own, other, strict=True)]
    assert np.mean(alarms) <= 0.05


@pytest.mark.parametrize(("worse", "days"), [(0.5, 30), (0.2, 60), (0.05, 400)])
def test_what_is_worse_is_found(worse, days):
    own, other = pairs(np.random.default_rng(2), days, 200, worse)
    found = [evidence(a, b).found(0.05) for a, b in zip(own, other, strict=True)]
    assert np.mean(found) >= 0.9


def test_what_is_better_is_never_found():
    own, other = pairs(np.random.default_rng(3), 500, 200, -0.1)
    assert not any(evidence(a, b).found(0.05) for a, b in zip(own, other, strict=True))


def test_the_peak_stays_when_the_value_falls():
    worse, even = np.full(50, 2.0), np.full(50, 1.0)
    losses = np.concatenate([worse, even / 2])
    found = evidence(losses, np.concatenate([even, even]))
    assert found.found(0.01)
    assert found.value < found.peak
    assert found.days == 100
    assert found.relative == pytest.approx(0.25)


def test_without_days_there_is_no_evidence():
    found = evidence(np.array([]), np.array([]))
    assert (found.value, found.peak, found.days) == (1.0, 1.0, 0)
    assert np.isnan(found.relative)


@pytest.mark.parametrize(
    ("losses", "reference"), [([1.0], [1.0, 2.0]), ([-1.0], [1.0]), ([np.nan], [1.0])]
)
def test_losses_that_are_none_are_refused(losses, reference):
    with pytest.raises(ValueError, match=r"expected|finite"):
        evidence(np.array(losses), np.array(reference))


@given(st.lists(st.floats(-1, 3), max_size=40), st.integers(1, 4), st.integers(1, 9))
def test_later_gamblers_begin_with_what_was_kept_for_them(outcomes, lag, fresh):
    x = np.array(outcomes, dtype=np.float64)
    reference = np.full(len(x), 2.0)
    found = wealth(reference + x, reference, lag, np.ones(len(x)), fresh)
    np.testing.assert_allclose(found, with_fresh(outcomes, lag, fresh), rtol=1e-9)


def test_who_turns_bad_after_two_good_years_is_found_by_a_later_gambler():
    good, bad = np.full(500, 0.9), np.full(80, 1.2)
    losses, even = np.concatenate([good, bad]), np.full(580, 1.0)
    scale = np.full(580, 0.5)
    assert evidence(losses, even, 1, scale, fresh=63).found(0.01)
    assert not evidence(losses, even, 1, scale).found(0.01)


def test_a_scale_that_the_losses_go_beyond_is_refused():
    with pytest.raises(ValueError, match="no smaller than what the losses are the smaller by"):
        evidence(np.array([1.0]), np.array([2.0]), 1, np.array([0.5]))


@pytest.mark.parametrize("lag", [1, 5])
def test_a_right_interval_is_rarely_called_wrong_and_a_wrong_one_is_found(lag):
    rng = np.random.default_rng(5)
    usual = rng.random((300, 1000)) < 0.2
    for missing, found in ((0.2, 0.0), (0.25, 0.01), (0.15, 0.01), (0.5, 1.0), (0.02, 1.0)):
        missed = rng.random((300, 1000)) < missing
        paths = [coverage_wealth(a, b, 0.15, 0.25, lag) for a, b in zip(missed, usual, strict=True)]
        share = np.mean([path.max() >= 100 for path in paths])
        assert share <= found if found < 1 else share == 1


def test_an_interval_that_misses_where_the_reference_does_is_not_at_fault():
    wild = np.random.default_rng(6).random(500) < 0.5
    assert coverage_wealth(wild, wild, 0.15, 0.25).max() < 2
    assert coverage_wealth(wild, np.zeros(500, dtype=bool), 0.15, 0.25).max() > 1e6


def test_probabilities_out_of_order_are_refused():
    none = np.zeros(3, dtype=bool)
    with pytest.raises(ValueError, match="0 < least <= most < 1"):
        coverage_wealth(none, none, 0.3, 0.2)
