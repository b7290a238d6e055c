"""The gradient of a batch, whose shards are worked on by threads at the same time.

At a few dozen windows no operation of a batch is large enough for torch to spread it over cores,
but half a batch is as much as a core likes. Each thread has a twin of the network: the same
weights, but gradients and dropout of its own, so that nothing is written by two. The gradients are
added in the order of the shards: the same numbers, however the threads run. Between the two passes
they meet: what is left there is many small operations, for which they would queue.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from forecasting.network import Network

T = TypeVar("T")
_APART = 1_000_003
"""Between the seeds of two shards' dropout."""


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
        self._made: list[Tensor] = []

    def seed(self, seed: int) -> None:
        """Seed the twins' dropout."""
        for number, twin in enumerate(self._networks[1:], 1):
            assert isinstance(twin.dropout, _Dropout)
            twin.dropout.generator.manual_seed(seed + number * _APART)

    def corrections(self, features: Tensor, rows: Tensor) -> Tensor:
        """What the networks say of some rows of `features`; see `Network.corrections`."""
        parts = torch.tensor_split(rows, len(self._networks))
        jobs = [
            partial(_corrections, network, features, part)
            for network, part in zip(self._networks, parts, strict=True)
            if len(part)
        ]
        self._made = self._together(jobs)
        return torch.cat([each.detach() for each in self._made])

    def backward(self, slope: Tensor, own: Callable[[Tensor, Tensor], None]) -> None:
        """Set `gradient`.

        Args:
            slope: of the loss, along what `corrections` gave last.
            own: backward pass on the network itself, from its corrections and their slope.
        """
        mine, *others = zip(
            self._made, torch.split(slope, [len(each) for each in self._made]), strict=True
        )
        used = self._others[: len(others)]
        for gradient in (self.gradient, *used):
            gradient.zero_()
        self._together([partial(own, *mine), *(partial(_backward, *each) for each in others)])
        for gradient in used:
            self.gradient.add_(gradient)

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


def _corrections(network: Network, features: Tensor, rows: Tensor) -> Tensor:
    made = network.corrections(features.index_select(0, rows))
    assert made is not None  # the LSTM is on in training
    return made


def _backward(made: Tensor, slope: Tensor) -> None:
    made.backward(slope)  # type: ignore[no-untyped-call]


def _flat(network: Network) -> Tensor:
    """Let the gradients of all parameters be views of one tensor."""
    parameters = list(network.parameters())
    sizes = [each.numel() for each in parameters]
    gradient = torch.zeros(sum(sizes), device=parameters[0].device)
    for parameter, part in zip(parameters, torch.split(gradient, sizes), strict=True):
        parameter.grad = part.view_as(parameter)
    return gradient


class _Dropout(nn.Dropout):
    """Dropout from a generator of its own; torch's one has the whole process's."""

    def __init__(self, share: float) -> None:
        super().__init__(share)
        self.generator = torch.Generator()

    def forward(self, inputs: Tensor) -> Tensor:
        """Zeros in place of some, the others the larger for it."""
        kept = 1 - self.p
        mask = torch.empty_like(inputs).bernoulli_(kept, generator=self.generator)
        return inputs * mask.div_(kept)


def _twin(network: Network) -> Network:
    twin = copy.deepcopy(network)
    for mine, its in zip(twin.parameters(), network.parameters(), strict=True):
        mine.data = its.data
    twin.dropout = _Dropout(network.dropout.p)
    return twin
