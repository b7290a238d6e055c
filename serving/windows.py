"""Windows of prices on their way to a model: as a client sent them, and as a graph takes them."""

from typing import NamedTuple

import numpy as np
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray


class Rows(NamedTuple):
    """One window as rows of one symbol, oldest first, more or fewer than a model needs.

    Attributes:
        symbol: whose prices.
        days: days since 1970-01-01, int64 [rows].
        ohlcv: open, high, low, close, volume, float64 [rows, 5], as sent.
        forecaster: that shall answer; unset: the one that serves the symbol.
    """

    symbol: str
    days: NDArray[np.int64]
    ohlcv: NDArray[np.float64]
    forecaster: str | UnsetType = UNSET


class Tensors(NamedTuple):
    """Windows of one forecaster in the shape of its graph's inputs (see `contract.Contract`).

    Attributes:
        ohlcv: float32 [windows, context, 5].
        dates: days since 1970-01-01, int64 [windows, context].
        symbol: indices into the contract's symbols, int64 [windows].
    """

    ohlcv: NDArray[np.float32]
    dates: NDArray[np.int64]
    symbol: NDArray[np.int64]
