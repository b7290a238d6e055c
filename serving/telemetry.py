"""What the server tells Prometheus."""

import logging
import os
import time
from typing import TYPE_CHECKING

from litestar.enums import ScopeType
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from forecasting.predictions import Spool
from serving.predictor import State

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

CONTENT_TYPE = CONTENT_TYPE_LATEST
MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Set by `python -m serving web` when there is more than one worker; figures are then summed."""

_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Telemetry:
    """Counters of one worker, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "perennial_requests",
            "Requests answered.",
            ["method", "route", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "perennial_request_seconds",
            "Time from a request's head to the end of its answer.",
            ["method", "route"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._swaps = Counter(
            "perennial_model_swaps",
            "Model versions taken up.",
            ["forecaster"],
            registry=registry,
        )
        self._version = Gauge(
            "perennial_model_version",
            "Version being served.",
            ["forecaster"],
            registry=registry,
            multiprocess_mode="livemin",
        )
        self._refusals = Counter(
            "perennial_refusals",
            "Model versions and prices not let in.",
            ["name"],
            registry=registry,
        )
        self._logged = Counter(
            "perennial_spool_writes", "Forecasts written to the spool.", registry=registry
        )
        self._failures = Counter(
            "perennial_spool_failures", "Spool writes that the disk refused.", registry=registry
        )
        self._pending = Gauge(
            "perennial_spool_pending",
            "Forecasts that wait for the disk.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._seen = (0, 0)

    def swapped(self, before: State, after: State) -> None:
        """Count and log what a refresh changed."""
        for name, loaded in after.models.items():
            if before.models.get(name) is loaded:
                continue
            version = loaded.forecaster.version
            self._swaps.labels(name).inc()
            self._version.labels(name).set(version)
            log.info("serving %s version %d", name, version)
        for key, refusal in after.refused.items():
            if before.refused.get(key) != refusal:
                self._refusals.labels(refusal.name).inc()
                log.warning(
                    "refused %s version %s: %s", refusal.name, refusal.version, refusal.reason
                )

    def spooled(self, spool: Spool) -> None:
        """Take the spool's own counters over."""
        written, failures = spool.written, spool.failures
        self._logged.inc(written - self._seen[0])
        self._failures.inc(failures - self._seen[1])
        self._pending.set(spool.pending)
        self._seen = (written, failures)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def render(self) -> bytes:
        """Everything in Prometheus text format, of all workers if there are several."""
        if MULTIPROCESS_VARIABLE not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def measured(app: "ASGIApp", telemetry: Telemetry) -> "ASGIApp":
    """`app`, with every HTTP answer counted, unmatched paths and errors included."""

    async def outer(scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != ScopeType.HTTP:
            await app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def watch(message: "Message") -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await app(scope, receive, watch)
        finally:
            route = scope.get("path_template") or "unmatched"
            telemetry.answered(scope["method"], route, status, time.perf_counter() - start)

    return outer
