"""What the server tells Prometheus."""

import logging
import os
import time
from collections import defaultdict
from pathlib import Path

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from forecasting.predictions import Spool
from serving.predictor import State
from serving.shadow import Shadow

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
            ["method", "route", "version"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._in_progress = Gauge(
            "perennial_requests_in_progress",
            "Requests that are being answered.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._batches = Counter(
            "perennial_batches",
            "Batches computed, by how many windows they held: up to 1, 2, 4, ...",
            ["up_to"],
            registry=registry,
        )
        self._rows = Counter(
            "perennial_rows", "Rows of prices that forecasts were computed from.", registry=registry
        )
        self._shadow = Counter(
            "perennial_shadow_windows",
            "Windows for the challenger's shadow, computed or shed.",
            ["outcome"],
            registry=registry,
        )
        self._open = Gauge(
            "perennial_models_open",
            "Models in memory.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._swaps = Counter(
            "perennial_model_swaps",
            "Model versions taken up.",
            ["forecaster", "role"],
            registry=registry,
        )
        self._version = Gauge(
            "perennial_model_version",
            "Version being served.",
            ["forecaster", "role"],
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
        self._spool_bytes = Gauge(
            "perennial_spool_bytes",
            "Prediction log on disk that is not in SQL yet: by how much the drainer lags.",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._lag = Gauge(
            "perennial_spool_lag_seconds",
            "Age of the oldest forecast that is not in SQL yet.",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._children: dict[tuple[str, str, str, int], tuple[Counter, Histogram]] = {}
        self._sizes: defaultdict[int, int] = defaultdict(int)
        self._computed_rows = 0
        self._seen = {"rows": 0, "written": 0, "failures": 0, "scored": 0, "shed": 0}

    def swapped(self, before: State, after: State) -> None:
        """Count and log what a refresh changed."""
        for role in ("champions", "challengers"):
            for name, served in getattr(after, role).items():
                if getattr(before, role).get(name) is served:
                    continue
                self._swaps.labels(name, role[:-1]).inc()
                self._version.labels(name, role[:-1]).set(served.version)
                log.info("serving %s version %d as %s", name, served.version, role[:-1])
        for key, refusal in after.refused.items():
            if before.refused.get(key) != refusal:
                self._refusals.labels(refusal.name).inc()
                log.warning(
                    "refused %s version %s: %s", refusal.name, refusal.version, refusal.reason
                )

    def computed(self, windows: int, rows: int) -> None:
        """Count one batch; `looked` tells Prometheus."""
        self._sizes[1 << (windows - 1).bit_length()] += 1
        self._computed_rows += rows

    def looked(self, spool: Spool, shadow: Shadow, models_open: int, in_progress: int) -> None:
        """Take over what was counted elsewhere, or too often to tell each time."""
        sizes, self._sizes = self._sizes, defaultdict(int)
        for up_to, count in sizes.items():
            self._batches.labels(str(up_to)).inc(count)
        self._rows.inc(self._since("rows", self._computed_rows))
        self._logged.inc(self._since("written", spool.written))
        self._failures.inc(self._since("failures", spool.failures))
        self._shadow.labels("computed").inc(self._since("scored", shadow.scored))
        self._shadow.labels("shed").inc(self._since("shed", shadow.shed))
        self._pending.set(spool.pending)
        self._spool_bytes.set(spool.bytes)
        self._lag.set(time.time() - spool.oldest if spool.oldest else 0.0)
        self._open.set(models_open)
        self._in_progress.set(in_progress)

    def answered(self, method: str, route: str, version: str, status: int, seconds: float) -> None:
        """Count one request; `version` of the model that answered it, if one did."""
        key = method, route, version, status
        children = self._children.get(key)
        if children is None:
            children = self._children[key] = (
                self._requests.labels(method, route, str(status)),
                self._seconds.labels(method, route, version),
            )
        children[0].inc()
        children[1].observe(seconds)

    def _since(self, name: str, total: int) -> int:
        grown, self._seen[name] = total - self._seen[name], total
        return grown

    def render(self) -> bytes:
        """Everything in Prometheus text format, of all workers if there are several."""
        folder = os.environ.get(MULTIPROCESS_VARIABLE)
        if folder is None:
            return generate_latest(self._registry)
        forget_dead_workers(Path(folder))
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def forget_dead_workers(folder: Path) -> None:
    """Drop the gauges of workers that are gone; their counts stay."""
    for path in folder.glob("gauge_live*_*.db"):
        number = int(path.stem.rpartition("_")[2])
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            mark_process_dead(number, str(folder))  # type: ignore[no-untyped-call]
