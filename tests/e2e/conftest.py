"""One real stack for the story of the loop, started and stopped as `make up` and Ctrl-C do."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from deployments.prefect_api import PrefectApi
from deployments.stack import Ports, Stack
from forecasting.settings import Settings, load_settings
from tests.serving.running import until

QUICK = {
    "PERENNIAL_TRIALS": "2",
    "PERENNIAL_EPOCHS": "4",
    "PERENNIAL_FIT_EPOCHS": "10",
    "PERENNIAL_POLL_SECONDS": "0.2",
    "PERENNIAL_CLOCK": "market",
    "PERENNIAL_PROBATION_DAYS": "0",  # the weak version of the story is to drift, not to give way
}
"""A small search, and days of history; the gate's settings are the usual ones."""


@dataclass(frozen=True)
class Up:
    """What `make up` runs: its process, and what it printed."""

    process: psutil.Process
    log: Path

    def family(self) -> list[psutil.Process]:
        """The process and everything below it."""
        return [self.process, *self.process.children(recursive=True)]

    def part(self, *words: str) -> psutil.Process:
        """The one process of the stack whose command ends like that."""
        found = [
            each
            for each in self.process.children()
            if any(each.cmdline()[i:][: len(words)] == list(words) for i in range(8))
        ]
        assert len(found) == 1, (words, found)
        return found[0]


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """Where everything is; who needs it running uses `up`."""
    return Stack(tmp_path_factory.mktemp("stack"), Ports.free(), extra=QUICK)


@pytest.fixture(scope="package")
def up(stack: Stack) -> Iterator[Up]:
    log = stack.home / "up.log"
    ports = {
        "PERENNIAL_PREFECT_PORT": str(stack.ports.prefect),
        "PERENNIAL_MLFLOW_PORT": str(stack.ports.mlflow),
        "PERENNIAL_PORT": str(stack.ports.server),
        "PERENNIAL_HOME": str(stack.home),
    }
    with log.open("wb") as output:
        started = subprocess.Popen(
            [sys.executable, "-m", "deployments.stack"],
            env=os.environ | ports | QUICK | {"PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    running = Up(psutil.Process(started.pid), log)
    try:
        until(
            lambda: "Ctrl-C stops everything" in log.read_text() or started.poll() is not None,
            "the stack to be up",
            240,
        )
        assert started.poll() is None, log.read_text()
        yield running
        family = running.family()
        started.send_signal(signal.SIGINT)
        assert started.wait(60) == 0, log.read_text()
        gone, left = psutil.wait_procs(family, timeout=5)
        assert left == [], gone
    finally:
        if started.poll() is None:
            started.send_signal(signal.SIGTERM)
            started.wait(60)


@pytest.fixture(scope="package")
def settings(stack: Stack) -> Settings:
    """What the stack's own processes are told."""
    return load_settings(
        home=stack.home, tracking_uri=stack.mlflow_url, server_url=stack.server_url
    )


@pytest.fixture(scope="package")
def api(stack: Stack) -> Iterator[PrefectApi]:
    with PrefectApi(stack.prefect_url) as client:
        yield client
