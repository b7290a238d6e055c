"""Compare recent prices with what the version in production learnt from; alarm on drift."""

from datetime import date
from uuid import UUID

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from pydantic import BaseModel

from flows.ingest import today_or
from forecasting import datasets
from forecasting.assignment import who_serves
from forecasting.errors import HistoryError
from forecasting.registry import open_registry
from forecasting.settings import load_settings
from forecasting.store import engine_of
from tasks.accounting import accounted
from tasks.events import deliver_events
from tasks.monitor import (
    alarm,
    check_days,
    compare,
    find_faults,
    join_actuals,
    last_check,
    last_known,
    production_contract,
    record_checks,
    report,
    was_alarmed,
)
from tasks.probation import Scene, watch


class MonitorResult(BaseModel):
    """What one monitor run saw; without new prices there is no check, no share and no run id.

    `faults` are of the newest prices; while there are any, drift is told but alarms nobody.
    `probation` says how a version fares that is watched, or that it was rolled back.
    """

    symbol: str
    as_of: date
    version: int
    summary: str
    joined: int
    drifted: bool = False
    share: float | None = None
    checks: int = 0
    run_id: str = ""
    faults: list[str] = []
    event_id: UUID | None = None
    probation: str = ""


@flow(name="monitor")
@accounted
def monitor(
    symbol: str = "GOOG", as_of: date | None = None, since: date | None = None
) -> MonitorResult:
    """Check for drift on `as_of`, and catch up on the weekly checks missed since the last one.

    Only the newest check acts: it says what is true now. It emits `perennial.drift.detected`, once
    a day and version, which an automation answers with the deployment `retrain`. Prices that cannot
    be right, or did not come, are `perennial.data.faulty`; no training follows from them.
    A version on probation that is worse than the one before it is rolled back.

    Args:
        symbol: whose prices, and whose forecaster: its own or one that serves it with others.
        as_of: the day it pretends to be; today if absent.
        since: checks after this day are made up for; the last recorded check if absent.

    Raises:
        RegistryError: nothing is in production yet.
        HistoryError: the version in production was trained as of a later day.
    """
    settings = load_settings()
    day = today_or(as_of)
    registry = open_registry(settings)
    forecaster, symbols = who_serves(registry, symbol)
    version, contract = production_contract(registry, forecaster)
    if contract.as_of > day:
        raise HistoryError(
            f"Version {version} in production was trained as of {contract.as_of} and knows what "
            f"came after {day}; monitor it as of that day or later."
        )
    seen = MonitorResult(symbol=symbol, as_of=day, version=version, summary="", joined=0)
    md5 = datasets.find(settings).md5  # one version for all steps, whatever is ingested meanwhile
    with engine_of(settings.sql_url) as engine:
        seen.faults = find_faults(settings, engine, symbol, day, md5)
        seen.joined = join_actuals(settings, engine, symbol, day, md5)
        after = since or last_check(engine, symbol)
        session = last_known(settings, symbol, day, md5)
        days = check_days(after, session)
        if days:
            verdicts, html = compare(settings, contract, symbol, days, md5)
            newest = verdicts[-1]
            seen.summary, seen.drifted, seen.share = newest.summary(), newest.drifted, newest.share
            seen.checks = len(verdicts)
            seen.run_id = report(registry, engine, version, symbol, md5, verdicts, html)
            known = was_alarmed(engine, contract, version, symbol, newest.recent_end)
            if newest.drifted and not known and not seen.faults:
                seen.event_id = alarm(engine, contract, version, symbol, newest)
            record_checks(engine, contract, version, symbol, verdicts, str(flow_run.id or "local"))
        else:
            seen.summary = (
                f"Nothing to check: on {day} no prices of {symbol} after {after} are known."
            )
        if not seen.faults:  # nobody is judged by prices that cannot be right
            scene = Scene(settings, registry, engine, forecaster, symbols, day, session, md5)
            seen.probation = watch(scene)
    deliver_events(settings)
    get_run_logger().info(seen.summary)
    return seen
