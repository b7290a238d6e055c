"""A person approves: the flow run pauses with the verdict until somebody answers its form."""

from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL
from prefect.states import Running
from pydantic import Field
from sqlalchemy import Engine

from forecasting import audit
from forecasting.errors import ConfigError
from forecasting.settings import Settings

POLL_SECONDS = 2
"""How often a paused run asks whether it was answered."""


class Approval(RunInput):
    """The form, and what was answered."""

    approve: bool = Field(description="Whether the version may go into production.")
    who: str = Field(min_length=1, max_length=80, description="Who decides; kept with it.")
    reason: str = Field(min_length=1, max_length=500, description="Why; kept with it.")

    def __str__(self) -> str:
        word = "Approved" if self.approve else "Not approved"
        return f"{word} by {self.who}: {self.reason}"


class NoAnswer(Approval):
    """What stands for an answer where nobody gave one in time."""

    approve: bool = False
    who: str = "nobody"


def require_approvable(settings: Settings) -> None:
    """Say before any work is done that nobody could approve what comes of it.

    Raises:
        ConfigError: approval is asked for, and there is no Prefect server to pause at.
    """
    if settings.approval and not PREFECT_API_URL.value():
        raise ConfigError(
            "PERENNIAL_APPROVAL asks a person to approve promotions in the Prefect UI, and no "
            "Prefect server is named: a run that pauses could not be answered. Set PREFECT_API_URL "
            "(`make up` starts a server), or PERENNIAL_APPROVAL=false."
        )


def ask(settings: Settings, engine: Engine, forecaster: str, question: str) -> Approval:
    """Pause the flow run until a person has decided, and put that into the audit.

    Call it inside a flow, outside of tasks.

    Args:
        settings: `approval_hours`.
        engine: of the audit.
        forecaster: whose version in production would be another one.
        question: Markdown above the form, with all that it takes to decide.

    Returns:
        What was answered; a refusal where nobody did in time.
    """
    url = PREFECT_UI_URL.value() or PREFECT_API_URL.value()
    get_run_logger().warning(
        "%s waits for a person: press Resume on this run (%s, %s) within %g hours",
        forecaster,
        flow_run.name,
        url,
        settings.approval_hours,
    )
    form = Approval.with_initial_data(description=question)
    try:
        answer: Approval = pause_flow_run(
            wait_for_input=form,
            timeout=max(1, round(settings.approval_hours * 3600)),
            poll_interval=POLL_SECONDS,
        )
    except FlowPauseTimeout:
        _go_on()
        reason = f"no answer within {settings.approval_hours:g} hours (PERENNIAL_APPROVAL_HOURS)."
        answer = NoAnswer(reason=reason)
    details = {"approve": answer.approve, "flow_run_id": str(flow_run.id or "")}
    with engine.begin() as connection:
        audit.add(
            connection,
            "approval",
            forecaster,
            who=answer.who,
            reason=answer.reason,
            details=details,
        )
    return answer


def _go_on() -> None:
    """Prefect fails a run that ends after a pause that nobody answered; a refusal is no failure."""
    if flow_run.id:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(UUID(flow_run.id), Running(), force=True)
