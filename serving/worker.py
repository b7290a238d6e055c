"""What one web worker holds: predictor, spool, telemetry, and the task that follows the store."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from forecasting.predictions import Spool
from forecasting.settings import Settings
from serving.model_store import ModelStore
from serving.predictor import Predictor
from serving.telemetry import Telemetry

log = logging.getLogger(__name__)


class Worker:
    """Parts of one worker process, and their life."""

    def __init__(self, settings: Settings) -> None:
        self.predictor = Predictor(ModelStore(settings.model_store))
        self.spool = Spool(settings.spool_dir, "web")
        self.telemetry = Telemetry()
        self._poll_seconds = settings.poll_seconds
        self._follower: asyncio.Task[None] | None = None

    def is_following(self) -> bool:
        """Whether model store and prices are being followed."""
        return self._follower is not None and not self._follower.done()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load what the store holds, follow it, and at the end put every forecast on disk."""
        await self._refresh()
        gc.collect()
        gc.freeze()  # what is loaded by now stays: full collections skip it
        self._follower = asyncio.create_task(self._follow(), name="follow-model-store")
        try:
            yield
        finally:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
            await asyncio.to_thread(self.spool.close)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            await self._refresh()
            if self.spool.pending:
                await asyncio.to_thread(self.spool.flush)

    async def _refresh(self) -> None:
        try:
            before, after = await asyncio.to_thread(self.predictor.refresh)
        except Exception as error:  # noqa: BLE001  (whatever it is, what is served stays)
            log.error("The model store cannot be read: %r; what is served stays.", error)
            return
        if after is not before:
            self.telemetry.swapped(before, after)
