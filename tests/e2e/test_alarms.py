"""Every alarm but drift from end to end: prices come, and the automations do what has to be done.

A stack of its own with a webhook. The tests are steps of one story and run in the order in which
they stand; `test_loop` has the story of drift.
"""

from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from sqlalchemy import Engine

from deployments.prefect_api import PrefectApi, Run
from deployments.stack import Stack
from forecasting import audit, datasets, events, promotion
from forecasting.events import (
    DataUpdated,
    DriftDetected,
    ModelAged,
    ModelRolledBack,
    PerformanceDegraded,
)
from forecasting.performance import WALK
from forecasting.registry import PREVIOUS, PRODUCTION, Registry, open_registry
from forecasting.sessions import sessions_after
from forecasting.settings import Settings, load_settings
from forecasting.store import engine_of, open_engine, retrains
from tasks.events import deliver
from tests.e2e.conftest import QUICK
from tests.e2e.planted import NAME, plant
from tests.flows.support import rows_of
from tests.serving.running import until
from tests.webhook import Receiver, receiving

TRAINED = date(2006, 12, 29)
DAYS = sessions_after(TRAINED, 80)
ALARMED = QUICK | {
    "PERENNIAL_PROBATION_DAYS": "20",
    "PERENNIAL_RETRAIN_BUDGET_RUNS": "1",
    "PERENNIAL_RETRAIN_COOLDOWN_DAYS": "8",
}

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@pytest.fixture(scope="module")
def alarmed(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> Iterator[Stack]:
    """A stack whose automations tell somebody."""
    told = ALARMED | {"PERENNIAL_NOTIFY_URL": receiver.url}
    with Stack(tmp_path_factory.mktemp("alarmed"), extra=told) as made:
        made.start()
        made.deploy()
        yield made


@pytest.fixture(scope="module")
def its_settings(alarmed: Stack) -> Settings:
    return load_settings(
        home=alarmed.home, tracking_uri=alarmed.mlflow_url, server_url=alarmed.server_url
    )


@pytest.fixture(scope="module")
def registry(its_settings: Settings) -> Registry:
    return open_registry(its_settings)


@pytest.fixture(scope="module")
def engine(its_settings: Settings) -> Iterator[Engine]:
    made = open_engine(its_settings.sql_url)
    yield made
    made.dispose()


@pytest.fixture(scope="module")
def its_api(alarmed: Stack) -> Iterator[PrefectApi]:
    with PrefectApi(alarmed.prefect_url) as client:
        yield client


def come(api: PrefectApi, day: date) -> Run:
    """Prices up to a day come; the round that new data started, once it is over."""
    before = {run.id for run in api.runs("daily")}
    api.wait(api.start("ingest/ingest", {"symbols": ["GOOG"], "as_of": str(day)}), 120)
    return api.wait(new(api, "daily", before).id, 300)


def new(api: PrefectApi, flow: str, before: set[str]) -> Run:
    """The run of a flow that an automation has started since."""

    def started() -> list[Run]:
        return [run for run in api.runs(flow) if run.id not in before]

    (run,) = until(started, f"an automation to start {flow}", 60)
    assert run.creator == "AUTOMATION"
    return run


def asked(api: PrefectApi, name: str) -> dict[str, Any]:
    """The newest event of a kind."""
    return until(lambda: api.events(name), f"the event {name}")[0]


def lines(settings: Settings) -> list[tuple[str, str, str]]:
    """Who asked, what came of it, and why, of each retrain that was asked for."""
    rows = rows_of(settings, retrains, "created_at")
    return [(row["trigger"].split()[0], row["state"], row["reason"]) for row in rows]


def served(stack: Stack) -> int:
    answered = httpx.get(f"{stack.server_url}/v1/forecast/GOOG", timeout=10)
    assert answered.status_code == 200, answered.text
    return int(answered.json()["model_version"])


def alarm(stack: Stack, settings: Settings, symbol: str, day: date) -> None:
    """Tell of drift as a monitor does."""
    event = DriftDetected(
        symbol=symbol,
        as_of=day,
        forecaster=f"perennial-{symbol.lower()}",
        version=1,
        share=0.75,
        threshold=0.5,
        features=("log_range",),
        dataset_md5="d" * 32,
    )
    with engine_of(settings.sql_url) as engine:
        events.put(engine, event)
    with temporary_settings({PREFECT_API_URL: f"{stack.prefect_url}/api"}):
        assert deliver(settings) == 1


def test_new_data_starts_the_round_of_its_day(
    alarmed: Stack,
    its_api: PrefectApi,
    its_settings: Settings,
    registry: Registry,
    engine: Engine,
    tmp_path: Path,
) -> None:
    datasets.ingest(its_settings, ["GOOG"], TRAINED)
    assert plant(its_settings, registry, engine, tmp_path / "weak", TRAINED) == 1
    run = come(its_api, DAYS[0])
    event = asked(its_api, DataUpdated.name)
    assert event["payload"]["as_of"] == run.parameters["as_of"] == str(DAYS[0])
    assert run.parameters["symbols"] == ["GOOG"]
    assert served(alarmed) == 1
    assert lines(its_settings) == []


def test_degraded_forecasts_start_a_retrain_that_is_served(
    alarmed: Stack, its_api: PrefectApi, its_settings: Settings, registry: Registry
) -> None:
    come(its_api, DAYS[20])  # the days between are made up for, each with its forecast
    run = its_api.wait(new(its_api, "retrain", set()).id, 300)
    event = asked(its_api, PerformanceDegraded.name)
    assert event["payload"]["version"] == 1
    assert event["payload"]["against"] == WALK
    assert run.parameters["trigger"] == f"{PerformanceDegraded.name} {event['id']}"
    assert registry.aliases(NAME) == {PRODUCTION: 2, PREVIOUS: 1}
    assert served(alarmed) == 2
    assert [line[:2] for line in lines(its_settings)] == [(PerformanceDegraded.name, "promoted")]


@pytest.mark.parametrize(
    ("symbol", "why"),
    [("GOOG", "the cooldown is 8"), ("IBM", "1 retrains were started within a week")],
)
def test_an_alarm_that_comes_too_soon_is_skipped_and_written_down(
    alarmed: Stack,
    its_api: PrefectApi,
    its_settings: Settings,
    engine: Engine,
    symbol: str,
    why: str,
) -> None:
    before = {run.id for run in its_api.runs("retrain")}
    alarm(alarmed, its_settings, symbol, DAYS[22])
    run = its_api.wait(new(its_api, "retrain", before).id, 120)
    trigger, state, reason = lines(its_settings)[-1]
    assert (trigger, state) == (DriftDetected.name, "skipped")
    assert why in reason
    skipped = [line for line in audit.read(engine) if line.kind == "skip"][-1]
    assert (skipped.subject, skipped.who, skipped.reason) == (
        symbol,
        run.parameters["trigger"],
        reason,
    )


def test_a_worse_version_is_rolled_back_and_the_one_before_served(
    alarmed: Stack,
    its_api: PrefectApi,
    its_settings: Settings,
    registry: Registry,
    engine: Engine,
    tmp_path: Path,
) -> None:
    assert plant(its_settings, registry, engine, tmp_path / "weak", DAYS[20]) == 3
    come(its_api, DAYS[36])
    assert registry.aliases(NAME) == {PRODUCTION: 2, PREVIOUS: 3}
    assert served(alarmed) == 2
    line = promotion.history(engine, NAME)[0]
    assert line.why.startswith("probation: Worse than version 2")
    assert registry.version(NAME, 3).tags["probation"] == "rolled-back"
    assert lines(its_settings)[-1][:2] == ("rollback", "rolled-back")


def test_a_version_that_was_left_alone_for_long_is_trained_anew(
    its_api: PrefectApi, its_settings: Settings
) -> None:
    before = {run.id for run in its_api.runs("retrain")}
    come(its_api, DAYS[48])
    run = its_api.wait(new(its_api, "retrain", before).id, 300)
    event = asked(its_api, ModelAged.name)
    assert run.parameters["trigger"] == f"{ModelAged.name} {event['id']}"
    trigger, state, _ = lines(its_settings)[-1]
    assert trigger == ModelAged.name
    assert state in ("promoted", "refused", "unchanged")


def test_a_person_was_told_of_what_they_should_see(receiver: Receiver) -> None:
    receiver.await_all(
        {
            f"perennial: tell that {what}"
            for what in ("forecasts got worse", "a version was rolled back")
        }
    )
    (back,) = [each for each in receiver.messages if each["event"] == ModelRolledBack.name]
    assert (back["payload"]["version"], back["payload"]["rolled_back"]) == (2, 3)
    crashed = [each for each in receiver.messages if "crashed" in each["automation"]]
    assert crashed == []
