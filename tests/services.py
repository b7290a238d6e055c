"""Real services for tests: an MLflow server, and a small HTTP server in the inference's place."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

WEBHOOKS = {
    "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "https,http",
    "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
    "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlYyE=",
}
"""Environment of an MLflow server that sends webhooks to this machine."""


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def mlflow_server(home: Path, extra: Mapping[str, str] | None = None) -> Iterator[str]:
    """An `mlflow server` (SQLite, artifacts through the server) with its own home; its address.

    `extra` goes into its environment, see `WEBHOOKS`.
    """
    home.mkdir(parents=True, exist_ok=True)
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", url.rpartition(":")[2], "--artifacts-destination", str(home / "files")]
    command += ["--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}"]
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **(extra or {}),
    }
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait(f"{url}/health", process, home / "log")
        yield url
    finally:
        _stop(process)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError(f"{url} did not answer:\n{log.read_text()[-2000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            break
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


class InferenceServer:
    """Answers GET /v1/models like the inference server; `models` and `refused` are set by tests.

    `on_ask` is called before each answer; `keys` holds the Authorization header of each request.
    """

    def __init__(self) -> None:
        self.models: dict[str, int] = {}
        self.refused: list[dict[str, Any]] = []
        self.on_ask: Callable[[], object] = lambda: None
        self.status = 200
        self.keys: list[str | None] = []
        self.asked = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                outer.keys.append(self.headers["Authorization"])
                outer.on_ask()
                body = json.dumps(outer.answer()).encode()
                self.send_response(outer.status if self.path == "/v1/models" else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def answer(self) -> dict[str, object]:
        """The body of GET /v1/models."""
        models = [{"forecaster": name, "version": n} for name, n in self.models.items()]
        return {"models": models, "refused": self.refused, "prices": []}

    def __enter__(self) -> "InferenceServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def answering(status: int, kind: str, body: bytes) -> Iterator[str]:
    """A server that gives every GET the same answer; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with _serving(Handler) as url:
        yield url


@dataclass(frozen=True)
class Delivery:
    """One POST that came, and when."""

    headers: dict[str, str]
    body: bytes
    at: float


class HookListener:
    """Takes every POST and keeps it; `url` is where."""

    def __init__(self) -> None:
        self._came: queue.Queue[Delivery] = queue.Queue()
        came = self._came

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                at = time.perf_counter()
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(204)
                self.end_headers()
                came.put(Delivery(dict(self.headers), body, at))

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._serving = _serving(Handler)
        self.url = ""

    def __enter__(self) -> "HookListener":
        self.url = f"{self._serving.__enter__()}/hooks/registry"
        return self

    def __exit__(self, *_: object) -> None:
        self._serving.__exit__(None, None, None)

    @property
    def waiting(self) -> int:
        """Deliveries that nobody took yet."""
        return self._came.qsize()

    def wait(self, seconds: float = 30) -> Delivery:
        """The next delivery."""
        return self._came.get(timeout=seconds)
