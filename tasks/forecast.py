"""Steps of an offline forecast: who answers, forecasts, prediction log, Parquet file."""

from collections.abc import Sequence
from datetime import date
from typing import Any

from prefect import Task, get_run_logger
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import exponential_backoff

from forecasting import batch, datasets, outcomes
from forecasting.assignment import Held, assign, in_production
from forecasting.batch import Batch
from forecasting.datasets import DatasetVersion
from forecasting.errors import ConfigError, ModelError, RegistryError, ServiceError
from forecasting.predictions import Spool
from forecasting.registry import Registry
from forecasting.scratch import scratch
from forecasting.settings import Settings
from forecasting.store import engine_of
from tasks.steps import create_table_artifact, task

MOST_SHOWN = 1000
"""Rows of the table in Prefect; those without a forecast come first."""


async def _was_away(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Retry when registry, database or disk were away; a bad model or price stays bad."""
    error = await state.aresult(raise_on_failure=False)
    return isinstance(error, (RegistryError, ServiceError))


_PATIENCE: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "retries": 2,
    "retry_delay_seconds": exponential_backoff(backoff_factor=2),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": _was_away,
}


@task(name="find-versions", timeout_seconds=900, **_PATIENCE)
def find_versions(
    registry: Registry, symbols: Sequence[str], forecaster: str = ""
) -> list[tuple[Held, list[str]]]:
    """Versions in production that answer for the symbols, each with its own.

    Args:
        forecaster: the one to be asked about all of them, whether or not it is for them.

    Raises:
        ConfigError: that one has nothing in production.
    """
    held = in_production(registry)
    if not forecaster:
        return assign(symbols, held)
    named = [(each, list(symbols)) for each in held if each.forecaster == forecaster]
    if not named:
        there = ", ".join(each.forecaster for each in held) or "none at all"
        raise ConfigError(
            f"No version of {forecaster!r} is in production at {registry.shown}; there is {there}."
        )
    return named


@task(name="forecast-symbols", timeout_seconds=3600, **_PATIENCE)
def forecast_symbols(
    settings: Settings,
    registry: Registry,
    prices: DatasetVersion,
    as_of: date,
    assigned: Sequence[tuple[Held, list[str]]],
) -> tuple[list[Batch], dict[str, str]]:
    """Forecasts of some versions, one open at a time, and why symbols have none."""
    snapshot_of = datasets.snapshots(settings, prices, as_of)
    made: list[Batch] = []
    refused: dict[str, str] = {}
    for held, symbols in assigned:
        try:
            with scratch(settings.work_dir) as folder:
                model = batch.load(registry, held, folder, settings.trusted_key_path)
        except (ModelError, RegistryError) as error:
            registry.aliases(held.forecaster)  # raises where the registry is away
            refused |= dict.fromkeys(symbols, str(error))
            continue
        found, without = batch.forecast(model, symbols, as_of, snapshot_of)
        refused |= without
        if found.windows:
            made.append(found)
    return made, refused


@task(name="log-forecasts", timeout_seconds=600, **_PATIENCE)
def log_forecasts(settings: Settings, made: Sequence[Batch]) -> int:
    """Write forecasts into the prediction log; how many."""
    most = int(settings.spool_max_mb * 1_000_000)
    spool = Spool(settings.spool_dir, "forecast", most_bytes=most)
    try:
        spool.measure()
        for each in made:
            for line, count in each.lines():
                spool.write(line, count)
        if not spool.flush():
            raise ServiceError(
                f"The prediction log in {settings.spool_dir} cannot be written. Free disk space "
                "there; forecasts that are made again are logged once."
            )
    finally:
        spool.close()
    return spool.written


@task(name="write-forecasts", timeout_seconds=900, **_PATIENCE)
def write_forecasts(made: Sequence[Batch], as_of: date, output: str) -> int:
    """Write forecasts as one Parquet file, whole or not at all; its rows."""
    table = batch.table_of(made, as_of)
    batch.write(table, output)
    get_run_logger().info("%d rows in %s", table.num_rows, output)
    return int(table.num_rows)


@task(name="drain-log", timeout_seconds=900, **_PATIENCE)
def drain_log(settings: Settings) -> int:
    """Move the prediction log into SQL, unless another process has done so; how many forecasts."""
    with engine_of(settings.sql_url) as engine:
        return outcomes.drain(engine, settings.spool_dir)


def show_forecasts(made: Sequence[Batch], refused: dict[str, str], as_of: date) -> str:
    """What came of each symbol as a Prefect artifact; the headline."""
    rows = [{"symbol": name, "why not": refused[name]} for name in sorted(refused)]
    rows += [row for each in made for row in _shown(each)]
    headline = f"As of {as_of}: {len(rows) - len(refused)} symbols forecast, {len(refused)} not"
    columns = dict.fromkeys(("symbol", "forecaster", "version", "origin", "close", "why not"), "")
    create_table_artifact(
        [columns | row for row in rows[:MOST_SHOWN]],
        key="forecasts",
        description=headline + (f" (the first {MOST_SHOWN})" if len(rows) > MOST_SHOWN else ""),
    )
    return headline


def _shown(each: Batch) -> list[dict[str, str]]:
    return [
        {
            "symbol": window.symbol,
            "forecaster": each.contract.forecaster,
            "version": str(each.version),
            "origin": window.origin.isoformat(),
            "close": str(window.origin_close),
        }
        for window in each.windows
    ]
