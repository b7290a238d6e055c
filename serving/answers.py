"""From quantiles to what goes out and what is logged; every number is written once for both."""

from collections.abc import Sequence
from datetime import date
from functools import lru_cache
from itertools import count
from typing import NamedTuple, cast
from uuid import uuid4

import msgspec
import numpy as np
from numpy.typing import NDArray

from forecasting.contract import Contract
from forecasting.predictions import Source, Window, json_numbers
from forecasting.quantiles import medians
from forecasting.sessions import sessions_after
from serving.intake import EPOCH_ORDINAL
from serving.schemas import Forecast, ForecastRequest, HorizonForecast
from serving.windows import Rows, Tensors

_encoder = msgspec.json.Encoder()
_PREFIX, _numbers = str(uuid4())[:24], count()
"""Identities are random in their first half, once a process, and counted in their second."""


class Numbers(NamedTuple):
    """Quantiles of one window.

    Attributes:
        quantiles: float32 [horizon, levels], prices.
        medians: float32 [horizon].
        texts: JSON of each row of `quantiles`.
    """

    quantiles: NDArray[np.float32]
    medians: NDArray[np.float32]
    texts: list[bytes]


def numbers(quantiles: NDArray[np.float32], levels: Sequence[float]) -> tuple[bytes, list[Numbers]]:
    """Write the quantiles of a batch, float32 [windows, horizon, levels].

    Returns:
        JSON of all of it, and its parts, one a window.
    """
    whole = json_numbers(quantiles)
    texts = whole[3:-3].split(b"]],[[")
    middle = medians(quantiles, levels)
    return whole, [
        Numbers(rows, median, text.split(b"],["))
        for rows, median, text in zip(quantiles, middle, texts, strict=True)
    ]


def stacked(items: Sequence[Numbers]) -> NDArray[np.float32]:
    """Quantiles of several windows, float32 [windows, horizon, levels]."""
    return np.stack([item.quantiles for item in items])


def windows_of_rows(
    rows: Sequence[Rows], contract: Contract, source: Source, prices_md5: str | None = None
) -> list[Window]:
    """What is said of each window that came as rows."""
    return [
        _window(
            each.symbol, int(each.days[-1]), float(each.ohlcv[-1, 3]), contract, source, prices_md5
        )
        for each in rows
    ]


def windows_of_requests(
    requests: Sequence[ForecastRequest], contract: Contract, source: Source
) -> list[Window]:
    """What is said of each window that came as JSON."""
    return [
        _window(
            each.symbol,
            each.rows[-1].date.toordinal() - EPOCH_ORDINAL,
            each.rows[-1].close,
            contract,
            source,
        )
        for each in requests
    ]


def windows_of_tensors(tensors: Tensors, contract: Contract, source: Source) -> list[Window]:
    """What is said of each window that came as tensors."""
    closes = [float(str(close)) for close in tensors.ohlcv[:, -1, 3]]  # 806.19, not 806.190002
    return [
        _window(contract.symbols[symbol], day, close, contract, source)
        for symbol, day, close in zip(
            tensors.symbol.tolist(), tensors.dates[:, -1].tolist(), closes, strict=True
        )
    ]


def forecast(window: Window, contract: Contract, version: int, found: Numbers) -> Forecast:
    """The answer to one window; its long numbers are JSON already (`msgspec.Raw`)."""
    steps = zip(window.targets, found.texts, _texts(found.medians), strict=True)
    return Forecast(
        id=window.id,
        symbol=window.symbol,
        forecaster=contract.forecaster,
        model_version=version,
        run_id=contract.run_id,
        dataset_md5=contract.dataset_md5,
        prices_md5=window.prices_md5,
        as_of=window.origin,
        origin=window.origin,
        origin_close=window.origin_close,
        levels=cast("list[float]", _levels(contract.quantile_levels)),
        forecast=[
            HorizonForecast(
                step,
                target,
                cast("float", msgspec.Raw(median)),
                cast("list[float]", msgspec.Raw(b"[" + text + b"]")),
            )
            for step, (target, text, median) in enumerate(steps, start=1)
        ],
    )


def body_of(answer: Forecast) -> bytes:
    """JSON of an answer."""
    return _encoder.encode(answer)


@lru_cache(maxsize=4096)
def targets_after(origin: int, horizon: int) -> tuple[date, list[date]]:
    """Origin and target sessions of a day since 1970."""
    day = date.fromordinal(origin + EPOCH_ORDINAL)
    return day, sessions_after(day, horizon)


def _window(
    symbol: str,
    day: int,
    close: float,
    contract: Contract,
    source: Source,
    prices_md5: str | None = None,
) -> Window:
    origin, targets = targets_after(day, contract.horizon)
    identity = f"{_PREFIX}{next(_numbers):012x}"
    return Window(identity, source, symbol, prices_md5, origin, close, targets)


def _texts(values: NDArray[np.float32]) -> list[bytes]:
    return json_numbers(values)[1:-1].split(b",")


@lru_cache(maxsize=256)
def _levels(levels: tuple[float, ...]) -> msgspec.Raw:
    return msgspec.Raw(_encoder.encode(levels))
