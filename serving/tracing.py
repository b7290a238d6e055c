"""OpenTelemetry traces of requests, where an OTLP endpoint is set in the standard variables."""

import importlib
import os
from typing import TYPE_CHECKING, Any

from serving.exchange import Exchange

if TYPE_CHECKING:
    from litestar.types import ASGIApp

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
SERVICE = "perennial"


class Tracing:
    """One span a request, exported in the background over OTLP/HTTP.

    The packages are loaded here, since a server without an endpoint does not need them.
    """

    def __init__(self) -> None:
        sdk = importlib.import_module("opentelemetry.sdk.trace")
        export = importlib.import_module("opentelemetry.sdk.trace.export")
        otlp = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        resources = importlib.import_module("opentelemetry.sdk.resources")
        name = os.environ.get("OTEL_SERVICE_NAME", SERVICE)
        self._trace = importlib.import_module("opentelemetry.trace")
        self._provider: Any = sdk.TracerProvider(
            resource=resources.Resource.create({"service.name": name})
        )
        self._provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter()))

    def around(self, app: "ASGIApp") -> "ASGIApp":
        """`app` with a span for every request, child of the one that the client names."""
        asgi = importlib.import_module("opentelemetry.instrumentation.asgi")
        wrapped: ASGIApp = asgi.OpenTelemetryMiddleware(
            app, tracer_provider=self._provider, exclude_spans=["receive", "send"]
        )
        return wrapped

    def note(self, exchange: Exchange, route: str) -> None:
        """Name the span of a request by its route, and say who asked and which version answered."""
        span = self._trace.get_current_span()
        span.update_name(f"{exchange.scope['method']} {route}")
        span.set_attribute("http.route", route)
        span.set_attribute("perennial.request_id", exchange.identity.decode())
        if exchange.version:
            span.set_attribute("perennial.model_version", exchange.version)

    def close(self) -> None:
        """Send what was not sent yet."""
        self._provider.shutdown()


def tracing() -> Tracing | None:
    """Tracing, if the environment names where traces go."""
    return Tracing() if any(os.environ.get(name) for name in ENDPOINTS) else None
