"""The inference server: `create_app(settings)`, and `python -m serving web`.

Imports neither Prefect, Ray, torch, Lightning, Evidently, MLflow, pandas nor SQLAlchemy.
"""

import logging
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

import uvicorn
from litestar import Litestar
from litestar.datastructures import State
from litestar.openapi import OpenAPIConfig
from uvicorn.supervisors import Multiprocess

from forecasting.errors import ConfigError
from forecasting.settings import Settings, load_settings
from serving.problems import handlers
from serving.routes import HANDLERS
from serving.telemetry import MULTIPROCESS_VARIABLE, measured
from serving.worker import Worker

log = logging.getLogger(__name__)

GRACE_SECONDS = 10
BACKLOG = 2048
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def create_app(settings: Settings) -> Litestar:
    """The ASGI application of one worker; it starts and stops its parts with its lifespan."""
    worker = Worker(settings)

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        async with worker.running():
            yield

    app = Litestar(
        HANDLERS,
        lifespan=[lifespan],
        state=State({"worker": worker}),
        exception_handlers=handlers(settings.max_body_mb),
        request_max_body_size=int(settings.max_body_mb * 1_000_000),
        logging_config=None,
        openapi_config=OpenAPIConfig(
            title="perennial",
            version=version("perennial"),
            description="Price quantiles for the next sessions, from a model that renews itself.",
            path="/schema",
        ),
    )
    app.asgi_handler = measured(app.asgi_handler, worker.telemetry)
    return app


def app_from_environment() -> Litestar:
    """What uvicorn calls in each worker process."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    return create_app(load_settings())


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the server's address.

    Raises:
        ConfigError: the port is in use, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(BACKLOG)  # claims the port now; clients wait until the workers are ready
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"A free port was expected at {host}:{port}; it cannot be bound: {error.strerror}. "
            "Stop what uses it, or choose others with PERENNIAL_HOST and PERENNIAL_PORT."
        ) from error
    return sock


def main(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: the port is in use.
    """
    sock = bind(settings.host, settings.port)
    several = settings.web_workers > 1
    if several:
        _share_metrics(settings)
    config = uvicorn.Config(
        "serving.app:app_from_environment",
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.web_workers,
        access_log=False,
        log_level="warning",
        log_config=None,
        lifespan="on",
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    log.info("inference server on http://%s:%d", settings.host, settings.port)
    if several:
        Multiprocess(config, sockets=[sock]).run()
        return 0
    server = uvicorn.Server(config)

    def stop(*_: object) -> None:
        if not server.should_exit:  # uvicorn does not listen to signals yet; later it has obeyed
            raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server.run(sockets=[sock])
    return 0 if server.started else 1


def _share_metrics(settings: Settings) -> None:
    """Let several workers sum their figures in files; read when a worker imports its client."""
    folder = settings.home / "metrics" / str(settings.port)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ[MULTIPROCESS_VARIABLE] = str(folder)
