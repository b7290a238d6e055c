"""`serving.sync` with a real MLflow registry (SQLite) and real published snapshots."""

import hashlib
import json
import shutil
import sqlite3
import threading
import time
from contextlib import closing
from datetime import date

import fsspec
import pytest
from mlflow import MlflowClient

from forecasting import events
from forecasting import registry as registry_room
from forecasting.contract import MODEL_FILE, Snapshot, encode, sha256_file
from forecasting.errors import ContractError, RegistryError, ServiceError
from forecasting.promotion import sign_version
from forecasting.registry import ENVIRONMENT, Registry
from forecasting.settings import load_settings
from forecasting.store import engine_of
from serving.model_store import (
    CHALLENGER,
    CURRENT_FILE,
    PRODUCTION,
    REGISTRY_FILE,
    ModelStore,
    Refused,
    check,
    read_registered,
)
from serving.sync import AliasFollower, PriceFollower, Teller, follow, pause_after
from tests.keys import write_pair
from tests.models import make_snapshot, write_model_folder
from tests.serving.running import FORECASTER, put_prices, started, until, web


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    """MLflow's tables, which take seconds to make; copied by each test."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    Registry(f"sqlite:///{path}").served_versions()
    return path


@pytest.fixture
def registry(tmp_path, empty_database):
    (tmp_path / "mlflow").mkdir()
    shutil.copy(empty_database, tmp_path / "mlflow")
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
        {
            "production": {
                "version": noted.version,
                "reason": "bad",
                "refused_at": "2020-01-01T00:00:00Z",
            }
        }
    )
    (tmp_path / "store/models" / FORECASTER / "refused.json").write_text(old)
    assert isinstance(store.refused(FORECASTER), Refused)
    follower.step()
    assert store.refused(FORECASTER) is None


@pytest.mark.parametrize("restarted", [False, True])
def test_a_version_damaged_in_the_store_is_laid_anew(tmp_path, registry, store, restarted):
    version = register(registry, tmp_path, 1.0)
    follower = AliasFollower(registry, store)
    assert [follower.step(), follower.step()] == [[f"{FORECASTER}/{version}"], []]
    path = store.version_folder(FORECASTER, version) / MODEL_FILE
    path.write_bytes(b"damaged")
    follower = AliasFollower(registry, store) if restarted else follower
    assert [follower.step(), follower.step()] == [[f"{FORECASTER}/{version}"], []]
    assert check(path.parent, FORECASTER, version).version == version


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


def test_a_version_whose_files_are_gone_holds_up_no_other_forecaster(
    tmp_path, registry, store, caplog
):
    register(registry, tmp_path, 1.0)
    with closing(sqlite3.connect(tmp_path / "mlflow" / "mlflow.db")) as database:
        database.execute("UPDATE model_versions SET storage_location='gone://nowhere'")
        database.commit()
    run = registry.start_run("test", {})
    write_model_folder(tmp_path / "other", forecaster="perennial-zzz", run_id=run)
    version = registry.register(tmp_path / "other", "perennial-zzz", run)
    registry.set_alias("perennial-zzz", PRODUCTION, version)
    follower = AliasFollower(registry, store)
    assert follower.step() == [f"perennial-zzz/{version}"]
    assert store.current("perennial-zzz").version == version
    assert store.refused(FORECASTER) is None, "it is not the version's fault"
    for _ in range(3):
        follower.step()
        time.sleep(0.3)
    said = [record.getMessage() for record in caplog.records]
    assert sum(f"could not download {FORECASTER}" in text for text in said) == 1, "said once"


# what the registry says of a version, and signatures ---------------------------------------------


def follower_with(registry, store, key=None) -> tuple[AliasFollower, list[tuple[str, int, str]]]:
    told: list[tuple[str, int, str]] = []
    return AliasFollower(registry, store, key, lambda *refusal: told.append(refusal)), told


def client_of(registry: Registry) -> MlflowClient:
    return MlflowClient(registry.uri, registry.uri)


def test_what_the_registry_says_is_laid_beside_the_files(tmp_path, registry, store):
    version = register(registry, tmp_path, 1.0)
    AliasFollower(registry, store).step()
    folder = store.version_folder(FORECASTER, version)
    said = read_registered(folder)
    assert said.contract_sha256 == sha256_file(folder / "contract.json")
    assert (said.forecaster, said.version, said.signature) == (FORECASTER, version, "")
    assert check(folder, FORECASTER, version).version == version


@pytest.mark.parametrize("fault", ["missing", "other"])
def test_a_version_that_is_not_the_registered_one_is_refused(tmp_path, registry, store, fault):
    first = register(registry, tmp_path, 1.0)
    follower, told = follower_with(registry, store)
    follower.step()
    second = register(registry, tmp_path, 2.0)
    if fault == "missing":
        client_of(registry).delete_model_version_tag(FORECASTER, str(second), "contract_sha256")
        says = "should carry the tag contract_sha256"
    else:
        registry.tag_version(FORECASTER, second, {"contract_sha256": "0" * 64})
        says = f"not the one that was registered: sha256 {'0' * 64} expected"
    assert follower.step() == []
    assert says in store.refused(FORECASTER).reason
    assert current(store) == first
    assert [(name, version) for name, version, _ in told] == [(FORECASTER, second)]


def test_a_refusal_is_told_once(tmp_path, registry, store, monkeypatch):
    register(registry, tmp_path, 1.0)
    second = register(registry, tmp_path, 2.0)
    registry.set_alias(FORECASTER, CHALLENGER, second)
    damage_artifact(tmp_path)
    monkeypatch.setattr("serving.sync.REFUSED_AGAIN_SECONDS", 0.0)
    follower, told = follower_with(registry, store)
    for _ in range(3):
        follower.step()
    again, told_again = follower_with(registry, store)
    again.step()
    assert [version for _, version, _ in told] == [second]
    assert told_again == [], "not by a process started anew either"


def test_only_signed_versions_are_let_in_where_a_key_is_trusted(tmp_path, registry, store):
    private, public = write_pair(tmp_path / "keys")
    settings = load_settings(home=tmp_path, signing_key=str(private))
    version = register(registry, tmp_path, 1.0)
    follower, _ = follower_with(registry, store, public)
    assert follower.step() == []
    assert "it has none. Promote it with PERENNIAL_SIGNING_KEY" in store.refused(FORECASTER).reason
    assert current(store) is None
    assert follower.step() == [], "not tried again at once"
    sign_version(settings, registry, FORECASTER, version)
    assert follower.step() == [f"{FORECASTER}/{version}"], "but when the registry says more"
    assert store.refused(FORECASTER) is None
    assert follower_with(registry, ModelStore(tmp_path / "fresh"), public)[0].step()
    folder = ModelStore(tmp_path / "fresh").version_folder(FORECASTER, version)
    assert check(folder, FORECASTER, version, public).version == version
    _, stranger = write_pair(tmp_path / "stranger")
    with pytest.raises(ContractError, match="another key"):
        check(folder, FORECASTER, version, stranger)
    (folder / REGISTRY_FILE).unlink()
    assert check(folder, FORECASTER, version).version == version, "an older store"
    with pytest.raises(ContractError, match=r"should hold registry\.json with a signature"):
        check(folder, FORECASTER, version, public)


def test_a_signature_that_came_later_reaches_what_lies_in_the_store(tmp_path, registry, store):
    private, public = write_pair(tmp_path / "keys")
    version = register(registry, tmp_path, 1.0)
    AliasFollower(registry, store).step()
    trusting, told = follower_with(registry, store, public)
    trusting.step()
    assert len(told) == 1, "unsigned"
    settings = load_settings(home=tmp_path, signing_key=str(private))
    sign_version(settings, registry, FORECASTER, version)
    store.forget_refusal(FORECASTER, version + 1, -1)
    downloads = count_downloads(registry)
    assert trusting.step() == [f"{FORECASTER}/{version}"]
    assert downloads == []
    folder = store.version_folder(FORECASTER, version)
    assert check(folder, FORECASTER, version, public).version == version


def test_a_forged_signature_leaves_what_is_served_as_it_was(tmp_path, registry, store):
    private, public = write_pair(tmp_path / "keys")
    settings = load_settings(home=tmp_path, signing_key=str(private))
    first, second = (register(registry, tmp_path, scale) for scale in (1.0, 2.0))
    for version in (first, second):
        sign_version(settings, registry, FORECASTER, version)
        registry.set_alias(FORECASTER, PRODUCTION, version)
        follower_with(registry, store, public)[0].step()
    registry.tag_version(FORECASTER, first, {"signature": "A" * 86 + "=="})
    registry.set_alias(FORECASTER, PRODUCTION, first)
    follower_with(registry, store, public)[0].step()
    assert current(store) == second
    assert store.refused(FORECASTER).version == first
    folder = store.version_folder(FORECASTER, first)
    assert check(folder, FORECASTER, first, public), "still good to fall back on"


@pytest.mark.parametrize("content", ["{", "[]", '{"forecaster": "x"}'])
def test_a_damaged_description_is_refused(tmp_path, registry, store, content):
    version = register(registry, tmp_path, 1.0)
    AliasFollower(registry, store).step()
    folder = store.version_folder(FORECASTER, version)
    (folder / REGISTRY_FILE).write_text(content)
    with pytest.raises(ContractError, match=r"registry\.json should hold"):
        check(folder, FORECASTER, version)
    assert AliasFollower(registry, store).step() == [f"{FORECASTER}/{version}"], "laid anew"


def test_a_folder_of_another_version_is_refused(tmp_path, registry, store):
    version = register(registry, tmp_path, 1.0)
    AliasFollower(registry, store).step()
    folder = store.version_folder(FORECASTER, version)
    with pytest.raises(ContractError, match=f"version {version + 1} was expected"):
        check(folder, FORECASTER, version + 1)


def test_a_trusted_key_that_is_none_ends_sync_with_a_message(tmp_path):
    with started("sync", tmp_path, trusted_key=tmp_path / "none.pem") as process:
        assert process.popen.wait(60) == 2
        assert "PERENNIAL_TRUSTED_KEY" in process.log
        assert "Traceback" not in process.log


# challengers -------------------------------------------------------------------------------------


def count_downloads(registry: Registry) -> list[int]:
    """Versions that are downloaded from now on."""
    came: list[int] = []
    real = registry.download

    def download(forecaster, version, dst):
        came.append(version)
        return real(forecaster, version, dst)

    registry.download = download  # type: ignore[method-assign]
    return came


def test_a_challenger_comes_goes_and_is_promoted_without_a_download(tmp_path, registry, store):
    first = register(registry, tmp_path, 1.0)
    second = register(registry, tmp_path, 2.0, promote=False)
    follower = AliasFollower(registry, store)
    follower.step()
    registry.set_alias(FORECASTER, CHALLENGER, second)
    assert follower.step() == [f"{FORECASTER}/{second}"]
    assert follower.step() == []
    assert (current(store), store.challenger(FORECASTER)) == (first, second)
    downloads = count_downloads(registry)
    registry.set_alias(FORECASTER, PRODUCTION, second)
    assert follower.step() == [f"{FORECASTER}/{second}", f"{FORECASTER} without a challenger"]
    assert (current(store), store.challenger(FORECASTER)) == (second, None), "one, not two"
    registry.set_alias(FORECASTER, PRODUCTION, first)
    follower.step()
    assert (current(store), store.challenger(FORECASTER)) == (first, second)
    registry.delete_alias(FORECASTER, CHALLENGER)
    follower.step()
    assert store.challenger(FORECASTER) is None
    assert downloads == []


def test_a_challenger_stays_on_disk_and_is_nothing_to_fall_back_on(tmp_path, registry, store):
    follower = AliasFollower(registry, store)
    candidate = register(registry, tmp_path, 9.0, promote=False)
    registry.set_alias(FORECASTER, CHALLENGER, candidate)
    follower.step()
    assert store.challenger(FORECASTER) == candidate
    assert store.fallbacks(FORECASTER) == [], "never in production"
    for scale in range(1, 7):
        register(registry, tmp_path, float(scale))
        follower.step()
    assert store.version_folder(FORECASTER, candidate).is_dir()
    assert candidate not in store.fallbacks(FORECASTER)
    (tmp_path / "store/models" / FORECASTER / CURRENT_FILE).write_text("{")
    assert candidate not in store.fallbacks(FORECASTER)
    follower.step()
    registry.delete_alias(FORECASTER, CHALLENGER)
    follower.step()
    assert not store.version_folder(FORECASTER, candidate).exists()


def test_a_refused_challenger_is_noted_and_production_goes_on(tmp_path, registry, store):
    follower, told = follower_with(registry, store)
    first = register(registry, tmp_path, 1.0)
    good = register(registry, tmp_path, 2.0, promote=False)
    registry.set_alias(FORECASTER, CHALLENGER, good)
    follower.step()
    bad = register(registry, tmp_path, 3.0, promote=False)
    damage_artifact(tmp_path)
    registry.set_alias(FORECASTER, CHALLENGER, bad)
    assert follower.step() == []
    assert (current(store), store.challenger(FORECASTER)) == (first, good), "the last good one"
    assert store.refused(FORECASTER) is None
    assert store.refusals(FORECASTER)[CHALLENGER].version == bad
    assert [version for _, version, _ in told] == [bad]
    third = register(registry, tmp_path, 4.0)
    assert follower.step() == [f"{FORECASTER}/{third}"]
    assert store.refusals(FORECASTER)[CHALLENGER].version == bad
    registry.delete_alias(FORECASTER, CHALLENGER)
    follower.step()
    assert (store.refusals(FORECASTER), store.challenger(FORECASTER)) == ({}, None)


def test_each_alias_keeps_a_refusal_of_its_own(store):
    store.refuse(FORECASTER, 2, "production is bad")
    store.refuse(FORECASTER, 3, "challenger is bad", CHALLENGER)
    assert store.refused(FORECASTER).reason == "production is bad"
    assert {a: r.version for a, r in store.refusals(FORECASTER).items()} == {
        PRODUCTION: 2,
        CHALLENGER: 3,
    }
    store.forget_refusal(FORECASTER, 9, -1, CHALLENGER)
    assert list(store.refusals(FORECASTER)) == [PRODUCTION]
    store.forget_refusal(FORECASTER, 9, -1)
    assert store.refusals(FORECASTER) == {}


def test_a_challenger_of_a_model_that_was_deleted_goes(tmp_path, registry, store):
    first = register(registry, tmp_path, 1.0)
    second = register(registry, tmp_path, 2.0, promote=False)
    registry.set_alias(FORECASTER, CHALLENGER, second)
    follower = AliasFollower(registry, store)
    follower.step()
    client_of(registry).delete_registered_model(FORECASTER)
    follower.step()
    assert (current(store), store.challenger(FORECASTER)) == (first, None)


def test_a_damaged_challenger_pointer_is_written_anew(tmp_path, registry, store):
    register(registry, tmp_path, 1.0)
    second = register(registry, tmp_path, 2.0, promote=False)
    registry.set_alias(FORECASTER, CHALLENGER, second)
    follower = AliasFollower(registry, store)
    follower.step()
    (tmp_path / "store/models" / FORECASTER / "challenger.json").write_text("{")
    follower.step()
    assert store.challenger(FORECASTER) == second


def test_registry_and_store_agree_on_the_names_of_aliases():
    assert (PRODUCTION, CHALLENGER) == (registry_room.PRODUCTION, registry_room.CHALLENGER)


# one file to look at ------------------------------------------------------------------------------


def test_every_change_makes_a_new_generation_and_nothing_else_does(tmp_path, registry, store):
    follower = AliasFollower(registry, store)
    seen = [store.generation()]

    def changes(do) -> bool:
        do()
        seen.append(store.generation())
        return seen[-1] != seen[-2]

    assert not changes(follower.step)
    first = register(registry, tmp_path, 1.0)
    assert changes(follower.step)
    assert not changes(follower.step)
    assert changes(lambda: store.put_snapshot(make_snapshot()))
    assert changes(lambda: store.refuse(FORECASTER, 9, "bad"))
    assert changes(lambda: store.forget_refusal(FORECASTER, first, -1))
    assert not changes(lambda: store.forget_refusal(FORECASTER, first, -1))
    assert changes(lambda: store.make_challenger(FORECASTER, first))
    assert changes(lambda: store.drop_challenger(FORECASTER))
    assert not changes(lambda: store.drop_challenger(FORECASTER))
    assert changes(lambda: store.make_current(FORECASTER, first))
    assert changes(store.clean_incoming), "what a killed process did not announce"
    assert len(set(seen)) == 9


def test_two_changes_at_once_are_two_generations(store):
    seen = set()
    for _ in range(500):
        store.poke()
        store.clean_incoming()
        seen.add((store.poked(), store.generation()))
    assert len({poke for poke, _ in seen}) == len({change for _, change in seen}) == 500


def test_writers_in_several_threads_leave_nothing_behind(store):
    def write(symbol: str) -> None:
        for _ in range(50):
            store.put_snapshot(make_snapshot(symbol))

    threads = [threading.Thread(target=write, args=(f"S{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(store.price_files()) == ["S0", "S1", "S2", "S3"]
    assert not [path for path in store.root.rglob("*") if path.name.endswith(".tmp")]


def test_what_a_killed_writer_left_is_removed_at_the_start(store):
    store.put_snapshot(make_snapshot())
    left = [store.root / ".changed.1.2.tmp", store.root / "prices/.GOOG.json.1.2.tmp"]
    left.append(store.root / "models" / FORECASTER / ".current.json.1.2.tmp")
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    store.clean_incoming()
    assert not any(path.exists() for path in left)
    assert store.snapshot("GOOG")


# the pace -----------------------------------------------------------------------------------------


def test_a_poke_ends_the_wait_at_once(store):
    stop, looks = threading.Event(), []
    arguments = (lambda: looks.append(time.monotonic()), "the registry", 60.0, stop, store.poked)
    thread = threading.Thread(target=follow, args=arguments)
    thread.start()
    try:
        until(lambda: len(looks) == 1, "the first look")
        time.sleep(0.2)
        for number in (2, 3):
            asked = time.monotonic()
            store.poke()
            until(lambda number=number: len(looks) == number, "a look after the poke")
            assert looks[-1] - asked < 1.0
        time.sleep(0.2)
        assert len(looks) == 3, "a poke is one look"
    finally:
        stop.set()
        thread.join()


def test_looking_costs_at_most_a_tenth_of_the_time():
    assert pause_after(0.02, 0.02) == pytest.approx(0.2)
    assert pause_after(2.0, 2.0) == pytest.approx(20.0)
    assert pause_after(30.0, 0.01) == 5.0, "what was only waited for counts up to a bound"


def test_a_costly_look_is_followed_by_a_long_pause(monkeypatch):
    stop, busy, looks = threading.Event(), 0.05, []

    def look() -> list[str]:
        end = time.thread_time() + busy
        while time.thread_time() < end:
            pass
        looks.append(time.monotonic())
        return []

    thread = threading.Thread(target=follow, args=(look, "prices", 0.01, stop))
    thread.start()
    time.sleep(1.6)
    stop.set()
    thread.join()
    assert len(looks) <= 4


# what is told -------------------------------------------------------------------------------------


def test_a_refusal_reaches_the_outbox_when_the_database_is_there(tmp_path):
    url = f"sqlite:///{tmp_path / 'perennial.db'}"
    teller = Teller(url)
    assert teller.step() == []
    assert not (tmp_path / "perennial.db").exists(), "nothing to tell, nothing is opened"
    (tmp_path / "perennial.db").write_bytes(b"no database at all " * 500)
    teller.refused(FORECASTER, 3, "altered")
    with pytest.raises(ServiceError):
        teller.step()
    (tmp_path / "perennial.db").unlink()
    assert teller.step() == ["perennial.model.unservable"]
    assert teller.step() == []
    with engine_of(url) as engine:
        (waiting,) = events.pending(engine)
    assert waiting.resource == f"perennial.forecaster.{FORECASTER}"
    assert waiting.payload == {
        "schema": 1,
        "forecaster": FORECASTER,
        "version": 3,
        "reason": "altered",
        "where": "sync",
    }


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
