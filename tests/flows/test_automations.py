"""Automations and deployments as code, on a real Prefect server."""

import importlib
import inspect
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import yaml
from prefect import Flow, flow, tags
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.events.actions import ChangeFlowRunState, RunDeployment
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.events.schemas.automations import Automation
from prefect.events.schemas.events import Event
from prefect.exceptions import ObjectNotFound
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Crashed, Failed

from deployments.automations import (
    DAILY,
    HEARTBEAT_SECONDS,
    RETIRED,
    TAG,
    TRAINING,
    WEBHOOK_BLOCK,
    Targets,
    apply,
    automations,
)
from deployments.stack import POOL, PREFECT_FILE
from flows.daily import daily
from flows.retrain import retrain
from flows.rollback import rollback
from forecasting import events
from forecasting.errors import ServiceError
from forecasting.events import (
    DataFaulty,
    DataUpdated,
    DriftDetected,
    ModelAged,
    ModelCondemned,
    ModelProvisional,
    ModelRolledBack,
    ModelUnservable,
    PerformanceDegraded,
)
from forecasting.settings import Settings, load_settings
from forecasting.store import engine_of, retrains
from tasks.events import deliver
from tests.flows.support import configured, rows_of
from tests.serving.running import until
from tests.webhook import Receiver, receiving

STARTED = (retrain, daily, rollback)
FILE = yaml.safe_load(PREFECT_FILE.read_text())
DEPLOYMENTS = FILE["deployments"]


def plan(**changes: object) -> list[str]:
    """Names of what there should be."""
    settings = load_settings(**changes)
    webhook = uuid4() if settings.notify_url.get_secret_value() else None
    return [
        each.name for each in automations(Targets(uuid4(), uuid4(), uuid4()), webhook, settings)
    ]


RETRAIN, CHAIN, ROLLBACK, CRASHED = CORE = plan()
TOLD = plan(notify_url="http://somewhere")[4:]
SILENT = "perennial: tell that no monitor has completed"


@pytest.fixture
def client(prefect_server: None) -> Iterator[SyncPrefectClient]:
    """A client of a server without our deployments and automations."""
    with get_client(sync_client=True) as made:
        forget(made)
        yield made
        forget(made)


@pytest.fixture
def targets(client: SyncPrefectClient) -> Targets:
    """The deployments of the flows that automations start."""
    return Targets(
        *(client.create_deployment(client.create_flow(each), each.name) for each in STARTED)
    )


def forget(client: SyncPrefectClient) -> None:
    for each in client.read_automations():
        client.delete_automation(each.id)
    for found in client.read_deployments():
        client.delete_deployment(found.id)


def ours(client: SyncPrefectClient) -> list[Automation]:
    names = (*CORE, *TOLD, *RETIRED)
    return [each for name in names for each in client.read_automations_by_name(name)]


def without_id(found: Automation) -> dict[str, object]:
    return found.model_dump(exclude={"id": True, "trigger": {"id"}})


def test_without_deployments_it_says_what_to_do_first(client: SyncPrefectClient) -> None:
    with pytest.raises(ServiceError, match=r"retrain/retrain is missing\. Run `prefect deploy"):
        apply(client, load_settings())
    assert ours(client) == []


def test_applied_twice_there_is_one_of_each(client: SyncPrefectClient, targets: Targets) -> None:
    for settings, names in (
        (load_settings(), [*CORE]),
        (load_settings(notify_url="http://127.0.0.1:9/"), [*CORE, *TOLD]),
    ):
        apply(client, settings)
        first = ours(client)
        assert apply(client, settings) == [f"unchanged: {name}" for name in names]
        again = ours(client)
        assert [each.id for each in again] == [each.id for each in first]
        assert [without_id(each) for each in again] == [without_id(each) for each in first]
        assert [each.name for each in again] == names
        assert all(each.enabled for each in again)


def test_without_an_address_nothing_tells_and_nothing_is_left(
    client: SyncPrefectClient, targets: Targets
) -> None:
    apply(client, load_settings(notify_url="http://127.0.0.1:9/hook?token=hush"))
    document = client.read_block_document_by_name(WEBHOOK_BLOCK, "webhook", include_secrets=False)
    assert "hush" not in document.model_dump_json(), "shown to nobody in the UI"
    done = apply(client, load_settings())
    assert sorted(done[4:]) == sorted(f"removed: {name}" for name in TOLD)
    assert [each.name for each in ours(client)] == [*CORE]
    with pytest.raises(ObjectNotFound):
        client.read_block_document_by_name(WEBHOOK_BLOCK, "webhook")


def test_one_of_an_earlier_version_is_removed_and_one_of_somebody_else_is_not(
    client: SyncPrefectClient, targets: Targets
) -> None:
    for name in (*RETIRED, "perennial: my own"):
        made = automations(targets, None, load_settings())[0]
        client.create_automation(made.model_copy(update={"name": name}))
    assert f"removed: {RETIRED[0]}" in apply(client, load_settings())
    assert [each.name for each in ours(client)] == [*CORE]
    assert len(client.read_automations_by_name("perennial: my own")) == 1


def test_a_changed_one_is_put_back(client: SyncPrefectClient, targets: Targets) -> None:
    apply(client, load_settings())
    before = ours(client)
    other = automations(Targets(uuid4(), uuid4(), uuid4()), None, load_settings())[3]
    other.trigger.within *= 2
    for each in before:
        changed = other.model_copy(update={"name": each.name, "description": "by hand"})
        client.update_automation(each.id, changed)
    assert [without_id(each) for each in ours(client)] != [without_id(each) for each in before]
    done = apply(client, load_settings())
    assert done == [f"updated: {name}" for name in CORE]
    assert [without_id(each) for each in ours(client)] == [without_id(each) for each in before]


def test_one_that_was_switched_off_by_hand_stays_off(
    client: SyncPrefectClient, targets: Targets
) -> None:
    apply(client, load_settings())
    found = ours(client)[0]
    changed = automations(targets, None, load_settings())[0]
    client.update_automation(found.id, changed.model_copy(update={"description": "by hand"}))
    client.pause_automation(found.id)
    assert f"updated: {RETRAIN}" in apply(client, load_settings())
    assert [each.enabled for each in ours(client)] == [False, True, True, True]


def test_duplicates_are_removed(client: SyncPrefectClient, targets: Targets) -> None:
    for _ in range(2):
        for each in automations(targets, None, load_settings()):
            client.create_automation(each)
    assert len(ours(client)) == 8
    apply(client, load_settings())
    assert [each.name for each in ours(client)] == [*CORE]


@pytest.mark.parametrize(
    ("position", "started", "kinds"),
    [
        (0, retrain, (DriftDetected, PerformanceDegraded)),
        (1, daily, (DataUpdated,)),
        (2, rollback, (ModelCondemned,)),
    ],
)
def test_a_deployment_is_run_with_parameters_it_has_from_what_the_event_says(
    client: SyncPrefectClient,
    targets: Targets,
    position: int,
    started: Flow[Any, Any],
    kinds: tuple[type[events.Event], ...],
) -> None:
    apply(client, load_settings())
    (action,) = ours(client)[position].actions
    assert isinstance(action, RunDeployment)
    assert action.deployment_id == (targets.retrain, targets.daily, targets.rollback)[position]
    assert set(action.parameters) <= set(inspect.signature(started.fn).parameters)
    for name, template in action.parameters.items():
        if name != "trigger":
            told = {"version": "previous", "watched": "probation"}.get(name, name)
            assert template == f"{{{{ event.payload.{told} }}}}"
            assert all(told in kind.__struct_fields__ for kind in kinds)


def test_lost_runs_become_crashed(client: SyncPrefectClient, targets: Targets) -> None:
    apply(client, load_settings())
    (action,) = ours(client)[3].actions
    assert isinstance(action, ChangeFlowRunState)
    assert action.state == StateType.CRASHED


def trigger_of(client: SyncPrefectClient, name: str) -> EventTrigger:
    """The trigger as the server's own matching sees it."""
    (found,) = client.read_automations_by_name(name)
    return EventTrigger.model_validate(found.trigger.model_dump(mode="json"))


def received(event: Event) -> ReceivedEvent:
    return ReceivedEvent.model_validate(event.model_dump(mode="json"))


def test_every_symbols_drift_and_nothing_else_starts_a_retrain(
    client: SyncPrefectClient, targets: Targets
) -> None:
    apply(client, load_settings())
    trigger = trigger_of(client, RETRAIN)
    drift = DriftDetected(
        symbol="BRK.B",
        as_of=date(2008, 1, 2),
        forecaster="perennial-brk.b",
        version=1,
        share=0.7,
        threshold=0.5,
        features=("volume",),
        dataset_md5="d",
    )

    def event(name: str, resource: str) -> ReceivedEvent:
        return ReceivedEvent(
            event=name,
            resource={"prefect.resource.id": resource},
            occurred=datetime.now(UTC),
            id=uuid4(),
        )

    assert trigger.covers(event(drift.name, drift.resource))
    for asked in (PerformanceDegraded, ModelProvisional, ModelAged):
        assert trigger.covers(event(asked.name, drift.resource))
    assert not trigger.covers(event(drift.name, "somebody.elses.symbol.GOOG"))
    assert not trigger.covers(event("perennial.drift.denied", drift.resource))


@flow(name="watched")
def watched() -> None:
    """A flow that ends at once."""


def last_event(client: SyncPrefectClient, name: str, run_id: UUID, seconds: float = 30) -> Event:
    """The event of one run, as soon as the server has it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        wanted = EventFilter(  # made anew, as it ends at the time of its making
            event=EventNameFilter(name=[name]),
            resource=EventResourceFilter(id=[f"prefect.flow-run.{run_id}"]),
        )
        if found := client.read_events(wanted, limit=1).events:
            return found[0]
        time.sleep(0.1)
    raise AssertionError(f"no event {name} of flow run {run_id} in {seconds} s")


def test_only_runs_with_our_tag_are_judged(client: SyncPrefectClient, targets: Targets) -> None:
    apply(client, load_settings())
    trigger = trigger_of(client, CRASHED)
    runs = {}
    for tag in (TAG, "perennial-but-not-ours"):
        with tags(tag), temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 30}):
            runs[tag] = watched(return_state=True).state_details.flow_run_id
    for name in ("prefect.flow-run.heartbeat", "prefect.flow-run.Completed"):
        assert name in trigger.expect
        seen = {tag: received(last_event(client, name, run)) for tag, run in runs.items()}
        judged = {tag: trigger.covers(event) for tag, event in seen.items()}
        assert judged == {TAG: True, "perennial-but-not-ours": False}


def test_every_deployment_carries_the_tag_and_the_pool() -> None:
    assert all(TAG in each["tags"] for each in DEPLOYMENTS)
    assert all(each["work_pool"]["name"] == POOL for each in DEPLOYMENTS)


def test_runs_send_heartbeats_well_within_the_automations_window() -> None:
    crashed = automations(Targets(uuid4(), uuid4(), uuid4()), None, load_settings())[3]
    window = crashed.trigger.within.total_seconds()
    assert window == HEARTBEAT_SECONDS
    for each in DEPLOYMENTS:
        sent = each["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]
        assert isinstance(sent, str), "an environment variable is text"
        assert 30 <= int(sent) <= window / 2, "Prefect takes at least 30"


def test_deployments_have_names_of_their_own() -> None:
    names = [each["name"] for each in DEPLOYMENTS]
    assert len(set(names)) == len(names)
    assert "retrain" in names


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda each: each["name"])
def test_an_entry_point_is_a_flow_of_a_module(deployment: dict[str, str]) -> None:
    module, _, name = deployment["entrypoint"].rpartition(".")
    assert "/" not in module
    assert ":" not in deployment["entrypoint"]
    found = getattr(importlib.import_module(module), name)
    assert isinstance(found, Flow)
    assert found.name == deployment["name"], "named flow/deployment as prefect.yaml calls it"
    assert deployment["description"]


def test_the_schedule_waits_until_it_is_switched_on_and_stays_so(
    client: SyncPrefectClient, targets: Targets
) -> None:
    """One in `prefect.yaml` would be switched off by each deploy."""
    assert not any(found.get("schedules") for found in DEPLOYMENTS)
    assert "created: schedule of daily" in "".join(apply(client, load_settings()))
    (made,) = client.read_deployment_schedules(targets.daily)
    assert (made.active, made.schedule) == (False, DAILY)
    client.update_deployment_schedule(targets.daily, made.id, active=True)
    apply(client, load_settings())
    (kept,) = client.read_deployment_schedules(targets.daily)
    assert (kept.id, kept.active) == (made.id, True)


def test_one_training_runs_at_a_time_without_a_lease(client: SyncPrefectClient) -> None:
    """Prefect cancels a run that pauses for an approval if its deployment has a limit."""
    pool = client.create_work_pool(WorkPoolCreate(name="somewhere", type="process"))
    queue = client.create_work_queue(TRAINING, work_pool_name=pool.name)
    for each in STARTED:
        client.create_deployment(
            client.create_flow(each),
            each.name,
            work_pool_name=pool.name,
            work_queue_name=TRAINING if each is retrain else None,
        )
    try:
        apply(client, load_settings())
        assert client.read_work_queue(queue.id).concurrency_limit == 1
        client.update_work_queue(queue.id, concurrency_limit=3)
        apply(client, load_settings())
        assert client.read_work_queue(queue.id).concurrency_limit == 3
    finally:
        client.delete_work_pool(pool.name)
    pauses = [each for each in DEPLOYMENTS if each["name"] in ("train", "train-each", "retrain")]
    assert len(pauses) == 3
    for each in pauses:
        assert "concurrency_limit" not in each
        assert each["work_pool"]["work_queue_name"] == TRAINING


# what the server does ----------------------------------------------------------------------------


def put_all(settings: Settings, told: list[events.Event]) -> None:
    """Events into the outbox, and from there to Prefect."""
    with engine_of(settings.sql_url) as engine:
        for event in told:
            events.put(engine, event)
    assert deliver(settings) == len(told)


def drift(day: date = date(2008, 10, 24)) -> DriftDetected:
    return DriftDetected(
        symbol="GOOG",
        as_of=day,
        forecaster="perennial-goog",
        version=1,
        share=0.75,
        threshold=0.5,
        features=("log_range",),
        dataset_md5="d" * 32,
    )


def degraded() -> PerformanceDegraded:
    return PerformanceDegraded(
        symbol="GOOG",
        as_of=date(2008, 10, 24),
        forecaster="perennial-goog",
        version=1,
        against="random walk",
        since=date(2008, 9, 2),
        days=38,
        horizon=1,
        crps_bp=300.0,
        against_crps_bp=200.0,
        coverage=0.8,
        evidence=120.0,
    )


def condemned() -> ModelCondemned:
    return ModelCondemned(
        forecaster="perennial-goog",
        version=2,
        previous=1,
        as_of=date(2008, 10, 24),
        probation="a-promotion",
        evidence=31.0,
        why="Worse than version 1.",
    )


def aged() -> ModelAged:
    return ModelAged(
        symbol="AAPL",
        as_of=date(2008, 10, 27),
        forecaster="perennial-aapl",
        version=1,
        since=date(2008, 7, 28),
        days=64,
        wait=40,
    )


def provisional() -> ModelProvisional:
    return ModelProvisional(
        symbol="IBM",
        as_of=date(2008, 10, 28),
        forecaster="perennial-ibm",
        version=2,
        since=date(2008, 9, 29),
        days=21,
        wait=20,
        refused=0,
    )


def runs_of(client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    wanted = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
    return client.read_flow_runs(deployment_filter=wanted, limit=200)


def test_events_start_runs_with_typed_parameters(
    client: SyncPrefectClient, targets: Targets, settings: Settings
) -> None:
    apply(client, load_settings())
    day = date(2008, 10, 24)
    new = DataUpdated(symbols=("GOOG", "IBM"), as_of=day, dataset_md5="d" * 32)
    put_all(settings, [degraded(), aged(), provisional(), new, condemned()])
    retrained = until(
        lambda: (found := runs_of(client, targets.retrain))[2:] and found, "three retrains"
    )
    asked_for = sorted((run.parameters["symbol"], run.parameters["as_of"]) for run in retrained)
    assert asked_for == [("AAPL", "2008-10-27"), ("GOOG", str(day)), ("IBM", "2008-10-28")]
    (round_,) = until(lambda: runs_of(client, targets.daily), "a daily round")
    assert round_.parameters == {"symbols": ["GOOG", "IBM"], "as_of": str(day)}
    (asked,) = until(lambda: runs_of(client, targets.rollback), "a rollback")
    assert asked.parameters == {
        "forecaster": "perennial-goog",
        "version": 1,
        "why": "Worse than version 1.",
        "watched": "a-promotion",
    }


STORM = 20


@pytest.mark.slow
def test_of_twenty_drift_events_at_once_one_trains(
    client: SyncPrefectClient, targets: Targets, tmp_path: Path
) -> None:
    """A run for each; the ledger lets one train and keeps why the others did not."""
    apply(client, load_settings())
    with configured(tmp_path / "home") as settings:
        put_all(settings, [drift() for _ in range(STORM)])
        asked = until(
            lambda: (found := runs_of(client, targets.retrain))[STORM - 1 :] and found,
            f"{STORM} runs",
            60,
        )
        assert len({run.parameters["trigger"] for run in asked}) == len(asked) == STORM
        given = [run.parameters | {"as_of": date(2006, 12, 29)} for run in asked]  # short history
        with ThreadPoolExecutor(STORM) as threads:
            results = list(threads.map(lambda parameters: retrain(**parameters), given))
        lines = rows_of(settings, retrains)
    outcomes = sorted(result.outcome for result in results)
    assert outcomes == ["promoted"] + ["skipped"] * (STORM - 1)
    assert sorted(line["state"] for line in lines) == outcomes
    assert {line["trigger"] for line in lines} == {run.parameters["trigger"] for run in asked}
    skipped = [line["reason"] for line in lines if line["state"] == "skipped"]
    assert all("one at a time" in reason or "the cooldown is 20" in reason for reason in skipped)
    (trained,) = [line for line in lines if line["state"] == "promoted"]
    assert trained["cpu_seconds"] > 1


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@flow(name="monitor")
def completes() -> None:
    """By its name and tag a monitor."""


@pytest.mark.slow
def test_a_person_is_told_through_the_webhook(
    client: SyncPrefectClient,
    targets: Targets,
    settings: Settings,
    receiver: Receiver,
) -> None:
    hours = 11 / 3600  # Prefect takes no less than ten seconds
    apply(
        client,
        load_settings(notify_url=receiver.url, notify_silence_hours=hours, notify_failures=2),
    )
    faulty = DataFaulty(
        symbol="GOOG", as_of=date(2008, 10, 24), faults=('stale: "none" came',), dataset_md5="d"
    )
    broken = ModelUnservable(forecaster="perennial-goog", version=2, reason="no", where="sync")
    back = ModelRolledBack(
        forecaster="perennial-goog", version=1, rolled_back=2, who="me", why="worse"
    )
    put_all(settings, [faulty, broken, back, condemned(), degraded()])
    failing = [targets.retrain, targets.daily, targets.daily]
    runs = [client.create_flow_run_from_deployment(each, tags=[TAG]).id for each in failing]
    for each in runs:
        client.set_flow_run_state(each, Failed(message="no disk"), force=True)
    with tags(TAG):
        lost = watched(return_state=True).state_details.flow_run_id
    client.set_flow_run_state(lost, Crashed(message="gone"), force=True)
    receiver.await_all({*TOLD})
    assert receiver.types == {"application/json"}
    by_name = {each["automation"]: each for each in receiver.messages}
    stale = by_name["perennial: tell that prices are missing, stale, faulty or refused"]
    assert stale["event"] == "perennial.data.faulty"
    assert stale["payload"]["faults"] == ['stale: "none" came']
    assert stale["text"].endswith(": perennial.symbol.GOOG")
    crash = by_name["perennial: tell that a run has crashed"]
    assert crash["resource"] == f"prefect.flow-run.{lost}"
    failed = by_name["perennial: tell that a deployment fails again and again"]
    assert failed["resource"] in {f"prefect.flow-run.{each}" for each in runs[1:]}
    silent = by_name["perennial: tell that no monitor has completed"]
    assert silent["text"].startswith("perennial: tell that no monitor has completed")


@pytest.mark.slow
def test_silence_is_counted_from_the_last_monitor(
    client: SyncPrefectClient,
    targets: Targets,
    settings: Settings,
    receiver: Receiver,
) -> None:
    seconds = 16
    apply(client, load_settings(notify_url=receiver.url, notify_silence_hours=seconds / 3600))
    for _ in range(3):  # together they last longer than the silence that is told
        with tags(TAG):
            completes()
        ended = time.monotonic()
        until(lambda ended=ended: time.monotonic() - ended > seconds / 2, "half of it", seconds)
        assert SILENT not in {each["automation"] for each in receiver.messages}
    completes()  # without the tag it is somebody else's
    receiver.await_all({SILENT})
    assert seconds - 1 < time.monotonic() - ended < 1.45 * seconds
    (told,) = [each for each in receiver.messages if each["automation"] == SILENT]
    assert told["run"], "the last that completed"
