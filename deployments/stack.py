"""The local stack: Prefect server, MLflow, inference server (web, sync, drain) and a worker.

`python -m deployments.stack` (`make up`) runs it on fixed ports until Ctrl-C; the demo and the
end-to-end tests run the same class on free ports with a home of their own. Every process is the
product's or the package's own command, started in its own process group, logged to its own file,
and waited for by asking it, never by sleeping.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from uuid import uuid4

import httpx
import psutil

from deployments import orphans
from forecasting.errors import ConfigError, ServiceError
from forecasting.settings import PREFIX, load_settings

POOL = "perennial"
PREFECT_FILE = Path(__file__).resolve().parent.parent / "prefect.yaml"
HOST = "127.0.0.1"
# Set before Python starts: the allocator keeps its pages, which makes a small LSTM 1.3-1.8x faster.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
WRITERS = ("worker", "sync", "web")
"""Stopped first, while those that they write to still take it."""
ORPHAN_SECONDS = 3.0
"""How long children may outlive their parent before they are ended."""
LEASES = "prefect.server.concurrency.lease_storage.filesystem"
FOREIGN = ("PREFECT_", "MLFLOW_", "RAY_", "DVC_", PREFIX)


@dataclass(frozen=True)
class Ports:
    """TCP ports of the stack's three HTTP servers."""

    prefect: int
    mlflow: int
    server: int

    @staticmethod
    def free() -> "Ports":
        """Three ports that nobody listens on now."""
        sockets = [socket.socket() for _ in range(3)]
        try:
            for each in sockets:
                each.bind((HOST, 0))
            return Ports(*(each.getsockname()[1] for each in sockets))
        finally:
            for each in sockets:
                each.close()


@dataclass(frozen=True)
class Service:
    """One process of the stack and how to know that it is ready."""

    name: str
    command: list[str]
    ready: Callable[[], bool]
    needs: tuple[str, ...] = ()
    seconds: float = 120.0


@dataclass
class Stack:
    """Starts, watches and stops the local stack; as a context manager, it stops at the end.

    Args:
        home: folder of all state, logs included (`home/logs/<name>.log`).
        ports: where the servers listen.
        extra: further environment for every process, such as other settings.
        inherit: keep the caller's `PREFECT_*`, `MLFLOW_*`, `PERENNIAL_*` variables (`make up`), or
            drop them so that nobody else's servers are ever reached (demo, tests).
    """

    home: Path
    ports: Ports = field(default_factory=Ports.free)
    extra: Mapping[str, str] = field(default_factory=dict)
    inherit: bool = False
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, init=False)
    mark: str = field(default_factory=lambda: uuid4().hex, init=False)

    def __enter__(self) -> "Stack":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def prefect_url(self) -> str:
        """Address of the Prefect UI; the API is below `/api`."""
        return f"http://{HOST}:{self.ports.prefect}"

    @property
    def mlflow_url(self) -> str:
        """Address of the MLflow UI and tracking server."""
        return f"http://{HOST}:{self.ports.mlflow}"

    @property
    def server_url(self) -> str:
        """Address of the inference server."""
        return f"http://{HOST}:{self.ports.server}"

    def environment(self) -> dict[str, str]:
        """Environment of every process, and of anybody who wants to talk to this stack."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if self.inherit or not key.upper().startswith(FOREIGN)
        }
        own = {
            "PERENNIAL_HOME": str(self.home),
            "PERENNIAL_PORT": str(self.ports.server),
            "PERENNIAL_SERVER_URL": self.server_url,
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PREFECT_API_URL": f"{self.prefect_url}/api",
            "PREFECT_HOME": str(self.home / "prefect"),
            "PREFECT_LOCAL_STORAGE_PATH": str(self.home / "prefect" / "storage"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            # every flow waits for its event to be readable; as patient as the default, 5 x 5 s
            "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "0.5",
            "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_MAX_FLUSH_RETRIES": "50",
            # who runs one at a time (`daily`) holds a lease, which a server that is killed forgets
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES,
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_WORKER_PREFETCH_SECONDS": "5",
            "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
            "PREFECT_CLI_PROMPT": "false",
            "DVC_NO_ANALYTICS": "true",
            "ORT_DISABLE_TELEMETRY": "1",
            "MPLCONFIGDIR": str(self.home / "matplotlib"),
            "DO_NOT_TRACK": "1",
            "PYTHONUNBUFFERED": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }
        return kept | own | ALLOCATOR | dict(self.extra)

    def services(self) -> list[Service]:
        """Everything that runs, in starting order."""
        python = sys.executable
        prefect = [python, "-m", "prefect"]
        return [
            Service(
                "prefect",
                [*prefect, "server", "start", "--host", HOST, "--port", str(self.ports.prefect)],
                lambda: _answers(f"{self.prefect_url}/api/ready"),
            ),
            Service(
                "mlflow", self._mlflow_command(), lambda: _answers(f"{self.mlflow_url}/health")
            ),
            Service(
                "web",
                [python, "-m", "serving", "web"],
                lambda: _answers(f"{self.server_url}/health/live"),
            ),
            Service("sync", [python, "-m", "serving", "sync"], lambda: True, needs=("mlflow",)),
            Service("drain", [python, "-m", "serving", "drain"], lambda: True),
            Service(
                "worker",
                [*prefect, "worker", "start", "--pool", POOL, "--type", "process"],
                self._worker_online,
                needs=("prefect",),
            ),
        ]

    def start(self, progress: Callable[[str], None] = lambda _: None) -> None:
        """Start everything and return when all of it answers.

        What an earlier stack of this home left running, for it was killed, is ended first.

        Raises:
            ConfigError: a port is in use, or a stack of this home runs.
            ServiceError: a process ended or did not get ready; names its log file.
        """
        if ended := orphans.end(self.home):
            progress(f"ended {ended} processes that a killed stack had left")
        self._require_free_ports()
        for folder in ("logs", "mlflow", "prefect"):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        waiting = self.services()
        pending: dict[str, Service] = {}
        began = time.monotonic()
        try:
            while waiting or pending:
                busy = {*pending, *(service.name for service in waiting)}
                for service in [s for s in waiting if not busy.intersection(s.needs)]:
                    waiting.remove(service)
                    self._spawn(service)
                    pending[service.name] = service
                for name, service in list(pending.items()):
                    self._require_alive(name)
                    if service.ready():
                        del pending[name]
                        progress(f"{name} is ready ({time.monotonic() - began:.0f} s)")
                    elif time.monotonic() - began > service.seconds:
                        raise ServiceError(
                            f"{name} was not ready after {service.seconds:.0f} s. "
                            f"Its log: {self.log(name)}{self._tail(name)}"
                        )
                time.sleep(0.1)
        except BaseException:
            self.stop()
            raise

    def deploy(self) -> None:
        """`prefect deploy --all` and the automations; safe to repeat.

        Raises:
            ServiceError: Prefect refused; the message holds its output.
        """
        self.run("prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(PREFECT_FILE))
        self.run("deployments.automations")

    def watch(self) -> None:
        """Block until Ctrl-C; restart whatever dies (the servers keep their state on disk)."""
        by_name = {service.name: service for service in self.services()}
        while True:
            for name, process in list(self.processes.items()):
                if process.poll() is not None:
                    _kill_group(process)
                    print(f"{name} ended with code {process.returncode}; starting it again")
                    self._spawn(by_name[name])
            time.sleep(1.0)

    def stop(self) -> None:
        """Stop every process of the stack and all their children; the server drains first."""
        if not self.processes:  # refused, maybe for a stack of this home that runs
            return
        writers = [self.processes.pop(name) for name in WRITERS if name in self.processes]
        self._end(writers)
        self._end(list(self.processes.values()))
        self.processes.clear()
        orphans.forget(self.home)

    def log(self, name: str) -> Path:
        """Log file of one process."""
        return self.home / "logs" / f"{name}.log"

    def run(self, *command: str, timeout: float = 120) -> str:
        """Run a Python module command (`prefect`, ...) against this stack; its output.

        Raises:
            ServiceError: it failed; the message holds its output.
        """
        done = subprocess.run(
            [sys.executable, "-m", *command],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=PREFECT_FILE.parent,
            timeout=timeout,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ServiceError(
                f"`{' '.join(command)}` ended with {done.returncode}:\n{done.stdout}"
            )
        return done.stdout

    def _mlflow_command(self) -> list[str]:
        folder = self.home / "mlflow"
        return [
            *(sys.executable, "-m", "mlflow", "server", "--host", HOST),
            *("--port", str(self.ports.mlflow), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
            *("--artifacts-destination", str(folder / "artifacts")),
        ]

    def _require_free_ports(self) -> None:
        for name, port, key in (
            ("Prefect", self.ports.prefect, "PREFECT_PORT"),
            ("MLflow", self.ports.mlflow, "MLFLOW_PORT"),
            ("the inference server", self.ports.server, "PORT"),
        ):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((HOST, port))
                except OSError as error:
                    raise ConfigError(
                        f"Port {port} for {name} is in use on {HOST}. Stop what listens there "
                        f"(`ss -ltnp 'sport = :{port}'` names it) or choose another "
                        f"port with {PREFIX}{key}."
                    ) from error

    def _spawn(self, service: Service) -> None:
        orphans.record(self.home, self.mark)
        with self.log(service.name).open("ab") as log:
            self.processes[service.name] = subprocess.Popen(
                service.command,
                env=self.environment() | {orphans.MARK: self.mark},
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _require_alive(self, name: str) -> None:
        code = self.processes[name].poll()
        if code is not None:
            raise ServiceError(
                f"{name} ended with code {code} while starting. "
                f"Its log: {self.log(name)}{self._tail(name)}"
            )

    def _tail(self, name: str, lines: int = 15) -> str:
        text = self.log(name).read_text(errors="replace").splitlines()[-lines:]
        return "\n  " + "\n  ".join(text)

    def _worker_online(self) -> bool:
        try:
            answer = _http().post(
                f"{self.prefect_url}/api/work_pools/{POOL}/workers/filter", json={}, timeout=5
            )
        except httpx.HTTPError:
            return False
        return answer.is_success and any(w.get("status") == "ONLINE" for w in answer.json())

    @staticmethod
    def _end(processes: list[subprocess.Popen[bytes]], seconds: float = 15.0) -> None:
        """Ask each to end; then end whatever of its family is still there."""
        family = _family(processes)
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        with suppress(KeyboardInterrupt):  # a second Ctrl-C waits no longer
            parents = [member for member in family if member.pid in {p.pid for p in processes}]
            psutil.wait_procs(parents, timeout=seconds)
            psutil.wait_procs(family, timeout=ORPHAN_SECONDS)
        for member in {*family, *_family(processes)}:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        for process in processes:
            _kill_group(process)
            process.wait(timeout=5)
        psutil.wait_procs(family, timeout=5)


def _family(processes: list[subprocess.Popen[bytes]]) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            found += [parent, *parent.children(recursive=True)]
    return found


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """What a dead process left behind in its group, which `start_new_session` named after it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@cache
def _http() -> httpx.Client:
    """One for all that is asked while services start: to make one takes 0.1 s of CPU."""
    return httpx.Client()


def _answers(url: str) -> bool:
    try:
        return _http().get(url, timeout=2).is_success
    except httpx.HTTPError:
        return False


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the stack until Ctrl-C; exit code 2 on a problem that the user can mend."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # also where a shell ignores it
        signal.signal(number, _interrupt)
    up = False
    try:
        settings = load_settings()
        ports = Ports(settings.prefect_port, settings.mlflow_port, settings.port)
        with Stack(settings.home, ports, inherit=True) as stack:
            stack.start(lambda line: print(f"  {line}", flush=True))
            stack.deploy()
            up = True
            print(_welcome(stack, settings.home), flush=True)
            with suppress(KeyboardInterrupt):
                stack.watch()
            print("\nstopping ...", flush=True)
    except (ConfigError, ServiceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0 if up else 130
    return 0


def _welcome(stack: Stack, home: Path) -> str:
    lines = [
        "",
        f"  Prefect   {stack.prefect_url}",
        f"  MLflow    {stack.mlflow_url}",
        f"  server    {stack.server_url}/v1/models",
        f"  home      {home}",
        "",
    ]
    if not any((home / "store" / "models").glob("*/current.json")):
        lines += [
            "No model yet. Train one: press Quick run on the deployment `train` in the Prefect UI,",
            "or in another terminal:",
            f"  PREFECT_API_URL={stack.prefect_url}/api .venv/bin/prefect deployment run \\",
            "    train/train --param symbol=GOOG --param as_of=2013-03-01 --watch",
            "",
        ]
    return "\n".join([*lines, "Ctrl-C stops everything."])


if __name__ == "__main__":
    sys.exit(main())
