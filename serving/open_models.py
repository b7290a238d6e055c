"""Models that a worker keeps open: bounded, the least recently used is closed first."""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from forecasting.contract import Contract
from forecasting.inference import Forecaster
from serving.model_store import check

Key = tuple[str, int]


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """A version that was verified and taken up; whether it is open is another matter.

    Attributes:
        folder: its files in the model store.
        loaded_at: when it was taken up.
    """

    contract: Contract
    version: int
    folder: Path
    loaded_at: datetime

    @property
    def key(self) -> Key:
        """Forecaster and version."""
        return self.contract.forecaster, self.version


class OpenModels:
    """At most `most` open models. Thread-safe.

    Args:
        most: models that stay open.
        trusted_key: see `model_store.check`, by which a model is opened again.
    """

    def __init__(self, most: int, trusted_key: Path | None = None) -> None:
        self.most = most
        self._trusted_key = trusted_key
        self._open: OrderedDict[Key, Forecaster] = OrderedDict()
        self._opening: dict[Key, asyncio.Task[Forecaster]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, served: Served) -> Forecaster | None:
        """The model if it is open, counted as used."""
        with self._lock:
            found = self._open.get(served.key)
            if found is not None:
                self._open.move_to_end(served.key)
            return found

    def put(self, served: Served, forecaster: Forecaster) -> None:
        """Keep an open model, closing another if need be."""
        with self._lock:
            self._open[served.key] = forecaster
            self._open.move_to_end(served.key)
            while len(self._open) > self.most:
                self._open.popitem(last=False)

    def retain(self, wanted: Collection[Key]) -> None:
        """Close what is not served any more."""
        with self._lock:
            for key in [key for key in self._open if key not in wanted]:
                del self._open[key]

    def open(self, served: Served) -> Forecaster:
        """The model, verified and opened again from the store if it was closed.

        Raises:
            ContractError: it was damaged or removed since it was taken up.
        """
        found = self.get(served)
        if found is None:
            found = check(
                served.folder, served.contract.forecaster, served.version, self._trusted_key
            )
            self.put(served, found)
        return found

    async def opened(self, served: Served) -> Forecaster:
        """`open` off the event loop; callers that ask for one model at a time share the work."""
        found = self.get(served)
        if found is not None:
            return found
        task = self._opening.get(served.key)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self.open, served))
            self._opening[served.key] = task
            task.add_done_callback(lambda _: self._opening.pop(served.key, None))
        return await asyncio.shield(task)
