"""Compare recent prices with what the version in production learnt from; alarm on drift."""

from datetime import date
from uuid import UUID

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from pydantic import BaseModel

from flows.ingest import today_or
from flows.train import forecaster_name
from forecasting.errors import HistoryError
from forecasting.registry import open_registry
from forecasting.settings import load_settings
from forecasting.store import engine_of
from tasks.events import deliver_events
from tasks.monitor import (
    alarm,
    check_days,
    compare,
    join_actuals,
    last_check,
    production_contract,
    record_checks,
    report,
)


class MonitorResult(BaseModel):
    """What one monitor run saw."""

    symbol: str
    as_of: date
    version: int
    drifted: bool
    share: float
    summary: str
    checks: int
    joined: int
    run_id: str
    event_id: UUID | None = None


@flow(name="monitor")
def monitor(
    symbol: str = "GOOG", as_of: date | None = None, since: date | None = None
) -> MonitorResult:
    """Check for drift on `as_of`, and catch up on the weekly checks missed since the last one.

    Only the newest check acts: it says what is true now. It emits `perennial.drift.detected`,
    which an automation answers with the deployment `retrain`.

    Args:
        symbol: whose prices and forecaster.
        as_of: the day it pretends to be; today if absent.
        since: checks after this day are made up for; the last recorded check if absent.
    """
    settings = load_settings()
    day = today_or(as_of)
    registry = open_registry(settings)
    version, contract = production_contract(registry, forecaster_name(symbol))
    with engine_of(settings.sql_url) as engine:
        joined = join_actuals(settings, engine, symbol, day)
        after = since or last_check(engine, symbol)
        days = check_days(after, day)
        if not days:
            deliver_events(settings)  # what an earlier run could not
            raise HistoryError(
                f"No session of the exchange lies after {after} up to {day}: nothing to check. "
                "Ask for a later as_of or an earlier since."
            )
        verdicts, html = compare(settings, contract, symbol, days)
        run_id = report(registry, engine, version, symbol, verdicts, html)
        newest = verdicts[-1]
        event_id = alarm(engine, contract, version, symbol, newest) if newest.drifted else None
        record_checks(engine, contract, version, symbol, verdicts, str(flow_run.id or "local"))
    deliver_events(settings)
    get_run_logger().info(newest.summary())
    return MonitorResult(
        symbol=symbol,
        as_of=day,
        version=version,
        drifted=newest.drifted,
        share=newest.share,
        summary=newest.summary(),
        checks=len(verdicts),
        joined=joined,
        run_id=run_id,
        event_id=event_id,
    )
