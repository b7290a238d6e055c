"""The loop from end to end, on a real stack: train, serve, drift, automation, retrain, reload.

The tests are steps of one story and run in the order in which they stand.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from deployments.automations import Targets, automations
from deployments.prefect_api import PrefectApi, Run
from deployments.stack import PREFECT_FILE, Stack
from forecasting import costs, datasets
from forecasting.events import DriftDetected
from forecasting.registry import PREVIOUS, PRODUCTION, Registry, open_registry
from forecasting.settings import Settings, load_settings
from forecasting.store import engine_of, predictions, retrains
from tests.clients import asking
from tests.e2e.conftest import Up
from tests.e2e.planted import NAME, plant
from tests.serving.running import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420), pytest.mark.usefixtures("up")]

README = PREFECT_FILE.parent / "README.md"
TRAINED = date(2007, 1, 31)
CALM = date(2007, 2, 27)  # too soon after the training for another one
CRASH = date(2008, 10, 31)


@pytest.fixture(scope="module")
def registry(settings: Settings) -> Registry:
    return open_registry(settings)


def ask(stack: Stack) -> dict[str, Any]:
    answer = httpx.get(f"{stack.server_url}/v1/forecast/GOOG", timeout=10)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def logged(api: PrefectApi, run_id: str, text: str) -> str:
    """The log of a run once it holds `text`; the last lines arrive after the run's end."""
    until(lambda: text in api.logs(run_id), f"the log to say {text!r}")
    return api.logs(run_id)


def test_the_stack_says_what_to_run_next(stack: Stack, up: Up) -> None:
    said = up.log.read_text()
    assert "No model yet. Train one" in said
    assert f"PREFECT_API_URL={stack.prefect_url}/api" in said
    assert f"{stack.server_url}/v1/models" in said


def test_nothing_is_served_before_the_first_model(stack: Stack) -> None:
    answer = httpx.get(f"{stack.server_url}/v1/forecast/GOOG")
    assert answer.status_code == 503
    assert answer.headers["content-type"].startswith("application/problem+json")
    assert "Train one" in answer.json()["detail"]


def test_the_automations_are_applied_once_however_often(stack: Stack, api: PrefectApi) -> None:
    assert stack.run("deployments.automations").count("unchanged: ") == 4
    started = ("retrain/retrain", "daily/daily", "rollback/rollback")
    targets = Targets(*(api_id(api, name) for name in started))
    wanted = sorted(each.name for each in automations(targets, None, load_settings()))
    found = httpx.post(f"{stack.prefect_url}/api/automations/filter", json={}).json()
    assert sorted(each["name"] for each in found) == wanted


def api_id(api: PrefectApi, deployment: str) -> Any:
    return httpx.get(f"{api.url}/api/deployments/name/{deployment}").json()["id"]


def test_a_deployed_training_is_promoted_and_served(
    stack: Stack, api: PrefectApi, settings: Settings, registry: Registry
) -> None:
    run_id = api.start("train/train", {"symbol": "GOOG", "as_of": TRAINED.isoformat()})
    api.wait(run_id, 240)
    assert registry.alias(NAME, PRODUCTION) == 1, api.logs(run_id)
    forecast = ask(stack)  # confirmed by the server before the run ended
    assert (forecast["model_version"], forecast["origin"]) == (1, TRAINED.isoformat())
    info = registry.version(NAME, 1)
    dataset = datasets.current(settings)
    assert dataset is not None
    assert forecast["dataset_md5"] == forecast["prices_md5"] == dataset.md5
    assert forecast["run_id"] == info.run_id
    names = {name.split("-")[0].split(" ")[0] for name, _ in api.tasks(run_id)}
    assert {"ingest", "windows", "search", "fit", "gate", "promote"} <= names


def test_artifacts_can_be_read_in_the_prefect_ui(stack: Stack) -> None:
    found = httpx.post(f"{stack.prefect_url}/api/artifacts/filter", json={}).json()
    keys = {each["key"] for each in found}
    assert {"data-summary", "search-leaderboard", "gate-verdict"} <= keys


def test_the_second_training_reuses_every_step(api: PrefectApi) -> None:
    run_id = api.start("train/train", {"symbol": "GOOG", "as_of": TRAINED.isoformat()})
    api.wait(run_id, 120)
    states = {name.split("-")[0]: state for name, state in api.tasks(run_id)}
    assert [states[name] for name in ("windows", "search", "fit")] == ["Cached"] * 3
    log = logged(api, run_id, "identical to version 1")
    assert "search: re-used from an earlier run" in log


def test_a_calm_market_starts_nothing(stack: Stack, api: PrefectApi, settings: Settings) -> None:
    datasets.ingest(settings, ["GOOG"], CALM)
    until(lambda: ask(stack)["origin"] == CALM.isoformat(), "prices of February 2007 being served")
    parameters = {"symbol": "GOOG", "as_of": CALM.isoformat(), "since": TRAINED.isoformat()}
    api.wait(api.start("monitor/monitor", parameters), 120)
    assert api.events(DriftDetected.name) == []
    assert api.runs("retrain") == []


@pytest.fixture(scope="module")
def weak_model(settings: Settings, registry: Registry, tmp_path_factory: Any) -> int:
    """Version 2, a tenth off the price."""
    with engine_of(settings.sql_url) as engine:
        return plant(settings, registry, engine, tmp_path_factory.mktemp("weak"), TRAINED)


def wait_retrain(api: PrefectApi) -> Run:
    runs = until(lambda: api.runs("retrain"), "the automation to start a retrain", 60)
    return api.wait(runs[0].id, 240)


def test_drift_starts_a_retrain_whose_promotion_is_served_without_a_failed_request(
    stack: Stack, up: Up, api: PrefectApi, settings: Settings, registry: Registry, weak_model: int
) -> None:
    datasets.ingest(settings, ["GOOG"], CRASH)
    until(lambda: ask(stack)["origin"] == CRASH.isoformat(), "prices of October 2008 being served")
    web = up.part("serving", "web")
    with asking(stack.server_url) as clients:
        api.wait(api.start("monitor/monitor", {"symbol": "GOOG", "as_of": CRASH.isoformat()}), 120)
        run = wait_retrain(api)
        until(lambda: clients.versions[weak_model + 1], "clients getting the new version")
    assert clients.problems == []
    assert set(clients.versions) == {weak_model, weak_model + 1}
    assert up.part("serving", "web") == web
    assert run.creator == "AUTOMATION"
    event = api.events(DriftDetected.name)[0]
    assert run.parameters == {
        "symbol": "GOOG",
        "as_of": CRASH.isoformat(),
        "trigger": f"{DriftDetected.name} {event['id']}",
    }
    assert event["payload"]["version"] == weak_model
    assert registry.aliases(NAME) == {PRODUCTION: weak_model + 1, PREVIOUS: weak_model}


def test_the_ledger_says_what_came_of_it_and_refuses_a_storm(
    api: PrefectApi, settings: Settings
) -> None:
    run_id = api.start("retrain/retrain", {"symbol": "GOOG", "as_of": CRASH.isoformat()})
    api.wait(run_id, 120)
    assert "retrained (promoted)" in logged(api, run_id, "cooldown")
    with engine_of(settings.sql_url) as engine, engine.connect() as connection:
        query = select(retrains.c.state).order_by(retrains.c.created_at)
        assert list(connection.execute(query).scalars()) == ["promoted", "skipped"]


def readme_commands() -> list[str]:
    """The shell blocks of the README that ask the local stack's server."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    return [block for block in blocks if "curl -s http://127.0.0.1:8200" in block]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed here")
def test_the_readmes_curl_examples_work_as_printed(stack: Stack, tmp_path: Path) -> None:
    for command in readme_commands():
        here = command.replace("http://127.0.0.1:8200", stack.server_url)
        here = here.replace("http://127.0.0.1:5000", stack.mlflow_url)
        here = here.replace(".venv/bin/python", sys.executable)
        assert stack.server_url in here
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-ec", here.replace("curl -s", "curl -sS --fail-with-body")],
            cwd=tmp_path,
            env=stack.environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{here}\n{done.stdout}\n{done.stderr}"
    assert len(readme_commands()) == 4
    assert "unknown" not in (tmp_path / "lineage.html").read_text()


def test_forecasts_were_logged_and_get_their_actuals(
    stack: Stack, api: PrefectApi, settings: Settings
) -> None:
    later = date(2008, 11, 10)
    with engine_of(settings.sql_url) as engine:

        def logged(version: int) -> int:
            query = select(predictions.c.id).where(predictions.c.model_version == version)
            with engine.connect() as connection:
                return len(set(connection.execute(query).scalars()))

        until(lambda: logged(3) > 0, "forecasts of version 3 in SQL")
        datasets.ingest(settings, ["GOOG"], later)
        run_id = api.start("monitor/monitor", {"symbol": "GOOG", "as_of": later.isoformat()})
        api.wait(run_id, 120)
        query = select(predictions.c.crps_bp).where(
            predictions.c.model_version == 3, predictions.c.origin == CRASH
        )
        with engine.connect() as connection:
            scores = list(connection.execute(query).scalars())
    assert scores
    assert all(score is not None and score > 0 for score in scores)


def test_rollback_by_call_or_command_is_served(
    stack: Stack, api: PrefectApi, registry: Registry
) -> None:
    def is_moved(version: int) -> bool:
        return registry.alias(NAME, PRODUCTION) == version

    parameters = {"forecaster": NAME, "version": 1, "why": "an exercise"}
    run_id = api.start("rollback/rollback", parameters)
    until(lambda: is_moved(1), "the alias to move", 120)  # benchmarks.loop measures how soon
    until(lambda: ask(stack)["model_version"] == 1, "the version to be served", 20)
    api.wait(run_id, 120)
    assert registry.aliases(NAME) == {PRODUCTION: 1, PREVIOUS: 3}
    assert registry.version(NAME, 1).tags["promoted_because"] == "an exercise"

    for target in (3, 1):
        done = subprocess.run(
            [sys.executable, "-m", "deployments.rollback", NAME, "--why", "an exercise"],
            env=stack.environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert f"{NAME} is back at the version before after" in done.stdout
        assert is_moved(target)
        assert ask(stack)["model_version"] == target


def test_an_answer_leads_back_to_file_run_and_promoter(stack: Stack) -> None:
    answer = ask(stack)
    shown = recorded(stack, "lineage", json.dumps(answer))
    assert "missing" not in shown
    for part in (answer["run_id"], answer["dataset_md5"], answer["prices_md5"], "an exercise"):
        assert part in shown
    assert "sample bokeh_sampledata" in shown
    assert re.search(r"rows +\d+ to \d+: \d{4}-", shown)


def test_what_was_done_and_what_it_cost_is_on_record(stack: Stack, settings: Settings) -> None:
    lines = [json.loads(line) for line in recorded(stack, "audit").splitlines()]
    assert {"alias", "trigger", "skip", "retrain", "verdict"} <= {each["kind"] for each in lines}
    assert all(each["reason"] and each["who"] for each in lines)
    with engine_of(settings.sql_url) as engine:
        runs = costs.summary(costs.read(engine))
    assert {"train", "monitor", "retrain", "rollback"} <= set(runs.index)
    assert (runs["cpu_minutes"] > 0).all()


def recorded(stack: Stack, command: str, piped: str = "") -> str:
    """What `python -m deployments.record` prints in the stack's environment."""
    done = subprocess.run(
        [sys.executable, "-m", "deployments.record", command],
        input=piped,
        env=stack.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_failed_run_leaves_production_as_it_was(
    stack: Stack, api: PrefectApi, registry: Registry
) -> None:
    before = registry.aliases(NAME)
    run_id = api.start("train/train", {"symbol": "FB", "as_of": "2012-11-26"})
    run = until(lambda: ended(api, run_id), "the run to end", 120)
    assert run.state == "FAILED"
    assert "rows of prices are needed" in run.message
    assert registry.aliases(NAME) == before
    assert ask(stack)["model_version"] == 1


def ended(api: PrefectApi, run_id: str) -> Run | None:
    run = api.run(run_id)
    return run if run.ended else None


@pytest.mark.slow
def test_a_run_that_lost_its_worker_is_marked_crashed(up: Up, api: PrefectApi) -> None:
    worker = up.part("prefect", "worker")
    run_id = api.start("train/train", {"symbol": "IBM", "as_of": "2007-03-30"})
    until(lambda: any(n.startswith("search") for n, _ in api.tasks(run_id)), "the search", 90)
    for process in [worker, *worker.children(recursive=True)]:
        process.kill()
    began = time.monotonic()
    run = until(lambda: ended(api, run_id), "the automation to notice", 180)
    assert run.state == "CRASHED"
    assert "No heartbeat" in run.message
    assert time.monotonic() - began < 150
    assert "worker ended with code -9; starting it again" in up.log.read_text()
