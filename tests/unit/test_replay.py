"""Policies, the lines of a replay, and its summary."""

import io
import os
import uuid
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from sqlalchemy import insert, select

from deployments.replay import ASIDE, OWN, SHARED, Line, environment, play
from flows.replay import Span
from forecasting import events, replay
from forecasting.errors import ConfigError
from forecasting.events import DriftDetected, ModelAged, Outgoing, PerformanceDegraded
from forecasting.replay import DAY, POLICIES, RETRAIN, Meter, Policy
from forecasting.sessions import sessions_between
from forecasting.settings import Settings
from forecasting.store import costs, now, outbox, predictions, retrains

DAYS = sessions_between(date(2007, 1, 3), date(2007, 6, 29))
LEVELS = [0.025, 0.1, 0.5, 0.9, 0.975]


def told(name: str) -> Outgoing:
    return Outgoing(uuid.uuid4(), name, "perennial.symbol.GOOG", {}, now())


# --- policies --------------------------------------------------------------------------------


def started(policy: Policy, heard: dict[int, str]) -> list[int]:
    """Positions at which it retrains, with the events that are told at some."""
    return [
        position
        for position, day in enumerate(DAYS, start=1)
        if policy.trigger(position, day, [told(heard[position])] if position in heard else [])
    ]


def test_calendar_policies_count_market_days_and_hear_nothing():
    heard = {7: DriftDetected.name, 8: PerformanceDegraded.name}
    assert started(POLICIES["never"], heard) == []
    assert started(POLICIES["monthly"], heard) == [21, 42, 63, 84, 105]
    assert started(POLICIES["quarterly"], heard) == [63]


def test_triggered_policies_hear_their_events_and_no_others():
    heard = {7: DriftDetected.name, 8: PerformanceDegraded.name, 9: "perennial.data.faulty"}
    heard |= {99: ModelAged.name}
    assert started(POLICIES["drift"], heard) == [7]
    assert started(POLICIES["performance"], heard) == [8]
    assert started(POLICIES["both"], heard) == [7, 8]
    assert started(POLICIES["loop"], heard) == [7, 8, 99]


def test_an_oracle_knows_its_days():
    assert started(Policy("oracle", days=frozenset({DAYS[4], DAYS[11]})), {}) == [5, 12]


def test_a_trigger_says_what_it_was():
    event = told(DriftDetected.name)
    assert str(event.id) in POLICIES["both"].trigger(3, DAYS[2], [event])
    assert "market day 21" in POLICIES["monthly"].trigger(21, DAYS[20], [])


# --- lines -----------------------------------------------------------------------------------


def test_a_day_and_its_events_are_done_together_and_once(engine):
    event = DriftDetected(
        symbol="GOOG",
        as_of=DAYS[0],
        forecaster="perennial-goog",
        version=1,
        share=0.5,
        threshold=0.5,
        features=("log_range",),
        volatility=None,
        dataset_md5="d" * 32,
    )
    events.put(engine, event)
    assert replay.last_day(engine) is None
    heard = events.pending(engine)
    replay.end_day(engine, "drift", "GOOG", DAYS[0], heard, Meter(1.0, 0.5))
    replay.end_day(engine, "drift", "GOOG", DAYS[0], heard, Meter(9.0, 9.0))
    assert replay.last_day(engine) == DAYS[0]
    assert events.pending(engine) == []
    with engine.connect() as connection:
        assert connection.execute(select(costs.c.wall_seconds, costs.c.cpu_seconds)).all() == [
            (1.0, 0.5)
        ]
        assert connection.execute(select(outbox.c.attempts)).scalar_one() == 1


def test_a_day_grows_the_home_by_what_its_forecast_and_monitor_do(engine):
    for day, flow, grown in [
        (0, "forecast", 3),
        (0, "monitor", 4),
        (0, RETRAIN, 9),
        (1, "monitor", 5),
    ]:
        spent(engine, DAYS[day], flow, grown)
    for day in DAYS[:3]:
        replay.end_day(engine, "drift", "GOOG", day, [], Meter(1.0, 0.5))
    with engine.connect() as connection:
        query = select(costs.c.bytes).where(costs.c.flow == replay.DAY).order_by(costs.c.as_of)
        assert connection.execute(query).scalars().all() == [7, 5, 0]


@pytest.mark.parametrize(
    ("state", "settled"), [("promoted", True), ("skipped", True), ("running", False)]
)
def test_a_retrain_is_settled_once_it_has_ended(engine, state, settled):
    identity = replay.run_id("drift", RETRAIN, DAYS[0])
    assert not replay.is_settled(engine, identity)
    ledger(engine, DAYS[0], state, identity)
    assert replay.is_settled(engine, identity) is settled
    assert not replay.is_settled(engine, replay.run_id("drift", RETRAIN, DAYS[1]))


def test_a_meter_counts_cpu_of_this_process():
    with replay.metered() as meter:
        for _ in range(40):
            np.linalg.inv(np.random.default_rng(0).normal(size=(300, 300)))
    assert meter.wall > 0
    assert meter.cpu > 0.02


# --- summary ---------------------------------------------------------------------------------


def ledger(engine, day, state, flow_run_id=""):
    with engine.begin() as connection:
        connection.execute(
            insert(retrains).values(
                id=str(uuid.uuid4()),
                symbol="GOOG",
                as_of=day,
                trigger="",
                flow_run_id=flow_run_id or str(uuid.uuid4()),
                state=state,
                reason="",
                created_at=now(),
            )
        )


def spent(engine, day, flow=RETRAIN, grown=0):
    """A run of one minute with a minute and a half of CPU, as its flow writes it down."""
    with engine.begin() as connection:
        connection.execute(
            insert(costs).values(
                id=str(uuid.uuid4()),
                flow=flow,
                flow_run_id="x",
                symbol="GOOG",
                as_of=day,
                outcome="promoted",
                wall_seconds=60.0,
                cpu_seconds=90.0,
                bytes=grown,
                started_at=now(),
            )
        )


def forecasts(engine, width: float, source: str = "batch") -> list[tuple[float, bool]]:
    """One forecast a day of horizon 1; actual and whether it lies in the 80 % interval."""
    rng = np.random.default_rng(3)
    rows, found = [], []
    for day in DAYS:
        close, moved = 100.0, float(rng.normal(0, 0.02))
        quantiles = [close * (1 + width * step) for step in (-0.04, -0.02, 0, 0.02, 0.04)]
        actual = close * (1 + moved)
        rows.append(
            {
                "id": str(uuid.uuid4()),
                "horizon": 1,
                "made_at": now(),
                "source": source,
                "symbol": "GOOG",
                "forecaster": "perennial-goog",
                "model_version": 1,
                "run_id": "r",
                "dataset_md5": "d",
                "prices_md5": "p",
                "origin": day,
                "origin_close": close,
                "target": day + timedelta(days=1),
                "levels": LEVELS,
                "quantiles": quantiles,
                "actual": actual,
                "crps_bp": 100 * width,
            }
        )
        found.append((actual, quantiles[1] <= actual <= quantiles[3]))
    with engine.begin() as connection:
        connection.execute(insert(predictions), rows)
    return found


def test_a_summary_counts_what_the_home_holds(engine):
    held = [inside for _, inside in forecasts(engine, 1.0)]
    forecasts(engine, 5.0, source="shadow")  # of nobody's policy
    for position, day in enumerate(DAYS):
        replay.end_day(engine, "both", "GOOG", day, [], Meter(2.0, 1.0))
        if position in (20, 40, 60):
            spent(engine, day)
    for day, state in zip(
        DAYS,
        ("promoted", "promoted", "refused", "skipped", "unchanged", "rolled-back"),
        strict=False,
    ):
        ledger(engine, day, state)
    for state in ("failed", "refused"):  # cut off, and run again
        ledger(engine, DAYS[7], state, "the same run")
    found = replay.summarise(engine, "both", "GOOG")
    assert found.days == len(DAYS)
    assert found.crps == pytest.approx(100)
    assert found.coverage == pytest.approx(np.mean(held))
    assert (found.retrains, found.promotions, found.refusals, found.skips) == (5, 2, 2, 1)
    assert [state for _, state in found.retrained].count("rolled-back") == 0
    assert found.cpu_minutes == pytest.approx(3 * 1.5)
    assert found.watch_cpu_minutes == pytest.approx(len(DAYS) / 60)
    assert found.days_per_minute == pytest.approx(30)
    assert found.figures()["promotions"] == 2


def test_a_home_without_outcomes_says_so(engine):
    with pytest.raises(ValueError, match="longer span"):
        replay.summarise(engine, "never", "GOOG")


def test_policies_are_compared_on_the_days_of_both(engine):
    forecasts(engine, 1.0)
    found = replay.summarise(engine, "both", "GOOG")
    worse = replay.summarise(engine, "never", "GOOG")
    worse.losses[:] = worse.losses * np.linspace(1.0, 1.2, len(DAYS))
    shorter = worse.losses.iloc[10:]
    relative, low, high = replay.against(
        replay.Summary(**{**vars(worse), "losses": shorter}), found
    )
    assert relative == pytest.approx(shorter.mean() / 100 - 1)
    assert low < relative < high


def test_every_policy_has_its_own_name():
    assert [policy.name for policy in POLICIES.values()] == list(POLICIES)
    assert DAY != RETRAIN


# --- the home of a replay --------------------------------------------------------------------


def test_a_replay_takes_every_setting_but_those_that_name_what_production_uses(monkeypatch):
    told = {
        "PERENNIAL_TRIALS": "3",
        "PERENNIAL_SOURCE": "file",
        "PERENNIAL_DATABASE_URL": "postgresql://elsewhere",
        "MLFLOW_TRACKING_URI": "http://elsewhere",
        "PERENNIAL_DVC_REMOTE": "s3://elsewhere",
        "PERENNIAL_SERVER_URL": "http://elsewhere",
        "PERENNIAL_HOME": "/elsewhere",
    }
    for key, value in told.items():
        monkeypatch.setenv(key, value)
    found = environment(Path("/replay/never"))
    assert [key for key, value in found.items() if "elsewhere" in value] == []
    assert (found["PERENNIAL_TRIALS"], found["PERENNIAL_SOURCE"]) == ("3", "file")
    assert (found["PERENNIAL_HOME"], found["PERENNIAL_REPORT_DAYS"]) == ("/replay/never", "5")
    monkeypatch.setenv("PERENNIAL_REPORT_DAYS", "1")
    assert environment(Path("/replay/never"))["PERENNIAL_REPORT_DAYS"] == "1"


def test_every_setting_that_a_replay_leaves_out_or_sets_is_one():
    known = {f"PERENNIAL_{name.upper()}" for name in Settings.model_fields}
    named = {*SHARED, *OWN, *ASIDE}
    assert {name for name in named if name.startswith("PERENNIAL_")} <= known
    addresses = {name for name in known if name.endswith(("_URL", "_URI", "_REMOTE", "_ADDRESS"))}
    assert addresses - named == {"PERENNIAL_SOURCE_URL"}


def test_a_folder_holds_one_replay(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    tmp_path.joinpath("span").write_text("GOOG 2007-01-03 2007-02-28")
    span = Span("GOOG", date(2007, 1, 3), date(2008, 2, 28))
    with pytest.raises(ConfigError, match="another --name"):
        play(tmp_path, span, POLICIES["never"], lambda *_: None)


def test_a_span_knows_its_days_and_their_eve():
    span = Span("GOOG", date(2007, 1, 3), date(2007, 1, 9))
    assert [day.day for day in span.days] == [3, 4, 5, 8, 9]
    assert span.eve == date(2006, 12, 29)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_whose_exception_python_drops_ends_the_replay_after_its_day():
    class Dropping:
        """Garbage: what is raised while it is collected is told on stderr and dropped."""

        def __del__(self) -> None:
            line.interrupt(15, None)

    line = Line(Console(file=io.StringIO()), "both")
    line(1, 3, DAYS[0], "")
    garbage = Dropping()
    del garbage
    with pytest.raises(KeyboardInterrupt):
        line(2, 3, DAYS[1], "")
