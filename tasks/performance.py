"""Steps of monitoring what was forecast: score it, compare it with what is usual, tell, alarm."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
import pandas as pd
from prefect import get_run_logger
from prefect.cache_policies import NO_CACHE
from sqlalchemy import Engine
from sqlalchemy.dialects import postgresql, sqlite

from forecasting import backtest, datasets, events, performance, prices, served
from forecasting.contract import Contract
from forecasting.drift import DriftVerdict
from forecasting.errors import ContractError, HistoryError, ModelError
from forecasting.inference import Forecaster
from forecasting.metrics import Array
from forecasting.performance import Logged, Performance
from forecasting.registry import Registry
from forecasting.served import PredictionDrift, Traffic
from forecasting.settings import Settings
from forecasting.store import now, scores
from forecasting.windows import make_windows
from tasks.steps import create_table_artifact, task

_TOLD = {
    "prediction_drift": "Predictions against those that are usual for the version; alarms nobody",
    "traffic": f"What was asked in the last {served.TRAFFIC_DAYS} days; alarms nobody",
}


class Served(NamedTuple):
    """What was answered, and what it was asked about."""

    drift: list[PredictionDrift]
    traffic: list[Traffic]

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """Rows for reports."""
        return {
            "prediction_drift": [asdict(each) for each in self.drift],
            "traffic": [asdict(each) for each in self.traffic],
        }

    def scores(self) -> dict[tuple[str, int], float]:
        """Every score by name and horizon; 0 is of no one horizon."""
        found = {}
        for each in self.drift:
            found["prediction_width_drift", each.horizon] = each.width
            found["prediction_skew_drift", each.horizon] = each.skew
            found["width_bp", each.horizon] = each.mean_width_bp
        for row in self.traffic:
            found[f"forecasts_{row.source}", 0] = float(row.forecasts)
            if row.source == "post":
                found["post_share", 0] = row.share
                found["post_stale", 0] = row.stale
                found["post_other_price", 0] = row.other_price
                found["post_unknown_day", 0] = row.unknown_day
        return found


@task(name="score-forecasts", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
def score_forecasts(
    settings: Settings,
    engine: Engine,
    contract: Contract,
    version: int,
    symbol: str,
    as_of: date,
    md5: str,
) -> tuple[Performance, Logged]:
    """Whether the version has degraded, and the forecasts that say so."""
    frame = datasets.load_frame(settings, symbol, as_of, md5)
    of = (symbol, contract.forecaster, version)
    logged = performance.read_log(engine, *of, frame, as_of, since=contract.as_of)
    alpha = settings.performance_alpha / len(contract.symbols)  # each symbol is a watch of its own
    found = performance.judge(logged, *of, as_of, alpha)
    if found.rolling:
        create_table_artifact(found.table(), key="performance", description=found.summary())
    get_run_logger().info(found.summary())
    return found, logged


@task(name="watch-served", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
def watch_served(
    settings: Settings,
    registry: Registry,
    engine: Engine,
    contract: Contract,
    version: int,
    symbol: str,
    as_of: date,
    md5: str,
    logged: Logged,
) -> Served:
    """Predictions against those that are usual for the version, and what clients sent."""
    recent = logged.quantiles[-settings.drift_window :]
    drifts: list[PredictionDrift] = []
    if len(recent) >= served.LEAST_DAYS:
        try:
            usual = _usual(settings, registry, contract, version, symbol)
            drifts = served.prediction_drift(usual, recent, logged.levels)
        except (ContractError, HistoryError, ModelError) as error:
            get_run_logger().warning("Drift of predictions is not watched: %s", error)
    frame = datasets.load_frame(settings, symbol, as_of, md5)
    raw = prices.visible_rows(datasets.load_raw(settings, symbol, md5), as_of).set_index("date")
    closes = pd.DataFrame({"traded": raw["close"], "adjusted": frame["close"]})
    found = Served(drifts, served.traffic(engine, symbol, as_of, closes))
    for name, rows in found.tables().items():
        if rows:
            create_table_artifact(rows, key=name.replace("_", "-"), description=_TOLD[name])
    return found


def _usual(
    settings: Settings, registry: Registry, contract: Contract, version: int, symbol: str
) -> Array:
    """What the version answers to the newest days that it knew when it was trained."""
    frame = datasets.load_frame(settings, symbol, contract.as_of, contract.dataset_md5)
    rows = frame.iloc[-served.REFERENCE_DAYS - contract.context + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        registry.download(contract.forecaster, version, Path(folder) / "model")
        forecaster = Forecaster.load(Path(folder) / "model", version)
    index = contract.symbol_input(symbol)
    windows = make_windows(rows, contract.context, contract.horizon, index)
    return backtest.return_quantiles(forecaster, windows)


@task(name="record-scores", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
def record_scores(
    engine: Engine,
    contract: Contract,
    version: int,
    symbol: str,
    verdicts: Sequence[DriftVerdict],
    found: Performance,
    answered: Served,
) -> None:
    """Write every score into SQL by day; those that are there already are written anew."""
    dialect = postgresql if engine.dialect.name == "postgresql" else sqlite
    by_day = {verdict.recent_end: _drift_scores(verdict) for verdict in verdicts}
    by_day[verdicts[-1].recent_end] |= found.scores() | answered.scores()
    rows = [
        {
            "symbol": symbol,
            "as_of": day,
            "forecaster": contract.forecaster,
            "version": version,
            "name": name,
            "horizon": horizon,
            "value": value,
            "created_at": now(),
        }
        for day, values in by_day.items()
        for (name, horizon), value in values.items()
        if np.isfinite(value)
    ]
    insert = dialect.insert(scores)
    statement = insert.on_conflict_do_update(
        index_elements=list(scores.primary_key),
        set_={"value": insert.excluded.value, "created_at": insert.excluded.created_at},
    )
    with engine.begin() as connection:
        connection.execute(statement, rows)


def _drift_scores(verdict: DriftVerdict) -> dict[tuple[str, int], float]:
    features = {(f"drift_{name}", 0): score for name, score in verdict.scores().items()}
    return features | {("drift_share", 0): verdict.share}


@task(name="alarm-degraded", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)
def alarm_degraded(engine: Engine, found: Performance) -> UUID:
    """Write the event into the outbox, once a day and version; its id.

    As with drift, what a cooldown skipped is asked for again while it holds.
    """
    return events.put_once(engine, found.event(), same=_same(found))


def is_untold(engine: Engine, found: Performance) -> bool:
    """Whether forecasts have degraded and `alarm_degraded` has not said so."""
    with engine.connect() as connection:
        return found.degraded and not events.was_put(
            connection, events.PerformanceDegraded, _same(found)
        )


def _same(found: Performance) -> str:
    return f"{found.symbol} {found.as_of} {found.forecaster} {found.version}"
