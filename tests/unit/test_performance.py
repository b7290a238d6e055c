from datetime import date
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest

from benchmarks.degraded import ORIGINS, Markets, days_until_found
from forecasting import outcomes
from forecasting.contract import QUANTILE_LEVELS
from forecasting.performance import LEAST_ROWS, ROLLING, look, read_log
from forecasting.predictions import Spool
from forecasting.sessions import sessions_between
from tests.predictions import make_prediction

NAME, ALPHA = "perennial-goog", 0.01
Z = np.array([NormalDist().inv_cdf(level) for level in QUANTILE_LEVELS])
SIGMA = 0.02
DAYS = sessions_between(date(2006, 1, 3), date(2007, 12, 31))


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """Two years of a market whose volatility stays."""
    moves = SIGMA * np.random.default_rng(4).standard_normal(len(DAYS))
    close = 100 * np.exp(np.cumsum(moves))
    return pd.DataFrame({"close": close}, index=pd.DatetimeIndex(DAYS, name="date"))


def forecast(frame: pd.DataFrame, origin: date, width: float = 1.0, **changes: object):
    """A normal forecast around the last price; `width` 1 is right."""
    close = float(frame["close"].loc[pd.Timestamp(origin)])
    steps = width * SIGMA * np.sqrt(np.arange(1, 6))[:, None]
    quantiles = (close * np.exp(steps * Z)).tolist()
    return make_prediction(origin, close, quantiles=quantiles, **changes)


def log(engine, folder, *records) -> None:
    spool = Spool(folder, "web")
    for record in records:
        spool.append(record)
    spool.close()
    outcomes.drain(engine, folder)


def seen(engine, frame, as_of=DAYS[-1], **changes):
    return look(engine, "GOOG", NAME, 1, frame, as_of, ALPHA, **changes)


def test_scores_are_those_of_a_slow_loop(engine, tmp_path, frame):
    origins = DAYS[200:300]
    log(engine, tmp_path, *(forecast(frame, origin, 1.3) for origin in origins))
    found = seen(engine, frame)
    logs = np.log(frame["close"].to_numpy())
    assert [each.horizon for each in found.rolling] == [1, 2, 3, 4, 5]
    for each in found.rolling:
        own, walk, held, errors, still = [], [], [], [], []
        for origin in origins[-ROLLING:]:
            row = DAYS.index(origin)
            step = each.horizon
            move = logs[row + step] - logs[row]
            quantiles = 1.3 * SIGMA * step**0.5 * Z
            past = [logs[s + step] - logs[s] for s in range(row - step + 1)][-250:]
            own.append(slow_crps(move, quantiles))
            walk.append(slow_crps(move, np.quantile(past, QUANTILE_LEVELS)))
            held.append(abs(move) <= 1.3 * SIGMA * step**0.5 * NormalDist().inv_cdf(0.9))
            errors.append(abs(move))
            still.append(abs(move))
        assert each.days == ROLLING
        assert each.since == origins[-ROLLING]
        assert each.crps_bp == pytest.approx(1e4 * np.mean(own))
        assert each.walk_crps_bp == pytest.approx(1e4 * np.mean(walk))
        assert each.cover80 == pytest.approx(np.mean(held))
        assert each.mae_over_walk == pytest.approx(np.sum(errors) / np.sum(still))
        assert each.expected_crps_bp == pytest.approx(
            1e4 * 1.3 * SIGMA * each.horizon**0.5 / np.pi**0.5, rel=0.04
        )
    assert (found.since, found.days) == (origins[0], 104)


def slow_crps(outcome: float, quantiles) -> float:
    total = 0.0
    for level, quantile in zip(QUANTILE_LEVELS, quantiles, strict=True):
        gap = outcome - quantile
        total += max(level * gap, (level - 1) * gap)
    return 2 * total / len(QUANTILE_LEVELS)


def test_the_first_forecast_of_our_own_prices_counts(engine, tmp_path, frame):
    origin = DAYS[100]
    later = make_prediction().made_at.replace(hour=23)
    log(
        engine,
        tmp_path,
        forecast(frame, origin, 3.0, made_at=later),
        forecast(frame, origin, 5.0, source="post", prices_md5=None),
        forecast(frame, origin, 1.0),
        forecast(frame, origin, 4.0, model_version=2),
        forecast(frame, origin, 4.0, forecaster="another"),
        forecast(frame, origin, 4.0, symbol="MSFT"),
        forecast(frame, DAYS[LEAST_ROWS - 1], 4.0),  # the walk knows too little
    )
    logged = read_log(engine, "GOOG", NAME, 1, frame, DAYS[-1])
    assert list(logged.origins.astype(object)) == [origin]
    np.testing.assert_allclose(logged.quantiles[0, 0], SIGMA * Z, atol=1e-12)


def test_what_is_not_known_yet_is_expected_and_not_scored(engine, tmp_path, frame):
    log(engine, tmp_path, *(forecast(frame, origin) for origin in DAYS[100:110]))
    as_of = DAYS[107]
    found = seen(engine, frame, as_of)
    assert [each.days for each in found.rolling] == [7, 6, 5, 4, 3]
    assert all(each.coming_crps_bp > 0 for each in found.rolling)
    cut = frame.loc[: pd.Timestamp(as_of)]
    assert found == seen(engine, cut, as_of)
    assert all(np.isnan(each.coming_crps_bp) for each in seen(engine, frame).rolling)


def test_without_forecasts_nothing_is_said(engine, frame):
    found = seen(engine, frame)
    assert (found.days, found.evidence, found.degraded, found.since) == (0, 1.0, False, None)
    assert found.table() == []
    assert found.strongest is None
    assert "no forecast has its label yet" in found.summary()
    assert found.scores() == {("evidence", 0): 1.0, ("scored_days", 0): 0.0}


@pytest.mark.parametrize(("width", "claim"), [(0.5, "coverage"), (2.5, "crps")])
def test_a_wrong_width_is_found_and_stays_found(engine, tmp_path, frame, width, claim):
    log(engine, tmp_path, *(forecast(frame, origin, width) for origin in DAYS[260:420]))
    found = seen(engine, frame)
    assert found.degraded
    assert found.strongest.claim in (claim, "coverage")
    assert found.found_on is not None
    before = DAYS[DAYS.index(found.found_on) - 1]
    assert not seen(engine, frame, before).degraded
    assert seen(engine, frame, found.found_on).found_on == found.found_on
    assert f"Degraded: evidence {found.evidence:.3g} of 100" in found.summary()
    assert found.scores()["evidence", 0] == found.evidence


def test_a_good_version_is_not_found(engine, tmp_path, frame):
    log(engine, tmp_path, *(forecast(frame, origin) for origin in DAYS[100:480]))
    found = seen(engine, frame)
    assert not found.degraded
    assert found.days == 384
    assert "Not degraded" in found.summary()
    row = found.table()[0]
    assert row["crps_bp"] == found.rolling[0].crps_bp
    assert row["over_walk"] == pytest.approx(row["crps_bp"] / row["walk_crps_bp"] - 1)


def test_as_good_as_the_walk_are_only_enough_days_at_both_ends(engine, tmp_path, frame):
    log(engine, tmp_path, *(forecast(frame, origin) for origin in DAYS[300:480]))
    assert not seen(engine, frame, DAYS[300 + ROLLING - 1]).as_good_as_walk
    told = set()
    for day in DAYS[365:480]:
        found = seen(engine, frame, day)
        worse = [each.over_walk > 0 for each in (found.rolling[0], found.rolling[-1])]
        assert found.as_good_as_walk == (not any(worse))
        told.add(found.as_good_as_walk)
    assert told == {True, False}


def test_a_bet_that_no_day_has_settled_is_never_the_strongest(engine, tmp_path, frame):
    log(engine, tmp_path, *(forecast(frame, origin) for origin in DAYS[300:310]))
    assert seen(engine, frame, DAYS[300]).strongest is None, "nothing is known yet"
    first = seen(engine, frame, DAYS[301])
    assert {bet.horizon: bet.days for bet in first.bets} == {1: 1, 5: 0}
    assert first.strongest.horizon == 1
    assert np.isfinite(first.event().crps_bp)


def test_forecasts_before_the_version_knew_its_data_can_be_left_out(engine, tmp_path, frame):
    log(engine, tmp_path, *(forecast(frame, origin, 0.3) for origin in DAYS[100:200]))
    assert seen(engine, frame).degraded
    late = seen(engine, frame, since=DAYS[190])
    assert (late.since, late.degraded) == (DAYS[190], False)


def test_four_years_of_daily_looks_at_the_true_forecaster_alarm_nobody():
    found = days_until_found(Markets(60, seed=1), np.ones(ORIGINS), alpha=0.05)
    assert np.isinf(found).all()


@pytest.mark.parametrize(
    ("width", "days"),
    [(0.5, 110), (2.0, 110), (3.2, 75)],
    ids=["half as wide", "twice as wide", "CRPS half as large again"],
)
def test_a_planted_fault_is_found_within_days(width, days):
    markets = Markets(30, seed=2)
    found = days_until_found(markets, np.full(ORIGINS, width), ALPHA)
    assert np.mean(found <= days) >= 0.9


def test_a_fault_after_two_good_years_is_found_within_days():
    markets, changed = Markets(30, seed=3), ORIGINS // 2
    found = days_until_found(markets, np.where(np.arange(ORIGINS) < changed, 1.0, 0.5), ALPHA)
    assert np.all(found > changed)
    assert np.mean(found - changed <= 170) >= 0.9
