"""A lasting shift of volatility: found when planted, told in its size, seldom made up."""

from datetime import date

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.markets import garch, louder
from forecasting import breaks
from forecasting.drift import SHIFT, compare, features, recent_rows, reference_rows
from forecasting.errors import DataError, HistoryError

TRAINED = 1260


@pytest.fixture(scope="module")
def markets() -> list[pd.DataFrame]:
    return list(garch(40, TRAINED + 2 * breaks.QUARTER, seed=3))


def _learned(frame: pd.DataFrame) -> breaks.Expectation:
    return breaks.learn(frame, frame.index[64].date(), frame.index[TRAINED - 1].date())


def test_doubled_volatility_is_found_within_three_weeks_and_seldom_made_up(markets):
    found, made_up, ratios = 0, 0, []
    day = TRAINED + 20
    for frame in markets:
        expectation, loud = _learned(frame), louder(frame, day)
        made_up += int(breaks.alarms(expectation, frame)[TRAINED:].any())
        alarms = np.flatnonzero(breaks.alarms(expectation, loud)[day : day + 15])
        if len(alarms):
            found += 1
            seen = breaks.look(expectation, loud, loud.index[day + alarms[0]].date())
            assert seen.found
            ratios.append(seen.ratio)
    assert found >= 0.8 * len(markets)  # of 40; `make bench-drift` tells the share of 200
    assert made_up <= 0.25 * len(markets)  # in two quarters
    assert 1.7 < np.median(ratios) < 3.5


def test_a_calmer_market_is_a_shift_too(markets):
    scores = []
    for frame in markets[:10]:
        expectation, quiet = _learned(frame), louder(frame, TRAINED + 20, 1 / 3)
        seen = breaks.look(expectation, quiet, quiet.index[TRAINED + 34].date())
        scores.append(seen.score)
        assert seen.ratio < 1
    assert np.median(scores) < -4


def test_the_day_on_which_it_began_is_told(markets):
    frame = louder(markets[0], TRAINED + 20, 4.0)
    seen = breaks.look(_learned(markets[0]), frame, frame.index[TRAINED + 25].date())
    assert seen.found
    assert abs((seen.began - frame.index[TRAINED + 20].date()).days) <= 3
    assert f"since about {seen.began}" in str(seen)


def test_a_look_says_what_the_alarms_say(markets):
    frame = louder(markets[1], TRAINED + 20)
    expectation = _learned(frame)
    alarmed = breaks.alarms(expectation, frame)
    days = range(TRAINED, TRAINED + 60)
    seen = [breaks.look(expectation, frame, frame.index[row].date()).found for row in days]
    assert seen == alarmed[days.start : days.stop].tolist()
    assert 0 < sum(seen) < len(seen)


def test_the_statistic_is_the_largest_likelihood_ratio_of_a_trail():
    """Against a slow loop over the days on which a shift may have begun."""
    rng = np.random.default_rng(1)
    surprise, trail = rng.standard_normal(40), np.linspace(1, 0.3, breaks.LAGS)
    scores = breaks._scores(surprise, trail)
    for day in (20, 39):
        for length in range(1, breaks.LAGS + 1):
            part, seen = trail[:length], surprise[day - length + 1 : day + 1]
            gain = np.sum(seen**2) - np.min(
                [np.sum((seen - size * part) ** 2) for size in [part @ seen / (part @ part)]]
            )
            assert scores[day, length - 1] ** 2 == pytest.approx(gain)


def test_nothing_after_the_day_or_the_training_span_counts(markets):
    frame = markets[2]
    expectation, day = _learned(frame), frame.index[TRAINED + 30].date()
    later = louder(frame, TRAINED + 31, 5.0)
    assert breaks.look(expectation, later, day) == breaks.look(expectation, frame, day)
    again = _learned(louder(frame, TRAINED, 5.0))
    assert (again.limits, again.deviation) == (expectation.limits, expectation.deviation)


@given(scale=st.floats(0.01, 100.0))
def test_the_unit_of_prices_does_not_matter(scale):
    frame = next(garch(1, 500, seed=9))
    prices = ["open", "high", "low", "close"]
    other = frame.copy()
    other[prices] *= scale
    first, last, day = (frame.index[row].date() for row in (64, 450, 499))
    mine, theirs = (
        breaks.look(breaks.learn(each, first, last), each, day) for each in (frame, other)
    )
    assert theirs.score == pytest.approx(mine.score, abs=1e-6)


def test_a_short_span_and_bad_prices_are_refused(markets):
    frame = markets[0]
    with pytest.raises(HistoryError, match="204 are needed to tell a lasting shift"):
        breaks.learn(frame, frame.index[0].date(), frame.index[250].date())
    with pytest.raises(HistoryError, match="80 are needed"):
        breaks.look(_learned(frame), frame, frame.index[50].date())
    bad = frame.copy()
    bad.iloc[5, 1] = np.nan
    with pytest.raises(DataError, match="not finite or not positive"):
        _learned(bad)


def test_a_shift_alone_is_drift(markets):
    frame = louder(markets[0], TRAINED + 20, 4.0)
    day, table = frame.index[TRAINED + 25].date(), features(frame)
    reference = reference_rows(table, frame.index[64].date(), frame.index[TRAINED].date(), 40)
    verdict = compare(reference, recent_rows(table, day, 40), 10.0, 1.0)
    seen = breaks.look(_learned(markets[0]), frame, day)
    assert not verdict.drifted
    assert not verdict.with_shift(None).drifted
    shifted = verdict.with_shift(seen)
    assert shifted.drifted
    assert shifted.scores()[SHIFT] == seen.score
    assert "Volatility: " in shifted.summary()
    assert isinstance(day, date)
