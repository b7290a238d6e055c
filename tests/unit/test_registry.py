"""The registry against real MLflow: embedded in SQLite, and behind a server."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from uuid import uuid4

import mlflow.pyfunc
import numpy as np
import pytest
from mlflow import MlflowClient

from forecasting.contract import MODEL_FILE, read_contract, verify_files
from forecasting.errors import ConfigError, ContractError, RegistryError
from forecasting.registry import (
    CHALLENGER,
    PREVIOUS,
    PRODUCTION,
    Registry,
    open_registry,
    register_webhook,
)
from forecasting.settings import Settings, load_settings
from serving.hooks import Deliveries, verify
from tests.models import write_model_folder
from tests.services import WEBHOOKS, HookListener, answering, free_port, mlflow_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as url:
        yield url


@pytest.fixture(scope="module", params=["embedded", "server"])
def registry(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    home = tmp_path_factory.mktemp("home")
    uri = request.getfixturevalue("server") if request.param == "server" else ""
    return open_registry(load_settings(home=home, tracking_uri=uri))


@pytest.fixture
def forecaster(request: pytest.FixtureRequest) -> str:
    return f"perennial-{request.node.name.partition('[')[0].replace('_', '-')}"


def put(registry: Registry, folder: Path, forecaster: str, scale: float = 1.0) -> int:
    run_id = registry.start_run("a run", {"symbol": "GOOG"})
    write_model_folder(folder, forecaster=forecaster, scale=scale, run_id=run_id)
    version = registry.register(folder, forecaster, run_id, {"asked_by": "test"})
    registry.finish(run_id)
    return version


def read(registry: Registry) -> MlflowClient:
    return MlflowClient(registry.uri, registry.uri)


def test_runs_keep_what_is_logged(registry: Registry) -> None:
    run_id = registry.start_run("GOOG 2007-01-03", {"symbol": "GOOG"})
    registry.log_params(run_id, {f"p{i}": i for i in range(150)})
    registry.log_metrics(run_id, [("loss", float(i), i) for i in range(1500)] + [("last", 3.0, 0)])
    registry.set_tags(run_id, {"outcome": "refused"})
    registry.log_text(run_id, "<p>", "report.html")
    registry.log_dict(run_id, {"a": 1}, "verdict.json")
    registry.finish(run_id, "FAILED")
    run = read(registry).get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("GOOG 2007-01-03", "FAILED")
    assert run.data.params["p149"] == "149"
    assert run.data.metrics == {"loss": 1499.0, "last": 3.0}
    assert run.data.tags.items() >= {"symbol": "GOOG", "outcome": "refused"}.items()
    assert len(read(registry).get_metric_history(run_id, "loss")) == 1500
    found = registry.find_run({"symbol": "GOOG", "outcome": "refused"})
    assert found is not None
    assert (found.run_id, found.metrics["last"]) == (run_id, 3.0)
    assert registry.find_run({"symbol": "NONE"}) is None
    kept = {each.path for each in read(registry).list_artifacts(run_id)}
    assert kept == {"report.html", "verdict.json"}


def test_a_trial_is_a_nested_run(registry: Registry) -> None:
    parent = registry.start_run("search", {})
    log = registry.trial_logger(parent, {"dataset_md5": "d" * 32})
    run = read(registry).get_run(log(3, {"hidden": 32}, [90.0, 80.5, 81.0], "KILLED"))
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["dataset_md5"] == "d" * 32
    assert (run.info.run_name, run.info.status) == ("trial-003", "KILLED")
    assert run.data.params == {"hidden": "32"}
    assert run.data.metrics == {"validation_crps_bp": 81.0, "best_validation_crps_bp": 80.5}


def test_an_interrupted_search_is_taken_up_with_the_trials_it_logged(registry: Registry) -> None:
    first, second = registry.start_run("train", {}), registry.start_run("train again", {})
    search = registry.start_run("search", {}, first)
    registry.log_trial(search, 0, {"hidden": 8}, [9.0])
    registry.log_trial(search, 2, {"hidden": 8}, [9.0], "KILLED")
    halfway = {"perennial.kind": "trial", "perennial.trial": "1"}
    registry.start_run("trial-001", halfway, search)  # its process died here
    registry.finish(search, "FAILED")

    assert registry.take_up_run(search, second)
    found = read(registry).get_run(search)
    assert (found.info.status, found.data.tags["mlflow.parentRunId"]) == ("RUNNING", second)
    assert registry.logged_trials(search) == {0, 2}
    registry.log_trial(search, 1, {"hidden": 8}, [9.0])
    assert registry.logged_trials(search) == {0, 1, 2}
    assert not registry.take_up_run("0" * 32, second)


def test_past_searches_know_no_later_day(registry: Registry) -> None:
    def searched(symbol: str, as_of: str, status: str = "FINISHED") -> None:
        tags = {"perennial.kind": "search", "symbol": symbol, "as_of": as_of}
        run_id = registry.start_run("search", tags)
        registry.log_params(run_id, {"lr": f"{symbol} {as_of}"})
        registry.finish(run_id, status)

    symbol = f"S{uuid4().hex[:8]}"
    searched(symbol, "2007-01-31")
    searched(symbol, "2008-01-31", "FAILED")
    searched(symbol, "2008-02-29")
    searched(symbol, "2008-03-31")
    searched("OTHER", "2007-01-31")
    past = registry.past_searches(symbol, date(2008, 3, 31), limit=3)
    assert past == [{"lr": f"{symbol} 2008-02-29"}, {"lr": f"{symbol} 2007-01-31"}]
    assert len(registry.past_searches(symbol, date(2008, 3, 31), limit=1)) == 1


def test_only_a_server_has_run_addresses(registry: Registry) -> None:
    run_id = registry.start_run("a run", {})
    url = registry.run_url(run_id)
    assert url.endswith(f"/runs/{run_id}") if registry.uri.startswith("http") else url == ""


def test_an_artifact_is_linked_where_it_has_an_address(registry: Registry) -> None:
    run_id = registry.start_run("a run", {})
    link = registry.artifact_link(run_id, "card.html", "The card")
    if registry.uri.startswith("http"):
        assert link == f"[The card]({registry.run_url(run_id)}/artifacts/card.html)"
    else:
        assert link == f"The card: card.html of run {run_id}"


def test_notes_lie_beside_the_files_of_a_version(
    registry: Registry, forecaster: str, tmp_path: Path
) -> None:
    run_id = registry.start_run("a run", {})
    contract = write_model_folder(tmp_path / "model", forecaster=forecaster, run_id=run_id)
    notes = {"card.md": "# How it was judged: 80 % held"}
    version = registry.register(tmp_path / "model", forecaster, run_id, notes=notes)
    got = registry.download(forecaster, version, tmp_path / "download")
    assert (got / "card.md").read_text() == notes["card.md"]
    verify_files(got, contract)


def test_register_find_download(registry: Registry, forecaster: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert put(registry, folder, forecaster) == 1
    contract = read_contract(folder)
    assert registry.register(folder, forecaster, contract.run_id) == 1, "the same folder again"
    assert put(registry, tmp_path / "second", forecaster, scale=1.1) == 2
    info = registry.version(forecaster, 1)
    assert info.run_id == contract.run_id
    wanted = {
        "asked_by": "test",
        "as_of": "2007-12-31",
        "dataset_md5": "d" * 32,
        "git_commit": "f" * 40,
        "kind": "lstm",
        "symbols": "GOOG",
    }
    assert info.tags.items() >= wanted.items()
    assert registry.find(forecaster, {"contract_sha256": info.tags["contract_sha256"]}) == 1
    assert registry.find(forecaster, {"kind": "lstm"}) == 2
    assert registry.find(forecaster, {"kind": "lstm", "as_of": "2001-01-01"}) is None
    assert registry.find("perennial-nobody", {}) is None
    got = registry.download(forecaster, 1, tmp_path / "download")
    verify_files(got, contract)
    assert (got / MODEL_FILE).read_bytes() == (folder / MODEL_FILE).read_bytes()
    names = {each.name for each in got.iterdir()}
    assert names - {each.name for each in folder.iterdir()} == {
        "MLmodel",
        "python_env.yaml",
        "requirements.txt",
    }
    assert not any(name.endswith((".pkl", ".pickle", ".pt")) for name in names)


def test_mlflow_itself_can_load_a_version(
    registry: Registry, forecaster: str, tmp_path: Path
) -> None:
    put(registry, tmp_path / "model", forecaster, scale=1.0)
    folder = registry.download(forecaster, 1, tmp_path / "download")
    model = mlflow.pyfunc.load_model(str(folder))
    close = np.full((2, 64, 5), 100, np.float32)
    window = {"ohlcv": close, "dates": np.ones((2, 64), np.int64), "symbol": np.zeros(2, np.int64)}
    quantiles = model.predict(window)["quantiles"]
    assert quantiles.shape == (2, 5, 39)
    assert quantiles[0, 0, 19] == pytest.approx(100)
    assert model.metadata.signature.inputs.input_names() == ["ohlcv", "dates", "symbol"]


def test_wrong_folders_are_not_registered(
    registry: Registry, forecaster: str, tmp_path: Path
) -> None:
    write_model_folder(tmp_path, forecaster="perennial-other")
    with pytest.raises(ContractError, match="made for 'perennial-other'"):
        registry.register(tmp_path, forecaster, "0" * 32)
    write_model_folder(tmp_path, forecaster=forecaster)
    (tmp_path / MODEL_FILE).write_bytes(b"altered")
    with pytest.raises(ContractError, match="altered"):
        registry.register(tmp_path, forecaster, "0" * 32)
    assert registry.history(forecaster) == []


def test_aliases_move_and_go(registry: Registry, forecaster: str, tmp_path: Path) -> None:
    assert registry.alias(forecaster, PRODUCTION) is None
    assert registry.aliases(forecaster) == {}
    for number, scale in enumerate((1.0, 1.1, 1.2), start=1):
        assert put(registry, tmp_path / str(number), forecaster, scale) == number
    assert registry.served_versions()[forecaster] == {}
    registry.set_alias(forecaster, PRODUCTION, 1)
    registry.set_alias(forecaster, PRODUCTION, 3)
    registry.set_alias(forecaster, PREVIOUS, 1)
    assert registry.served_versions()[forecaster] == {PRODUCTION: 3}
    registry.set_alias(forecaster, CHALLENGER, 2)
    assert registry.served_versions()[forecaster] == {PRODUCTION: 3, CHALLENGER: 2}
    registry.delete_alias(forecaster, CHALLENGER)
    assert registry.aliases(forecaster) == {PRODUCTION: 3, PREVIOUS: 1}
    listed = [(info.version, info.aliases) for info in registry.history(forecaster)]
    assert listed == [(3, (PRODUCTION,)), (2, ()), (1, (PREVIOUS,))]
    registry.delete_alias(forecaster, PREVIOUS)
    registry.delete_alias(forecaster, PREVIOUS)
    assert registry.alias(forecaster, PREVIOUS) is None


def test_only_our_models_are_followed(registry: Registry) -> None:
    client = read(registry)
    client.create_registered_model("somebody-elses")
    client.create_model_version("somebody-elses", "s3://bucket/x")
    client.set_registered_model_alias("somebody-elses", PRODUCTION, "1")
    assert registry.alias("somebody-elses", PRODUCTION) == 1
    assert "somebody-elses" not in registry.served_versions()


def test_a_missing_version_names_those_that_exist(
    registry: Registry, forecaster: str, tmp_path: Path
) -> None:
    put(registry, tmp_path / "one", forecaster)
    with pytest.raises(RegistryError, match=f"no version 7 of {forecaster}; it holds: 1"):
        registry.version(forecaster, 7)
    with pytest.raises(RegistryError, match="version 7"):
        registry.set_alias(forecaster, PRODUCTION, 7)
    with pytest.raises(RegistryError, match=f"download {forecaster} version 7"):
        registry.download(forecaster, 7, tmp_path / "seven")


def test_a_registry_that_is_away_fails_in_seconds(tmp_path: Path) -> None:
    port = free_port()
    address = f"http://someone:secret@127.0.0.1:{port}"
    away = open_registry(load_settings(home=tmp_path, tracking_uri=address))
    start = time.monotonic()
    with pytest.raises(RegistryError, match=f"http://127.0.0.1:{port}") as caught:
        away.alias("perennial-goog", PRODUCTION)
    with pytest.raises(RegistryError):
        away.start_run("a run", {})
    assert time.monotonic() - start < 20
    assert "secret" not in str(caught.value)


def test_a_registry_that_hangs_fails_after_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        uri = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        hanging = open_registry(load_settings(home=tmp_path, tracking_uri=uri))
        start = time.monotonic()
        with pytest.raises(RegistryError, match=uri):
            hanging.served_versions()
    assert time.monotonic() - start < 5


def test_a_damaged_database_is_named_at_once(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path)
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").write_bytes(b"not a database" * 100)
    start = time.monotonic()
    with pytest.raises(RegistryError, match=r"mlflow\.db.*not a database"):
        open_registry(settings).served_versions()
    assert time.monotonic() - start < 5


ANSWERS = {
    "html": (200, "text/html", b"<html>Bad gateway</html>"),
    "truncated": (200, "application/json", b'{"registered_models": [{"name": "perennial-go'),
    "list": (200, "application/json", b"[1, 2]"),
    "other types": (200, "application/json", b'{"registered_models": 7}'),
    "bad alias": (
        200,
        "application/json",
        b'{"registered_models": [{"name": "n", "aliases": [{"alias": "a", "version": "x"}]}]}',
    ),
    "bytes": (200, "application/octet-stream", b"\xff\xfe\x00"),
    "broken": (500, "text/html", b"<html>" + b"x" * 100_000),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_that_is_none_of_mlflows_is_an_error_of_the_registry(
    answer: tuple[int, str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with answering(*answer) as url:
        registry = open_registry(load_settings(home=tmp_path, tracking_uri=url))
        with pytest.raises(RegistryError, match=url) as caught:
            registry.served_versions()
    assert len(str(caught.value)) < 1000


# webhooks ----------------------------------------------------------------------------------------


def with_secret(home: Path, uri: str, secret: str = "s3cret") -> Settings:
    return load_settings(home=home, tracking_uri=uri, webhook_secret=secret)


def test_a_webhook_is_made_once_and_tells_of_alias_moves(tmp_path: Path) -> None:
    with mlflow_server(tmp_path / "mlflow", WEBHOOKS) as uri, HookListener() as listener:
        settings = with_secret(tmp_path, uri)
        assert register_webhook(settings, listener.url).startswith("created: ")
        assert register_webhook(settings, listener.url).startswith("updated: ")
        registry = open_registry(settings)
        put(registry, tmp_path / "model", "perennial-hook")
        registry.set_alias("perennial-hook", PRODUCTION, 1)
        registry.delete_alias("perennial-hook", PRODUCTION)
        moved, gone = (listener.wait() for _ in range(2))
        told = {"name": "perennial-hook", "alias": "production"}
        assert json.loads(moved.body)["action"] == "created"
        assert json.loads(moved.body)["data"] == {**told, "version": "1"}
        assert json.loads(gone.body)["data"] == told
        for hook in (moved, gone):
            verify(hook.headers, hook.body, "s3cret", time.time(), Deliveries())
        assert listener.waiting == 0, "one webhook, not two"


def test_a_webhook_that_cannot_be_is_refused(tmp_path: Path, server: str) -> None:
    with pytest.raises(ConfigError, match="PERENNIAL_WEBHOOK_SECRET"):
        register_webhook(with_secret(tmp_path, server, ""), "https://forecast.example/hooks")
    with pytest.raises(ConfigError, match=r"Only an MLflow server .*MLFLOW_TRACKING_URI"):
        register_webhook(with_secret(tmp_path, ""), "https://forecast.example/hooks")
    with pytest.raises(RegistryError, match="Invalid webhook URL scheme") as caught:
        register_webhook(with_secret(tmp_path, server), "ftp://forecast.example/hooks")
    assert "s3cret" not in str(caught.value)


def test_import_is_light_and_without_effect(tmp_path: Path) -> None:
    code = (
        "import os, sys; before = dict(os.environ)\n"
        "import forecasting.registry\n"
        "heavy = {'mlflow.pyfunc', 'mlflow.onnx', 'onnx', 'torch', 'sklearn', 'prefect', 'ray'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "changed = {k for k, v in os.environ.items() if before.get(k) != v}\n"
        "assert all(key.startswith('_MLFLOW_') for key in changed), changed\n"
        "assert not os.listdir('.'), os.listdir('.')\n"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
