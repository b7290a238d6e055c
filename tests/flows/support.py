"""Running flows as a deployment does: settings from the environment, a home of their own."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from datetime import date
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterName,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from sqlalchemy import Table, select
from tenacity import retry, retry_if_exception_type, retry_if_result, stop_after_delay, wait_fixed

from forecasting import datasets
from forecasting.registry import PRODUCTION, open_registry
from forecasting.settings import PREFIX, Settings, load_settings
from forecasting.store import engine_of
from tests.models import write_model_folder

T = TypeVar("T")
NAME = "perennial-goog"
QUICK = {
    "trials": 2,
    "epochs": 2,
    "fit_epochs": 2,
    "concurrency": 1,
    "server_url": "",
    "confirm_seconds": 0,
    "clock": "market",
    "retrain_budget_runs": 0,
}
"""A search and a fit that are real but short, no server to wait for, and days of history."""


@contextmanager
def configured(home: Path, **changes: object) -> Iterator[Settings]:
    """Settings of a deployment with a home, and results cached in it, of its own."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in ({"home": home} | QUICK | changes).items():
            environment.setenv(f"{PREFIX}{name.upper()}", str(value))
        with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: home / "results"}):
            yield load_settings()


def put_into_production(home: Path, trained: date, symbol: str = "GOOG") -> Settings:
    """A version for a symbol whose prices are known up to `trained`, without any training."""
    settings, name = load_settings(home=home, server_url=""), f"perennial-{symbol.lower()}"
    md5 = datasets.ingest(settings, [symbol], trained).md5
    registry, folder = open_registry(settings), home / f"model-{symbol}"
    run_id = registry.start_run("trained", {})
    told = {"forecaster": name, "symbols": (symbol,)}
    write_model_folder(folder, run_id=run_id, dataset_md5=md5, as_of=trained, **told)
    registry.set_alias(name, PRODUCTION, registry.register(folder, name, run_id))
    return settings


# --- MLflow ----------------------------------------------------------------------------------


def client_of(settings: Settings) -> MlflowClient:
    return MlflowClient(tracking_uri=settings.mlflow_uri, registry_uri=settings.mlflow_uri)


def all_runs(settings: Settings) -> list[Run]:
    """Every run, oldest first."""
    client = client_of(settings)
    experiments = [each.experiment_id for each in client.search_experiments()]
    return list(client.search_runs(experiments, order_by=["attributes.start_time ASC"]))


def children(settings: Settings, run_id: str) -> list[Run]:
    return [run for run in all_runs(settings) if run.data.tags.get("mlflow.parentRunId") == run_id]


def kept(settings: Settings, run_id: str, name: str) -> str:
    """Text of an MLflow artifact."""
    return Path(client_of(settings).download_artifacts(run_id, name)).read_text()


# --- Prefect ---------------------------------------------------------------------------------


def task_states(flow_run_id: str) -> dict[str, str]:
    """Name of each task of a flow run, without its number, and the name of its state."""
    wanted = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(flow_run_id)]))
    with get_client(sync_client=True) as client:
        found = client.read_task_runs(flow_run_filter=wanted)
    return {run.name.rpartition("-")[0]: str(run.state_name) for run in found}


def flow_artifacts(flow_run_id: str) -> dict[str, Any]:
    """Data of each artifact that a flow run made, by key."""
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(flow_run_id)]))
    with get_client(sync_client=True) as client:
        return {str(each.key): each.data for each in client.read_artifacts(artifact_filter=wanted)}


def flow_log(flow_run_id: str, expected: str) -> list[str]:
    """Messages of a flow run once one of them holds `expected` (Prefect sends them in batches)."""
    wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[UUID(flow_run_id)]))

    @retry(
        stop=stop_after_delay(20),
        wait=wait_fixed(0.2),
        retry=retry_if_result(lambda lines: not any(expected in line for line in lines)),
        retry_error_callback=lambda state: state.outcome and state.outcome.result(),
    )
    def read() -> list[str]:
        with get_client(sync_client=True) as client:
            return [each.message for each in client.read_logs(log_filter=wanted)]

    return read()


# --- a person -------------------------------------------------------------------------------


@contextmanager
def meanwhile(work: Callable[[], T]) -> Iterator[list[T]]:
    """Do something in a thread with this one's settings; the list holds its result at the end."""
    found: list[T] = []
    thread = threading.Thread(target=copy_context().run, args=(lambda: found.append(work()),))
    thread.start()
    try:
        yield found
    finally:
        thread.join(200)
    assert not thread.is_alive()


@retry(
    stop=stop_after_delay(180),
    wait=wait_fixed(0.2),
    retry=retry_if_exception_type((LookupError, PrefectHTTPStatusError)),
)
def paused(name: str) -> UUID:
    """Id of the run of that name, once it is paused and its form is there."""
    with get_client(sync_client=True) as client:
        wanted = FlowRunFilter(name=FlowRunFilterName(any_=[name]))
        for run in client.read_flow_runs(flow_run_filter=wanted):
            if run.state is not None and run.state.is_paused():
                keys = run.state.state_details.run_input_keyset or {}
                assert client.read_flow_run_input(run.id, keys["schema"])
                return run.id
    raise LookupError(name)


def answer(run_id: UUID, **form: object) -> str:
    """Resume a run with a form, as the UI does; what Prefect says."""
    with get_client(sync_client=True) as client:
        return str(client.resume_flow_run(run_id, run_input=form).status.value)


# --- SQL -------------------------------------------------------------------------------------


def rows_of(settings: Settings, table: Table, *order: str) -> list[dict[str, Any]]:
    """Rows of one of `forecasting.store`'s tables."""
    with engine_of(settings.sql_url) as engine, engine.connect() as connection:
        query = select(table).order_by(*(table.c[name] for name in order))
        return [dict(row) for row in connection.execute(query).mappings()]
