"""Probation: the rule against a slow loop and planted differences, and its line in SQL."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sqlalchemy import Engine, insert

from benchmarks.degraded import Markets
from benchmarks.probation import rolled_back
from forecasting import audit, probation
from forecasting.contract import QUANTILE_LEVELS
from forecasting.probation import Probation, Replacement
from forecasting.sequential import STAKES
from forecasting.sessions import sessions_after
from forecasting.settings import Settings
from forecasting.store import now, open_engine, promotions
from tests.models import ratios

NAME = "perennial-goog"
START = date(2008, 1, 2)
DAYS, FAR = 20, 5
ALPHA = 0.05
WATCHED = Probation("a", NAME, 2, 1, START, DAYS, "watching", {})


def pairs(ratio: float, days: int = DAYS, horizons: tuple[int, ...] = (1, FAR), seed: int = 0):
    """Losses of two versions, one `ratio` times the other but for noise, as known after `days`."""
    rng = np.random.default_rng(seed)
    sessions = [START, *sessions_after(START, days)]
    rows = []
    for horizon in horizons:
        for i in range(days - horizon + 1):
            base = float(rng.gamma(2.0, 50.0))
            new = base * ratio * float(np.exp(rng.normal(0, 0.02)))
            most = max(new, base)
            rows.append(("GOOG", sessions[i], sessions[i + horizon], horizon, new, base, most))
    columns = ["symbol", "origin", "target", "horizon", "crps", "previous_crps", "scale"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(origin=pd.to_datetime(table.origin), target=pd.to_datetime(table.target))


def slow_peak(table: pd.DataFrame) -> float:
    """Wealth of every stake and interleaved series on every day, one bet at a time."""
    peak = 1.0
    for day in sorted(table.target.unique()):
        values = []
        for lag in (1, FAR):
            known = table[(table.horizon == lag) & (table.target <= day)].sort_values("origin")
            series = []
            for start in range(lag):
                wealths = []
                for stake in STAKES:
                    wealth = 1.0
                    for row in known.iloc[start::lag].itertuples():
                        x = (row.crps - row.previous_crps) / row.scale
                        wealth *= 1 + stake * x
                    wealths.append(wealth)
                series.append(sum(wealths) / len(wealths))
            values.append(sum(series) / lag)
        peak = max(peak, sum(values) / 2)
    return peak


@pytest.mark.parametrize(("ratio", "days"), [(1.0, 20), (1.3, 12), (0.8, 20), (1.3, 4), (1.3, 1)])
def test_the_rule_is_the_slow_loop(ratio, days):
    table = pairs(ratio, days)
    found = probation.weigh(table, FAR, ALPHA)
    assert found.peak == pytest.approx(slow_peak(table), rel=1e-12)
    assert found.worse == (found.peak >= 20)
    assert found.days == days


def test_a_version_that_is_much_worse_is_found_within_three_weeks_and_for_good():
    assert not probation.weigh(pairs(2.0, 3), FAR, ALPHA).worse
    for days in (15, DAYS):
        found = probation.weigh(pairs(2.0, days), FAR, ALPHA)
        assert found.worse
        assert found.relative == pytest.approx(1.0, abs=0.05)
    assert found.far_relative == pytest.approx(1.0, abs=0.05)
    assert found.summary(1).startswith("Worse than version 1 on 20 days: CRPS ")


@pytest.mark.parametrize("ratio", [1.0, 0.7])
def test_one_that_is_as_good_or_better_is_not(ratio):
    """The same random days with either version first: no worse on average, by symmetry."""
    condemned = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        table = pairs(ratio, seed=seed)
        noise = np.exp(rng.normal(0, 0.3, len(table)))
        table["crps"] *= noise
        table["previous_crps"] *= np.exp(rng.normal(0, 0.3, len(table)))
        table["scale"] = table[["crps", "previous_crps"]].max(axis=1)
        condemned += probation.weigh(table, FAR, ALPHA).worse
    assert condemned <= 5


def test_days_are_known_by_their_target():
    """A forecast five days ahead says nothing before its day, in whatever order rows come."""
    table = pairs(1.5, 10)
    shuffled = table.sample(frac=1.0, random_state=1)
    assert probation.weigh(shuffled, FAR, ALPHA) == probation.weigh(table, FAR, ALPHA)
    early = table[table.target <= pd.Timestamp(sessions_after(START, 4)[-1])]
    assert set(early.horizon) == {1}
    found = probation.weigh(early, FAR, ALPHA)
    assert (found.horizon, found.peak) == (FAR, pytest.approx(slow_peak(early)))
    assert np.isnan(found.far_relative)


def test_several_symbols_are_averaged_day_by_day():
    one = pairs(1.5, 10)
    other = one.assign(symbol="IBM", crps=one.previous_crps, previous_crps=one.crps)
    found = probation.weigh(pd.concat([one, other]), FAR, ALPHA)
    assert (found.days, found.peak) == (10, 1.0)
    assert found.relative == pytest.approx(0.0)


def test_without_a_day_nothing_is_said():
    found = probation.weigh(pairs(1.0, 1).iloc[:0], FAR, ALPHA)
    assert (found.days, found.peak, found.worse) == (0, 1.0, False)
    told = found.as_json(1, START, ALPHA)
    assert told["summary"] == "No day was scored beside version 1 yet."
    assert told["crps_bp"] is told["relative"] is None


def scored_rows(version: int, count: int, **changes: object) -> pd.DataFrame:
    sessions = [START, *sessions_after(START, count)]
    rows = [
        {
            "symbol": "GOOG",
            "forecaster": NAME,
            "model_version": version,
            "prices_md5": "p" * 32,
            "origin": pd.Timestamp(sessions[i]),
            "target": pd.Timestamp(sessions[i + 1]),
            "horizon": 1,
            "crps_bp": 100.0 * version + i,
            "origin_close": 100.0,
            "levels": list(QUANTILE_LEVELS),
            "quantiles": (100 * ratios(1, 1.0 + version / 10)[0].astype(float)).tolist(),
        }
        | changes
        for i in range(count)
    ]
    return pd.DataFrame(rows)


def test_only_forecasts_of_both_from_our_own_rows_in_its_days_are_paired():
    log = pd.concat(
        [
            scored_rows(2, 25),
            scored_rows(2, 25),  # logged twice
            scored_rows(1, 25),
            scored_rows(1, 25, prices_md5=None, crps_bp=9e9),
            scored_rows(3, 25),
            scored_rows(1, 25, forecaster="perennial-ibm"),
        ]
    )
    found = probation.pair(log.iloc[1:], WATCHED)
    assert len(found) == DAYS
    assert (found.crps - found.previous_crps).tolist() == [100.0] * DAYS
    assert found.origin.min() == pd.Timestamp(START)
    # the same shape a tenth apart: beyond both, one wins by all that lies between
    apart = 1e4 * np.log(1.2 / 1.1)
    assert found.scale.to_numpy() == pytest.approx(np.full(DAYS, apart), rel=0.2)
    later = probation.pair(log, replace(WATCHED, started=sessions_after(START, 3)[-1]))
    assert later.origin.min() == pd.Timestamp(sessions_after(START, 3)[-1])


# --- the table -------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = open_engine(f"sqlite:///{tmp_path / 'perennial.db'}")
    yield made
    made.dispose()


def promoted(engine: Engine, version: int, previous: int | None, state: str = "moved") -> str:
    identity = f"{version} after {previous} {state}"
    with engine.begin() as connection:
        connection.execute(
            insert(promotions).values(
                id=identity,
                forecaster=NAME,
                version=version,
                previous=previous,
                state=state,
                who="me",
                why="a test",
                created_at=now(),
                updated_at=now(),
            )
        )
    return identity


def test_the_first_version_and_one_that_goes_back_are_not_watched(engine):
    assert probation.standing(engine, NAME) is None
    for version, previous, asks in ((1, None, False), (2, 1, True), (1, 2, False), (3, 1, True)):
        promoted(engine, version, previous)
        newest = probation.standing(engine, NAME)
        assert newest is not None
        assert (newest.version, newest.previous) == (version, previous)
        assert probation.asks_for_one(engine, newest) == asks


def test_a_promotion_that_does_not_hold_asks_for_nothing(engine):
    identity = promoted(engine, 2, 1)
    promoted(engine, 3, 2, "undone")
    promoted(engine, 4, 2, "intended")
    newest = probation.standing(engine, NAME)
    assert newest == Replacement(identity, NAME, 2, 1)


def test_a_probation_begins_once_on_the_session_that_the_version_was_trained_as_of(engine):
    newest = Replacement("x", NAME, 2, 1)
    for _ in range(2):
        probation.begin(engine, newest, date(2008, 1, 5), date(2008, 1, 9), DAYS)  # a Saturday
    (watched,) = probation.watching(engine, NAME)
    assert watched == Probation("x", NAME, 2, 1, date(2008, 1, 4), DAYS, "watching", {})
    assert not probation.asks_for_one(engine, Replacement("x", NAME, 2, 1))


def test_a_version_that_was_watched_before_is_watched_from_today(engine):
    for identity in ("x", "y"):
        newest = Replacement(identity, NAME, 2, 1)
        probation.begin(engine, newest, date(2008, 1, 4), date(2008, 1, 9), DAYS)
    first, second = probation.watching(engine, NAME)
    assert (first.started, second.started) == (date(2008, 1, 4), date(2008, 1, 9))


def test_a_look_takes_back_nothing_that_a_later_one_found(engine):
    """Two rounds at once: one makes up for a missed day while the other looks at today."""
    probation.begin(engine, Replacement("x", NAME, 2, 1), START, START, DAYS)
    (watched,) = probation.watching(engine, NAME)
    today = {"worse": False, "as_of": "2008-01-09", "summary": "today"}
    assert probation.record(engine, watched, "watching", "me", today).evidence == today
    earlier = {"worse": False, "as_of": "2008-01-08", "summary": "earlier"}
    assert probation.record(engine, watched, "passed", "me", earlier).evidence == today
    condemned = {"worse": True, "as_of": "2008-01-10", "summary": "bad"}
    probation.record(engine, watched, "watching", "me", condemned)
    after = probation.record(engine, watched, "passed", "me", today | {"as_of": "2008-01-11"})
    assert (after.state, after.evidence) == ("watching", condemned)


def test_what_has_ended_stays_as_it_is(engine):
    probation.begin(engine, Replacement("x", NAME, 2, 1), START, START, DAYS)
    (watched,) = probation.watching(engine, NAME)
    assert watched.summary == "Nobody looked yet."
    seen = probation.record(engine, watched, "watching", "me", {"worse": True, "summary": "bad"})
    assert (seen.state, seen.condemned, seen.summary) == ("watching", True, "bad")
    ended = probation.record(engine, seen, "rolled-back", "me")
    assert (ended.state, ended.evidence) == ("rolled-back", seen.evidence)
    assert probation.record(engine, watched, "passed", "me", {}) == ended
    assert probation.watching(engine, NAME) == []
    (line,) = audit.read(engine)
    assert (line.kind, line.subject, line.version, line.reason) == ("probation", NAME, 2, "bad")
    assert line.details == {"id": "x", "state": "rolled-back", "previous": 1}


def test_far_too_wide_is_rolled_back_in_the_days_of_a_probation_and_as_good_is_not():
    """The measured shares are in the README: `make bench-probation`."""
    days = Settings.model_fields["probation_days"].default
    markets = Markets(4, seed=3, origins=days)
    assert rolled_back(markets, 3.2, alpha=0.05, seed=1) == 1
    assert rolled_back(markets, None, alpha=0.05, seed=1) == 0
