"""Prefect automations as code; `python -m deployments.automations` applies them idempotently.

With them come the schedule of `daily`, switched off, and the limit of the queue `training`: both
are made once, and stay as somebody changes them.
"""

from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast
from uuid import UUID, uuid4

from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.actions import CallWebhook, ChangeFlowRunState, RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.types import SecretDict
from pydantic import SecretStr

from forecasting.errors import ServiceError
from forecasting.events import (
    RETRAINING,
    DataFaulty,
    DataMissing,
    DataRejected,
    DataUpdated,
    ModelCondemned,
    ModelRolledBack,
    ModelUnservable,
    PerformanceDegraded,
)
from forecasting.settings import Settings, load_settings

HEARTBEAT_SECONDS = 90
"""A run whose last heartbeat is older has lost its worker; `prefect.yaml` has our runs send one
every 30 seconds (Prefect's default of 180 would make every longer run look lost)."""
TAG = "perennial"
"""Of our deployments in `prefect.yaml`; runs of others are not judged."""
WEBHOOK_BLOCK = "perennial-notify"
DAILY = CronSchedule(cron="0 19 * * 1-5", timezone="America/New_York")
"""After the close in New York; the flow knows the holidays, and makes up for what was missed."""
TRAINING = "training"
"""Work queue of the flows that train, one at a time."""
RETIRED = (
    "perennial: drift starts retrain",
    "perennial: drift or degraded performance starts retrain",
    "perennial: tell that prices are stale, faulty or refused",
)
"""Names that earlier versions gave; automations of these names are removed."""
PAYLOAD = """{
  "text": {{ (automation.name ~ (": " ~ event.resource.id if event else "")) | tojson }},
  "automation": {{ automation.name | tojson }},
  "event": {{ (event.event if event else none) | tojson }},
  "resource": {{ (event.resource.id if event else none) | tojson }},
  "run": {{ event.resource["prefect.resource.name"] | default(none) | tojson }},
  "payload": {{ (event.payload if event else {}) | tojson }}
}"""
"""What the webhook is sent: JSON, with a line for people under `text`, as chat services take it."""


@dataclass(frozen=True)
class Targets:
    """Ids of the deployments that automations start."""

    retrain: UUID
    daily: UUID
    rollback: UUID


def automations(targets: Targets, webhook: UUID | None, settings: Settings) -> list[AutomationCore]:
    """Every automation of the project.

    Args:
        targets: what is started.
        webhook: id of the block that is told; None: the automations that tell are left out.
        settings: what is told when.
    """
    wanted = [
        *(_retrain(targets.retrain), _chain(targets.daily)),
        *(_rollback(targets.rollback), _crashed()),
    ]
    return wanted if webhook is None else [*wanted, *_notifications(webhook, settings)]


def _retrain(deployment: UUID) -> AutomationCore:
    return AutomationCore(
        name="perennial: drift, degraded performance or age starts retrain",
        description="A run for each event; the ledger lets one train, and keeps why others did "
        "not.",
        trigger=_each(
            set(RETRAINING),
            match={"prefect.resource.id": "perennial.symbol.*"},
        ),
        actions=[
            RunDeployment(
                deployment_id=deployment,
                parameters={
                    "symbol": "{{ event.payload.symbol }}",
                    "as_of": "{{ event.payload.as_of }}",
                    "trigger": "{{ event.event }} {{ event.id }}",
                },
            )
        ],
    )


def _chain(deployment: UUID) -> AutomationCore:
    return AutomationCore(
        name="perennial: new data starts daily",
        description="Monitor and forecast the symbols of an ingest; a day is done once.",
        trigger=_each({DataUpdated.name}, match={"prefect.resource.id": "perennial.dataset"}),
        actions=[
            RunDeployment(
                deployment_id=deployment,
                parameters={
                    "symbols": "{{ event.payload.symbols }}",
                    "as_of": "{{ event.payload.as_of }}",
                },
            )
        ],
    )


def _rollback(deployment: UUID) -> AutomationCore:
    return AutomationCore(
        name="perennial: a condemned version starts rollback",
        description="Where a person has to approve (PERENNIAL_APPROVAL): the run pauses and asks. "
        "Where not, the monitor has rolled back already.",
        trigger=_each({ModelCondemned.name}),
        actions=[
            RunDeployment(
                deployment_id=deployment,
                parameters={
                    "forecaster": "{{ event.payload.forecaster }}",
                    "version": "{{ event.payload.previous }}",
                    "why": "{{ event.payload.why }}",
                    "watched": "{{ event.payload.probation }}",
                },
            )
        ],
    )


def _crashed() -> AutomationCore:
    return AutomationCore(
        name="perennial: a run that lost its worker is Crashed",
        description="No heartbeat and no end: the process or its machine is gone.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={
                "prefect.flow-run.heartbeat",
                "prefect.flow-run.Completed",
                "prefect.flow-run.Failed",
                "prefect.flow-run.Cancelled",
                "prefect.flow-run.Crashed",
            },
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=_OURS,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=HEARTBEAT_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, message="No heartbeat: the process or its worker is gone."
            )
        ],
    )


def _notifications(webhook: UUID, settings: Settings) -> list[AutomationCore]:
    """What a person is told, by name and trigger."""
    failures = settings.notify_failures
    told = {DataFaulty.name, DataRejected.name, DataMissing.name}
    triggers = {
        "no monitor has completed": _silence(settings),
        "prices are missing, stale, faulty or refused": _each(told),
        "a deployment fails again and again": EventTrigger(
            expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
            match_related=[{"prefect.resource.role": "deployment"}, _OURS],
            for_each={"related:deployment:prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=failures,
            within=timedelta(days=7),  # of `daily` there is one a market day
        ),
        "a run has crashed": _each({"prefect.flow-run.Crashed"}, match_related=_OURS),
        "a version cannot be served": _each({ModelUnservable.name}),
        "forecasts got worse": _each({PerformanceDegraded.name}),
        "a version was rolled back": _each({ModelRolledBack.name}),
        "a rollback waits for a person": _each({ModelCondemned.name}),
    }
    return [
        AutomationCore(
            name=f"perennial: tell that {what}",
            description="Calls the webhook of PERENNIAL_NOTIFY_URL.",
            trigger=trigger,
            actions=[CallWebhook(block_document_id=webhook, payload=PAYLOAD)],
        )
        for what, trigger in triggers.items()
    ]


_COMPLETED = "prefect.flow-run.Completed"
_OURS: dict[str, str | list[str]] = {
    "prefect.resource.id": f"prefect.tag.{TAG}",
    "prefect.resource.role": "tag",
}


def _silence(settings: Settings) -> EventTrigger:
    """Fire where no monitor completes for too long, counted from the last one that did."""
    return EventTrigger(
        after={_COMPLETED},  # without it windows of that length would follow on each other
        expect={_COMPLETED},
        match_related=[
            {"prefect.resource.role": "flow", "prefect.resource.name": "monitor"},
            _OURS,
        ],
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(hours=settings.notify_silence_hours),
    )


def _each(expect: set[str], **matching: Any) -> EventTrigger:  # noqa: ANN401  (Prefect's patterns)
    """Fire for each event at once, with none left out."""
    return EventTrigger(
        expect=expect,
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),
        **matching,
    )


def apply(client: SyncPrefectClient, settings: Settings) -> list[str]:
    """Create or update every automation by name; the lines say what was done.

    One that is as it should be is left alone, and goes on waiting for what it waits for. Those that
    are no longer wanted are removed: of earlier versions, and the ones that tell where no
    `notify_url` is set. What was switched off by hand stays off.

    Raises:
        ServiceError: a deployment that is started is not there yet.
    """
    targets = Targets(
        retrain=_deployment(client, "retrain/retrain"),
        daily=_deployment(client, "daily/daily"),
        rollback=_deployment(client, "rollback/rollback"),
    )
    wanted = automations(targets, _webhook(settings.notify_url), settings)
    done = [_put(client, automation) for automation in wanted]
    done += [*_schedule(client, targets.daily), *_limit(client)]
    known = {*RETIRED, *(each.name for each in automations(targets, uuid4(), settings))}
    for name in sorted(known - {each.name for each in wanted}):
        for found in client.read_automations_by_name(name):
            client.delete_automation(found.id)
            done.append(f"removed: {name}")
    return done


def _deployment(client: SyncPrefectClient, name: str) -> UUID:
    try:
        return client.read_deployment_by_name(name).id
    except ObjectNotFound as error:
        raise ServiceError(
            f"The deployment {name} is missing. Run `prefect deploy --all` first."
        ) from error


def _put(client: SyncPrefectClient, automation: AutomationCore) -> str:
    found = client.read_automations_by_name(automation.name)
    for repeated in found[1:]:
        client.delete_automation(repeated.id)
    if not found:
        client.create_automation(automation)
        return f"created: {automation.name}"
    if _says(found[0]) == _says(automation):  # an update would have it wait from now on
        return f"unchanged: {automation.name}"
    client.update_automation(found[0].id, automation)
    return f"updated: {automation.name}"


def _says(automation: AutomationCore) -> dict[str, Any]:
    """All that is ours to decide."""
    return automation.model_dump(include=AutomationCore.model_fields.keys() - {"enabled"})


def _schedule(client: SyncPrefectClient, daily: UUID) -> list[str]:
    if client.read_deployment_schedules(daily):
        return []
    client.create_deployment_schedules(
        daily, [DeploymentScheduleCreate(schedule=DAILY, active=False)]
    )
    return [f"created: schedule of daily ({DAILY.cron} {DAILY.timezone}), to be switched on"]


def _limit(client: SyncPrefectClient) -> list[str]:
    """One training at a time, where nobody has set another limit."""
    deployed = client.read_deployment_by_name("retrain/retrain")
    if deployed.work_queue_name != TRAINING:  # somebody deploys it elsewhere
        return []
    queue = client.read_work_queue_by_name(TRAINING, deployed.work_pool_name)
    if queue.concurrency_limit is not None:
        return []
    client.update_work_queue(queue.id, concurrency_limit=1)
    return [f"limited: one run at a time of the work queue {TRAINING}"]


def _webhook(url: SecretStr) -> UUID | None:
    """Id of the webhook's block, made or updated; removed, and None, without an address."""
    if url.get_secret_value():
        block = Webhook(
            url=url,
            headers=SecretDict({"Content-Type": "application/json"}),
            allow_private_urls=True,  # it is the operator's own, and may be on this machine
        )
        return cast(UUID, block.save(WEBHOOK_BLOCK, overwrite=True))  # no coroutine outside of one
    with suppress(ValueError):  # there is none
        Webhook.delete(WEBHOOK_BLOCK)
    return None


def main() -> None:
    """Apply to the server of `PREFECT_API_URL`."""
    with get_client(sync_client=True) as client:
        print("\n".join(apply(client, load_settings())))


if __name__ == "__main__":
    main()
