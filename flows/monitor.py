"""Compare recent prices with what the version in production learnt from; alarm on drift."""

from collections.abc import Sequence
from datetime import date
from uuid import UUID

from prefect import flow, get_run_logger
from pydantic import BaseModel
from sqlalchemy import Engine

from flows.ingest import today_or
from forecasting import datasets
from forecasting.assignment import who_serves
from forecasting.contract import Contract
from forecasting.errors import HistoryError
from forecasting.events import DriftDetected, PerformanceDegraded
from forecasting.registry import Registry, open_registry
from forecasting.settings import Settings, load_settings
from forecasting.store import engine_of
from tasks.accounting import accounted
from tasks.events import telling
from tasks.monitor import (
    alarm,
    alarm_aged,
    alarm_provisional,
    check_days,
    compare,
    draw,
    find_faults,
    is_provisional,
    join_actuals,
    keep_snapshot,
    last_check,
    last_known,
    page_due,
    production_contract,
    record_checks,
    report,
    was_alarmed,
    withhold,
)
from tasks.performance import (
    Served,
    alarm_degraded,
    is_untold,
    record_scores,
    score_forecasts,
    watch_served,
)
from tasks.probation import Scene, is_giving_way, watch
from tasks.steps import flow_run_id


class MonitorResult(BaseModel):
    """What one monitor run saw; without new prices there is no check, no share and no run id.

    `faults` are of the newest prices; while there are any, of symbols that share the forecaster
    too, drift and degraded forecasts are told but alarm nobody. `performance` says how the version
    in production fares, `probation` how one that is watched does, or that it was rolled back.
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
    degraded: bool = False
    evidence: float | None = None
    performance: str = ""
    degraded_event_id: UUID | None = None
    aged_event_id: UUID | None = None
    provisional: bool = False
    provisional_event_id: UUID | None = None
    probation: str = ""


@flow(name="monitor")
@accounted
def monitor(
    symbol: str = "GOOG",
    as_of: date | None = None,
    since: date | None = None,
    alarms: bool = True,
) -> MonitorResult:
    """Check for drift on `as_of`, and catch up on the weekly checks missed since the last one.

    Only the newest check acts: it says what is true now. It emits `perennial.drift.detected`, once
    a day and version, which an automation answers with the deployment `retrain`; forecasts that got
    worse than they should be are `perennial.performance.degraded`, as often; where neither is, but
    the last retrain was long ago, `perennial.model.aged`. While a version is provisional, which its
    own newest scores may end, `perennial.model.provisional` asks for a better one. Prices that
    cannot be right, or did not come, are `perennial.data.faulty`; no training follows from them.
    A version on probation that is worse than the one before it is rolled back.

    Args:
        symbol: whose prices, and whose forecaster: its own or one that serves it with others.
        as_of: the day it pretends to be; today if absent.
        since: checks after this day are made up for; the last recorded check if absent.
        alarms: whether drift and degraded forecasts are told, and a person is asked to approve a
            rollback; false for a day that is made up for: a later day says what is true now.

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
    with telling(settings), engine_of(settings.sql_url) as engine:
        seen.faults = find_faults(settings, engine, symbol, day, md5)
        others = [each for each in symbols if each != symbol]  # of the same forecaster
        shared = [find_faults(settings, engine, each, day, md5) for each in others]
        seen.joined = join_actuals(settings, engine, symbol, day, md5)
        after = since or last_check(engine, symbol)
        session = last_known(settings, symbol, day, md5)
        days = check_days(after, session)
        if days:
            held_back = _held_back(
                seen.faults,
                [each for each, found in zip(others, shared, strict=True) if found],
                is_giving_way(engine, forecaster, version),
                alarms,
            )
            _check(settings, registry, engine, contract, seen, md5, days, after, held_back)
        else:
            seen.summary = (
                f"Nothing to check: on {day} no prices of {symbol} after {after} are known."
            )
        if not seen.faults:  # nobody is judged by prices that cannot be right
            scene = Scene(
                *(settings, registry, engine, forecaster, symbols, day, session, md5), asks=alarms
            )
            seen.probation = watch(scene)
    get_run_logger().info(seen.summary)
    return seen


def _held_back(faults: list[str], others: list[str], gives_way: bool, alarms: bool) -> str:
    """Why nobody is told of drift or degraded forecasts; empty if somebody is.

    A retrain would learn from all prices, or start from what is being rolled back.
    """
    if faults:
        return f"the newest prices cannot be right: {'; '.join(faults)}."
    if others:
        return f"of {', '.join(others)}, which it is forecast with, prices cannot be right."
    if gives_way:
        return "the version is being rolled back."
    return "" if alarms else "the day is made up for; a later one says what is true now."


def _check(
    settings: Settings,
    registry: Registry,
    engine: Engine,
    contract: Contract,
    seen: MonitorResult,
    md5: str,
    days: Sequence[date],
    after: date | None,
    held_back: str,
) -> None:
    """Look at prices and forecasts, tell and record it; what was seen is filled in."""
    tells = not held_back
    symbol, version = seen.symbol, seen.version
    verdicts = compare(settings, contract, symbol, days, md5)
    newest = verdicts[-1]
    seen.summary, seen.drifted, seen.share = newest.summary(), newest.drifted, newest.share
    seen.checks = len(verdicts)
    fares, logged = score_forecasts(settings, engine, contract, version, symbol, seen.as_of, md5)
    seen.performance, seen.degraded, seen.evidence = fares.summary(), fares.degraded, fares.evidence
    is_new = newest.drifted and not was_alarmed(engine, contract, version, symbol, after)
    known = was_alarmed(engine, contract, version, symbol, newest.recent_end)
    if newest.drifted and not known and tells:  # before any page, which may fail
        seen.event_id = alarm(engine, contract, version, symbol, newest)
    if fares.degraded and tells:
        seen.degraded_event_id = alarm_degraded(engine, fares)
    end = newest.recent_end
    if held_back:
        untold = [DriftDetected.name] if newest.drifted and not known else []
        untold += [PerformanceDegraded.name] if is_untold(engine, fares) else []
        withhold(engine, version, symbol, end, untold, held_back)
    seen.provisional = not fares.as_good_as_walk and is_provisional(registry, contract, version)
    if tells and seen.provisional and fares.strongest and not fares.degraded:
        seen.provisional_event_id = alarm_provisional(
            settings, engine, contract, version, symbol, end
        )
    elif tells and not (newest.drifted or fares.degraded):
        seen.aged_event_id = alarm_aged(
            settings, engine, contract, version, symbol, end, seen.as_of
        )
    answered = Served([], [])
    if is_new or page_due(settings.report_days, after, newest.recent_end):
        answered = watch_served(
            settings, registry, engine, contract, version, symbol, seen.as_of, md5, logged
        )
        snapshot = draw(settings, contract, symbol, newest.recent_end, md5)
        seen.run_id = report(
            registry,
            engine,
            contract.forecaster,
            version,
            symbol,
            md5,
            verdicts,
            snapshot,
            fares,
            answered,
        )
        keep_snapshot(settings, version, symbol, newest.recent_end, snapshot)
    record_scores(engine, contract, version, symbol, verdicts, fares, answered)
    record_checks(
        engine,
        contract,
        version,
        symbol,
        verdicts,
        flow_run_id(),
        alarmed=seen.event_id is not None,
    )
