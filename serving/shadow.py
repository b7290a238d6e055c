"""The challenger computes some requests too, off the request path, and only for the log."""

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from uuid import uuid4

import msgspec
import numpy as np

from forecasting.errors import ServiceError
from forecasting.predictions import Spool
from serving.batcher import Computed, compute
from serving.open_models import OpenModels, Served
from serving.predictor import Latest
from serving.queries import Prepared, Query

log = logging.getLogger(__name__)

MOST_WAITING = 64
"""Queries that wait for the challenger; more are shed."""


class Shadow:
    """Scores queries with the challenger, one at a time, in a thread.

    Args:
        spool: where its forecasts are logged, with source `shadow` and the challenger's version.
        models: to open the challenger.
        is_busy: whether the worker has better things to do; what waits is shed then.

    Attributes:
        scored: windows computed.
        shed: windows that were not.
    """

    def __init__(self, spool: Spool, models: OpenModels, is_busy: Callable[[], bool]) -> None:
        self.scored = 0
        self.shed = 0
        self._spool = spool
        self._models = models
        self._is_busy = is_busy
        self._waiting: asyncio.Queue[tuple[Computed, Served]] = asyncio.Queue(MOST_WAITING)
        self._random = random.Random()

    def offer_latest(self, latest: Latest, share: float) -> None:
        """Log the challenger's forecast from the latest prices, once, beside this share of GETs."""
        if latest.problem or self._random.random() >= share:
            return
        with suppress(ServiceError):  # the answer's own record says that the log is full
            latest.write(self._spool, "shadow")
            self.scored += 1

    def offer(self, champion: Served, computed: Computed, challenger: Served, share: float) -> None:
        """Take this share of what was computed, while there is room."""
        if self._random.random() >= share:
            return
        ours, theirs = champion.contract, challenger.contract
        fits = (ours.context, ours.horizon) == (theirs.context, theirs.horizon)
        if not fits or self._is_busy() or self._waiting.full():
            self.shed += len(computed.windows)
            return
        self._waiting.put_nowait((computed, challenger))

    async def run(self) -> None:
        """Score until cancelled."""
        while True:
            computed, challenger = await self._waiting.get()
            if self._is_busy():
                self.shed += len(computed.windows)
                continue
            try:
                await asyncio.to_thread(self._score, computed, challenger)
            except Exception as error:  # noqa: BLE001  (the shadow must not end)
                self.shed += len(computed.windows)
                log.warning("the challenger could not compute a request: %s", error)

    def _score(self, computed: Computed, challenger: Served) -> None:
        windows = [
            msgspec.structs.replace(window, id=str(uuid4()), source="shadow")
            for window in computed.windows
        ]
        symbols = [challenger.contract.symbol_input(window.symbol) for window in windows]
        tensors = computed.tensors._replace(symbol=np.array(symbols, dtype=np.int64))
        load = Prepared(tensors, windows)
        compute([Query(challenger, self._models.open(challenger), load)], self._spool)
        self.scored += len(windows)
