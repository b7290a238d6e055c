"""The fit as the flow runs it: the same bytes in any home, after a kill, and with several workers.

Each fit runs in a process of its own, from an empty home: nothing comes from a cache.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from forecasting.model import CHECKPOINT
from tests.candidates import KEY


def _start(home: Path, **settings: object) -> subprocess.Popen[str]:
    environment = {f"PERENNIAL_{name.upper()}": str(value) for name, value in settings.items()}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.candidates", str(home)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _end(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    """What it printed, and its log."""
    out, log = process.communicate(timeout=200)
    assert process.returncode == 0, log
    return json.loads(out.splitlines()[-1]), log


def _wait(path: Path, process: subprocess.Popen[str]) -> None:
    """Until there is such a file; a look every few milliseconds, since a fit takes a second."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.003)


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same training in two empty homes."""
    homes = [tmp_path_factory.mktemp("home") for _ in range(2)]
    found = [_end(each)[0] for each in [_start(home) for home in homes]]
    assert not any((home / "work" / "fit" / KEY).exists() for home in homes)
    # with the LSTM off, the graph would hold nothing of what was learned
    assert {each["kind"] for each in found} == {"lstm"}
    return found


def test_the_same_data_parameters_and_seed_give_the_same_bytes_in_two_empty_homes(candidates):
    first, second = candidates
    assert first == second
    assert len(first["history"]) == 2 * first["epochs"] > 2


@pytest.mark.slow
def test_a_fit_that_was_killed_goes_on_to_the_same_bytes(candidates, tmp_path):
    checkpoint = tmp_path / "work" / "fit" / KEY / CHECKPOINT
    killed = _start(tmp_path)
    _wait(checkpoint, killed)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    done = len(torch.load(checkpoint, weights_only=True)["state_dict"]["_extra_state"]["history"])
    assert 0 < done < candidates[0]["epochs"]
    again, log = _end(_start(tmp_path))
    assert f"Going on after epoch {done}" in log
    assert again == candidates[0]
    assert not checkpoint.parent.exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_a_fit_that_is_stopped(number, tmp_path):
    fit = _start(tmp_path, fit_workers=2)
    _wait(tmp_path / "work" / "fit" / KEY / CHECKPOINT, fit)
    family = psutil.Process(fit.pid).children(recursive=True)
    assert len(family) >= 2
    fit.send_signal(number)
    fit.communicate(timeout=30)
    assert fit.returncode != 0
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
