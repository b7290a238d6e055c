"""What a client sends, checked: bodies become rows, and rows the windows that a graph takes."""

import re
from collections.abc import Sequence
from datetime import date
from itertools import chain
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from forecasting.contract import COLUMNS, Contract
from serving import problems
from serving.schemas import REQUEST_SHAPE, ForecastRequest, ForecastRequests, PriceRow
from serving.windows import Rows, Tensors

FIRST_DAY, LAST_DAY = date(1985, 1, 1), date(2050, 11, 30)
"""Origins for which the trading calendar is known."""

Number = TypeVar("Number", np.int64, np.float32)
EPOCH_ORDINAL = date(1970, 1, 1).toordinal()
_SHOWN = 5
_NOT_JSON_NUMBER = re.compile(rb"[:,\[]\s*(-?(?:NaN|nan|Infinity|inf))\b")
_one = msgspec.json.Decoder(ForecastRequest)
_many = msgspec.json.Decoder(ForecastRequests)


def parse_request(body: bytes) -> ForecastRequest:
    """Decode the body of one window.

    Raises:
        ProblemError: not JSON, not of that shape, or numbers that JSON does not have.
    """
    try:
        return _one.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise unreadable(body, error, REQUEST_SHAPE) from error


def parse_requests(body: bytes) -> list[ForecastRequest]:
    """Decode the body of several windows.

    Raises:
        ProblemError: not JSON, not of that shape, or numbers that JSON does not have.
    """
    try:
        return _many.decode(body).windows
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        shape = f'{{"windows": [...]}}, each {REQUEST_SHAPE}'
        raise unreadable(body, error, shape) from error


def unreadable(body: bytes, error: Exception, expected: str) -> problems.ProblemError:
    """Why a body cannot be decoded."""
    if isinstance(error, msgspec.ValidationError):
        return problems.invalid_request(error, expected)
    found = _NOT_JSON_NUMBER.search(body)
    if found:
        return problems.bad_prices(
            f"Every price must be a finite number above zero; got {found[1].decode()} at byte "
            f"{found.start(1)}. Leave that day out or repair it."
        )
    return problems.malformed_json(error)


def rows_of(request: ForecastRequest) -> Rows:
    """The arrays of one decoded window."""
    return Rows(request.symbol, *_arrays(request.rows), request.forecaster)


def stack(requests: Sequence[ForecastRequest], contract: Contract) -> Tensors | None:
    """Windows of exactly `contract.context` rows, all at once; None if any needs a closer look."""
    count, context = len(requests), contract.context
    if any(len(each.rows) != context for each in requests):
        return None
    rows = [row for each in requests for row in each.rows]
    days, values = _arrays(rows)
    with np.errstate(over="ignore", under="ignore"):
        ohlcv = values.astype(np.float32).reshape(count, context, 5)
    symbols = [contract.symbol_input(each.symbol) for each in requests]
    tensors = Tensors(ohlcv, days.reshape(count, context), np.array(symbols, dtype=np.int64))
    return tensors if _are_usable(tensors) else None


def fit(windows: Sequence[Rows], contract: Contract, max_rows: int) -> Tensors:
    """Check windows and take the last `contract.context` rows of each.

    Raises:
        ProblemError: too few rows, out of order, or values that cannot be prices.
    """
    fitted = [_fit(rows, contract.context, max_rows) for rows in windows]
    symbols = [contract.symbol_input(rows.symbol) for rows in windows]
    return Tensors(
        _joined([ohlcv for _, ohlcv in fitted]),
        _joined([days for days, _ in fitted]),
        np.array(symbols, dtype=np.int64),
    )


def check_tensors(tensors: Tensors, contract: Contract) -> None:
    """Check windows that came as tensors.

    Raises:
        ProblemError: a symbol out of range, dates out of order, or values that are no prices.
    """
    symbols = len(contract.symbols)
    if not ((tensors.symbol >= 0) & (tensors.symbol < symbols)).all():
        raise problems.unknown_symbol(
            f"index {int(tensors.symbol[(tensors.symbol < 0) | (tensors.symbol >= symbols)][0])}",
            [f"{number} ({name})" for number, name in enumerate(contract.symbols)],
        )
    if _are_usable(tensors):
        return
    for number, (days, ohlcv) in enumerate(zip(tensors.dates, tensors.ohlcv, strict=True)):
        where = f"Window {number}: " if len(tensors.dates) > 1 else ""
        _check_dates(days, where)
        _check_values(days, ohlcv, 0, where)


def _fit(rows: Rows, context: int, max_rows: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    days, count = rows.days, len(rows.days)
    if count < context:
        raise problems.too_few_rows(context, count)
    if count > max_rows:
        raise problems.too_many_rows(max_rows, count)
    _check_dates(days)
    with np.errstate(over="ignore", under="ignore"):
        ohlcv = rows.ohlcv[-context:].astype(np.float32)
    if not _are_prices(ohlcv):
        _check_values(days[-context:], rows.ohlcv[-context:], count - context)
    return days[-context:], ohlcv


def _arrays(rows: Sequence[PriceRow]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Days since 1970 [rows] and values [rows, 5]; a row is a date and five numbers."""
    flat: list[Any] = list(chain.from_iterable(map(msgspec.structs.astuple, rows)))
    days = np.fromiter(map(date.toordinal, flat[::6]), np.int64, len(rows)) - EPOCH_ORDINAL
    del flat[::6]
    return days, np.fromiter(flat, np.float64, len(flat)).reshape(len(rows), 5)


def _joined(arrays: list[NDArray[Number]]) -> NDArray[Number]:
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)


def _check_dates(days: NDArray[np.int64], where: str = "") -> None:
    if not (days[1:] > days[:-1]).all():
        late = np.flatnonzero(days[1:] <= days[:-1]) + 1
        what = "twice" if days[late[0]] == days[late[0] - 1] else "out of order"
        raise problems.bad_dates(
            f"{where}Rows must ascend by date, each date once; row {late[0]} "
            f"({told(days[late[0]])}) comes {what}, after {told(days[late[0] - 1])} "
            f"({len(late)} such rows). Sort the rows and drop duplicates."
        )
    if not _in_calendar(days[-1]):
        raise problems.bad_dates(
            f"{where}The last row's date must lie between {FIRST_DAY} and {LAST_DAY}, for which "
            f"the trading calendar is known; got {told(days[-1])}."
        )


def _in_calendar(days: NDArray[np.int64] | np.int64) -> NDArray[np.bool_]:
    first, last = FIRST_DAY.toordinal() - EPOCH_ORDINAL, LAST_DAY.toordinal() - EPOCH_ORDINAL
    return np.asarray((days >= first) & (days <= last))


def _are_usable(tensors: Tensors) -> bool:
    return bool(
        (tensors.dates[:, 1:] > tensors.dates[:, :-1]).all()
        and _in_calendar(tensors.dates[:, -1]).all()
        and _are_prices(tensors.ohlcv)
    )


def _are_prices(ohlcv: NDArray[np.float32]) -> bool:
    """Whether all is well; a comparison with NaN never is."""
    return bool(
        ohlcv[..., :4].min() > 0
        and ohlcv.max() < np.inf
        and ohlcv[..., 4].min() >= 0
        and (ohlcv[..., 1] >= ohlcv[..., 2]).all()
    )


def _check_values(
    days: NDArray[np.int64], ohlcv: NDArray[np.floating], skipped: int, where: str = ""
) -> None:
    with np.errstate(over="ignore", under="ignore"):
        seen = ohlcv.astype(np.float32)
    bad_price = ~(np.isfinite(seen[:, :4]) & (seen[:, :4] > 0)).all(axis=1)
    bad_volume = ~(np.isfinite(seen[:, 4]) & (seen[:, 4] >= 0))
    crossed = seen[:, 1] < seen[:, 2]
    bad = np.flatnonzero(bad_price | bad_volume | crossed)
    if not len(bad):
        return
    shown = "; ".join(
        f"row {skipped + i} ({told(days[i])}): "
        + ", ".join(f"{name} {float(x)!r}" for name, x in zip(COLUMNS, ohlcv[i], strict=True))
        for i in bad[:_SHOWN]
    )
    raise problems.bad_prices(
        f"{where}Prices must be finite and above zero, volume finite and not negative, high not "
        f"below low; {len(bad)} rows break this: {shown}. Leave those days out or repair them."
    )


def told(day: np.int64 | int) -> str:
    """A day since 1970 as a date, or as it came where the calendar ends."""
    ordinal = int(day) + EPOCH_ORDINAL
    if 1 <= ordinal <= date.max.toordinal():
        return date.fromordinal(ordinal).isoformat()
    return f"day {int(day)} since 1970-01-01"
