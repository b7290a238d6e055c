"""Automations and deployments as code, on a real Prefect server."""

import importlib
import inspect
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime
from uuid import UUID, uuid4

import pytest
import yaml
from prefect import Flow, flow, tags
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, RunDeployment
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.events.schemas.automations import Automation
from prefect.events.schemas.events import Event
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent

from deployments.automations import HEARTBEAT_SECONDS, TAG, apply, automations
from deployments.stack import POOL, PREFECT_FILE
from flows.retrain import retrain
from forecasting.errors import ServiceError
from forecasting.events import DriftDetected

FILE = yaml.safe_load(PREFECT_FILE.read_text())
DEPLOYMENTS = FILE["deployments"]
DRIFT, CRASHED = [each.name for each in automations(uuid4())]


@pytest.fixture
def client(prefect_server: None) -> Iterator[SyncPrefectClient]:
    """A client of a server without our deployments and automations."""
    with get_client(sync_client=True) as made:
        forget(made)
        yield made
        forget(made)


@pytest.fixture
def deployment(client: SyncPrefectClient) -> UUID:
    """The deployment `retrain/retrain`."""
    return client.create_deployment(client.create_flow(retrain), "retrain")


def forget(client: SyncPrefectClient) -> None:
    for each in ours(client):
        client.delete_automation(each.id)
    for found in client.read_deployments():
        client.delete_deployment(found.id)


def ours(client: SyncPrefectClient) -> list[Automation]:
    return [each for name in (DRIFT, CRASHED) for each in client.read_automations_by_name(name)]


def without_id(found: Automation) -> dict[str, object]:
    return found.model_dump(exclude={"id": True, "trigger": {"id"}})


def test_without_deployments_it_says_what_to_do_first(client: SyncPrefectClient) -> None:
    with pytest.raises(ServiceError, match=r"retrain/retrain is missing\. Run `prefect deploy"):
        apply(client)
    assert ours(client) == []


def test_applied_twice_there_are_two(client: SyncPrefectClient, deployment: UUID) -> None:
    assert apply(client) == [f"created: {DRIFT}", f"created: {CRASHED}"]
    first = ours(client)
    assert apply(client) == [f"updated: {DRIFT}", f"updated: {CRASHED}"]
    again = ours(client)
    assert [each.id for each in again] == [each.id for each in first]
    assert [without_id(each) for each in again] == [without_id(each) for each in first]
    assert [each.name for each in again] == [DRIFT, CRASHED]
    assert all(each.enabled for each in again)


def test_a_changed_one_is_put_back(client: SyncPrefectClient, deployment: UUID) -> None:
    apply(client)
    before = ours(client)
    other = automations(uuid4())[1]
    other.trigger.within *= 2
    for each in before:
        changed = other.model_copy(update={"name": each.name, "description": "by hand"})
        client.update_automation(each.id, changed)
    assert [without_id(each) for each in ours(client)] != [without_id(each) for each in before]
    apply(client)
    assert [without_id(each) for each in ours(client)] == [without_id(each) for each in before]


def test_one_that_was_switched_off_by_hand_stays_off(
    client: SyncPrefectClient, deployment: UUID
) -> None:
    apply(client)
    client.pause_automation(ours(client)[0].id)
    apply(client)
    assert [each.enabled for each in ours(client)] == [False, True]


def test_duplicates_are_removed(client: SyncPrefectClient, deployment: UUID) -> None:
    for _ in range(2):
        for each in automations(deployment):
            client.create_automation(each)
    assert len(ours(client)) == 4
    apply(client)
    assert [each.name for each in ours(client)] == [DRIFT, CRASHED]


def test_drift_runs_the_deployment_with_parameters_it_has(
    client: SyncPrefectClient, deployment: UUID
) -> None:
    apply(client)
    (action,) = ours(client)[0].actions
    assert isinstance(action, RunDeployment)
    assert action.deployment_id == deployment
    assert set(action.parameters) == {"symbol", "as_of", "trigger"}
    assert set(action.parameters) <= set(inspect.signature(retrain.fn).parameters)
    payload = set(DriftDetected.__struct_fields__)
    assert {"symbol", "as_of"} <= payload
    assert action.parameters["symbol"] == "{{ event.payload.symbol }}"
    assert action.parameters["as_of"] == "{{ event.payload.as_of }}"


def test_lost_runs_become_crashed(client: SyncPrefectClient, deployment: UUID) -> None:
    apply(client)
    (action,) = ours(client)[1].actions
    assert isinstance(action, ChangeFlowRunState)
    assert action.state == StateType.CRASHED


def trigger_of(client: SyncPrefectClient, name: str) -> EventTrigger:
    """The trigger as the server's own matching sees it."""
    (found,) = client.read_automations_by_name(name)
    return EventTrigger.model_validate(found.trigger.model_dump(mode="json"))


def received(event: Event) -> ReceivedEvent:
    return ReceivedEvent.model_validate(event.model_dump(mode="json"))


def test_every_symbols_drift_and_nothing_else_starts_a_retrain(
    client: SyncPrefectClient, deployment: UUID
) -> None:
    apply(client)
    trigger = trigger_of(client, DRIFT)
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


def test_only_runs_with_our_tag_are_judged(client: SyncPrefectClient, deployment: UUID) -> None:
    apply(client)
    trigger = trigger_of(client, CRASHED)
    runs = {}
    for tag in (TAG, "perennial-but-not-ours"):
        with tags(tag):
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
    _, crashed = automations(uuid4())
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


def test_schedules_wait_until_they_are_switched_on() -> None:
    schedules = [each for found in DEPLOYMENTS for each in found.get("schedules", [])]
    assert schedules
    assert not any(each["active"] for each in schedules)
