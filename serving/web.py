"""`python -m serving web`: binds the port and keeps the web workers running.

The workers import the application; this process only starts them, starts them again when they die,
and replaces them one after the other on SIGHUP.
"""

import logging
import os
import shutil
import socket

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from forecasting.errors import ConfigError
from forecasting.settings import Settings
from serving.keys import Keys, require_keys
from serving.protocol import protocol_class

log = logging.getLogger(__name__)

GRACE_SECONDS = 10
BACKLOG = 2048
HEALTH_SECONDS = 30
"""How long a worker may be silent, or take to be ready when it replaces another."""
METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


class Supervisor(Multiprocess):
    """One that hears of a worker's death at once, also while it waits for its answer.

    uvicorn keeps an end of the pipe that the worker answers on. Then no death closes it, and one
    that comes after the question is waited for as long as a silent worker.
    """

    def keep_subprocess_alive(self) -> None:
        """Called twice a second; a worker has its own end since it was started."""
        for process in self.processes:
            process.child_conn.close()
        super().keep_subprocess_alive()


class Port(socket.socket):
    """A bound address that each worker listens on with a socket of its own.

    Handed to another process, it binds the address again there (SO_REUSEPORT), so that the kernel
    spreads connections over the workers. With one shared socket whoever wakes first accepts all.
    """

    def __init__(self, host: str, port: int) -> None:
        super().__init__(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._address = host, port
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.bind(self._address)

    def __reduce__(self) -> tuple[type["Port"], tuple[str, int]]:
        """Pickled as its address."""
        return Port, self._address


def claim(host: str, port: int) -> Port:
    """The server's address, kept for its workers; clients are refused until one is ready.

    Raises:
        ConfigError: the port is in use, or the address is not one of this machine.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind((host, port))  # refused also where others share it
        return Port(host, port)
    except OSError as error:
        raise ConfigError(
            f"A free port was expected at {host}:{port}; it cannot be bound: {error.strerror}. "
            "Stop what uses it, or choose others with PERENNIAL_HOST and PERENNIAL_PORT."
        ) from error


def main(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT.

    Returns:
        Exit status: 0, or 1 if a worker cannot start.

    Raises:
        ConfigError: the port is in use, keys are needed and there are none, or a file of keys
            cannot be used.
    """
    require_keys(settings, Keys(settings.keys_file))
    port = claim(settings.host, settings.port)
    _share_metrics(settings)
    config = uvicorn.Config(
        "serving.app:app_from_environment",
        factory=True,
        http=protocol_class(settings),
        ws="none",
        host=settings.host,
        port=settings.port,
        workers=settings.web_workers,
        access_log=False,
        log_level="warning",
        log_config=None,
        lifespan="on",
        server_header=False,
        backlog=BACKLOG,
        timeout_worker_healthcheck=HEALTH_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    log.info("inference server on http://%s:%d", settings.host, settings.port)
    supervisor = Supervisor(config, sockets=[port])
    supervisor.run()
    failed = any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes)
    return 1 if failed else 0


def _share_metrics(settings: Settings) -> None:
    """Let the workers sum their figures in files; read when a worker imports its client."""
    folder = settings.home / "metrics" / str(settings.port)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ[METRICS_VARIABLE] = str(folder)
