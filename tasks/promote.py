"""Promotion as a Prefect transaction: where a later step fails, the aliases go back."""

import getpass
import re
from typing import Any

from prefect import get_run_logger
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run
from prefect.tasks import Task
from prefect.transactions import Transaction, get_transaction, transaction
from sqlalchemy import Engine

from forecasting import promotion
from forecasting.errors import OvertakenError, RegistryError
from forecasting.promotion import PromotionResult
from forecasting.registry import Registry, open_registry
from forecasting.settings import Settings
from forecasting.store import engine_of
from tasks.steps import create_table_artifact, task


def promote_version(
    settings: Settings,
    registry: Registry,
    engine: Engine,
    forecaster: str,
    version: int,
    why: str,
    judged_against: int | None = promotion.ANY,
) -> PromotionResult:
    """Put a version into production, in one transaction with the record of it.

    Call it inside a flow; inside another `transaction()`, a failure of that one's later steps puts
    the aliases back too.

    Raises:
        RegistryError: no such version, or the registry is away.
        OvertakenError: another version than `judged_against` is in production by now.
        ServiceError: the server refused the version; the aliases are back where they were.
    """
    with transaction():
        result = promote(settings, registry, engine, forecaster, version, why, judged_against)
        record(registry, engine, result)
    return result


def _registry_was_away(_task: Task[Any, Any], _run: TaskRun, state: State[Any]) -> bool:
    error = state.result(raise_on_failure=False)
    return isinstance(error, RegistryError) and not isinstance(error, OvertakenError)


@task(
    name="promote",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[1, 3],
    retry_condition_fn=_registry_was_away,
    timeout_seconds=300,
)
def promote(
    settings: Settings,
    registry: Registry,
    engine: Engine,
    forecaster: str,
    version: int,
    why: str,
    judged_against: int | None,
) -> PromotionResult:
    """Move the aliases and wait for the server's word."""
    result = promotion.promote(
        settings, registry, engine, forecaster, version, who(), why, judged_against
    )
    current = get_transaction()
    if current is not None:
        current.set("settings", settings)
        current.set("promotion", result.promotion)
    get_run_logger().info("%s version %d: %s", forecaster, version, result.served)
    return result


@promote.on_rollback
def put_back(failed: Transaction) -> None:
    """Put the aliases back because a later step failed."""
    settings, identity = failed.get("settings", None), failed.get("promotion", "")
    if settings is None or not identity:
        return  # it failed itself, and undid itself; or it moved nothing
    with engine_of(settings.sql_url) as engine:
        reason = "a later step of its transaction failed."
        promotion.undo(settings, open_registry(settings), engine, identity, reason)


@task(name="record-promotion", cache_policy=NO_CACHE, timeout_seconds=120)
def record(registry: Registry, engine: Engine, done: PromotionResult) -> None:
    """Show who promoted what, when and why: tags of the version, and a table in Prefect."""
    forecaster, lines = done.forecaster, promotion.history(engine, done.forecaster)
    for line in lines:
        if line.id == done.promotion:  # none where the version was in production already
            tags = {
                "promoted_at": line.created_at.isoformat(timespec="seconds"),
                "promoted_by": line.who,
                "promoted_because": line.why,
            }
            registry.tag_version(forecaster, line.version, tags)
    create_table_artifact(
        [_row(line) for line in lines[:50]],
        key="promotions-" + re.sub(r"[^a-z0-9]+", "-", forecaster.lower()).strip("-"),
        description=f"Promotions of {forecaster}, newest first",
    )


def who() -> str:
    """Who acts: the user, and the flow run if there is one."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        user = "unknown user"
    run = f" through {flow_run.flow_name}/{flow_run.name} ({flow_run.id})" if flow_run.id else ""
    return f"{user}{run}"[:200]


def _row(line: promotion.Promotion) -> dict[str, object]:
    return {
        "when": line.created_at.isoformat(timespec="seconds"),
        "version": line.version,
        "before": line.previous,
        "state": line.state,
        "served": line.served,
        "who": line.who,
        "why": line.why,
    }
