"""Where prices come from: the bundled sample, a file or URL, or Yahoo.

`download` brings what the source says, as it says it, so that a refused file can be kept;
`parse` reads it as of a date.
"""

import asyncio
import csv
import difflib
import io
import logging
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import partial
from pathlib import PurePosixPath
from types import ModuleType
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit
from zoneinfo import ZoneInfo

import aiohttp
import fsspec
import numpy as np
import pandas as pd
import pyarrow as arrow
from bokeh_sampledata import stocks
from fsspec.compression import compr
from fsspec.utils import infer_compression
from numpy.typing import NDArray
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from forecasting.contract import COLUMNS
from forecasting.errors import BadPricesError, ConfigError, SourceError
from forecasting.prices import (
    PRICES,
    RawPrices,
    check_as_of,
    factors_frame,
    factors_from_adjusted,
    nothing_known,
    rows_frame,
)
from forecasting.settings import Settings

log = logging.getLogger(__name__)
T = TypeVar("T")

SAMPLES = ("AAPL", "FB", "GOOG", "IBM", "MSFT")
"""Symbols of the bundled sample (bokeh_sampledata, public domain)."""

_EXCHANGE_ZONE = ZoneInfo("America/New_York")
_DAY_IS_FINAL = time(17, 0)
_SYMBOL = re.compile(r"[A-Za-z0-9^][A-Za-z0-9.^=_-]{0,31}")
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:([,'’_ \u00a0\u2009\u202f])\d{3})(?:\1\d{3})*(?:\.\d*)?")
_NAMES = {
    "vol": "volume",
    "adj close": "adj_close",
    "adjclose": "adj_close",
    "adjusted close": "adj_close",
    "adj. close": "adj_close",
    "adj_close": "adj_close",
    "datetime": "date",
    "ticker": "symbol",
    "stock splits": "splits",
}
_NUMERIC = frozenset((*COLUMNS, "adj_close", "splits", "dividends"))
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_NETWORK: tuple[type[Exception], ...] = (OSError, asyncio.TimeoutError, aiohttp.ClientError)


@dataclass(frozen=True)
class Payload:
    """What a source said of one symbol, as it came.

    Attributes:
        symbol: ticker asked for.
        source: name of the source.
        address: where it came from, for messages.
        content: the bytes of a file, or the table of a library.
    """

    symbol: str
    source: str
    address: str
    content: bytes | pd.DataFrame

    @property
    def file_name(self) -> str:
        """A name under which `to_bytes` can be kept; `content` is unpacked already."""
        name = PurePosixPath(urlsplit(self.address).path).name
        if isinstance(self.content, pd.DataFrame) or not name:
            return f"{self.symbol}.csv"
        return PurePosixPath(name).stem if infer_compression(name) else name

    @property
    def origin(self) -> str:
        """Name and address of the source, without what could be a secret of the address."""
        parts = urlsplit(self.address)
        shown = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="")
        return f"{self.source} {urlunsplit(shown)}"

    def to_bytes(self) -> bytes:
        """The content as bytes (a table as CSV)."""
        if isinstance(self.content, pd.DataFrame):
            return self.content.to_csv(index=False).encode()
        return self.content


def fetch(settings: Settings, symbol: str, as_of: date) -> RawPrices:
    """Prices of `symbol` up to and including `as_of`, not yet validated.

    Raises:
        SourceError: unknown symbol, or the source cannot be read (after retries).
        BadPricesError: the file is no price table.
        HistoryError: `as_of` lies before the first row or in the future.
        ConfigError: the source lacks a setting or a package.
    """
    check_as_of(as_of)
    return parse(download(settings, symbol), as_of)


def check_symbol(symbol: str) -> str:
    """Refuse what cannot be a ticker (it becomes a folder name).

    Raises:
        SourceError: not 1 to 32 letters, digits or `.^=_-`.
    """
    if not _SYMBOL.fullmatch(symbol):
        raise SourceError(
            f"{symbol!r} is no symbol: 1 to 32 letters, digits or .^=_- are expected, as in GOOG."
        )
    return symbol


# --- download --------------------------------------------------------------------------------


def download(settings: Settings, symbol: str) -> Payload:
    """What the configured source says of `symbol`, with retries where the network is involved.

    Raises:
        SourceError: unknown symbol, or the source cannot be read.
        ConfigError: the source lacks a setting or a package.
    """
    check_symbol(symbol)
    if settings.source == "sample":
        return _sample(symbol)
    if settings.source == "file":
        return _file(settings, symbol)
    return _yfinance(settings, symbol)


def _sample(symbol: str) -> Payload:
    if symbol not in SAMPLES:
        near = difflib.get_close_matches(symbol.upper(), SAMPLES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise SourceError(
            f"The sample has no symbol {symbol!r}; it knows {', '.join(SAMPLES)}.{hint} "
            "PERENNIAL_SOURCE=file or yfinance reads others."
        )
    return Payload(symbol, "sample", "bokeh_sampledata", pd.DataFrame(getattr(stocks, symbol)))


def _file(settings: Settings, symbol: str) -> Payload:
    if not settings.source_url:
        raise ConfigError(
            "PERENNIAL_SOURCE=file needs PERENNIAL_SOURCE_URL: a CSV or Parquet file, any fsspec "
            "URL, in which {symbol} is replaced, such as data/{symbol}.csv."
        )
    address = settings.source_url.replace("{symbol}", symbol)
    content = _with_retries(settings, "file", address, partial(_read, address))
    return Payload(symbol, "file", address, content)


def _read(address: str) -> bytes:
    """The bytes at an fsspec URL, unpacked; `cat_file` says truly why HTTP failed, `open` not."""
    files, path = fsspec.core.url_to_fs(address)
    packed = io.BytesIO(files.cat_file(path))
    packing = infer_compression(path)
    content: bytes = (compr[packing](packed, mode="rb") if packing else packed).read()
    return content


def _yfinance(settings: Settings, symbol: str) -> Payload:
    address = f"https://finance.yahoo.com/quote/{symbol}"
    package = _import_yfinance()
    package.config.debug.hide_exceptions = False
    lost = (*_NETWORK, package.exceptions.YFException)

    def history() -> pd.DataFrame:
        try:
            table: pd.DataFrame = package.Ticker(symbol).history(
                period="max", auto_adjust=False, actions=True
            )
        except package.exceptions.YFTickerMissingError as error:
            raise SourceError(
                f"Source yfinance has no prices of {symbol} at {address}: {error}. "
                "Check the symbol."
            ) from None
        return table

    table = _with_retries(settings, "yfinance", address, history, lost)
    return Payload(symbol, "yfinance", address, final_days(as_traded(table), _now_at_exchange()))


def _import_yfinance() -> ModuleType:
    try:
        import yfinance
    except ImportError as error:
        raise ConfigError(
            "PERENNIAL_SOURCE=yfinance needs the extra: pip install 'perennial[yfinance]'."
        ) from error
    return yfinance  # type: ignore[no-any-return]


def _with_retries(
    settings: Settings,
    source: str,
    address: str,
    action: Callable[[], T],
    lost: tuple[type[Exception], ...] = _NETWORK,
) -> T:
    """Run `action`, again after a network failure, with backoff and jitter."""
    retrying = Retrying(
        stop=stop_after_attempt(settings.fetch_attempts),
        wait=wait_exponential(multiplier=0.25, max=20) + wait_random(0, 0.25),
        retry=retry_if_exception(lambda error: isinstance(error, lost) and _passes(error)),
        before_sleep=partial(_log_retry, source, address),
        reraise=True,
    )
    protocol, packing = (ValueError, ImportError), (EOFError, zlib.error)
    failures: tuple[type[Exception], ...] = (*lost, *protocol, *packing)
    try:
        return retrying(action)
    except failures as error:
        attempts = retrying.statistics.get("attempt_number", 1)
        raise SourceError(
            f"Source {source} could not be read at {address} after {attempts} attempt(s): "
            f"{type(error).__name__}: {error}. Check the address and the network, then run again."
        ) from error


def _passes(error: BaseException) -> bool:
    """Whether a failure may pass by itself."""
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status >= 500 or error.status in (408, 425, 429)
    return not isinstance(error, _LASTING)


def _log_retry(source: str, address: str, state: RetryCallState) -> None:
    failure = state.outcome.exception() if state.outcome else None
    log.warning(
        "Source %s at %s failed (attempt %d, %s); trying again.",
        source,
        address,
        state.attempt_number,
        failure,
    )


# --- Yahoo: back to prices as traded ---------------------------------------------------------


def as_traded(history: pd.DataFrame) -> pd.DataFrame:
    """Undo Yahoo's split adjustment: prices as traded, `splits` and `dividends` as traded.

    Args:
        history: yfinance's table (`auto_adjust=False`), whose prices are in today's shares.
    """
    table = history.rename(columns=_plain_name)
    index = pd.DatetimeIndex(history.index)
    days = index.tz_localize(None).normalize() if index.tz is not None else index.normalize()
    splits = table["splits"].to_numpy(dtype="float64")
    splits = np.where(splits > 0, splits, 1.0)
    later = np.append(np.cumprod(splits[::-1])[::-1][1:], 1.0)  # splits after each day
    columns: dict[str, object] = {"date": days}
    columns |= {name: _to_micro(table[name].to_numpy(dtype="float64") * later) for name in PRICES}
    columns["volume"] = table["volume"].to_numpy(dtype="float64") / later
    columns["splits"] = splits
    columns["dividends"] = table["dividends"].to_numpy(dtype="float64") * later
    return pd.DataFrame(columns)


def _to_micro(prices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without the noise of single precision, which could put a close above its high."""
    return np.round(prices, 6)


def final_days(table: pd.DataFrame, now: datetime) -> pd.DataFrame:
    """`table` without the row of a day whose trading is not over at `now` (exchange time)."""
    last = now.date() if now.time() >= _DAY_IS_FINAL else now.date() - pd.Timedelta(days=1)
    return table[table["date"] <= np.datetime64(last)]


def _now_at_exchange() -> datetime:
    return datetime.now(_EXCHANGE_ZONE)


def factors_from_actions(
    dates: NDArray[np.datetime64],
    close: NDArray[np.float64],
    splits: NDArray[np.float64],
    dividends: NDArray[np.float64],
) -> pd.DataFrame:
    """Factors from split ratios (2.0 for 2:1, 1.0 for none) and dividends a share as traded."""
    before = np.append(np.nan, close[:-1])
    cut = np.where(dividends > 0, 1 - dividends * splits / before, 1.0)
    factors = cut / splits
    events = np.flatnonzero((factors != 1.0) & np.isfinite(factors) & (factors > 0))
    return factors_frame([(dates[i], float(factors[i])) for i in events])


# --- parse -----------------------------------------------------------------------------------


def parse(payload: Payload, as_of: date) -> RawPrices:
    """Read a payload; rows after `as_of` are dropped before anything else is looked at.

    Understood: columns of Yahoo (Date, Open, ..., Adj Close) and Stooq (Date or <DATE>, ...,
    <VOL>), commas or semicolons or tabs, thousands separators. A cell that is no number becomes
    NaN, a date that is none becomes NaT: `validate` names them.

    Raises:
        BadPricesError: no price table, or a column is missing.
        HistoryError: no row up to `as_of`; names the first known day.
    """
    table = payload.content if isinstance(payload.content, pd.DataFrame) else _table(payload)
    table = _own_rows(table.rename(columns=_plain_name), payload)
    missing = [name for name in ("date", *COLUMNS) if name not in table]
    if missing:
        raise _no_table(payload, f"column {', '.join(missing)} missing; found {list(table)}")
    table = table.assign(date=_dates(table["date"]))
    known = table[~(table["date"] > np.datetime64(as_of))].reset_index(drop=True)
    if known["date"].isna().all():
        if len(known):
            raise _no_table(payload, f"no readable date, first is {table.iloc[0].tolist()}")
        raise nothing_known(payload.symbol, table["date"], as_of)
    for name in _NUMERIC.intersection(known.columns):
        known[name] = _numbers(known[name])
    factors, tells = _factors(known)
    return RawPrices(payload.symbol, rows_frame(known), factors, tells)


def _factors(rows: pd.DataFrame) -> tuple[pd.DataFrame, bool]:
    """Factors of a parsed table, and whether the table tells of them at all."""
    dates, close = rows["date"].to_numpy(), rows["close"].to_numpy()
    told = "splits" in rows or "adj_close" in rows
    if not told or rows["date"].isna().any() or not rows["date"].is_monotonic_increasing:
        return factors_frame([]), told
    if "splits" in rows and "dividends" in rows:
        actions = rows["splits"].to_numpy(), rows["dividends"].to_numpy()
        return factors_from_actions(dates, close, *actions), True
    return factors_from_adjusted(dates, close, rows["adj_close"].to_numpy()), True


def _plain_name(column: object) -> str:
    name = str(column).strip().strip("<>\ufeff").strip().lower()
    return _NAMES.get(name, name)


def _table(payload: Payload) -> pd.DataFrame:
    content = payload.content
    assert isinstance(content, bytes)
    if not content.strip():
        raise _no_table(payload, "the file is empty")
    if content.startswith(b"PAR1"):
        return _parquet_table(payload, content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _no_table(payload, f"neither Parquet nor UTF-8 text ({error})") from error
    header = text.lstrip().splitlines()[0]
    delimiter = max(",;\t|", key=header.count)
    rows = [row for row in csv.reader(io.StringIO(text.lstrip()), delimiter=delimiter) if row]
    uneven = next((n for n, row in enumerate(rows) if len(row) != len(rows[0])), None)
    if uneven is not None:
        found, expected = len(rows[uneven]), len(rows[0])
        raise _no_table(payload, f"row {uneven} has {found} cells, the header {expected}")
    return pd.DataFrame(rows[1:], columns=rows[0], dtype="object")


def _parquet_table(payload: Payload, content: bytes) -> pd.DataFrame:
    try:
        table = pd.read_parquet(io.BytesIO(content))
    except (arrow.ArrowException, OSError) as error:
        raise _no_table(payload, f"damaged Parquet ({error})") from error
    return table if isinstance(table.index, pd.RangeIndex) else table.reset_index()


def _own_rows(table: pd.DataFrame, payload: Payload) -> pd.DataFrame:
    """Rows of this symbol, where the file names symbols (Stooq writes GOOG.US)."""
    if len(set(table.columns)) != len(table.columns):
        raise _no_table(payload, f"columns are named twice: {list(table)}")
    if "symbol" not in table:
        return table
    names = table["symbol"].astype("str").str.strip().str.upper()
    wanted = payload.symbol.upper()
    own = table[(names == wanted) | (names == f"{wanted}.US")]
    if own.empty and len(table):
        known = ", ".join(sorted(set(names))[:20])
        raise SourceError(f"{payload.address} has no symbol {payload.symbol}; it knows {known}.")
    return own.reset_index(drop=True)


def _no_table(payload: Payload, why: str) -> BadPricesError:
    return BadPricesError(
        f"{payload.address} is no price table of {payload.symbol}: {why}. Expected are the columns "
        "Date, Open, High, Low, Close, Volume and, if known, Adj Close (CSV or Parquet)."
    )


def _dates(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Days without a time; NaT where a cell is no date (2013-03-01, 20130301, Mar 1, 2013)."""
    if isinstance(column.dtype, pd.DatetimeTZDtype):
        column = column.dt.tz_localize(None)
    if column.dtype.kind == "M":
        midnights: pd.Series[Any] = column.dt.normalize().astype("datetime64[us]")
        return midnights
    texts = column.astype("str").str.strip()
    iso = texts.str.extract(r"^(\d{4})-?(\d{2})-?(\d{2})(?:[T ].*)?$")
    days = pd.to_datetime(iso[0] + iso[1] + iso[2], format="%Y%m%d", errors="coerce")
    spelled = pd.to_datetime(texts.where(days.isna()), format="%b %d, %Y", errors="coerce")
    found: pd.Series[Any] = days.fillna(spelled).astype("datetime64[us]")
    return found


def _numbers(column: "pd.Series[Any]") -> "pd.Series[float]":
    """Float64; NaN where a cell is no number. Thousands separators must group by three."""
    if pd.api.types.is_numeric_dtype(column):
        return column.astype("float64")
    return pd.Series([_number(cell) for cell in column], index=column.index, dtype="float64")


def _number(cell: object) -> float:
    text = str(cell).strip()
    grouped = _GROUPED.fullmatch(text)
    if grouped:
        text = text.replace(grouped.group(1), "")
    try:
        return float(text) if "_" not in text else float("nan")
    except ValueError:
        return float("nan")
