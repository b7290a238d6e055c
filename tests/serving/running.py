"""The inference server's processes, really started, each with its own home and port."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import psutil

from serving.model_store import ModelStore
from tests.models import make_snapshot, price_rows, write_model_folder
from tests.services import free_port

FORECASTER = "perennial-goog"


def until(condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    """Wait for a condition to be true; its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds} s in vain for: {what}")


@dataclass
class Process:
    """A started `python -m serving <command>`."""

    popen: subprocess.Popen[bytes]
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def log_lines(self) -> list[str]:
        """Whole lines: while one is written a reader may see its beginning."""
        text = self.log
        return text[: text.rfind("\n") + 1].splitlines()

    def logged(self, text: str) -> bool:
        return text in self.log

    def stop(self, seconds: float = 20) -> int:
        """SIGTERM, and the exit status."""
        self.popen.terminate()
        return self.popen.wait(seconds)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(10)


@contextmanager
def started(command: str, home: Path, **settings: object) -> Iterator[Process]:
    """`python -m serving <command>` with settings; its whole group is gone at the end."""
    environment = os.environ | {"PERENNIAL_HOME": str(home)}
    environment |= {f"PERENNIAL_{name.upper()}": str(value) for name, value in settings.items()}
    home.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{command}-", suffix=".log", dir=home)
    with os.fdopen(handle, "wb") as log:
        popen = subprocess.Popen(
            [sys.executable, "-m", "serving", command],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield Process(popen, Path(name))
    finally:
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(popen.pid, kind)
                popen.wait(15)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        popen.wait()


@dataclass
class Server(Process):
    """A web server that answers, and its home."""

    home: Path = field(default_factory=Path)
    client: httpx.Client = field(default_factory=httpx.Client)

    @property
    def store(self) -> ModelStore:
        return ModelStore(self.home / "store")

    @property
    def url(self) -> str:
        return str(self.client.base_url)

    def get(self, path: str) -> httpx.Response:
        return self.client.get(path)

    def versions(self) -> dict[str, int]:
        return {m["forecaster"]: m["version"] for m in self.get("/v1/models").json()["models"]}

    def wait_version(self, version: int) -> None:
        until(lambda: self.versions().get(FORECASTER) == version, f"version {version} being served")


@contextmanager
def web(home: Path, *, ready: bool = True, **settings: object) -> Iterator[Server]:
    """A web server on a free port, once it answers (and, unless told otherwise, is ready)."""
    port = free_port()
    settings = {"port": port, "poll_seconds": 0.05, **settings}
    with (
        started("web", home, **settings) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client,
    ):
        server = Server(process.popen, process.log_path, home, client)

        def answers() -> bool:
            assert process.popen.poll() is None, server.log
            try:
                return client.get("/health/ready").status_code == 200 or not ready
            except httpx.TransportError:
                return False

        until(answers, "the server to answer")
        yield server


def workers(server: Server) -> set[int]:
    """Web workers that really serve (multiprocessing's resource tracker is a child too)."""
    found = set()
    for child in psutil.Process(server.popen.pid).children():
        with suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
            if any("spawn_main" in part for part in child.cmdline()):
                found.add(child.pid)
    return found


def install(home: Path, version: int, **model: Any) -> None:
    """A tiny model in the server's store, as sync would lay it there."""
    store = ModelStore(home / "store")
    folder = store.incoming()
    contract = write_model_folder(folder, run_id=f"{version:032d}", **model)
    store.install(contract.forecaster, version, folder)


def put_prices(home: Path, symbol: str = "GOOG", close: float = 100.0, **snapshot: Any) -> None:
    """Latest prices in the server's store, as sync would lay them there."""
    ModelStore(home / "store").put_snapshot(make_snapshot(symbol, close=close, **snapshot))


def request_body(
    count: int = 64, symbol: str = "GOOG", last: date = date(2008, 1, 2), close: float = 100.0
) -> dict[str, Any]:
    """A good POST body."""
    days, rows = price_rows(count, last, close)
    names = ("open", "high", "low", "close", "volume")
    return {
        "symbol": symbol,
        "rows": [
            {"date": day.isoformat(), **dict(zip(names, row, strict=True))}
            for day, row in zip(days, rows, strict=True)
        ],
    }
