"""Probation as steps of the monitor: forecast with both versions, look, roll back if worse.

Every part can be done again: forecasts that are there are not made again, a look changes nothing
until it is written down, what is condemned is written down before anything moves, and a rollback
that was made and not recorded is recorded by the next look.
"""

from dataclasses import dataclass
from datetime import date

import pandas as pd
from prefect import get_run_logger
from prefect.cache_policies import NO_CACHE
from sqlalchemy import Engine

from forecasting import batch, datasets, ledger, outcomes, probation, promotion
from forecasting.assignment import version_of
from forecasting.batch import Batch
from forecasting.errors import (
    ContractError,
    ModelError,
    OvertakenError,
    RegistryError,
    ServiceError,
)
from forecasting.events import ModelCondemned, put_once
from forecasting.probation import Probation
from forecasting.registry import PRODUCTION, Registry
from forecasting.scratch import scratch
from forecasting.sessions import count_sessions, sessions_between
from forecasting.settings import Settings
from tasks.forecast import drain_log, log_forecasts
from tasks.promote import promote_version, who
from tasks.steps import create_markdown_artifact, flow_run_id, task


@dataclass(frozen=True)
class Scene:
    """Whose probation is looked at, and as of when.

    Attributes:
        forecaster: registered model.
        symbols: all that it serves.
        as_of: the day it pretends to be; what came true later is not looked at.
        session: newest session that is known then.
        md5: dataset version that holds the prices of the symbols.
        asks: whether a person is asked; not on a day that is made up for, whose next one asks.
    """

    settings: Settings
    registry: Registry
    engine: Engine
    forecaster: str
    symbols: tuple[str, ...]
    as_of: date
    session: date
    md5: str
    asks: bool = True


def watch(scene: Scene) -> str:
    """Look at the forecaster's probation; what came of it, empty where there is none.

    Call it inside a flow. A version that is worse than the one before it is rolled back; where a
    person has to approve that, it is told, and an automation starts the run that asks.

    Raises:
        RegistryError: the registry is away.
        ServiceError: the server refused the version before; the aliases are where they were.
    """
    watched = find_probation(scene)
    if watched is None:
        return ""
    if not watched.condemned:
        made = forecast_both(scene, watched)
        if made:
            log_forecasts(scene.settings, made)
            drain_log(scene.settings)
        watched = look(scene, watched)
    if not watched.condemned:
        return _told(watched)
    if not scene.settings.approval:
        return roll_back(scene, watched)
    if not scene.asks:
        return f"{_told(watched)} The day is made up for; a later one asks a person."
    return condemn(scene, watched)


def is_giving_way(engine: Engine, forecaster: str, version: int) -> bool:
    """Whether the version is condemned, or has just been put back for one that was: its rollback
    waits for a person, or to be written down with the cooldown that follows."""
    return any(
        each.condemned and version in (each.version, each.previous)
        for each in probation.watching(engine, forecaster)
    )


@task(name="find-probation", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
def find_probation(scene: Scene) -> Probation | None:
    """The probation that is to be looked at; begun or ended as the newest promotion asks for."""
    settings, registry, engine = scene.settings, scene.registry, scene.engine
    for line in promotion.reconcile(settings, registry, engine, scene.forecaster):
        get_run_logger().warning("An interrupted promotion was settled: %s", line)
    newest = probation.standing(engine, scene.forecaster)
    if newest is None:
        return None
    for each in probation.watching(engine, scene.forecaster):
        if each.id != newest.id:
            _end(scene, each, newest)
    if settings.probation_days and probation.asks_for_one(engine, newest):
        trained = registry.version(newest.forecaster, newest.version).tags["as_of"]
        probation.begin(
            engine, newest, date.fromisoformat(trained), scene.session, settings.probation_days
        )
    for each in probation.watching(engine, scene.forecaster):
        moved = registry.alias(each.forecaster, PRODUCTION) != each.version  # by hand: left alone
        return None if moved or each.started > scene.session else each
    return None


def _end(scene: Scene, watched: Probation, newest: probation.Replacement) -> None:
    """Another promotion came: it is the rollback, whose process died after it, or it is not."""
    if watched.condemned and newest.version == watched.previous:
        _rolled_back(scene, watched)
    else:
        probation.record(scene.engine, watched, "superseded", who())


@task(name="forecast-both", cache_policy=NO_CACHE, timeout_seconds=600)
def forecast_both(scene: Scene, watched: Probation) -> list[Batch]:
    """Forecasts of both versions from each day of the probation that has none yet.

    A version that cannot be loaded makes none: then there is nothing to be weighed.
    """
    days = sessions_between(watched.started, scene.session)[: watched.days]
    there = probation.forecast_days(scene.engine, watched)
    prices, made = datasets.find(scene.settings, scene.md5), []
    for version in (watched.version, watched.previous):
        missing = [
            (day, symbol)
            for day in days
            for symbol in scene.symbols
            if (version, day, symbol) not in there
        ]
        if not missing:
            continue
        try:
            made += _forecasts(scene, version, missing, prices)
        except (ModelError, RegistryError) as error:
            scene.registry.aliases(scene.forecaster)  # raises where the registry is away
            get_run_logger().warning("Version %d does not forecast: %s", version, error)
    return made


def _forecasts(
    scene: Scene, version: int, missing: list[tuple[date, str]], prices: datasets.DatasetVersion
) -> list[Batch]:
    settings, registry, made = scene.settings, scene.registry, []
    with scratch(settings.work_dir) as folder:
        held = version_of(registry, scene.forecaster, version)
        model = batch.load(registry, held, folder, settings.trusted_key_path)
    for day, symbol in missing:
        rows = datasets.snapshots(settings, prices, day)
        found, without = batch.forecast(model, [symbol], day, rows, source="shadow")
        for reason in without.values():
            get_run_logger().warning("Version %d, %s on %s: %s", version, symbol, day, reason)
        if found.windows:
            made.append(found)
    return made


@task(name="look", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
def look(scene: Scene, watched: Probation) -> Probation:
    """Join what came true, weigh it, and write the finding down; the probation afterwards."""
    pairs = []
    for symbol in scene.symbols:
        frame = datasets.load_frame(scene.settings, symbol, scene.as_of, scene.md5)
        outcomes.join_actuals(scene.engine, symbol, frame, scene.as_of)
        scored = outcomes.scored(scene.engine, symbol, until=scene.as_of, sources=("shadow",))
        pairs.append(probation.pair(scored, watched))
    alpha = scene.settings.probation_alpha
    told = [each for each in pairs if len(each)] or pairs[:1]  # an empty one has no types
    horizon = probation.farthest(scene.engine, watched)
    found = probation.weigh(pd.concat(told), horizon, alpha)
    over = count_sessions(watched.started, scene.session) >= watched.days
    after = probation.record(
        scene.engine,
        watched,
        "passed" if over and not found.worse else "watching",  # until the alias has moved
        who(),
        found.as_json(watched.previous, scene.as_of, alpha),
    )
    get_run_logger().info(_told(after))
    _show(after)
    return after


@task(name="condemn", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
def condemn(scene: Scene, watched: Probation) -> str:
    """Tell that a version is to be rolled back, once a day until a person has decided."""
    told = ModelCondemned(
        forecaster=watched.forecaster,
        version=watched.version,
        previous=watched.previous,
        as_of=scene.as_of,
        probation=watched.id,
        evidence=float(watched.evidence.get("peak") or 1 / scene.settings.probation_alpha),
        why=watched.summary,
    )
    put_once(scene.engine, told, same=f"{watched.id} {scene.as_of}")
    return f"{_told(watched)} A person is asked whether to roll it back."


def roll_back(scene: Scene, watched: Probation) -> str:
    """Put the version before into production, with the evidence as the reason; what came of it."""
    try:
        promote_version(
            scene.settings,
            scene.registry,
            scene.engine,
            scene.forecaster,
            watched.previous,
            f"probation: {watched.summary}",
            judged_against=watched.version,
        )
    except OvertakenError as error:
        probation.record(scene.engine, watched, "superseded", who())
        return f"The probation of version {watched.version} was superseded: {error}"
    except (ServiceError, ContractError) as error:  # the next look tries again; the day goes on
        told = f"{_told(watched)} It could not be rolled back: {error}"
        get_run_logger().error(told)
        return told
    return record_rollback(scene, watched)


@task(name="record-rollback", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
def record_rollback(scene: Scene, watched: Probation) -> str:
    """Tag the version with the evidence, hold back the next retrain, end the probation."""
    return _rolled_back(scene, watched)


def _rolled_back(scene: Scene, watched: Probation) -> str:
    tags = {"probation": "rolled-back", "probation_evidence": watched.summary}
    scene.registry.tag_version(watched.forecaster, watched.version, tags)
    ledger.hold(
        scene.engine,
        watched.id,
        symbol=scene.symbols[0] if len(scene.symbols) == 1 else watched.forecaster,
        as_of=scene.as_of,
        flow_run_id=flow_run_id(),
        reason=f"version {watched.version} was rolled back: {watched.summary}",
    )
    after = probation.record(scene.engine, watched, "rolled-back", who())
    get_run_logger().warning(_told(after))
    _show(after)
    return _told(after)


def _told(watched: Probation) -> str:
    return (
        f"Probation of {watched.forecaster} version {watched.version}, from {watched.started} "
        f"for {watched.days} market days: {watched.state}. {watched.summary}"
    )


def _show(watched: Probation) -> None:
    rows = [f"| {name} | {value} |" for name, value in watched.evidence.items()]
    table = "\n".join(["| | |", "|---|---|", *rows])
    create_markdown_artifact(
        f"**{_told(watched)}**\n\n{table}", key="probation", description=watched.summary
    )
