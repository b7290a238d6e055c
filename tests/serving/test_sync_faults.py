"""Sync as a process, with a real MLflow server behind a proxy that misbehaves, and full disks."""

import json
import random
import resource
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import psutil
import pytest

from forecasting.registry import ENVIRONMENT, Registry
from serving.model_store import CHALLENGER, PRODUCTION, ModelStore, check
from tests.models import make_snapshot, write_model_folder
from tests.registry_proxy import Mode, RegistryProxy
from tests.services import mlflow_server
from tests.serving.running import FORECASTER, Process, started, until
from tests.serving.test_sync import publish

OTHER = "perennial-zzz"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real registry with four versions of two forecasters."""
    home = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as environment, mlflow_server(home) as url:
        for key, value in ENVIRONMENT.items():
            environment.setenv(key, value)
        registry = Registry(url)
        for name in (FORECASTER, OTHER):
            for number in range(1, 5):
                folder, run = home / name / str(number), registry.start_run("test", {})
                write_model_folder(folder, forecaster=name, scale=float(number), run_id=run)
                assert registry.register(folder, name, run) == number
        yield registry


@pytest.fixture
def proxy(server):
    for name in (FORECASTER, OTHER):
        server.delete_alias(name, CHALLENGER)
        server.set_alias(name, PRODUCTION, 1)
    with RegistryProxy(server.uri).running() as running:
        yield running


@pytest.fixture
def store(tmp_path):
    return ModelStore(tmp_path / "store")


def current(store: ModelStore, name: str = FORECASTER) -> int | None:
    found = store.current(name)
    return found.version if found else None


def syncing(home: Path, proxy: RegistryProxy):
    return started("sync", home, tracking_uri=proxy.url, poll_seconds=0.1)


def prices_still_come(home: Path, store: ModelStore, day: int) -> None:
    """New prices reach the store within a second or two."""
    newer = make_snapshot("GOOG", date(2008, 1, day))
    publish(str(home / "published"), newer)
    until(lambda: store.snapshot("GOOG") == newer, "prices in spite of the registry", 5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["slow", "html", "truncated", "broken", "deaf", "down"])
def test_a_registry_that_misbehaves_is_survived(
    tmp_path, server, proxy, store, mode: Mode, monkeypatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    publish(str(tmp_path / "published"), make_snapshot())
    with syncing(tmp_path, proxy) as sync:
        until(lambda: current(store) == 1 and current(store, OTHER) == 1, "version 1", 60)
        proxy.mode = mode
        before = store.current(FORECASTER)
        server.set_alias(FORECASTER, PRODUCTION, 2)
        until(lambda: proxy.came(mode) >= 2, "requests that go wrong", 60)
        prices_still_come(tmp_path, store, 3)
        time.sleep(5)
        prices_still_come(tmp_path, store, 4)
        assert sync.popen.poll() is None, sync.log
        assert store.current(FORECASTER) == before
        assert store.refusals(FORECASTER) == {}
        assert check(store.version_folder(FORECASTER, 1), FORECASTER, 1)
        proxy.mode = "pass"
        until(lambda: current(store) == 2, "recovery by itself", 40)
        assert sync.log.count("the registry cannot be followed") <= 3, sync.log
        assert "Traceback" not in sync.log
        assert sync.stop() == 0


@pytest.mark.slow
def test_ten_seconds_an_answer_are_too_slow_to_follow_but_not_to_survive(
    tmp_path, server, proxy, store
):
    publish(str(tmp_path / "published"), make_snapshot())
    with syncing(tmp_path, proxy) as sync:
        until(lambda: current(store) == 1, "version 1", 60)
        proxy.delay, proxy.mode = 10.0, "slow"
        server.set_alias(FORECASTER, PRODUCTION, 2)
        prices_still_come(tmp_path, store, 3)
        time.sleep(15)
        prices_still_come(tmp_path, store, 4)
        proxy.mode = "pass"
        until(lambda: current(store) == 2, "recovery by itself", 60)
        assert sync.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["html", "truncated", "broken"])
def test_files_that_come_wrong_become_nothing(tmp_path, server, proxy, store, mode: Mode):
    """The registry itself answers well; what fails is the download."""
    with syncing(tmp_path, proxy) as sync:
        until(lambda: current(store) == 1 and current(store, OTHER) == 1, "version 1", 60)
        proxy.only, proxy.mode = "model.onnx", mode
        server.set_alias(FORECASTER, PRODUCTION, 3)
        until(lambda: proxy.came(mode), "a download that goes wrong", 60)
        time.sleep(2)
        assert current(store) == 1
        assert not store.version_folder(FORECASTER, 3).exists()
        proxy.mode = "pass"
        server.set_alias(OTHER, PRODUCTION, 2)
        until(lambda: current(store, OTHER) == 2, "another forecaster", 20)
        until(lambda: current(store) == 3, "recovery by itself", 100)
        assert store.refusals(FORECASTER) == {}
        assert not list((store.root / "incoming").iterdir())
        assert sync.stop() == 0


# a full disk --------------------------------------------------------------------------------------


def limit_files(process: Process, size: int) -> None:
    """No file of the process may grow beyond `size` bytes from now on, as on a full disk."""
    _, hard = resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (size, hard))


@pytest.mark.slow
def test_no_room_for_a_version_leaves_what_is_there_until_there_is_room(
    tmp_path, server, proxy, store
):
    publish(str(tmp_path / "published"), make_snapshot())
    with syncing(tmp_path, proxy) as sync:
        until(lambda: current(store) == 1 and store.price_files(), "version 1", 60)
        room = 2 * sync.log_path.stat().st_size + 2000
        assert room < (store.version_folder(FORECASTER, 1) / "golden.json").stat().st_size
        limit_files(sync, room)
        server.set_alias(FORECASTER, PRODUCTION, 2)
        server.set_alias(OTHER, CHALLENGER, 2)
        until(lambda: sync.logged(f"production of {FORECASTER} stays as it is"), "the complaint")
        time.sleep(3)
        assert (current(store), store.challenger(OTHER)) == (1, None)
        assert store.refusals(FORECASTER) == {}, "it is not the version's fault"
        incoming = store.root / "incoming"
        until(lambda: not list(incoming.iterdir()), "incoming to be empty")
        assert check(store.version_folder(FORECASTER, 1), FORECASTER, 1)
        assert sync.log.count(f"production of {FORECASTER} stays as it is") == 1, sync.log
        newer = make_snapshot("GOOG", date(2008, 1, 3))
        publish(str(tmp_path / "published"), newer)
        until(lambda: sync.logged("prices of GOOG stay as they are"), "the other complaint")
        assert store.snapshot("GOOG") == make_snapshot()
        limit_files(sync, resource.RLIM_INFINITY)
        until(lambda: current(store) == 2, "the version when there is room", 40)
        until(lambda: store.challenger(OTHER) == 2, "the other one", 40)
        until(lambda: store.snapshot("GOOG") == newer, "the prices")
        assert not [path for path in store.root.rglob("*") if path.name.endswith(".tmp")]
        assert "Traceback" not in sync.log
        assert sync.stop() == 0


# killed -------------------------------------------------------------------------------------------


def require_loadable(store: ModelStore, name: str) -> int | None:
    """`current.json`, if there is one, names a complete version; so does `challenger.json`."""
    challenger = store.challenger(name)
    if challenger is not None:
        check(store.version_folder(name, challenger), name, challenger)
    found = store.current(name)
    if found is None:
        return None
    check(store.version_folder(name, found.version), name, found.version)
    return found.version


@pytest.mark.slow
def test_killed_at_any_moment_the_store_is_always_loadable(tmp_path, server, proxy, store):
    chance = random.Random(7)
    seen, kills = set(), 0
    with syncing(tmp_path, proxy) as sync:
        until(lambda: current(store) and current(store, OTHER), "version 1", 60)
    deadline = time.monotonic() + 150
    while kills < 12 and time.monotonic() < deadline:
        with syncing(tmp_path, proxy) as sync:
            until(lambda sync=sync: sync.logged("following"), "the start", 60)
            end = time.monotonic() + chance.uniform(0.2, 3.0)
            while time.monotonic() < end:
                name, alias = chance.choice((FORECASTER, OTHER)), chance.choice((0, 0, 1))
                server.set_alias(name, (PRODUCTION, CHALLENGER)[alias], chance.randint(1, 4))
                time.sleep(chance.uniform(0, 0.1))
            sync.kill()
        kills += 1
        seen |= {(name, require_loadable(store, name)) for name in (FORECASTER, OTHER)}
    assert kills >= 6
    assert len(seen) >= 4, f"versions moved meanwhile: {seen}"
    with syncing(tmp_path, proxy) as sync:
        until(lambda: sync.logged("following"), "the start", 60)
        wanted = server.aliases(FORECASTER)[PRODUCTION]
        until(lambda: current(store) == wanted, "what the registry wants", 30)
        assert sync.stop() == 0
    assert not list((store.root / "incoming").glob("*/*"))


LAYS = """
import itertools, shutil, sys
from pathlib import Path
from serving.model_store import CHALLENGER, ModelStore

store, versions = ModelStore(Path(sys.argv[1])), Path(sys.argv[2])
store.clean_incoming()
print("ready", flush=True)
for number in itertools.cycle((1, 2, 3, 2, 4)):
    folder = store.incoming()
    shutil.copytree(versions / str(number), folder, dirs_exist_ok=True)
    store.install("perennial-goog", number, folder)
    store.make_challenger("perennial-goog", number)
    store.drop_challenger("perennial-goog")
"""


@pytest.mark.slow
def test_killed_while_it_lays_versions_the_store_names_complete_ones(tmp_path, store):
    """Without a registry, so that nearly every kill comes in the middle of an installation."""
    chance, seen = random.Random(11), set()
    for number in range(1, 5):
        write_model_folder(tmp_path / "versions" / str(number), scale=float(number))
    for number in range(1, 5):
        shutil.copytree(
            tmp_path / "versions" / str(number), folder := store.incoming(), dirs_exist_ok=True
        )
        store.install(FORECASTER, number, folder)
    for _ in range(25):
        command = [sys.executable, "-c", LAYS, str(store.root), str(tmp_path / "versions")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0, 0.15))
            process.kill()
        seen.add(require_loadable(store, FORECASTER))
    assert len(seen) > 2


# many ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_thousands_of_symbols_and_forecasters_leave_the_processor_alone(tmp_path, server, proxy):
    root = tmp_path / "published"
    for number in range(3000):
        folder = root / f"S{number}"
        folder.mkdir(parents=True)
        (folder / "latest.json").write_text("{}")  # refused, and known from then on
    for number in range(3000):
        home = tmp_path / "store/models" / f"f{number}"
        home.mkdir(parents=True)
        (home / "current.json").write_text(json.dumps({"version": 1}))
    with syncing(tmp_path, proxy) as sync:
        until(lambda: sync.logged("S2999 stay as they are"), "the first look", 60)
        time.sleep(3)
        process = psutil.Process(sync.popen.pid)
        before, start = process.cpu_times(), time.monotonic()
        time.sleep(15)
        after = process.cpu_times()
        used = after.user + after.system - before.user - before.system
        assert used / (time.monotonic() - start) < 0.25, "two followers, a tenth of a core each"
        assert sync.stop() == 0
