"""Put an earlier version of a forecaster back into production."""

from prefect import flow, get_run_logger
from sqlalchemy import Engine

from forecasting import probation, promotion
from forecasting.errors import RegistryError
from forecasting.probation import Probation
from forecasting.promotion import PromotionResult
from forecasting.registry import PREVIOUS, Registry, open_registry
from forecasting.settings import Settings, load_settings
from forecasting.store import engine_of
from tasks.accounting import accounted
from tasks.approval import NoAnswer, ask, require_approvable
from tasks.events import telling
from tasks.promote import promote_version


@flow(name="rollback")
@accounted
def rollback(
    forecaster: str = "perennial-goog",
    version: int | None = None,
    why: str = "rolled back by hand",
    watched: str = "",
) -> PromotionResult | None:
    """Put `version` into production, by default the one that held it before.

    The version that it replaces becomes `previous`, so that a second rollback undoes the first.

    Args:
        forecaster: registered model.
        version: any registered version; absent: the alias `previous`.
        why: kept in the promotion history.
        watched: id of the probation that asks for it; a person has to approve then.

    Returns:
        What came of it; None where a person did not approve.

    Raises:
        RegistryError: there is no such version, or nothing to go back to.
    """
    settings = load_settings()
    registry = open_registry(settings)
    with telling(settings), engine_of(settings.sql_url) as engine:
        for line in promotion.reconcile(settings, registry, engine, forecaster):
            get_run_logger().warning("An interrupted promotion was settled: %s", line)
        target = version if version is not None else _previous(registry, forecaster)
        registry.version(forecaster, target)  # said at once if there is none; a task would retry
        if watched:
            return _after_approval(settings, registry, engine, probation.find(engine, watched))
        return promote_version(settings, registry, engine, forecaster, target, why)


def _after_approval(
    settings: Settings, registry: Registry, engine: Engine, watched: Probation
) -> PromotionResult | None:
    """Roll back what a probation condemned if a person approves; if not, it stays.

    Where nobody answers the probation goes on, and the next monitor asks again.

    Raises:
        OvertakenError: the version is not in production any more.
    """
    require_approvable(settings)
    if watched.state != "watching":
        get_run_logger().warning("The probation is over: %s. Nothing is asked.", watched.state)
        return None
    told = f"probation: {watched.summary}"
    question = (
        f"May **{watched.forecaster}** go back from version {watched.version} to version "
        f"{watched.previous}?\n\n{told}"
    )
    answer = ask(settings, engine, watched.forecaster, question)
    state = probation.find(engine, watched.id).state
    if state != "watching":  # somebody answered the question of another day meanwhile
        get_run_logger().warning("The probation is over: %s. The answer comes too late.", state)
        return None
    if answer.approve:
        return promote_version(
            *(settings, registry, engine, watched.forecaster, watched.previous),
            f"{told} {answer}",
            judged_against=watched.version,
        )
    get_run_logger().warning("not rolled back: %s", answer)
    if not isinstance(answer, NoAnswer):
        probation.record(engine, watched, "kept", answer.who)
    return None


def _previous(registry: Registry, forecaster: str) -> int:
    found = registry.alias(forecaster, PREVIOUS)
    if found is None:
        held = ", ".join(str(each.version) for each in registry.history(forecaster)) or "none"
        raise RegistryError(
            f"{forecaster} has no version with the alias {PREVIOUS!r} to go back to; "
            f"versions in {registry.shown}: {held}. Name one with `version`."
        )
    return found
