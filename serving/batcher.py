"""Batching: what arrived while the last batch was computed is the next one.

Requests that the event loop reads in one turn are computed together in the next, on the event loop
itself: handing a tenth of a millisecond of work to a thread would cost more than the work. While it
computes, the operating system collects the next requests. Only large batches go to a thread.
How many are worth computing is for `pace` to say.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from forecasting.errors import ModelError
from forecasting.predictions import Spool, Window, computed_line
from serving.answers import Numbers, numbers
from serving.pace import Pace
from serving.problems import ProblemError
from serving.queries import Query, joined, prepare
from serving.windows import Tensors

INLINE_WINDOWS = 64
"""Largest batch that is computed on the event loop: a few milliseconds at most."""

Observe = Callable[[int, int], None]


class Computed(NamedTuple):
    """What came of one query: its windows as they were computed, and their numbers.

    Attributes:
        batch: tensors of the whole batch, of which `place` is this query's part.
    """

    batch: Tensors
    place: slice
    windows: list[Window]
    numbers: list[Numbers]

    @property
    def tensors(self) -> Tensors:
        """Of this query alone."""
        ohlcv, dates, symbol = self.batch
        return Tensors(ohlcv[self.place], dates[self.place], symbol[self.place])


class _Waiting(NamedTuple):
    query: Query
    answer: "asyncio.Future[Computed]"


class Batcher:
    """Computes and logs queries, those of one version together.

    Args:
        spool: where what was computed is written before it is answered.
        observe: called with the number of windows and rows of each batch.
        pace: says when a batch is worth computing.
    """

    def __init__(self, spool: Spool, observe: Observe, pace: Pace | None = None) -> None:
        self._spool = spool
        self._observe = observe
        self._waiting: list[_Waiting] = []
        self._pace = pace or Pace()
        self._is_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._pool = ThreadPoolExecutor(1, "batch")

    def submit(self, query: Query) -> "asyncio.Future[Computed]":
        """Take a query into the next batch; what comes of it.

        The future raises ProblemError if a window is not usable, ModelError if the model does not
        answer with numbers, ServiceError if the forecasts can no longer be logged.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(query, loop.create_future())
        self._waiting.append(waiting)
        if not self._is_due:
            self._schedule(loop)
        return waiting.answer

    async def close(self) -> None:
        """Wait for what is being computed in the thread."""
        await asyncio.to_thread(self._pool.shutdown)

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._pace.is_enough(len(self._waiting), loop.time()):
            self._is_due = True
            if self._timer is not None:
                self._timer.cancel()
            loop.call_soon(self._run)
        elif self._timer is None:
            self._timer = loop.call_later(self._pace.hold_seconds, self._run)

    def _run(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._is_due, self._timer = False, None
        for batch in _batches(waiting):
            count = sum(each.query.size for each in batch)
            self._observe(count, count * batch[0].query.served.contract.context)
            if count <= INLINE_WINDOWS:
                _answer(batch, self._outcomes(batch))
            else:
                self._start_thread(batch)
        self._pace.computed(len(waiting), asyncio.get_running_loop().time())

    def _start_thread(self, group: list[_Waiting]) -> None:
        loop = asyncio.get_running_loop()

        def work() -> None:
            outcomes = self._outcomes(group)
            loop.call_soon_threadsafe(_answer, group, outcomes)

        self._pool.submit(work)

    def _outcomes(self, group: list[_Waiting]) -> list[Computed | Exception]:
        """Numbers or an error for each query; one that cannot be computed harms no other."""
        queries = [each.query for each in group]
        try:
            return list(compute(queries, self._spool))
        except (ModelError, ProblemError) as error:
            if len(group) == 1:
                return [error]
        except Exception as error:  # noqa: BLE001  (raised where the answer is awaited)
            return [error] * len(group)
        return [self._outcomes([each])[0] for each in group]


def _batches(waiting: list[_Waiting]) -> list[list[_Waiting]]:
    """Queries of one version together, as long as they fit into one batch on the event loop."""
    batches: list[list[_Waiting]] = []
    filling: dict[int, tuple[list[_Waiting], int]] = {}
    for each in waiting:
        version, count = id(each.query.forecaster), each.query.size
        batch, filled = filling.get(version, ([], INLINE_WINDOWS))
        if filled + count > INLINE_WINDOWS:
            batch, filled = [], 0
            batches.append(batch)
        batch.append(each)
        filling[version] = batch, filled + count
    return batches


def compute(queries: Sequence[Query], spool: Spool) -> list[Computed]:
    """Compute queries of one version in one run of its graph, and log them in one line.

    Raises:
        ProblemError: a window is not usable.
        ModelError: the graph does not answer with finite numbers.
        ServiceError: the log does not take them.
    """
    first = queries[0]
    tensors, windows = joined(prepare(queries))
    quantiles = first.forecaster.predict(*tensors)
    contract = first.served.contract
    whole, parts = numbers(quantiles, contract.quantile_levels)
    spool.write(computed_line(contract, first.served.version, windows, whole), len(windows))
    found, start = [], 0
    for query in queries:
        own = slice(start, start + query.size)
        found.append(Computed(tensors, own, windows[own], parts[own]))
        start = own.stop
    return found


def _answer(group: list[_Waiting], outcomes: list[Computed | Exception]) -> None:
    for waiting, outcome in zip(group, outcomes, strict=True):
        if waiting.answer.done():  # its client went away
            continue
        if isinstance(outcome, Exception):
            waiting.answer.set_exception(outcome)
        else:
            waiting.answer.set_result(outcome)
