"""Windows of past rows with the returns that followed, and their split by time.

A window ends at its origin `t`: it holds the rows `t - context + 1 .. t` and nothing later. Its
targets are the log returns from close `t` to close `t + h` for `h = 1 .. horizon`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import date
from typing import TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from forecasting.contract import COLUMNS
from forecasting.errors import HistoryError

T = TypeVar("T", np.float32, np.int64)

MIN_TRAIN = 120
"""Fewest training windows of one symbol: below it, 39 quantiles of residuals are noise."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of one or more symbols, each symbol's in order of time.

    Attributes:
        ohlcv: float32 [n, context, 5], adjusted prices and volume as in `contract.COLUMNS`.
        dates: int64 [n, context], days since 1970-01-01.
        symbol: int64 [n], index of the symbol.
        last_close: float64 [n], close of the origin.
        returns: float64 [n, horizon], log(close[t+h] / close[t]); NaN where not yet known.
        ranges: float64 [n, horizon], mean of log(high / low)^2 over the rows t+1 .. t+h; NaN
            where not yet known. What a volatility forecast is estimated on.
        origins: datetime64[D] [n], day of the last row seen.
    """

    ohlcv: NDArray[np.float32]
    dates: NDArray[np.int64]
    symbol: NDArray[np.int64]
    last_close: NDArray[np.float64]
    returns: NDArray[np.float64]
    ranges: NDArray[np.float64]
    origins: NDArray[np.datetime64]

    def __len__(self) -> int:
        return len(self.origins)

    @property
    def context(self) -> int:
        """Rows in a window."""
        return int(self.ohlcv.shape[1])

    @property
    def horizon(self) -> int:
        """Days ahead that are targets."""
        return int(self.returns.shape[1])

    @property
    def known(self) -> NDArray[np.bool_]:
        """[n], whether the whole horizon has been observed."""
        return np.asarray(np.isfinite(self.returns).all(axis=1))

    @property
    def first_day(self) -> date:
        """Earliest origin."""
        return _as_date(self.origins.min())

    @property
    def last_day(self) -> date:
        """Latest origin."""
        return _as_date(self.origins.max())

    def at(self, origins: NDArray[np.datetime64]) -> "Windows":
        """The windows with these origins.

        Raises:
            HistoryError: an origin has no window.
        """
        missing = np.setdiff1d(origins, self.origins)
        if len(missing):
            raise HistoryError(
                f"Windows are needed at {len(origins)} origins; {len(missing)} have none, the "
                f"first {missing[0]}. The rows before it are fewer than the context of "
                f"{self.context}, or it is no session of this symbol."
            )
        return self.take(np.isin(self.origins, origins))

    def take(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> "Windows":
        """The windows that a mask or an index picks."""
        return Windows(*(getattr(self, field.name)[chosen] for field in fields(self)))


@dataclass(frozen=True, eq=False)
class Splits:
    """Parts in order of time; a horizon's width of windows is left out between them."""

    train: Windows
    validation: Windows
    gate: Windows


def _as_date(day: np.datetime64) -> date:
    return date.fromisoformat(str(day))


def make_windows(frame: pd.DataFrame, context: int, horizon: int, symbol_index: int = 0) -> Windows:
    """One window for every row that has `context - 1` rows before it.

    Args:
        frame: rows of one symbol by ascending date, columns as in `contract.COLUMNS`.
        context: rows in a window.
        horizon: days ahead that are targets.
        symbol_index: value of the `symbol` input.

    Raises:
        HistoryError: fewer rows than one window needs.
    """
    if len(frame) < context:
        raise HistoryError(
            f"{context} rows of prices are needed for one window; {len(frame)} found. "
            "Take a later as_of or a symbol with more history."
        )
    values = frame.loc[:, list(COLUMNS)].to_numpy(np.float64)
    days = frame.index.to_numpy().astype("datetime64[D]")
    close, last = values[:, 3], slice(context - 1, None)
    ranges = np.log(values[:, 1] / values[:, 2]) ** 2
    return Windows(
        ohlcv=_slide(values.astype(np.float32), context),
        dates=_slide(days.astype(np.int64), context),
        symbol=np.full(len(frame) - context + 1, symbol_index, dtype=np.int64),
        last_close=close[last].copy(),
        returns=_cumulative(np.diff(np.log(close)), horizon)[last],
        ranges=_cumulative(ranges[1:], horizon)[last] / np.arange(1, horizon + 1),
        origins=days[last].copy(),
    )


def _slide(values: NDArray[T], context: int) -> NDArray[T]:
    """[rows, ...] to [windows, context, ...], contiguous."""
    view = np.lib.stride_tricks.sliding_window_view(values, context, axis=0)
    return np.ascontiguousarray(np.moveaxis(view, -1, 1))


def _cumulative(steps: NDArray[np.float64], horizon: int) -> NDArray[np.float64]:
    """Sums of the next 1 .. horizon steps, one row per origin, NaN past the end."""
    padded = np.concatenate([steps, np.full(horizon, np.nan)])
    ahead = np.lib.stride_tricks.sliding_window_view(padded, horizon)
    sums: NDArray[np.float64] = np.cumsum(ahead, axis=1)
    return sums


def join(parts: Sequence[Windows]) -> Windows:
    """The windows of several symbols as one."""
    return Windows(
        *(
            np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(Windows)
        )
    )


def split(windows: Windows, validation_days: int, gate_days: int) -> Splits:
    """Cut by origin: the newest `gate_days` known windows, `validation_days` before, the rest.

    `horizon` origins are left out before validation and before the gate, so that no target of an
    earlier part lies after the first origin of a later one.

    Raises:
        HistoryError: too few known windows; the message says how many rows are needed.
    """
    horizon = windows.horizon
    known = windows.take(windows.known)
    days = np.unique(known.origins)
    held_out = gate_days + validation_days + 2 * horizon
    if len(days) < MIN_TRAIN + held_out:
        surplus = windows.context - 1 + horizon
        raise HistoryError(
            f"{MIN_TRAIN + held_out + surplus} rows of prices are needed (context "
            f"{windows.context}, horizon {horizon}, at least {MIN_TRAIN} training windows, "
            f"{validation_days} for validation, {gate_days} for the gate, gaps between them); "
            f"{len(days) + surplus} found. Take a later as_of or fewer validation and gate days."
        )
    gate = len(days) - gate_days
    validation = gate - horizon - validation_days
    return Splits(
        train=_between(known, days, 0, validation - horizon),
        validation=_between(known, days, validation, gate - horizon),
        gate=_between(known, days, gate, len(days)),
    )


def folds(splits: Splits, count: int) -> list[Splits]:
    """Earlier validation blocks beside the one of `splits`, each learned up to from before it.

    The oldest comes first and the last is `splits` itself; each block has as many days as that of
    `splits`. A fold whose past would be shorter than MIN_TRAIN days is left out, so that a young
    symbol has fewer. Windows of several symbols stay together by day.

    Args:
        splits: as `split` or `with_peers` cut them.
        count: folds that are wanted, at least 1.
    """
    known = join([splits.train, splits.validation])
    gap, width = splits.train.horizon, len(np.unique(splits.validation.origins))
    past, found = np.unique(splits.train.origins), [splits]
    while len(found) < count and len(past) >= MIN_TRAIN + gap + width:
        before = past[: -width - gap]
        found.append(
            Splits(
                train=known.take(known.origins <= before[-1]),
                validation=known.take(
                    (known.origins >= past[-width]) & (known.origins <= past[-1])
                ),
                gate=splits.gate,
            )
        )
        past = before
    return found[::-1]


def with_peers(splits: Splits, peers: Sequence[Windows]) -> Splits:
    """Windows of other symbols beside those that are learned from; the gate stays as it is.

    Of a peer all that lies before the end of training is taken, also from before the first own
    window: a young symbol has seen less than its peers have.

    Args:
        splits: of one symbol.
        peers: known and unknown windows of others, of the same context and horizon.
    """
    train, validation = [splits.train], [splits.validation]
    first, last = splits.validation.origins.min(), splits.validation.origins.max()
    for peer in peers:
        known = peer.take(peer.known)
        train.append(known.take(known.origins <= splits.train.origins.max()))
        validation.append(known.take((known.origins >= first) & (known.origins <= last)))
    return Splits(join(train), join(validation), splits.gate)


def _between(windows: Windows, days: NDArray[np.datetime64], first: int, end: int) -> Windows:
    """The windows whose origin is one of `days[first:end]`."""
    return windows.take((windows.origins >= days[first]) & (windows.origins <= days[end - 1]))
