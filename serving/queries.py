"""What a batch is made of: windows as they were sent, prepared as late and as many as possible.

Looking at a hundred numbers costs numpy as much as looking at a thousand, so windows that came as
JSON are turned into arrays and checked together with the others of their batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from forecasting.contract import Contract
from forecasting.inference import Forecaster
from forecasting.predictions import Source, Window
from serving.answers import windows_of_requests
from serving.intake import fit, rows_of, stack
from serving.open_models import Served
from serving.schemas import ForecastRequest
from serving.windows import Tensors


class Prepared(NamedTuple):
    """Checked windows of one version.

    Attributes:
        windows: what is said of each, and logged.
    """

    tensors: Tensors
    windows: list[Window]


class Requests(NamedTuple):
    """Windows as they were decoded from JSON."""

    items: Sequence[ForecastRequest]
    source: Source
    max_rows: int

    def prepared(self, contract: Contract) -> Prepared:
        """Arrays of all windows, checked.

        Raises:
            ProblemError: one of them is not usable.
        """
        tensors = stack(self.items, contract)
        if tensors is None:  # not all of one length, or something is wrong: look at each
            tensors = fit([rows_of(each) for each in self.items], contract, self.max_rows)
        return Prepared(tensors, windows_of_requests(self.items, contract, self.source))


class Query(NamedTuple):
    """Windows for one version, to be computed."""

    served: Served
    forecaster: Forecaster
    load: Prepared | Requests

    @property
    def size(self) -> int:
        """How many windows."""
        load = self.load
        return len(load.items) if isinstance(load, Requests) else len(load.windows)


def prepare(queries: Sequence[Query]) -> list[Prepared]:
    """Checked windows of queries for one version: those of several as one, if they came as JSON.

    Returns:
        One item for all queries, or one for each; in their order.

    Raises:
        ProblemError: a window is not usable.
    """
    contract = queries[0].served.contract
    loads = [query.load for query in queries]
    requests = [load for load in loads if isinstance(load, Requests)]
    if len(requests) == len(loads) and len({load.source for load in requests}) == 1:
        items = [item for load in requests for item in load.items]
        return [Requests(items, requests[0].source, requests[0].max_rows).prepared(contract)]
    return [load.prepared(contract) if isinstance(load, Requests) else load for load in loads]


def joined(parts: Sequence[Prepared]) -> Prepared:
    """Several as one."""
    if len(parts) == 1:
        return parts[0]
    tensors = (np.concatenate(arrays) for arrays in zip(*(p.tensors for p in parts), strict=True))
    return Prepared(Tensors(*tensors), [window for part in parts for window in part.windows])
