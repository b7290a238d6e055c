"""What a client sends, checked: a body becomes a request, rows become the arrays a graph takes."""

import re
from datetime import date

import msgspec
import numpy as np
from numpy.typing import NDArray

from serving import problems
from serving.schemas import REQUEST_SHAPE, ForecastRequest, PriceRow

FIRST_DAY, LAST_DAY = date(1985, 1, 1), date(2050, 11, 30)
"""Origins for which the trading calendar is known."""

_EPOCH_ORDINAL = date(1970, 1, 1).toordinal()
_SHOWN = 5
_NOT_JSON_NUMBER = re.compile(rb"[:,\[]\s*(-?(?:NaN|nan|Infinity|inf))\b")
_decoder = msgspec.json.Decoder(ForecastRequest)


def parse_request(body: bytes) -> ForecastRequest:
    """Decode a POST body.

    Raises:
        ProblemError: not JSON, not of that shape, or numbers that JSON does not have.
    """
    try:
        return _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise problems.invalid_request(error, REQUEST_SHAPE) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        found = _NOT_JSON_NUMBER.search(body)
        if found:
            raise problems.bad_prices(
                f"Every price must be a finite number above zero; got {found[1].decode()} at byte "
                f"{found.start(1)}. Leave that day out or repair it."
            ) from error
        raise problems.malformed_json(error) from error


def usable_rows(
    rows: list[PriceRow], context: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Check rows and take the last `context` of them.

    Returns:
        days since 1970 int64 [context], ohlcv float32 [context, 5].

    Raises:
        ProblemError: too few, out of order, or values that cannot be prices.
    """
    if len(rows) < context:
        raise problems.too_few_rows(context, len(rows))
    days = np.array([row.date.toordinal() for row in rows], dtype=np.int64)
    late = np.flatnonzero(np.diff(days) <= 0) + 1
    if len(late):
        what = "twice" if days[late[0]] == days[late[0] - 1] else "out of order"
        raise problems.bad_dates(
            "Rows must ascend by date, each date once; "
            f"row {late[0]} ({rows[late[0]].date}) comes {what}, after {rows[late[0] - 1].date} "
            f"({len(late)} such rows). Sort the rows and drop duplicates."
        )
    if not FIRST_DAY <= rows[-1].date <= LAST_DAY:
        raise problems.bad_dates(
            f"The last row's date must lie between {FIRST_DAY} and {LAST_DAY}, for which the "
            f"trading calendar is known; got {rows[-1].date}."
        )
    used = rows[-context:]
    with np.errstate(over="ignore", under="ignore"):
        ohlcv = np.array(
            [(row.open, row.high, row.low, row.close, row.volume) for row in used], dtype=np.float64
        ).astype(np.float32)
    _check_values(used, ohlcv, len(rows) - context)
    return days[-context:] - _EPOCH_ORDINAL, ohlcv


def _check_values(rows: list[PriceRow], ohlcv: NDArray[np.float32], skipped: int) -> None:
    prices, volume = ohlcv[:, :4], ohlcv[:, 4]
    bad_price = ~(np.isfinite(prices) & (prices > 0)).all(axis=1)
    bad_volume = ~(np.isfinite(volume) & (volume >= 0))
    crossed = ohlcv[:, 1] < ohlcv[:, 2]
    bad = np.flatnonzero(bad_price | bad_volume | crossed)
    if not len(bad):
        return
    shown = "; ".join(
        f"row {skipped + i} ({rows[i].date}): open {rows[i].open}, high {rows[i].high}, "
        f"low {rows[i].low}, close {rows[i].close}, volume {rows[i].volume}"
        for i in bad[:_SHOWN]
    )
    raise problems.bad_prices(
        "Prices must be finite and above zero, volume finite and not negative, high not below "
        f"low; {len(bad)} rows break this: {shown}. Leave those days out or repair them."
    )
