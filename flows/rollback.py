"""Put an earlier version of a forecaster back into production."""

from prefect import flow, get_run_logger

from forecasting import promotion
from forecasting.errors import RegistryError
from forecasting.promotion import PromotionResult
from forecasting.registry import PREVIOUS, Registry, open_registry
from forecasting.settings import load_settings
from forecasting.store import engine_of
from tasks.accounting import accounted
from tasks.events import telling
from tasks.promote import promote_version


@flow(name="rollback")
@accounted
def rollback(
    forecaster: str = "perennial-goog", version: int | None = None, why: str = "rolled back by hand"
) -> PromotionResult:
    """Put `version` into production, by default the one that held it before.

    The version that it replaces becomes `previous`, so that a second rollback undoes the first.

    Args:
        forecaster: registered model.
        version: any registered version; absent: the alias `previous`.
        why: kept in the promotion history.

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
        return promote_version(settings, registry, engine, forecaster, target, why)


def _previous(registry: Registry, forecaster: str) -> int:
    found = registry.alias(forecaster, PREVIOUS)
    if found is None:
        held = ", ".join(str(each.version) for each in registry.history(forecaster)) or "none"
        raise RegistryError(
            f"{forecaster} has no version with the alias {PREVIOUS!r} to go back to; "
            f"versions in {registry.shown}: {held}. Name one with `version`."
        )
    return found
