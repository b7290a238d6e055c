"""Prefect automations as code; `python -m deployments.automations` applies them idempotently."""

from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

from forecasting.errors import ServiceError
from forecasting.events import DriftDetected

HEARTBEAT_SECONDS = 90
"""A run whose last heartbeat is older has lost its worker; `prefect.yaml` has our runs send one
every 30 seconds (Prefect's default of 180 would make every longer run look lost)."""
TAG = "perennial"
"""Of our deployments in `prefect.yaml`; runs of others are not judged."""


def automations(retrain_id: UUID) -> list[AutomationCore]:
    """Every automation of the project, given the id of the deployment `retrain/retrain`."""
    drift = AutomationCore(
        name="perennial: drift starts retrain",
        description="One retrain a symbol for each drift event; the ledger refuses storms.",
        trigger=EventTrigger(
            expect={DriftDetected.name},
            match={"prefect.resource.id": "perennial.symbol.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(seconds=10),
        ),
        actions=[
            RunDeployment(
                deployment_id=retrain_id,
                parameters={
                    "symbol": "{{ event.payload.symbol }}",
                    "as_of": "{{ event.payload.as_of }}",
                    "trigger": "{{ event.id | string }}",
                },
            )
        ],
    )
    crashed = AutomationCore(
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
            match_related={
                "prefect.resource.id": f"prefect.tag.{TAG}",
                "prefect.resource.role": "tag",
            },
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
    return [drift, crashed]


def apply(client: SyncPrefectClient) -> list[str]:
    """Create or update every automation by name; the lines say what was done.

    Raises:
        ServiceError: the deployment `retrain/retrain` is not there yet.
    """
    try:
        retrain_id = client.read_deployment_by_name("retrain/retrain").id
    except ObjectNotFound as error:
        raise ServiceError(
            "The deployment retrain/retrain is missing. Run `prefect deploy --all` first."
        ) from error
    done = []
    for automation in automations(retrain_id):
        found = client.read_automations_by_name(automation.name)
        if found:
            client.update_automation(found[0].id, automation)
        else:
            client.create_automation(automation)
        for repeated in found[1:]:
            client.delete_automation(repeated.id)
        done.append(f"{'updated' if found else 'created'}: {automation.name}")
    return done


def main() -> None:
    """Apply to the server of `PREFECT_API_URL`."""
    with get_client(sync_client=True) as client:
        print("\n".join(apply(client)))


if __name__ == "__main__":
    main()
