"""Work spread on a Ray of one's own: what comes back, what fails, what is lost."""

import os
import subprocess
import sys
import time

import psutil
import pytest
import ray
from ray._private.node import Node

from forecasting.errors import TrainingError
from forecasting.settings import load_settings
from tasks.cluster import RETRIES, running, short_lived, spread


def squared(number: int) -> int:
    """Slowest first, so that the order of the ends is not that of the items."""
    time.sleep(0.2 / (1 + number))
    if number == 3:
        raise ValueError("three")
    return number * number


def lost_once(path: str) -> str:
    if not os.path.exists(path):  # noqa: PTH110
        open(path, "w").close()  # noqa: PTH123
        os._exit(1)
    return "done again"


def lost_always(_: str) -> str:
    os._exit(1)


def pid_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def test_each_item_comes_back_with_what_came_of_it(tmp_path):
    settings = load_settings(home=tmp_path, concurrency=2)
    taken: list[int] = []

    def items():
        for number in range(8):
            taken.append(number)
            yield number

    found = {}
    for number, result in spread(settings, squared, items()):
        found[number] = result
        assert len(taken) <= len(found) + 4  # as there is room for them
    failed = found.pop(3)
    assert isinstance(failed, ValueError)
    assert "three" in str(failed)
    assert found == {n: n * n for n in range(8) if n != 3}


@pytest.mark.slow
def test_what_a_lost_worker_had_is_done_again_but_not_for_ever(tmp_path):
    settings = load_settings(home=tmp_path, concurrency=2)
    mark = str(tmp_path / "mark")
    assert list(spread(settings, lost_once, [mark])) == [(mark, "done again")]
    ((_, found),) = spread(settings, lost_always, ["x"])
    assert isinstance(found, TrainingError)
    assert f"lost {1 + RETRIES} times" in str(found)


def test_a_worker_that_waits_is_kept_and_nothing_runs_that_nobody_asks(tmp_path):
    settings = load_settings(home=tmp_path, concurrency=2)
    methods = dict(vars(Node))
    one, both = (ray.remote(num_cpus=cpus)(pid_after) for cpus in (1, 2))
    with short_lived() as folder, running(settings, folder):
        workers = set(ray.get([one.remote(1.0), one.remote(1.0)]))
        assert len(workers) == 2
        # with no CPU to spare, Ray ends after a second what has nothing to do, or imports
        ray.get(both.remote(2.5))
        assert set(ray.get([one.remote(1.0), one.remote(1.0)])) == workers
        running_now = " ".join(
            part for child in psutil.Process().children(recursive=True) for part in child.cmdline()
        )
    assert dict(vars(Node)) == methods
    assert "raylet" in running_now
    for script in ("dashboard.py", "monitor.py"):  # log_monitor.py as well
        assert script not in running_now


def test_a_warm_worker_has_what_it_needs_and_the_real_scipy():
    told = """
import gc, sys
import tasks.warm
assert gc.isenabled() and gc.get_freeze_count() > 100_000
assert {"torch", "lightning.pytorch", "torchmetrics", "tasks.trials"} <= set(sys.modules)
assert "scipy.signal" not in sys.modules
import scipy.signal
print(len(scipy.signal.butter(3, 0.1)[0]))
"""
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr
