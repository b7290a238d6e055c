"""The flow `train` killed in mid-search: run again, it goes on with the trials that it had."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from datetime import date
from pathlib import Path

import pytest
from mlflow.entities import Run
from prefect.settings import PREFECT_API_URL, PREFECT_LOCAL_STORAGE_PATH

from flows.train import train
from forecasting.settings import Settings
from tests.flows.support import all_runs, children, configured, flow_artifacts, kept
from tests.serving.running import until

DAY = date(2006, 12, 29)
SEARCH = {"trials": 4, "epochs": 40, "grace_epochs": 120, "concurrency": 2}
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("prefect_server")


def _trials(settings: Settings) -> list[Run]:
    """Trials that are logged in full: one that was being logged at the kill is logged anew."""
    return [
        run
        for run in all_runs(settings)
        if run.data.tags.get("perennial.kind") == "trial" and run.info.status == "FINISHED"
    ]


def _killed_after_a_trial(settings: Settings) -> None:
    """Run the flow in another process until a trial is logged and others are under way."""
    code = f"from datetime import date; from flows.train import train; train('GOOG', {DAY!r})"
    code = code.replace("datetime.date", "date")
    environment = os.environ | {
        "PREFECT_API_URL": str(PREFECT_API_URL.value()),
        "PREFECT_LOCAL_STORAGE_PATH": str(PREFECT_LOCAL_STORAGE_PATH.value()),
    }
    log = (settings.home / "killed.log").open("wb")
    with log:
        flow = subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            cwd=ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        begun = settings.work_dir / "search"  # MLflow's tables are made by then
        until(lambda: flow.poll() is not None or begun.exists(), "the search", 120)
        until(lambda: flow.poll() is not None or _trials(settings), "a trial's end", 180)
        assert flow.poll() is None, (settings.home / "killed.log").read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(flow.pid, signal.SIGKILL)
        flow.wait(30)


def test_a_killed_flow_goes_on_with_its_search(tmp_path):
    with configured(tmp_path, **SEARCH) as settings:
        settings.home.mkdir(exist_ok=True)
        _killed_after_a_trial(settings)
        before = {run.data.tags["perennial.trial"]: run.info.run_id for run in _trials(settings)}
        (search,) = {run.data.tags["mlflow.parentRunId"] for run in _trials(settings)}
        assert 1 <= len(before) < SEARCH["trials"]

        result = train(symbol="GOOG", as_of=DAY)

        (found,) = children(settings, result.run_id)
        assert found.info.run_id == search
        assert found.info.status == "FINISHED"
        trials = children(settings, search)
        numbers = [run.data.tags["perennial.trial"] for run in trials]
        assert sorted(numbers) == ["0", "1", "2", "3"]
        assert {run.info.status for run in trials} == {"FINISHED"}
        after = {run.data.tags["perennial.trial"]: run.info.run_id for run in trials}
        assert {number: after[number] for number in before} == before
        assert "Plotly" in kept(settings, search, "search.html")
        assert any(key.startswith("importance_") for key in found.data.metrics)
        flow_run = _training(settings, result.run_id).data.tags["flow_run_id"]
        assert flow_artifacts(flow_run)["search-progress"] == 100


def _training(settings: Settings, run_id: str) -> Run:
    return next(run for run in all_runs(settings) if run.info.run_id == run_id)
