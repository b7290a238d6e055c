"""Retrain a symbol's forecaster when it is no longer what it was; automations start it."""

from datetime import date

from prefect import flow, get_run_logger

from flows.ingest import today_or
from flows.train import TrainResult, run_training
from forecasting import costs, ledger
from forecasting.assignment import who_serves
from forecasting.registry import open_registry
from forecasting.settings import load_settings
from forecasting.store import engine_of
from tasks.accounting import accounted
from tasks.steps import flow_run_id


@flow(name="retrain")
@accounted
def retrain(
    symbol: str = "GOOG", as_of: date | None = None, trigger: str = "manual"
) -> TrainResult:
    """Train again on what is known on `as_of`, within the ledger's cooldown and weekly budget.

    One that serves several symbols is trained for all of them again, and one cooldown is for all.
    It starts from the parameters of the version in production, and searches where they do not do.
    A request that is against the limits is skipped, and the ledger keeps the reason.

    Args:
        symbol: whose forecaster.
        as_of: the day it pretends to be; today if absent.
        trigger: what asked for it, such as the id of an event.

    Returns:
        Promoted, refused, unchanged, or skipped, with reasons.
    """
    settings, spent = load_settings(), costs.usage()
    day = today_or(as_of)
    forecaster, symbols = who_serves(open_registry(settings), symbol)
    with engine_of(settings.sql_url) as engine:
        entry = ledger.claim(
            engine,
            symbol=symbol if len(symbols) == 1 else forecaster,
            as_of=day,
            trigger=trigger,
            flow_run_id=flow_run_id(),
            limits=ledger.Limits.of(settings),
        )
        if entry.skipped:
            get_run_logger().warning("not retrained: %s", entry.reason)
            return TrainResult(
                outcome="skipped",
                symbol=symbol,
                symbols=list(symbols),
                as_of=day,
                forecaster=forecaster,
                reasons=[entry.reason],
            )
        try:
            told, widen = f"retrain: {trigger}", settings.retrain_search
            result = run_training(settings, symbols, day, trigger=told, widen=widen)
        except BaseException as error:
            ledger.close(engine, entry.id, "failed", repr(error), costs.usage() - spent)
            raise
        reasons = " ".join(result.reasons)
        ledger.close(engine, entry.id, result.outcome, reasons, costs.usage() - spent)
    return result
