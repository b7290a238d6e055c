import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from forecasting.sequential import STAKES, evidence, wealth

LOSSES = arrays.arrays(np.float64, st.integers(0, 40), elements=st.floats(0, 1e6))


def pairs(rng, days: int, series: int, worse: float):
    """Losses of two forecasters of one wild series of days, the first worse by a factor."""
    day = rng.lognormal(0, 0.8, (series, days))  # both see the same day
    own = day * rng.lognormal(0, 0.15, (series, days))
    other = day * rng.lognormal(0, 0.15, (series, days))
    return own * (1 + worse), other


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
