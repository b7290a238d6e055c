"""The gradient of a batch, whose shards are worked on by threads at the same time.

At a few dozen windows no operation of a batch is large enough for torch to spread it over cores,
but half a batch is as much as a core likes. So the LSTM, which is most of a step, is shared: each
thread has a twin of the network with the same weights, but gradients of its own, so that nothing is
written by two. The gradients are added in the order of the shards: the same numbers, however the
threads run. All else is many small operations, for which threads would queue: they are done here,
for the whole batch.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from forecasting.loss import Answer
from forecasting.network import Network

T = TypeVar("T")
_LEAD = 1.2
"""What is done here, as a multiple of what a thread does: those begin once they have been woken,
and one that is done before it is asked need not wake us."""


class Shards:
    """A network, and a twin of it for each thread beside this one.

    Attributes:
        gradient: all gradients of the network, one piece of memory, so that zeroing, clipping and
            adding them are one operation each.
    """

    def __init__(self, network: Network, threads: int, pool: ThreadPoolExecutor | None) -> None:
        """A network alone if there is no pool."""
        twins = [_twin(network) for _ in range(threads - 1 if pool else 0)]
        self._pool = pool
        self._networks = [network, *twins]
        self.gradient, *self._others = (_flat(each) for each in self._networks)
        self._answer = Answer(network)
        self._states: list[Tensor] = []

    def corrections(self, inputs: Tensor) -> Tensor:
        """What the network says of a batch; see `Network.corrections`."""
        parts = [
            part for part in torch.tensor_split(inputs, self._bounds(len(inputs))) if len(part)
        ]
        pairs = zip(self._networks, parts, strict=False)  # a small batch leaves some idle
        self._states = self._together([partial(each.state, part) for each, part in pairs])
        return self._answer.forward(torch.cat([each.detach() for each in self._states]))

    def backward(self, slope: Tensor) -> None:
        """Set `gradient` from the loss's slope along what `corrections` gave last."""
        used = self._others[: len(self._states) - 1]
        for gradient in (self.gradient, *used):
            gradient.zero_()
        along = torch.split(self._answer.backward(slope), [len(each) for each in self._states])
        pairs = zip(self._states, along, strict=True)
        self._together([partial(each.backward, part) for each, part in pairs])
        for gradient in used:
            self.gradient.add_(gradient)

    def _bounds(self, rows: int) -> list[int]:
        """Where in a batch the second shard starts, and those after it."""
        twins = len(self._networks) - 1
        return [round(rows * (_LEAD + number) / (_LEAD + twins)) for number in range(twins)]

    def _together(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Do the first here, the others in threads."""
        begun = []
        for job in jobs[1:]:
            assert self._pool is not None
            begun.append(self._pool.submit(job))
        return [jobs[0](), *(each.result() for each in begun)]


def thread_pool(threads: int) -> ThreadPoolExecutor:
    """Threads for the twins; none starts before it is needed."""
    return ThreadPoolExecutor(
        max(1, threads - 1), "shard", initializer=torch.set_num_threads, initargs=(1,)
    )


def _flat(network: Network) -> Tensor:
    """Let the gradients of all parameters be views of one tensor."""
    parameters = list(network.parameters())
    sizes = [each.numel() for each in parameters]
    gradient = torch.zeros(sum(sizes), device=parameters[0].device)
    for parameter, part in zip(parameters, torch.split(gradient, sizes), strict=True):
        parameter.grad = part.view_as(parameter)
    return gradient


def _twin(network: Network) -> Network:
    twin = copy.deepcopy(network)
    for mine, its in zip(twin.parameters(), network.parameters(), strict=True):
        mine.data = its.data
    return twin
