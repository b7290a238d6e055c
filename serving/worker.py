"""What one web worker holds: its service, spool, keys and figures, and the task that keeps them."""

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from forecasting import signing
from forecasting.errors import ServiceError
from forecasting.predictions import Refused, Spool
from forecasting.settings import Settings
from serving.hooks import Deliveries
from serving.keys import Key, Keys, require_keys
from serving.limits import RateLimiter, rate_limited
from serving.model_store import ModelStore
from serving.predictor import Predictor
from serving.schemas import Refusal
from serving.service import Service
from serving.telemetry import Telemetry
from serving.traffic import TrafficSwitch

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.05
"""How often a worker looks whether its files changed: a `stat` each."""
SPOOL_SECONDS = 0.6
"""How often counts are written: what a killed worker loses of them is younger than a second."""
START_SECONDS = 20.0
"""How long a worker takes up what the store holds before it answers with what it has."""
BUSY_SHARE = 8
"""Above this part of `max_concurrency` a worker has no time for the challenger's shadow."""
_GC_THRESHOLD = 10_000
"""Young objects that are looked through at a time: rare enough to be seen in no percentile, often
enough that what refers to itself never takes more than two or three megabytes."""


class Worker:
    """Parts of one worker process, and their life.

    Attributes:
        busy: requests being answered.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = ModelStore(settings.model_store)
        self.keys = Keys(settings.keys_file)
        require_keys(settings, self.keys)
        trusted = settings.trusted_key_path
        if trusted is not None:
            signing.read_public(trusted)  # said now, and not for every version
        self.predictor = Predictor(self.store, settings.max_models, trusted)
        self.spool = Spool(
            settings.spool_dir, "web", most_bytes=int(settings.spool_max_mb * 1_000_000)
        )
        self.telemetry = Telemetry()
        self.traffic = TrafficSwitch(settings)
        self.service = Service(
            settings,
            self.predictor,
            self.spool,
            self.traffic,
            self.telemetry.computed,
            self.is_busy,
        )
        self.deliveries = Deliveries()
        self.busy = 0
        self._limiter = RateLimiter(settings.home / "limits")
        self._measured = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    def is_busy(self) -> bool:
        """Whether requests leave no time for work that nobody waits for."""
        return self.busy * BUSY_SHARE > self.settings.max_concurrency

    def is_following(self) -> bool:
        """Whether model store and prices are being followed."""
        return bool(self._tasks) and not any(task.done() for task in self._tasks)

    def report(self) -> None:
        """Bring the figures up to date."""
        self.telemetry.looked(
            self.spool, self.service.shadow, len(self.predictor.models), self.busy
        )

    def admit(self, name: str, key: Key | None) -> None:
        """Let a client ask once more, or not.

        Raises:
            ProblemError: 429, it asked more often than it may.
        """
        rate = self.settings.rate_limit if key is None else key.rate_per_second
        rate = rate or self.settings.rate_limit
        if not rate:
            return
        wait = self._limiter.take(name, rate, max(1.0, rate))
        if wait:
            raise rate_limited(name, rate, wait)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load what the store holds, follow it, and at the end put every forecast on disk."""
        patience = time.monotonic() + START_SECONDS
        while not await self._refresh() and time.monotonic() < patience:
            continue  # ready is who has all that the store holds
        gc.collect()
        gc.freeze()  # what is loaded by now stays: full collections skip it
        gc.set_threshold(_GC_THRESHOLD, *gc.get_threshold()[1:])
        self._tasks = [
            asyncio.create_task(self._follow(), name="follow-model-store"),
            asyncio.create_task(self.service.shadow.run(), name="shadow"),
        ]
        try:
            yield
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self.service.batcher.close()
            await asyncio.to_thread(self.spool.close)

    async def _follow(self) -> None:
        """Look whether anything changed; only what takes time is done in a thread."""
        done, said = True, ""
        while True:
            if done:
                await asyncio.sleep(LOOK_SECONDS)
            try:
                if not done or self.predictor.is_due():
                    done = await self._refresh()
                self._look()
                if time.monotonic() > self._measured + SPOOL_SECONDS:
                    self._measured = time.monotonic()
                    await self._keep_spool()
            except Exception as error:  # noqa: BLE001  (a worker must not stop following)
                done = True
                if repr(error) != said:
                    said = repr(error)
                    log.error("The worker's files cannot be looked at: %s; trying again.", said)

    async def _refresh(self) -> bool:
        """Take up what changed in the store; whether that is all."""
        try:
            before, after, done = await asyncio.to_thread(self.predictor.refresh)
        except Exception as error:  # noqa: BLE001  (whatever it is, what is served stays)
            log.error("The model store cannot be read: %r; what is served stays.", error)
            return True
        if after is not before:
            self.telemetry.swapped(before, after)
            self._tell(after.refused_since(before))
        return done

    def _tell(self, refusals: list[Refusal]) -> None:
        """Have it told that versions were refused here, though sync had let them in."""
        for refusal in refusals:
            if refusal.version is not None:
                event = Refused(
                    forecaster=refusal.name, version=refusal.version, reason=refusal.reason
                )
                with suppress(ServiceError):  # the log said so, and /v1/models still does
                    self.spool.append(event)

    def _look(self) -> None:
        """Read the small files that may change while the server runs, if they did."""
        self.traffic.refresh()
        complaint = self.keys.refresh()
        if complaint:
            log.error(complaint)

    async def _keep_spool(self) -> None:
        await asyncio.to_thread(self.spool.measure)
        await asyncio.to_thread(self.spool.flush)
        self.report()
