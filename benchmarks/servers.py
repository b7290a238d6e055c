"""The servers that are compared: how each is started, asked and stopped.

Each runs in a process group of its own with a folder of its own, logs into it, and is gone with all
that it started when its block ends. What runs inside the peers is in `benchmarks/peers`, a folder
of scripts, not a package, since most of them run in other environments.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks import windows
from benchmarks.environments import PEERS, PeerError, python_of
from benchmarks.windows import FORECASTER, SYMBOL, Case, Window
from deployments.stack import FOREIGN
from serving.model_store import ModelStore

CPUS = len(os.sched_getaffinity(0))
HOST = "127.0.0.1"
TOLERANCE = 1e-4
"""Largest relative difference of a peer's answer to the expected one."""
READY_SECONDS, STOP_SECONDS = 120, 20
QUIET = {
    "BENTOML_DO_NOT_TRACK": "True",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "ORT_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class Endpoint:
    """One way to ask: where, with what body, and where the quantiles are in the answer."""

    path: str
    body: Callable[[Sequence[Window]], bytes] | None = None
    answer: Callable[[Any], Any] = windows.rows_answer

    @property
    def method(self) -> str:
        """POST with a body, else GET."""
        return "POST" if self.body else "GET"


@dataclass
class Place:
    """Where one server is started: the model, a scratch folder, a port.

    Attributes:
        options: what only one server understands (ours: `log`, whether predictions are logged).
    """

    model: Path
    scratch: Path
    port: int
    options: Mapping[str, bool] = field(default_factory=dict)


@dataclass
class Launch:
    """A command with its environment, and headers that its clients send."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """One server: preparation gives the command; endpoints by the kind of request."""

    name: str
    prepare: Callable[[Place], Launch]
    ready: str
    endpoints: Mapping[str, Endpoint]


@dataclass
class Server:
    """A running server."""

    recipe: Recipe
    popen: subprocess.Popen[bytes]
    url: str
    headers: dict[str, str]
    log: Path
    ready_s: float = 0.0

    def processes(self) -> list[psutil.Process]:
        """The server's process and all below it, those that are left."""
        return _tree(self.popen)

    def memory_mb(self) -> tuple[float, float]:
        """Resident memory of the whole tree, and of its largest process that answers requests."""
        sizes = [_rss(each) for each in self.processes()]
        return sum(sizes), max(sizes[1:] or sizes, default=0.0)

    def check(self, kind: str, case: Case) -> None:
        """Ask once and compare.

        Raises:
            PeerError: no answer, or another one than expected.
        """
        endpoint = self.recipe.endpoints[kind]
        assert endpoint.body is not None
        where = f"{self.recipe.name}: {endpoint.method} {endpoint.path}"
        try:
            answer = httpx.post(
                self.url + endpoint.path,
                content=endpoint.body(case.windows),
                headers=self.headers | {"Content-Type": "application/json"},
                timeout=30,
            )
        except httpx.HTTPError as error:
            raise PeerError(f"{where}: {error!r}\n{self.tail()}") from error
        if answer.status_code != 200:
            raise PeerError(f"{where}: {answer.status_code} {answer.text[:300]}")
        got = np.array(endpoint.answer(answer.json()), dtype=np.float64)
        if got.shape != case.expected.shape:
            raise PeerError(f"{where}: shape {case.expected.shape} expected, got {got.shape}")
        off = float(np.max(np.abs(got / case.expected - 1)))
        if not off <= TOLERANCE:
            raise PeerError(f"{where}: {off:.1e} off the expected quantiles; {TOLERANCE} allowed")

    def tail(self) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-1500:].strip()


@contextmanager
def running(recipe: Recipe, model: Path, scratch: Path, **options: bool) -> Iterator[Server]:
    """Start a server, wait until it is ready, and stop it with everything that it started.

    Raises:
        PeerError: it cannot be started.
    """
    scratch.mkdir(parents=True)
    place = Place(model, scratch, free_port(), options)
    launch = recipe.prepare(place)
    log = scratch / "log"
    began = time.perf_counter()
    with log.open("wb") as sink:
        popen = subprocess.Popen(
            launch.command,
            env=clean_environment(scratch) | launch.environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    server = Server(recipe, popen, f"http://{HOST}:{place.port}", launch.headers, log)
    try:
        _wait_ready(server)
        server.ready_s = time.perf_counter() - began
        yield server
    finally:
        end(popen)


def end(popen: subprocess.Popen[Any]) -> None:
    """SIGTERM to a process, and SIGKILL to what is left of all that it started."""
    tree = _tree(popen)
    popen.terminate()
    try:
        popen.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        tree += _tree(popen)
    _, alive = psutil.wait_procs(tree, timeout=3)
    for process in alive:
        try:
            process.kill()  # psutil compares the start time: never another process's id
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=5)
    popen.wait(STOP_SECONDS)


def clean_environment(scratch: Path) -> dict[str, str]:
    """Nobody's settings, no reports to makers, and a home in the scratch folder."""
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith((*FOREIGN, "BENTOML_"))}
    homes = {
        "HOME": str(scratch / "home"),
        "BENTOML_HOME": str(scratch / "bentoml"),
        "MPLCONFIGDIR": str(scratch / "matplotlib"),
        "TMPDIR": str(scratch),
    }
    (scratch / "home").mkdir(parents=True, exist_ok=True)
    return kept | QUIET | homes


def run(command: list[str], environment: Mapping[str, str]) -> str:
    """Run a command to its end; what it printed.

    Raises:
        PeerError: it failed; with the end of what it said.
    """
    popen = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, said = popen.communicate()
    finally:
        if popen.returncode is None:  # interrupted
            end(popen)
    if popen.returncode:
        shown = " ".join(command)
        raise PeerError(f"`{shown}` failed ({popen.returncode}): {said.strip()[-800:]}")
    return printed.strip()


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _wait_ready(server: Server) -> None:
    deadline = time.monotonic() + READY_SECONDS
    url = server.url + server.recipe.ready
    with httpx.Client(timeout=5, headers=server.headers) as client:
        while time.monotonic() < deadline:
            if server.popen.poll() is not None:
                raise PeerError(f"{server.recipe.name} ended at once:\n{server.tail()}")
            try:
                if client.get(url).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # it does not listen yet
            time.sleep(0.02)
    raise PeerError(f"{server.recipe.name} not ready in {READY_SECONDS} s:\n{server.tail()}")


def _tree(popen: subprocess.Popen[Any]) -> list[psutil.Process]:
    try:
        top = psutil.Process(popen.pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _rss(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss) / 1e6
    except psutil.NoSuchProcess:
        return 0.0


# ours -------------------------------------------------------------------------------------------
def _prepare_ours(place: Place) -> Launch:
    home = place.scratch / "perennial"
    store = ModelStore(home / "store")
    folder = store.incoming()
    shutil.copytree(place.model, folder, dirs_exist_ok=True)
    store.install(FORECASTER, 1, folder)
    store.put_snapshot(windows.snapshot())
    environment = {
        "PERENNIAL_HOME": str(home),
        "PERENNIAL_PORT": str(place.port),
        "PERENNIAL_WEB_WORKERS": str(CPUS),
        "PERENNIAL_SPOOL_MAX_MB": "16000",  # nothing drains it meanwhile
    }
    headers = {"Authorization": f"Bearer {_make_key(place, environment)}"}
    without = ["benchmarks.peers.without_log"] if not place.options.get("log", True) else []
    return Launch([sys.executable, "-m", *(without or ["serving", "web"])], environment, headers)


def _make_key(place: Place, environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", "serving", "key", "--name", "bench"]
    return run(command, clean_environment(place.scratch) | environment).splitlines()[-1]


# peers ------------------------------------------------------------------------------------------
def _prepare_mlflow(place: Place) -> Launch:
    """The version out of a registry; see `peers/mlflow_model.py`."""
    made = [sys.executable, "-m", "benchmarks.peers.mlflow_model"]
    run([*made, str(place.model), str(place.scratch)], clean_environment(place.scratch))
    folder = place.scratch / "model"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", str(folder)]
    command += ["--host", HOST, "--port", str(place.port), "--workers", str(CPUS)]
    command += ["--env-manager", "local"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return Launch(command, {"OMP_NUM_THREADS": "1", "PATH": path})


def _prepare_ray_serve(place: Place) -> Launch:
    return Launch(
        [str(python_of("ray-serve")), str(PEERS / "ray_serve_app.py")],
        {
            "PEER_MODEL": str(place.model),
            "PEER_PORT": str(place.port),
            "PEER_SCRATCH": str(place.scratch / "ray"),
        },
    )


def _prepare_bentoml(place: Place) -> Launch:
    command = [str(python_of("bentoml")), "-m", "bentoml", "serve", "bentoml_service:Forecast"]
    command += ["--host", HOST, "--port", str(place.port), "--working-dir", str(PEERS)]
    return Launch(command, {"PEER_MODEL": str(place.model), "PYTHONDONTWRITEBYTECODE": "1"})


def _prepare_mlserver(place: Place) -> Launch:
    """No inference processes: with a model this small, handing tensors over costs more."""
    settings = {
        "debug": False,
        "host": HOST,
        "http_port": place.port,
        "grpc_port": free_port(),
        "metrics_port": free_port(),
        "metrics_dir": str(place.scratch),
        "environments_dir": str(place.scratch / "environments"),
        "parallel_workers": 0,
    }
    model = {
        "name": FORECASTER,
        "implementation": "mlserver_runtime.OnnxForecaster",
        "parameters": {"uri": str(place.model), "version": "1"},
    }
    folder = place.scratch / "mlserver"
    folder.mkdir()
    for name, value in (("settings", settings), ("model-settings", model)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    command = [str(python_of("mlserver").with_name("mlserver")), "start", str(folder)]
    environment = {"PYTHONPATH": str(PEERS), "PYTHONDONTWRITEBYTECODE": "1"}
    return Launch(command, environment)


_OIP = Endpoint(f"/v2/models/{FORECASTER}/infer", windows.oip_body, windows.oip_answer)
OURS = Recipe(
    "ours",
    _prepare_ours,
    "/health/ready",
    {
        "one": Endpoint("/v1/forecast", windows.rows_body, windows.rows_answer),
        "many": _OIP,
        "get": Endpoint(f"/v1/forecast/{SYMBOL}"),
    },
)
MLFLOW = Recipe(
    "mlflow",
    _prepare_mlflow,
    "/ping",
    {"one": Endpoint("/invocations", windows.mlflow_body, windows.mlflow_answer)},
)
BENTOML = Recipe(
    "bentoml",
    _prepare_bentoml,
    "/readyz",
    {"one": Endpoint("/predict", windows.listed_body, windows.listed_answer)},
)
RAY_SERVE = Recipe(
    "ray-serve",
    _prepare_ray_serve,
    "/",
    {"one": Endpoint("/", windows.bare_body, windows.bare_answer)},
)
MLSERVER = Recipe(
    "mlserver",
    _prepare_mlserver,
    f"/v2/models/{FORECASTER}/ready",
    {"one": _OIP, "many": _OIP},
)
RECIPES = {each.name: each for each in (OURS, MLFLOW, BENTOML, RAY_SERVE, MLSERVER)}
