"""The flow `monitor`: quiet in a calm year, an event in a crash, and every check written down.

The model in production is a tiny graph with the contract of a real one: its training span lies in
a dataset version that is really there.
"""

import json
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from statistics import NormalDist
from uuid import UUID

import numpy as np
import pytest
from prefect.client.orchestration import get_client
from prefect.events.filters import EventFilter, EventIDFilter, EventOccurredFilter

from flows.monitor import MonitorResult, monitor
from forecasting import datasets, events, ledger, outcomes
from forecasting.contract import QUANTILE_LEVELS
from forecasting.drift import FEATURES, SHIFT
from forecasting.errors import HistoryError, RegistryError
from forecasting.events import DriftDetected, ModelAged, ModelProvisional, PerformanceDegraded
from forecasting.predictions import Spool
from forecasting.registry import PROVISIONAL_TAG, open_registry
from forecasting.sessions import sessions_after, sessions_between
from forecasting.settings import Settings
from forecasting.store import audit, checks, engine_of, outbox, scores
from tasks.monitor import check_days
from tests.flows.support import (
    client_of,
    configured,
    flow_artifacts,
    kept,
    put_into_production,
    rows_of,
)
from tests.predictions import make_prediction

NAME = "perennial-goog"
TRAINED = date(2006, 12, 29)
CALM = date(2007, 6, 29)
CRASH = date(2008, 11, 14)

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prices up to the crash, and a version in production that was trained before it."""
    made = tmp_path_factory.mktemp("monitor")
    datasets.ingest(put_into_production(made, TRAINED), ["GOOG"], CRASH)
    return made


@pytest.fixture
def settings(home: Path, tmp_path: Path) -> Iterator[Settings]:
    """The home of all, and tables of the test's own; age alarms nobody."""
    own = f"sqlite:///{tmp_path / 'perennial.db'}"
    with configured(home, database_url=own, retrain_after_days=0) as made:
        yield made


def delivered(identity: UUID, since: datetime) -> list[dict[str, object]]:
    """Events of that id which Prefect lists."""
    wanted = EventFilter(id=EventIDFilter(id=[identity]), occurred=EventOccurredFilter(since=since))
    with get_client(sync_client=True) as client:
        return [event.model_dump() for event in client.read_events(wanted, limit=50).events]


def test_a_calm_market_is_checked_and_nobody_is_alarmed(settings):
    result = monitor(symbol="GOOG", as_of=CALM)
    assert isinstance(result, MonitorResult)
    assert MonitorResult.model_validate_json(result.model_dump_json()) == result
    assert (result.symbol, result.as_of, result.version) == ("GOOG", CALM, 1)
    assert (result.drifted, result.event_id) == (False, None)
    assert (result.checks, result.joined) == (1, 0)
    assert result.summary.startswith("No drift on 2007-06-29: ")
    assert rows_of(settings, outbox) == []
    (row,) = rows_of(settings, checks)
    assert (row["symbol"], row["as_of"], row["forecaster"]) == ("GOOG", CALM, NAME)
    assert (row["version"], row["drifted"], row["share"]) == (1, False, result.share)
    assert row["threshold"] == settings.drift_share
    assert row["features"].keys() == {*FEATURES, SHIFT}


def test_a_crash_is_drift_and_its_event_reaches_prefect(settings):
    start = datetime.now(UTC)
    result = monitor(symbol="GOOG", as_of=CRASH)
    assert result.drifted
    assert result.share >= settings.drift_share
    assert result.summary.startswith("Drift on 2008-11-14: ")
    (row,) = rows_of(settings, outbox)
    assert UUID(row["id"]) == result.event_id
    assert row["attempts"] == 1
    assert row["delivered_at"] is not None
    (event,) = delivered(result.event_id, start)
    assert event["event"] == "perennial.drift.detected"
    assert event["resource"]["prefect.resource.id"] == "perennial.symbol.GOOG"
    (check,) = rows_of(settings, checks)
    assert check["drifted"]
    beyond = [name for name in FEATURES if check["features"][name] >= settings.drift_threshold]
    assert event["payload"] == {
        "schema": 1,
        "symbol": "GOOG",
        "as_of": "2008-11-14",
        "forecaster": NAME,
        "version": 1,
        "share": result.share,
        "threshold": settings.drift_share,
        "features": beyond,
        "volatility": None,
        "dataset_md5": datasets.versions(settings)[-1].md5,
    }


def test_a_day_that_is_made_up_for_tells_nobody_and_is_looked_at_again(settings):
    """A later day of the same round says what is true now."""
    eve = sessions_between(CRASH - timedelta(days=7), CRASH)[-2]
    made_up = monitor(symbol="GOOG", as_of=eve, alarms=False)
    assert (made_up.drifted, made_up.event_id) == (True, None)
    assert rows_of(settings, outbox) == []
    newest = monitor(symbol="GOOG", as_of=CRASH)
    (row,) = rows_of(settings, outbox)
    assert UUID(row["id"]) == newest.event_id
    assert row["payload"]["as_of"] == CRASH.isoformat()


def test_check_days():
    saturday = date(2007, 6, 30)
    assert check_days(None, saturday) == check_days(None, CALM) == [CALM]
    assert check_days(CALM, saturday) == []
    assert check_days(date(2007, 6, 28), saturday) == [CALM]
    assert check_days(date(2007, 6, 23), saturday) == [CALM]  # a Saturday
    assert check_days(date(2007, 6, 15), CALM) == [date(2007, 6, 22), CALM]
    assert check_days(date(2007, 6, 15), date(2007, 6, 27)) == [
        date(2007, 6, 22),
        date(2007, 6, 27),
    ]
    assert check_days(CALM, date(2007, 6, 1)) == []


def test_a_first_check_on_a_weekend_is_of_the_last_session(settings):
    result = monitor(symbol="GOOG", as_of=date(2007, 6, 30))
    assert (result.as_of, result.checks) == (date(2007, 6, 30), 1)
    assert [row["as_of"] for row in rows_of(settings, checks)] == [CALM]


def test_a_monitor_shows_its_verdict_in_mlflow_and_prefect(settings):
    result = monitor(symbol="GOOG", as_of=CALM)
    run = client_of(settings).get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.tags["as_of"], run.data.tags["version"]) == ("2007-06-29", "1")
    assert run.data.metrics["drift_share"] == result.share
    assert {f"drift_{name}" for name in (*FEATURES, SHIFT)} <= run.data.metrics.keys()
    (check,) = json.loads(kept(settings, result.run_id, "drift.json"))["checks"]
    assert (check["drifted"], check["recent_end"]) == (False, "2007-06-29")
    assert (check["reference_start"], check["reference_end"]) == ("2004-08-19", "2006-12-29")
    page = kept(settings, result.run_id, "drift.html")
    assert page.lstrip().lower().startswith(("<!doctype html", "<html"))
    assert all(name in page for name in FEATURES)
    names = [each.path for each in client_of(settings).list_artifacts(result.run_id)]
    assert "forecasts-against-actuals.html" not in names
    (row,) = rows_of(settings, checks)
    shown = flow_artifacts(row["flow_run_id"])
    assert [line["feature"] for line in json.loads(shown["drift"])] == list(FEATURES)
    assert result.summary in shown["drift-verdict"]


def test_since_catches_up_on_weekly_checks(settings):
    result = monitor(symbol="GOOG", as_of=CALM, since=date(2007, 5, 31))
    june = sessions_between(date(2007, 6, 1), CALM)
    expected = sorted({*june[4::5], CALM})
    assert result.checks == len(expected) == 5
    assert [row["as_of"] for row in rows_of(settings, checks, "as_of")] == expected
    listed = json.loads(kept(settings, result.run_id, "drift.json"))["checks"]
    assert [each["recent_end"] for each in listed] == [str(day) for day in expected]


def test_without_since_it_goes_on_from_the_last_check(settings):
    assert monitor(symbol="GOOG", as_of=date(2007, 6, 15)).checks == 1
    assert monitor(symbol="GOOG", as_of=CALM).checks == 2
    days = [row["as_of"] for row in rows_of(settings, checks, "as_of")]
    assert days == [date(2007, 6, 15), date(2007, 6, 22), CALM]


def test_only_the_newest_check_alarms(settings):
    result = monitor(symbol="GOOG", as_of=CRASH, since=date(2008, 9, 1))
    drifted = [row["as_of"] for row in rows_of(settings, checks, "as_of") if row["drifted"]]
    assert len(drifted) > 1
    (row,) = rows_of(settings, outbox)
    assert (row["payload"]["as_of"], UUID(row["id"])) == ("2008-11-14", result.event_id)


def test_a_repeated_check_alarms_once(settings):
    since = date(2008, 11, 7)
    assert monitor(symbol="GOOG", as_of=CRASH, since=since).event_id is not None
    again = monitor(symbol="GOOG", as_of=CRASH, since=since)
    assert again.drifted
    assert again.event_id is None
    assert len(rows_of(settings, outbox)) == 1


def test_days_of_which_no_prices_are_known_are_not_checked(settings):
    result = monitor(symbol="GOOG", as_of=date(2012, 6, 29), since=date(2007, 6, 15))
    known = [row["as_of"] for row in rows_of(settings, checks, "as_of")]
    assert result.checks == len(known) < 100
    assert known[-1] == CRASH


def test_a_feed_that_stands_still_is_told_once_and_starts_no_training(settings):
    start = datetime.now(UTC)
    late = date(2008, 11, 19)
    result = monitor(symbol="GOOG", as_of=late, since=date(2008, 11, 7))
    assert result.drifted
    assert result.event_id is None
    (fault,) = result.faults
    assert fault.startswith("stale: no prices of 2008-11-17 and 2 later sessions are known")
    monitor(symbol="GOOG", as_of=late, since=date(2008, 11, 7))
    (row,) = rows_of(settings, outbox)
    assert row["name"] == "perennial.data.faulty"
    (event,) = delivered(UUID(row["id"]), start)
    assert event["payload"] == {
        "schema": 1,
        "symbol": "GOOG",
        "as_of": "2008-11-19",
        "faults": [fault],
        "dataset_md5": datasets.find(settings).md5,
    }


def test_a_repeated_check_is_not_written_twice(settings):
    since = date(2007, 6, 15)
    first = monitor(symbol="GOOG", as_of=CALM, since=since)
    before = rows_of(settings, checks, "as_of")
    again = monitor(symbol="GOOG", as_of=CALM, since=since)
    assert (again.checks, again.share) == (first.checks, first.share)
    assert again.run_id != first.run_id
    assert rows_of(settings, checks, "as_of") == before
    assert len(before) == 2


def test_with_nothing_new_to_check_it_says_so_and_sends_what_waits(settings):
    monitor(symbol="GOOG", as_of=CALM)  # a Friday
    with engine_of(settings.sql_url) as engine:
        events.put(
            engine,
            DriftDetected(
                symbol="GOOG",
                as_of=CALM,
                forecaster=NAME,
                version=1,
                share=1.0,
                threshold=0.5,
                features=("log_return",),
                dataset_md5="d" * 32,
            ),
        )
    result = monitor(symbol="GOOG", as_of=date(2007, 6, 30))
    assert "on 2007-06-30 no prices of GOOG after 2007-06-29 are known" in result.summary
    assert (result.checks, result.drifted, result.share, result.run_id) == (0, False, None, "")
    (row,) = rows_of(settings, outbox)
    assert row["delivered_at"] is not None
    assert len(rows_of(settings, checks)) == 1


def test_forecasts_are_joined_with_what_came_and_reported(settings):
    frame = datasets.load_frame(settings, "GOOG", CALM)
    spool = Spool(settings.spool_dir / "of this test", "web")
    origins = sessions_between(date(2007, 3, 1), date(2007, 6, 13))
    for origin in origins:
        spool.append(make_prediction(origin, float(frame["close"].loc[str(origin)])))
    spool.append(make_prediction(CALM, 500.0))  # its targets are not known yet
    spool.close()
    with engine_of(settings.sql_url) as engine:
        outcomes.drain(engine, settings.spool_dir / "of this test")
    result = monitor(symbol="GOOG", as_of=CALM)
    assert result.joined == 5 * len(origins)
    page = kept(settings, result.run_id, "forecasts-against-actuals.html")
    assert "Regression" in page
    metrics = client_of(settings).get_run(result.run_id).data.metrics
    assert metrics["forecast_rows"] == result.joined
    assert metrics["forecast_crps_bp"] > 0
    with engine_of(settings.sql_url) as engine:
        scored = outcomes.scored(engine, "GOOG", version=1)
    assert metrics["forecast_crps_bp"] == pytest.approx(scored["crps_bp"].mean())
    assert metrics["forecast_mae"] == pytest.approx(
        (scored["median"] - scored["actual"]).abs().mean()
    )


def plant(settings: Settings, width: float, first: date, last: date, **changes: object) -> int:
    """Forecasts of every session in the prediction log, their intervals `width` times as wide as
    the market of 2007 was; how many."""
    frame = datasets.load_frame(settings, "GOOG", CRASH)
    steps = width * 0.015 * np.sqrt(np.arange(1, 6))[:, None]
    z = np.array([NormalDist().inv_cdf(level) for level in QUANTILE_LEVELS])
    folder = settings.spool_dir / f"planted {width}"
    spool = Spool(folder, "web")
    origins = sessions_between(first, last)
    for origin in origins:
        close = float(frame["close"].loc[str(origin)])
        quantiles = (close * np.exp(steps * z)).tolist()
        spool.append(make_prediction(origin, close, quantiles=quantiles, **changes))
    spool.close()
    with engine_of(settings.sql_url) as engine:
        outcomes.drain(engine, folder)
    return len(origins)


def test_degraded_forecasts_are_told_once_by_an_event_that_reaches_prefect(settings):
    start = datetime.now(UTC)
    planted = plant(settings, 0.25, date(2007, 1, 3), date(2007, 6, 28))
    result = monitor(symbol="GOOG", as_of=CALM)
    assert (result.degraded, result.drifted, result.event_id) == (True, False, None)
    assert result.evidence >= 1 / settings.performance_alpha
    assert result.performance.startswith("Degraded: evidence")
    (event,) = delivered(result.degraded_event_id, start)
    assert event["event"] == "perennial.performance.degraded"
    assert event["resource"]["prefect.resource.id"] == "perennial.symbol.GOOG"
    payload = event["payload"]
    assert (payload["forecaster"], payload["version"], payload["schema"]) == (NAME, 1, 1)
    assert (payload["as_of"], payload["since"]) == ("2007-06-29", "2007-01-03")
    assert payload["days"] <= planted
    assert payload["coverage"] < 0.5
    assert payload["crps_bp"] > payload["against_crps_bp"] > 0
    again = monitor(symbol="GOOG", as_of=CALM, since=date(2007, 6, 28))
    assert again.degraded_event_id == result.degraded_event_id
    assert len(rows_of(settings, outbox)) == 1


@pytest.fixture
def ageing(home: Path, tmp_path: Path) -> Iterator[Settings]:
    """As `settings`, with the age that is set by default."""
    with configured(home, database_url=f"sqlite:///{tmp_path / 'perennial.db'}") as made:
        yield made


def asked_for_age(settings: Settings) -> list[tuple[str, str, int]]:
    """Day, since when, and trading days from there of every event."""
    rows = [row for row in rows_of(settings, outbox) if row["name"] == ModelAged.name]
    return [tuple(row["payload"][key] for key in ("as_of", "since", "days")) for row in rows]


def retrained(settings: Settings, day: date, trigger: str) -> None:
    """A retrain that the gate refused, for that is one too."""
    with engine_of(settings.sql_url) as engine:
        asked = {"symbol": "GOOG", "trigger": trigger, "flow_run_id": "a run", "as_of": day}
        entry = ledger.claim(engine, limits=ledger.Limits(), **asked)
        ledger.close(engine, entry.id, "refused", "not better")


def test_age_is_told_a_cooldown_after_training_then_after_twice_the_time(ageing):
    start, days = datetime.now(UTC), sessions_after(TRAINED, 61)
    assert monitor(symbol="GOOG", as_of=days[18]).aged_event_id is None
    assert asked_for_age(ageing) == []
    told = monitor(symbol="GOOG", as_of=days[19])
    assert told.aged_event_id is not None
    (event,) = delivered(told.aged_event_id, start)
    assert event["event"] == "perennial.model.aged"
    assert event["resource"]["prefect.resource.id"] == "perennial.symbol.GOOG"
    assert event["payload"] == {
        "schema": 1,
        "symbol": "GOOG",
        "as_of": days[19].isoformat(),
        "forecaster": NAME,
        "version": 1,
        "since": TRAINED.isoformat(),
        "days": 20,
        "wait": 20,
    }
    again = monitor(symbol="GOOG", as_of=days[20])  # what it asked for was skipped, or failed
    assert again.aged_event_id not in (None, told.aged_event_id)
    retrained(ageing, days[20], f"{ModelAged.name} {again.aged_event_id}")
    assert monitor(symbol="GOOG", as_of=days[59]).aged_event_id is None
    assert monitor(symbol="GOOG", as_of=days[60]).aged_event_id is not None
    assert asked_for_age(ageing) == [
        (days[19].isoformat(), TRAINED.isoformat(), 20),
        (days[20].isoformat(), TRAINED.isoformat(), 21),
        (days[60].isoformat(), days[20].isoformat(), 40),
    ]


def test_after_an_alarms_retrain_age_begins_anew(ageing):
    days = sessions_after(TRAINED, 70)
    retrained(ageing, days[19], f"{ModelAged.name} an event")
    retrained(ageing, days[45], f"{DriftDetected.name} an event")
    assert monitor(symbol="GOOG", as_of=days[64]).aged_event_id is None
    assert monitor(symbol="GOOG", as_of=days[65]).aged_event_id is not None


def test_age_is_silent_where_there_is_an_alarm_or_nobody_is_told(ageing):
    crash = monitor(symbol="GOOG", as_of=CRASH)
    assert (crash.event_id is None, crash.aged_event_id) == (False, None)
    made_up = monitor(symbol="GOOG", as_of=CALM, since=CALM - timedelta(days=7), alarms=False)
    assert (made_up.drifted, made_up.aged_event_id) == (False, None)
    assert asked_for_age(ageing) == []


@pytest.mark.parametrize(("version", "asks"), [(1, False), (2, True)])
def test_age_knows_of_an_alarm_that_was_told_on_a_day_without_trading(ageing, version, asks):
    friday = next(day for day in sessions_after(TRAINED, 25)[19:] if day.weekday() == 4)
    saturday, sunday = (friday + timedelta(days=each) for each in (1, 2))
    told = PerformanceDegraded(
        symbol="GOOG",
        as_of=saturday,
        forecaster=NAME,
        version=version,
        against="the walk",
        since=TRAINED,
        days=20,
        crps_bp=2.0,
        against_crps_bp=1.0,
        evidence=100.0,
    )
    with engine_of(ageing.sql_url) as engine:
        events.put_once(engine, told, same=f"GOOG {saturday} {NAME} {version}")
    assert (monitor(symbol="GOOG", as_of=sunday).aged_event_id is not None) == asks


@pytest.fixture
def provisional(ageing: Settings) -> Iterator[Settings]:
    """As `ageing`; the gate let the version in only because the one before was worse."""
    registry = open_registry(ageing)
    registry.tag_version(NAME, 1, {PROVISIONAL_TAG: "true"})
    yield ageing
    registry.tag_version(NAME, 1, {PROVISIONAL_TAG: "false"})


def test_a_provisional_version_asks_after_a_cooldown_then_later_for_each_refusal(provisional):
    start, days = datetime.now(UTC), sessions_after(TRAINED, 61)
    plant(provisional, 1.3, days[0], days[60])
    soon = monitor(symbol="GOOG", as_of=days[18])
    assert (soon.provisional, soon.degraded) == (True, False)
    assert (soon.provisional_event_id, soon.aged_event_id) == (None, None)
    told = monitor(symbol="GOOG", as_of=days[19])
    assert told.aged_event_id is None
    (event,) = delivered(told.provisional_event_id, start)
    assert event["event"] == "perennial.model.provisional"
    assert event["resource"]["prefect.resource.id"] == "perennial.symbol.GOOG"
    assert event["payload"] == {
        "schema": 1,
        "symbol": "GOOG",
        "as_of": days[19].isoformat(),
        "forecaster": NAME,
        "version": 1,
        "since": TRAINED.isoformat(),
        "days": 20,
        "wait": 20,
        "refused": 0,
    }
    retrained(provisional, days[20], f"{ModelProvisional.name} {told.provisional_event_id}")
    waits = monitor(symbol="GOOG", as_of=days[59])
    assert (waits.provisional, waits.provisional_event_id, waits.aged_event_id) == (
        True,
        None,
        None,
    )
    assert monitor(symbol="GOOG", as_of=days[60]).provisional_event_id is not None
    last = rows_of(provisional, outbox, "occurred_at")[-1]["payload"]
    assert (last["since"], last["wait"], last["refused"]) == (days[20].isoformat(), 40, 1)
    assert asked_for_age(provisional) == []


def test_one_that_degrades_beyond_doubt_does_not_wait(provisional):
    days = sessions_after(TRAINED, 61)
    plant(provisional, 0.25, days[0], days[60])
    retrained(provisional, days[40], "an alarm")
    seen = monitor(symbol="GOOG", as_of=days[60])
    assert (seen.degraded, seen.provisional_event_id) == (True, None)
    assert seen.degraded_event_id is not None


def test_one_whose_newest_scores_are_as_good_as_the_walks_is_provisional_no_more(provisional):
    days = sessions_after(TRAINED, 100)
    plant(provisional, 0.7, days[0], days[99])
    early, late = (monitor(symbol="GOOG", as_of=days[number]) for number in (40, 99))
    assert (early.provisional, late.provisional) == (True, False)
    assert late.provisional_event_id is None


def test_every_score_is_kept_as_a_series_and_shown(settings):
    plant(settings, 1.0, date(2007, 1, 3), CALM)
    plant(settings, 1.0, date(2007, 6, 1), CALM, source="post", prices_md5=None)
    first = monitor(symbol="GOOG", as_of=date(2007, 6, 15))
    result = monitor(symbol="GOOG", as_of=CALM)
    assert (result.degraded, result.degraded_event_id) == (False, None)
    found = {
        (row["as_of"], row["name"], row["horizon"]): row["value"]
        for row in rows_of(settings, scores)
    }
    days = {day for day, name, _ in found if name == "drift_log_range"}
    assert days == {date(2007, 6, 15), date(2007, 6, 22), CALM}
    for horizon in range(1, 6):
        crps, expected = (found[CALM, name, horizon] for name in ("crps_bp", "expected_crps_bp"))
        assert found[CALM, "expected_error", horizon] == pytest.approx(crps / expected - 1)
        assert found[CALM, "coming_crps_bp", horizon] > 0
        assert 0.5 < found[CALM, "cover80", horizon] <= 1
        assert found[CALM, "mae_over_walk", horizon] == pytest.approx(1)
        # the tiny graph's own intervals are a third wider than those that were planted
        assert found[CALM, "prediction_width_drift", horizon] > 1
    assert found[date(2007, 6, 15), "evidence", 0] == pytest.approx(first.evidence)
    metrics = client_of(settings).get_run(result.run_id).data.metrics
    assert metrics["crps_bp_h5"] == pytest.approx(found[CALM, "crps_bp", 5])
    told = json.loads(kept(settings, result.run_id, "performance.json"))
    assert [row["horizon"] for row in told["horizons"]] == [1, 2, 3, 4, 5]
    shown = flow_artifacts(rows_of(settings, checks, "as_of")[-1]["flow_run_id"])
    assert [row["horizon"] for row in json.loads(shown["performance"])] == [1, 2, 3, 4, 5]
    assert len(json.loads(shown["prediction-drift"])) == 5


def test_drift_that_was_held_back_for_faulty_prices_is_told_once_they_are_right(settings):
    late = date(2008, 11, 19)
    for _ in range(2):
        held = monitor(symbol="GOOG", as_of=late, since=date(2008, 11, 7))
        assert (held.drifted, bool(held.faults), held.event_id) == (True, True, None)
    (row,) = [each for each in rows_of(settings, checks) if each["as_of"] == CRASH]
    assert (row["drifted"], row["alarmed"]) == (True, False)
    (line,) = [each for each in rows_of(settings, audit) if each["kind"] == "skip"]
    assert (line["subject"], line["who"]) == ("GOOG", "perennial.drift.detected")
    assert line["reason"].startswith(f"As of {CRASH} the monitor told nobody: the newest prices")
    told = monitor(symbol="GOOG", as_of=CRASH)  # the same newest prices, none of them missing
    assert told.event_id is not None
    (row,) = [each for each in rows_of(settings, checks) if each["as_of"] == CRASH]
    assert row["alarmed"]
    assert monitor(symbol="GOOG", as_of=CRASH).checks == 0


def test_evidently_opens_the_checks_of_a_symbol(settings):
    workspace = settings.evidently_dir
    before = set(workspace.rglob("snapshots/*.json"))
    monitor(symbol="GOOG", as_of=date(2007, 9, 14))
    monitor(symbol="GOOG", as_of=date(2007, 9, 14), since=date(2007, 9, 13))
    (path,) = set(workspace.rglob("snapshots/*.json")) - before
    assert json.loads(path.read_text())["timestamp"].startswith("2007-09-14")
    project = json.loads((path.parents[1] / "metadata.json").read_text())
    assert project["name"] == "GOOG"


def test_a_day_before_what_production_knows_is_refused(settings):
    with pytest.raises(HistoryError, match="trained as of 2006-12-29 and knows what came after"):
        monitor(symbol="GOOG", as_of=date(2006, 12, 28))
    assert rows_of(settings, checks) == rows_of(settings, outbox) == []


def test_without_anything_in_production_it_says_what_to_run(tmp_path):
    with configured(tmp_path) as settings:
        with pytest.raises(RegistryError, match=r"no version with alias 'production'.*train/train"):
            monitor(symbol="GOOG", as_of=CALM)
        assert monitor(symbol="GOOG", as_of=CALM, return_state=True).is_failed()
    assert not settings.data_dir.exists()
