"""Steps of monitoring: join late labels, compare with the training reference, tell, alarm."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date, timedelta
from pathlib import Path
from uuid import UUID

import pandas as pd
from prefect import get_run_logger
from prefect.cache_policies import NO_CACHE
from sqlalchemy import Engine, and_, func, not_, select
from sqlalchemy.dialects import postgresql, sqlite

from forecasting import audit, breaks, datasets, drift, events, faults, ledger, outcomes, workspace
from forecasting.breaks import Shift
from forecasting.contract import Contract, read_contract
from forecasting.drift import DriftVerdict, Reference, Snapshot
from forecasting.errors import HistoryError, RegistryError
from forecasting.performance import Performance
from forecasting.predictions import ANSWERS
from forecasting.registry import PRODUCTION, PROVISIONAL_TAG, Registry
from forecasting.sessions import count_sessions, sessions_between
from forecasting.settings import Settings
from forecasting.store import checks, now
from tasks.performance import Served
from tasks.steps import create_markdown_artifact, create_table_artifact, flow_run_id, task

EVERY = 5
"""Sessions between two checks when a monitor catches up on missed days."""
_FIRST_PAGE = date(2000, 1, 3)
"""From which day pages are counted, so that it matters little when a monitor began."""


def production_contract(registry: Registry, forecaster: str) -> tuple[int, Contract]:
    """Version in production and its contract.

    Raises:
        RegistryError: nothing is in production yet.
    """
    version = registry.alias(forecaster, PRODUCTION)
    if version is None:
        raise RegistryError(
            f"{forecaster} has no version with alias {PRODUCTION!r} at {registry.shown}. Run the "
            "deployment train/train first."
        )
    with tempfile.TemporaryDirectory() as folder:
        registry.download(forecaster, version, Path(folder) / "model")
        return version, read_contract(Path(folder) / "model")


def is_provisional(registry: Registry, contract: Contract, version: int) -> bool:
    """Whether the gate let the version in only because the one before was worse beyond doubt."""
    return registry.version(contract.forecaster, version).tags.get(PROVISIONAL_TAG) == "true"


def last_check(engine: Engine, symbol: str) -> date | None:
    """Day of the symbol's newest recorded check, but for drift whose alarm was held back: that day
    is to be checked again."""
    held_back = and_(checks.c.drifted, func.coalesce(checks.c.alarmed, True).is_(False))
    query = select(func.max(checks.c.as_of)).where(checks.c.symbol == symbol, not_(held_back))
    with engine.connect() as connection:
        return connection.execute(query).scalar_one_or_none()


def last_known(settings: Settings, symbol: str, as_of: date, md5: str) -> date:
    """Session of the newest row that is known on `as_of`."""
    newest: pd.Timestamp = datasets.load_frame(settings, symbol, as_of, md5).index[-1]
    return newest.date()


def was_alarmed(
    engine: Engine, contract: Contract, version: int, symbol: str, day: date | None
) -> bool:
    """Whether drift of that day from that version was told. Drift that was held back was not; of
    checks from before that was written down, all that drifted were."""
    told = func.coalesce(checks.c.alarmed, checks.c.drifted)
    query = select(told).where(
        checks.c.symbol == symbol,
        checks.c.as_of == day,
        checks.c.forecaster == contract.forecaster,
        checks.c.version == version,
    )
    with engine.connect() as connection:
        return bool(connection.execute(query).scalar_one_or_none())


def check_days(since: date | None, as_of: date) -> list[date]:
    """Days to check: every fifth session after `since`, and the newest session up to `as_of`.

    Without `since` the newest session alone.
    """
    if since is None:
        return sessions_between(as_of - timedelta(days=14), as_of)[-1:]
    days = sessions_between(since + timedelta(days=1), as_of)
    return sorted({*days[EVERY - 1 :: EVERY], *days[-1:]})


@task(name="find-faults", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
def find_faults(
    settings: Settings, engine: Engine, symbol: str, as_of: date, md5: str
) -> list[str]:
    """What is wrong with the newest prices; each is told once, by an event."""
    frame = datasets.load_frame(settings, symbol, as_of, md5)
    found = [str(each) for each in faults.find(frame, as_of, settings.extra_closures)]
    if found:
        told = events.DataFaulty(symbol=symbol, as_of=as_of, faults=tuple(found), dataset_md5=md5)
        events.put_once(engine, told)
        get_run_logger().warning("%s: %s", symbol, "; ".join(found))
    return found


@task(name="join-actuals", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
def join_actuals(settings: Settings, engine: Engine, symbol: str, as_of: date, md5: str) -> int:
    """Fill in what came true for logged forecasts whose target day is known."""
    frame = datasets.load_frame(settings, symbol, as_of, md5)
    return outcomes.join_actuals(engine, symbol, frame, as_of)


def page_due(every: int, since: date | None, day: date) -> bool:
    """Whether one of the pages that come every so many sessions falls after `since`."""
    if since is None or every == 0:
        return every > 0
    return count_sessions(_FIRST_PAGE, day) // every > count_sessions(_FIRST_PAGE, since) // every


@task(name="compare", cache_policy=NO_CACHE, timeout_seconds=300)
def compare(
    settings: Settings, contract: Contract, symbol: str, days: Sequence[date], md5: str
) -> list[DriftVerdict]:
    """Verdict of every check day."""
    frame = datasets.load_frame(settings, symbol, days[-1], md5)
    trained_on = datasets.load_frame(settings, symbol, contract.as_of, contract.dataset_md5)
    reference = _reference(settings, contract, trained_on)
    limits = (settings.drift_threshold, settings.drift_share)
    table = drift.features(frame)
    shifts = _shifts(trained_on, contract, frame, days)
    every = zip(drift.compare_dates(table, reference, days, *limits), shifts, strict=True)
    return [verdict.with_shift(shift) for verdict, shift in every]


@task(name="draw", cache_policy=NO_CACHE, timeout_seconds=300)
def draw(settings: Settings, contract: Contract, symbol: str, day: date, md5: str) -> Snapshot:
    """Evidently's report on one check day; it takes a hundred times as long as the verdict."""
    table = drift.features(datasets.load_frame(settings, symbol, day, md5))
    trained_on = datasets.load_frame(settings, symbol, contract.as_of, contract.dataset_md5)
    recent = drift.recent_rows(table, day, settings.drift_window)
    limits = (settings.drift_threshold, settings.drift_share)
    return drift.drift_snapshot(_reference(settings, contract, trained_on), recent, *limits)[1]


def _reference(settings: Settings, contract: Contract, trained_on: pd.DataFrame) -> Reference:
    """What recent rows are compared with: rows that the version learned from."""
    table = drift.features(trained_on)
    return drift.reference_rows(
        table, contract.train_start, contract.train_end, settings.drift_window
    )


def _shifts(
    trained_on: pd.DataFrame, contract: Contract, frame: pd.DataFrame, days: Sequence[date]
) -> list[Shift | None]:
    """Of volatility, on each day; None where the version learned from too short a span to tell."""
    try:
        expectation = breaks.learn(trained_on, contract.train_start, contract.train_end)
    except HistoryError as error:
        get_run_logger().warning("Shifts of volatility are not watched: %s", error)
        return [None] * len(days)
    return [breaks.look(expectation, frame, day) for day in days]


@task(name="keep-snapshot", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
def keep_snapshot(
    settings: Settings, version: int, symbol: str, day: date, snapshot: Snapshot
) -> None:
    """Lay Evidently's report of a check into the workspace."""
    workspace.add(settings.evidently_dir, symbol, day, version, snapshot)


@task(name="record-checks", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
def record_checks(
    engine: Engine,
    contract: Contract,
    version: int,
    symbol: str,
    verdicts: Sequence[DriftVerdict],
    flow_run_id: str,
    *,
    alarmed: bool,
) -> None:
    """Write every check into SQL; a repeated check replaces nothing but that it was told now.

    `alarmed` is of the newest; the ones before it are never told.
    """
    dialect = postgresql if engine.dialect.name == "postgresql" else sqlite
    rows = [
        {
            "symbol": symbol,
            "as_of": verdict.recent_end,
            "forecaster": contract.forecaster,
            "version": version,
            "share": verdict.share,
            "threshold": verdict.required_share,
            "drifted": verdict.drifted,
            "features": verdict.scores(),
            "alarmed": alarmed and verdict is verdicts[-1],
            "flow_run_id": flow_run_id,
            "created_at": now(),
        }
        for verdict in verdicts
    ]
    insert = dialect.insert(checks)
    statement = insert.on_conflict_do_update(
        index_elements=list(checks.primary_key),
        set_={"alarmed": True},
        where=insert.excluded.alarmed,
    )
    with engine.begin() as connection:
        connection.execute(statement, rows)


@task(name="report", cache_policy=NO_CACHE)
def report(
    registry: Registry,
    engine: Engine,
    forecaster: str,
    version: int,
    symbol: str,
    md5: str,
    verdicts: Sequence[DriftVerdict],
    snapshot: Snapshot,
    found: Performance,
    answered: Served,
) -> str:
    """Verdicts, tables and Evidently's pages as MLflow and Prefect artifacts; the MLflow run id."""
    newest = verdicts[-1]
    run_id = registry.start_run(
        f"monitor {symbol} {newest.recent_end}",
        {
            "symbol": symbol,
            "as_of": newest.recent_end.isoformat(),
            "version": str(version),
            "dataset_md5": md5,
        },
    )
    metrics = [(f"drift_{name}", score, 0) for name, score in newest.scores().items()]
    metrics += [
        (f"{name}_h{horizon}" if horizon else name, score, 0)
        for (name, horizon), score in (found.scores() | answered.scores()).items()
    ]
    registry.log_metrics(run_id, [("drift_share", newest.share, 0), *metrics])
    registry.log_dict(run_id, {"checks": [asdict(each) for each in verdicts]}, "drift.json")
    registry.log_text(run_id, drift.page(snapshot), "drift.html")
    told = {"summary": found.summary(), "horizons": found.table(), "bets": found.bet_table()}
    registry.log_dict(run_id, told, "performance.json")
    registry.log_dict(run_id, answered.tables(), "served.json")
    scored = outcomes.scored(
        engine,
        symbol,
        until=newest.recent_end,
        forecaster=forecaster,
        version=version,
        sources=ANSWERS,
    )
    if len(scored) > 1:
        _report_accuracy(registry, run_id, scored)
    registry.finish(run_id, "FINISHED")
    create_table_artifact(newest.table(), key="drift", description=newest.summary())
    create_markdown_artifact(
        "\n".join(
            [
                f"**{newest.summary()}**",
                "",
                found.summary(),
                "",
                *(f"- {v.summary()}" for v in verdicts[:-1]),
                "",
                registry.run_link(run_id),
            ]
        ),
        key="drift-verdict",
        description=f"Full report in MLflow run {run_id}",
    )
    return run_id


def _report_accuracy(registry: Registry, run_id: str, scored: pd.DataFrame) -> None:
    scores, page = drift.regression_report(scored)
    registry.log_text(run_id, page, "forecasts-against-actuals.html")
    named = {f"forecast_{key}": value for key, value in asdict(scores).items()}
    named["forecast_crps_bp"] = float(scored["crps_bp"].mean())
    registry.log_metrics(run_id, [(key, float(value), 0) for key, value in named.items()])


@task(name="alarm", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
def alarm(
    engine: Engine, contract: Contract, version: int, symbol: str, verdict: DriftVerdict
) -> UUID:
    """Write the drift event into the outbox, once a day and version; `deliver_events` posts it."""
    return events.put_once(
        engine,
        events.DriftDetected(
            symbol=symbol,
            as_of=verdict.recent_end,
            forecaster=contract.forecaster,
            version=version,
            share=verdict.share,
            threshold=verdict.required_share,
            features=tuple(each.feature for each in verdict.features if each.drifted),
            volatility=verdict.shift.ratio if verdict.shift and verdict.shift.found else None,
            dataset_md5=contract.dataset_md5,
        ),
        same=f"{symbol} {verdict.recent_end} {contract.forecaster} {version}",
    )


@task(name="withhold", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
def withhold(
    engine: Engine, version: int, symbol: str, day: date, found: Sequence[str], why: str
) -> None:
    """Write into the audit, once, which events were not told of a check, and why."""
    reason = f"As of {day} the monitor told nobody: {why}"
    with engine.begin() as connection:
        for name in found:
            if not audit.says(connection, "skip", symbol, name, reason):
                audit.add(
                    *(connection, "skip", symbol),
                    who=name,
                    reason=reason,
                    version=version,
                    details={"as_of": day.isoformat(), "flow_run_id": flow_run_id()},
                )


@task(name="alarm-aged", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
def alarm_aged(
    settings: Settings,
    engine: Engine,
    contract: Contract,
    version: int,
    symbol: str,
    day: date,
    as_of: date,
) -> UUID | None:
    """Write an event into the outbox, once a session `day` and version, if the last retrain is long
    enough ago (`ledger.wait_for_age`); its id. Symbols that share a forecaster share it."""
    last, row = _since(contract, ledger.last_asked(engine, _whose(contract, symbol)))
    days, wait = count_sessions(last, day), ledger.wait_for_age(settings, row)
    if not wait or days < wait or _alarmed(engine, contract, version, day, as_of):
        return None
    return events.put_once(
        engine,
        events.ModelAged(
            symbol=symbol,
            as_of=day,
            forecaster=contract.forecaster,
            version=version,
            since=last,
            days=days,
            wait=wait,
        ),
        same=f"{day} {contract.forecaster} {version}",
    )


@task(name="alarm-provisional", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
def alarm_provisional(
    settings: Settings, engine: Engine, contract: Contract, version: int, symbol: str, day: date
) -> UUID | None:
    """Write an event into the outbox, once a session `day` and version, if the last retrain is long
    enough ago (`ledger.wait_if_provisional`); its id. Symbols that share a forecaster share it."""
    last, row = _since(contract, ledger.last_retrain(engine, _whose(contract, symbol)))
    days, wait = count_sessions(last, day), ledger.wait_if_provisional(settings, row)
    if days < wait:
        return None
    return events.put_once(
        engine,
        events.ModelProvisional(
            symbol=symbol,
            as_of=day,
            forecaster=contract.forecaster,
            version=version,
            since=last,
            days=days,
            wait=wait,
            refused=row,
        ),
        same=f"{day} {contract.forecaster} {version}",
    )


def _whose(contract: Contract, symbol: str) -> str:
    """How the ledger calls a forecaster: by its only symbol, or by its name."""
    return symbol if len(contract.symbols) == 1 else contract.forecaster


def _since(contract: Contract, asked: tuple[date | None, int]) -> tuple[date, int]:
    """From when a wait counts, and the retrains that it grows with: none before the version's own
    training, be it by hand."""
    last, row = asked
    return (contract.as_of, 0) if last is None or contract.as_of > last else (last, row)


def _alarmed(engine: Engine, contract: Contract, version: int, day: date, as_of: date) -> bool:
    """Whether another symbol of the forecaster has asked for a retrain already: drift is told of a
    session, degraded forecasts of the day of the look, which may be one without trading."""
    days = [day + timedelta(days=each) for each in range((as_of - day).days + 1)]
    with engine.connect() as connection:
        return any(
            events.was_put(connection, kind, f"{symbol} {each} {contract.forecaster} {version}")
            for symbol in contract.symbols
            for each in days
            for kind in (events.DriftDetected, events.PerformanceDegraded)
        )
