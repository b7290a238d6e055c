"""A search on a Ray cluster: used and left running, and a node of it lost in mid-search."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from forecasting.hyperparameters import ModelConfig
from forecasting.settings import Settings, load_settings
from forecasting.study import open_study
from forecasting.windows import Splits, make_windows, split
from tasks.search import Progress, SearchResult, run_search
from tests.market import market
from tests.services import free_port
from tests.serving.running import until

pytestmark = pytest.mark.slow
RAY = str(Path(sys.executable).with_name("ray"))
TRIALS, EPOCHS = 4, 80


@contextmanager
def _node(
    folder: Path, short: str, name: str, options: list[str], where: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """`ray start` in a session of its own, perhaps in another network namespace."""
    own = {"HOME": str(folder), "RAY_TMPDIR": short, "RAY_USAGE_STATS_ENABLED": "0"}
    home = os.environ | own
    start = [*where, RAY, "start", "--block", "--num-cpus=1", "--object-store-memory=134217728"]
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        node = subprocess.Popen(
            [*start, *options], env=home, stdout=out, stderr=out, start_new_session=True
        )
    try:
        until(lambda: "Ray runtime started" in log.read_text(), f"{name} of the cluster", 60)
        yield node
    finally:
        _end(node)


def _end(node: subprocess.Popen[bytes]) -> None:
    """`ray start --block` ends what it started, one after the other; all at once they may hang."""
    node.terminate()
    try:
        node.wait(30)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait(30)


@contextmanager
def _another_machine() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Address of the head, of a second node, and the namespace that the second one runs in.

    Both are this host where network namespaces may not be made.
    """
    number = os.getpid() % 250
    space, here, there = f"perennial{number}", f"pera{number}", f"perb{number}"
    head, second = f"10.217.{number}.1", f"10.217.{number}.2"
    inside = ("ip", "netns", "exec", space)
    steps = [
        ("ip", "netns", "add", space),
        ("ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", space),
        ("ip", "addr", "add", f"{head}/24", "dev", here),
        ("ip", "link", "set", here, "up"),
        (*inside, "ip", "addr", "add", f"{second}/24", "dev", there),
        (*inside, "ip", "link", "set", there, "up"),
        (*inside, "ip", "link", "set", "lo", "up"),
    ]
    try:
        made = all(subprocess.run(step, capture_output=True).returncode == 0 for step in steps)
    except FileNotFoundError:
        made = False
    try:
        yield (head, second, inside) if made else ("127.0.0.1", "127.0.0.1", ())
    finally:
        with suppress(FileNotFoundError):
            subprocess.run(("ip", "link", "del", here), capture_output=True)
            subprocess.run(("ip", "netns", "del", space), capture_output=True)


def _in_a_process(call: Callable[..., Any], *arguments: object) -> Any:
    """In a process of its own, like every run of a flow: Ray reads its token once a process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result(240)


def _splits() -> Splits:
    return split(make_windows(market(900), 32, 5), 30, 30)


def _search(settings: Settings, lose: int = 0) -> tuple[SearchResult, list[int], bool]:
    """Result, trials told, and whether Ray was left; `lose` is a node to kill in mid-search."""
    told: list[int] = []
    lost: list[int] = []
    folder = settings.work_dir / "search" / "key"
    with open_study(folder, seed=settings.seed, grace=settings.grace_epochs) as study:
        study.suggest_first([asdict(ModelConfig())])

        def kill_once_both_are_under_way(_: Progress) -> None:
            flying = [each.number for each in study.trials if each.status == "RUNNING"]
            ready = len(flying) == 2 and all(study.checkpoint(each) for each in flying)
            if lose and not lost and ready:
                lost.extend(flying)
                for process in psutil.Process(lose).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()

        result = run_search(
            _splits(),
            settings,
            study,
            on_trial=lambda number, *_: told.append(number),
            on_progress=kill_once_both_are_under_way,
        )
    assert bool(lost) == bool(lose)
    return result, told, not ray.is_initialized()


def _settings(home: Path, **changes: object) -> Settings:
    # nothing stops early and all are drawn at random, so that order decides nothing
    fixed = {"trials": TRIALS, "epochs": EPOCHS, "grace_epochs": EPOCHS, "folds": 1}
    return load_settings(home=home, checkpoint_seconds=0.0, **fixed | changes)


def test_a_node_lost_in_mid_search_loses_no_trial(tmp_path):
    with ExitStack() as stack:
        head_ip, second_ip, inside = stack.enter_context(_another_machine())
        # names of sockets are short, and Ray's default is where another cluster is looked for
        short = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray"))
        port = free_port()
        address = f"{head_ip}:{port}"
        start = ["--head", f"--port={port}", "--include-dashboard=false"]
        head = stack.enter_context(
            _node(tmp_path, short, "head", [*start, f"--node-ip-address={head_ip}"])
        )
        join = [f"--address={address}", f"--node-ip-address={second_ip}"]
        second = stack.enter_context(_node(tmp_path, short, "second", join, inside))
        settings = _settings(tmp_path / "cluster", ray_address=address, concurrency=2)
        result, told, is_left = _in_a_process(_search, settings, second.pid)
        assert is_left
        assert head.poll() is None
    assert sorted(told) == list(range(TRIALS))

    alone, _, _ = _in_a_process(_search, _settings(tmp_path / "alone", concurrency=1))
    assert result.leaderboard == alone.leaderboard
    assert {row["status"] for row in result.leaderboard} == {"FINISHED"}
