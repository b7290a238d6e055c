"""The application of one web worker: `create_app(settings)`.

Imports neither Prefect, Ray, torch, Lightning, Evidently, MLflow, pandas nor SQLAlchemy.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from litestar import Litestar
from litestar.datastructures import State

from forecasting.settings import Settings, load_settings
from serving import oip_routes, openapi, routes, scoring_routes
from serving.edge import Edge
from serving.logs import log_as_json
from serving.problems import handlers
from serving.tracing import tracing
from serving.worker import Worker

if TYPE_CHECKING:
    from litestar.types import ASGIApp

HANDLERS = (*routes.HANDLERS, *oip_routes.HANDLERS, *scoring_routes.HANDLERS)


def create_app(settings: Settings) -> "ASGIApp":
    """The ASGI application of one worker; it starts and stops its parts with its lifespan."""
    worker, traces = Worker(settings), tracing()

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        async with worker.running():
            yield
        if traces is not None:
            traces.close()

    app = Litestar(
        HANDLERS,
        lifespan=[lifespan],
        state=State({"worker": worker}),
        exception_handlers=handlers(settings.max_body_mb),
        request_max_body_size=int(settings.max_body_mb * 1_000_000),
        logging_config=None,
        openapi_config=openapi.config(settings, worker.keys) if settings.docs else None,
    )
    edge = Edge(app, worker, traces.note if traces else None)
    return traces.around(edge) if traces else edge


def app_from_environment() -> "ASGIApp":
    """What uvicorn calls in each worker process."""
    log_as_json("web")
    return create_app(load_settings())
