"""`serving.sync` with a real MLflow registry (SQLite) and real published snapshots."""

import hashlib
import json
import sqlite3
import threading
from contextlib import closing
from datetime import date

import fsspec
import pytest

from forecasting.contract import MODEL_FILE, Snapshot, encode
from forecasting.errors import RegistryError
from forecasting.registry import ENVIRONMENT, PRODUCTION, Registry
from serving.model_store import CURRENT_FILE, ModelStore, Refused
from serving.sync import AliasFollower, PriceFollower, follow
from tests.models import make_snapshot, write_model_folder
from tests.serving.running import FORECASTER, put_prices, started, until, web


@pytest.fixture
def registry(tmp_path):
    return Registry(f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}", tmp_path / "mlflow/artifacts")


@pytest.fixture
def store(tmp_path):
    return ModelStore(tmp_path / "store")


def register(registry: Registry, tmp_path, scale: float, *, promote: bool = True) -> int:
    run = registry.start_run("test", {})
    folder = tmp_path / "candidates" / str(scale)
    write_model_folder(folder, scale=scale, run_id=run)
    version = registry.register(folder, FORECASTER, run)
    if promote:
        registry.set_alias(FORECASTER, PRODUCTION, version)
    return version


def damage_artifact(tmp_path) -> None:
    newest = max((tmp_path / "mlflow").rglob(MODEL_FILE), key=lambda path: path.stat().st_mtime_ns)
    newest.write_bytes(b"damaged")


def current(store: ModelStore) -> int | None:
    found = store.current(FORECASTER)
    return found.version if found else None


def test_the_store_follows_the_alias_forth_and_back(tmp_path, registry, store):
    follower = AliasFollower(registry, store)
    assert follower.step() == []
    first = register(registry, tmp_path, 1.0)
    assert follower.step() == [f"{FORECASTER}/{first}"]
    assert follower.step() == []
    second = register(registry, tmp_path, 2.0, promote=False)
    assert follower.step() == [], "registered is not promoted"
    registry.set_alias(FORECASTER, PRODUCTION, second)
    follower.step()
    assert current(store) == second
    registry.set_alias(FORECASTER, PRODUCTION, first)
    follower.step()
    assert current(store) == first
    assert not list((tmp_path / "store/incoming").iterdir())


def test_a_damaged_version_is_refused_and_the_one_before_stays(tmp_path, registry, store):
    follower = AliasFollower(registry, store)
    first = register(registry, tmp_path, 1.0)
    follower.step()
    second = register(registry, tmp_path, 2.0)
    damage_artifact(tmp_path)
    assert follower.step() == []
    assert current(store) == first
    refused = store.refused(FORECASTER)
    assert refused
    assert (refused.version, "model.onnx is altered" in refused.reason) == (second, True)
    assert follower.step() == [], "not downloaded again at every look"
    put_prices(tmp_path)
    with web(tmp_path) as server:
        (listed,) = server.get("/v1/models").json()["refused"]
        assert (listed["name"], listed["version"]) == (FORECASTER, second)
        assert server.versions() == {FORECASTER: first}
    third = register(registry, tmp_path, 3.0)
    follower.step()
    assert current(store) == third
    assert store.refused(FORECASTER) is None


def test_a_refusal_is_forgotten_some_time_after_production_moved_away(tmp_path, registry, store):
    follower = AliasFollower(registry, store)
    first = register(registry, tmp_path, 1.0)
    follower.step()
    store.refuse(FORECASTER, first + 1, "bad")
    follower.step()
    noted = store.refused(FORECASTER)
    assert noted is not None
    old = json.dumps(
        {"version": noted.version, "reason": "bad", "refused_at": "2020-01-01T00:00:00Z"}
    )
    (tmp_path / "store/models" / FORECASTER / "refused.json").write_text(old)
    assert isinstance(store.refused(FORECASTER), Refused)
    follower.step()
    assert store.refused(FORECASTER) is None


def test_a_version_damaged_in_the_store_is_laid_anew_at_the_next_start(tmp_path, registry, store):
    version = register(registry, tmp_path, 1.0)
    AliasFollower(registry, store).step()
    (store.version_folder(FORECASTER, version) / MODEL_FILE).write_bytes(b"damaged")
    assert AliasFollower(registry, store).step() == [f"{FORECASTER}/{version}"]


def test_a_damaged_pointer_is_written_anew(tmp_path, registry, store):
    version = register(registry, tmp_path, 1.0)
    follower = AliasFollower(registry, store)
    follower.step()
    (tmp_path / "store/models" / FORECASTER / CURRENT_FILE).write_text("{")
    follower.step()
    assert current(store) == version


def test_old_versions_do_not_pile_up(tmp_path, registry, store):
    follower = AliasFollower(registry, store)
    for scale in range(1, 8):
        version = register(registry, tmp_path, float(scale))
        follower.step()
    kept = sorted(
        int(path.name) for path in store.version_folder(FORECASTER, 1).parent.glob("[0-9]*")
    )
    assert kept == [version - 3, version - 2, version - 1, version]


def test_a_registry_that_is_away_is_an_error_and_the_store_keeps_what_it_has(
    tmp_path, registry, store, monkeypatch
):
    version = register(registry, tmp_path, 1.0)
    AliasFollower(registry, store).step()
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    away = AliasFollower(Registry("http://127.0.0.1:9"), store)
    with pytest.raises(RegistryError):
        away.step()
    assert current(store) == version


def test_a_version_whose_files_are_gone_holds_up_no_other_forecaster(tmp_path, registry, store):
    register(registry, tmp_path, 1.0)
    with closing(sqlite3.connect(tmp_path / "mlflow" / "mlflow.db")) as database:
        database.execute("UPDATE model_versions SET storage_location='gone://nowhere'")
        database.commit()
    run = registry.start_run("test", {})
    write_model_folder(tmp_path / "other", forecaster="perennial-zzz", run_id=run)
    version = registry.register(tmp_path / "other", "perennial-zzz", run)
    registry.set_alias("perennial-zzz", PRODUCTION, version)
    with pytest.raises(RegistryError, match=f"download {FORECASTER}"):
        AliasFollower(registry, store).step()
    assert store.current("perennial-zzz").version == version
    assert store.refused(FORECASTER) is None, "it is tried again at once"


class CloudError(Exception):
    """As the clients of object stores raise them: not an OSError."""


@pytest.mark.parametrize("kind", [RegistryError, OSError, CloudError, UnicodeError])
def test_following_goes_on_after_errors(caplog, kind):
    stop, calls = threading.Event(), []

    def step() -> None:
        calls.append(1)
        if len(calls) == 4:
            stop.set()
        if len(calls) < 3:
            raise kind("the registry is away")

    follow(step, "the registry", 0.01, stop)
    said = [record.getMessage() for record in caplog.records]
    assert sum("cannot be followed" in text for text in said) == 1


# prices -------------------------------------------------------------------------------------------


def publish(url: str, snapshot: Snapshot, *, sha256: str = "", folder: str = "") -> None:
    """As ingest does."""
    raw = encode(snapshot)
    name = f"{snapshot.dataset_md5}-{snapshot.as_of}.json"
    files, root = fsspec.core.url_to_fs(url)
    home = f"{root}/{folder or snapshot.symbol}"
    files.makedirs(home, exist_ok=True)
    files.pipe_file(f"{home}/{name}", raw)
    pointer = {"file": name, "sha256": sha256 or hashlib.sha256(raw).hexdigest()}
    files.pipe_file(f"{home}/latest.json", json.dumps(pointer).encode())


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_published_prices_reach_the_store_from_any_file_system(tmp_path, store, scheme):
    url = str(tmp_path / "published") if scheme == "local" else f"memory://{tmp_path.name}"
    follower = PriceFollower(url, store)
    assert follower.is_remote == (scheme == "memory")
    assert follower.step() == []
    publish(url, make_snapshot("GOOG", close=100.0))
    publish(url, make_snapshot("AAPL", close=20.0))
    assert follower.step() == ["AAPL", "GOOG"]
    assert follower.step() == []
    newer = make_snapshot("GOOG", date(2008, 1, 3), 98.0)
    publish(url, newer)
    assert follower.step() == ["GOOG"]
    assert store.snapshot("GOOG") == newer


@pytest.mark.parametrize("fault", ["hash", "symbol", "pointer", "bytes", "escape", "folder"])
def test_bad_published_prices_leave_the_last_good_ones(tmp_path, store, caplog, fault):
    url = str(tmp_path / "published")
    good = make_snapshot("GOOG", close=100.0)
    publish(url, good)
    follower = PriceFollower(url, store)
    follower.step()
    bad = make_snapshot("GOOG", date(2008, 1, 3), 98.0)
    if fault == "hash":
        publish(url, bad, sha256="0" * 64)
    elif fault == "symbol":
        publish(url, make_snapshot("AAPL", date(2008, 1, 3)), folder="GOOG")
    elif fault == "folder":
        pointer = tmp_path / "published/GOOG/latest.json"
        pointer.unlink()
        pointer.mkdir()
    else:
        contents = {"pointer": b"{", "escape": b'{"file": "../../x", "sha256": ""}'}
        content = contents.get(fault, b'{"file": "\xff.json", "sha256": "a"}')
        (tmp_path / "published/GOOG/latest.json").write_bytes(content)
    assert follower.step() == []
    assert follower.step() == []
    assert store.snapshot("GOOG") == good
    assert len(caplog.records) == 1, "said once"
    if fault == "folder":
        pointer.rmdir()
    publish(url, bad)
    assert follower.step() == ["GOOG"]


# the process --------------------------------------------------------------------------------------


def test_from_alias_to_answer_and_on_without_a_registry(tmp_path, registry):
    home = tmp_path / "home"
    database = tmp_path / "mlflow" / "mlflow.db"
    first = register(registry, tmp_path, 1.0)
    publish(str(home / "published"), make_snapshot())
    with web(home, ready=False) as server:
        with started("sync", home, tracking_uri=registry.uri, poll_seconds=0.1) as sync:
            until(lambda: server.get("/v1/forecast/GOOG").is_success, "the first answer", 60)
            assert server.versions() == {FORECASTER: first}
            second = register(registry, tmp_path, 2.0)
            server.wait_version(second)
            with closing(sqlite3.connect(database)) as connection:
                connection.execute("DROP TABLE registered_models")
                connection.commit()
            until(lambda: sync.logged("the registry cannot be followed"), "the complaint")
            publish(str(home / "published"), make_snapshot("GOOG", date(2008, 1, 3), 98.0))
            until(
                lambda: server.get("/v1/forecast/GOOG").json()["origin"] == "2008-01-03",
                "new prices in spite of the registry",
            )
            assert sync.stop() == 0
        assert server.versions() == {FORECASTER: second}
    with web(home) as again:
        assert again.versions() == {FORECASTER: second}
        answer = again.get("/v1/forecast/GOOG").json()
        assert (answer["model_version"], answer["origin"]) == (second, "2008-01-03")
