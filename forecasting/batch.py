"""Forecasts of many symbols without a server: the numbers that it answers with, as one table.

Every window is computed by itself, as the server computes the forecast from a symbol's latest
prices: in a larger batch matrix products are summed in another order, and one number in a hundred
has another last digit. A window takes a fifth of a millisecond, reading its prices takes longer.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_OID, uuid4, uuid5

import fsspec
import numpy as np
import orjson
import pyarrow as arrow
import pyarrow.parquet as parquet
from numpy.typing import NDArray

from forecasting.assignment import Held
from forecasting.contract import CONTRACT_FILE, Contract, Snapshot, sha256_file
from forecasting.errors import (
    BadPricesError,
    ConfigError,
    ContractError,
    DataError,
    HistoryError,
    ModelError,
    ServiceError,
)
from forecasting.inference import Forecaster
from forecasting.predictions import Source, Window, computed_line, json_numbers
from forecasting.quantiles import medians
from forecasting.registry import Registry
from forecasting.sessions import sessions_after
from forecasting.signing import verify

WINDOWS_A_LINE = 256
"""Forecasts in one line of the prediction log."""
SCHEMA = arrow.schema(
    [
        ("id", arrow.string()),
        ("symbol", arrow.string()),
        ("forecaster", arrow.string()),
        ("model_version", arrow.int64()),
        ("run_id", arrow.string()),
        ("dataset_md5", arrow.string()),
        ("prices_md5", arrow.string()),
        ("as_of", arrow.date32()),
        ("origin", arrow.date32()),
        ("origin_close", arrow.float64()),
        ("horizon", arrow.int32()),
        ("target", arrow.date32()),
        ("median", arrow.float64()),
        ("quantiles", arrow.list_(arrow.float64())),
        ("levels", arrow.list_(arrow.float64())),
    ]
)
"""One row a symbol and horizon; the names are those of the server's answers."""
_EPOCH_ORDINAL = date(1970, 1, 1).toordinal()


@dataclass(frozen=True, eq=False)
class Batch:
    """Forecasts of one version.

    Attributes:
        windows: what each was made from, and for when.
        quantiles: float32 [windows, horizon, levels], prices.
    """

    contract: Contract
    version: int
    windows: list[Window]
    quantiles: NDArray[np.float32]

    def lines(self) -> Iterator[tuple[bytes, int]]:
        """Lines of the prediction log, each with how many forecasts it holds."""
        for start in range(0, len(self.windows), WINDOWS_A_LINE):
            some = slice(start, start + WINDOWS_A_LINE)
            windows, numbers = self.windows[some], json_numbers(self.quantiles[some])
            yield computed_line(self.contract, self.version, windows, numbers), len(windows)

    def rows(self, as_of: date) -> Iterator[dict[str, Any]]:
        """Rows of the table, with the numbers that the log and the server write as text."""
        contract = self.contract
        shared = {
            "forecaster": contract.forecaster,
            "model_version": self.version,
            "run_id": contract.run_id,
            "dataset_md5": contract.dataset_md5,
            "as_of": as_of,
            "levels": contract.quantile_levels,
        }
        middle = _as_written(medians(self.quantiles, contract.quantile_levels))
        for window, quantiles, center in zip(
            self.windows, _as_written(self.quantiles), middle, strict=True
        ):
            for step, target in enumerate(window.targets, start=1):
                yield {
                    **shared,
                    "id": window.id,
                    "symbol": window.symbol,
                    "prices_md5": window.prices_md5,
                    "origin": window.origin,
                    "origin_close": window.origin_close,
                    "horizon": step,
                    "target": target,
                    "median": center[step - 1],
                    "quantiles": quantiles[step - 1],
                }


def load(registry: Registry, held: Held, folder: Path, trusted_key: Path | None) -> Forecaster:
    """Download a version into an empty folder and load it, with the checks of the server.

    Args:
        trusted_key: PEM file of the public key that it must be signed for, if any.

    Raises:
        RegistryError: it cannot be downloaded.
        ContractError: it is not what was registered, does not load, or is not signed.
        ConfigError: the key cannot be read.
    """
    name, version = held.forecaster, held.version
    loaded = Forecaster.load(registry.download(name, version, folder), version)
    found = loaded.contract.forecaster, sha256_file(folder / CONTRACT_FILE)
    if found != (name, held.contract_sha256):
        raise ContractError(
            f"{name} version {version} was registered with a {CONTRACT_FILE} of sha256 "
            f"{held.contract_sha256 or '(none)'}; the registry gives out one of {found[0]} with "
            f"{found[1]}. Train again."
        )
    if trusted_key is not None:
        verify(trusted_key, name, version, held.contract_sha256, held.signature)
    return loaded


# --- forecasts -------------------------------------------------------------------------------


def forecast(
    forecaster: Forecaster,
    symbols: Iterable[str],
    as_of: date,
    snapshot_of: Callable[[str], Snapshot],
    source: Source = "batch",
) -> tuple[Batch, dict[str, str]]:
    """Forecast symbols with one version, from what is known on `as_of`.

    Args:
        forecaster: the version.
        symbols: whose prices; a symbol that the version was not trained for is forecast as well.
        as_of: the day it pretends to be; the day of the snapshots.
        snapshot_of: latest rows of a symbol, see `datasets.snapshots`.
        source: how the prediction log names them.

    Returns:
        The forecasts, and why there is none of each other symbol.
    """
    contract = forecaster.contract
    windows, quantiles, refused = [], [], {}
    for symbol in symbols:
        try:
            _require_past(forecaster, as_of)
            snapshot = snapshot_of(symbol)
            ohlcv, days = _inputs(snapshot, contract)
            index = np.array([contract.symbol_input(symbol)], dtype=np.int64)
            quantiles.append(forecaster.predict(ohlcv, days, index))
        except (DataError, ModelError) as error:
            refused[symbol] = str(error)
            continue
        windows.append(_window(forecaster, snapshot, ohlcv, source))
    shape = (0, contract.horizon, len(contract.quantile_levels))
    numbers = np.concatenate([np.empty(shape, dtype=np.float32), *quantiles])
    return Batch(contract, forecaster.version, windows, numbers), refused


def _require_past(forecaster: Forecaster, as_of: date) -> None:
    known = forecaster.contract.as_of
    if known > as_of:
        raise HistoryError(
            f"Version {forecaster.version} of {forecaster.contract.forecaster} in production was "
            f"trained as of {known} and knows what came after {as_of}; forecast as of {known} or "
            "later, or roll back to an older version."
        )


def _inputs(
    snapshot: Snapshot, contract: Contract
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Inputs of the graph: float32 [1, context, 5] and days since 1970, int64 [1, context].

    Raises:
        HistoryError: fewer rows than the context.
        BadPricesError: a price that is none in the precision of the graph.
    """
    count, context, symbol = len(snapshot.dates), contract.context, snapshot.symbol
    if count < context:
        raise HistoryError(
            f"{context} rows of {symbol} are needed by {contract.forecaster}; {count} are known as "
            f"of {snapshot.as_of}. Take a later as_of or a symbol with more history."
        )
    with np.errstate(over="ignore", under="ignore"):
        ohlcv = np.array(snapshot.ohlcv[-context:], dtype=np.float64).astype(np.float32)
    if not (np.isfinite(ohlcv).all() and (ohlcv[:, :4] > 0).all()):
        raise BadPricesError(
            f"The last {context} rows of {symbol} as of {snapshot.as_of} should hold finite prices "
            "above zero in single precision; they do not. Correct them at the source."
        )
    days = [day.toordinal() - _EPOCH_ORDINAL for day in snapshot.dates[-context:]]
    return ohlcv[None], np.array([days], dtype=np.int64)


def _window(
    forecaster: Forecaster, snapshot: Snapshot, ohlcv: NDArray[np.float32], source: Source
) -> Window:
    """What is said of a forecast. Made again from the same, it has the same id."""
    contract, origin = forecaster.contract, snapshot.dates[-1]
    parts = (
        source,
        contract.forecaster,
        forecaster.version,
        contract.run_id,
        snapshot.symbol,
        origin,
        snapshot.dataset_md5,
        hashlib.sha256(ohlcv.tobytes()).hexdigest(),  # one dataset, two days: a revision between
    )
    return Window(
        id=str(uuid5(NAMESPACE_OID, " ".join(map(str, parts)))),
        source=source,
        symbol=snapshot.symbol,
        prices_md5=snapshot.dataset_md5,
        origin=origin,
        origin_close=snapshot.ohlcv[-1][3],
        targets=sessions_after(origin, contract.horizon),
    )


# --- the table -------------------------------------------------------------------------------


def table_of(batches: Iterable[Batch], as_of: date) -> arrow.Table:
    """Forecasts as one table, by symbol and horizon; see `SCHEMA`."""
    rows = [row for batch in batches for row in batch.rows(as_of)]
    rows.sort(key=lambda row: (row["symbol"], row["horizon"]))
    columns = {name: [row[name] for row in rows] for name in SCHEMA.names}
    return arrow.Table.from_pydict(columns, schema=SCHEMA)


def _as_written(values: NDArray[np.float32]) -> list[Any]:
    """Nested lists of the doubles that the JSON of `values` reads as: 806.19, not 806.190002."""
    found: list[Any] = orjson.loads(json_numbers(values))
    return found


def open_target(url: str) -> tuple[Any, str]:
    """File system and path of a file that is to be written.

    Raises:
        ConfigError: no URL that fsspec opens, or a folder.
    """
    wanted = f"output should be the path or fsspec URL of a Parquet file; got {url!r}"
    try:
        files, path = fsspec.core.url_to_fs(url)
        is_folder = url.endswith("/") or files.isdir(path)
    except (ValueError, ImportError, NotImplementedError) as error:
        raise ConfigError(f"{wanted}, which cannot be opened: {error}.") from error
    except OSError as error:
        raise _not_written(url, error) from error
    if is_folder:
        raise ConfigError(f"{wanted}, a folder. Add the name of the file.")
    return files, path


def write(table: arrow.Table, url: str) -> None:
    """Write a Parquet file under another name, then give it its own: it is there whole or not.

    Raises:
        ConfigError: see `open_target`.
        ServiceError: it cannot be written; what is there stays.
    """
    sink = arrow.BufferOutputStream()
    parquet.write_table(table, sink)
    files, path = open_target(url)
    folder, _, name = path.rpartition("/")
    part = f"{folder}/.{name}.{uuid4().hex}.part"
    try:
        files.makedirs(folder, exist_ok=True)
        files.pipe_file(part, sink.getvalue().to_pybytes())
        files.mv(part, path)
    except (OSError, NotImplementedError) as error:
        with suppress(OSError, NotImplementedError):
            files.rm_file(part)
        raise _not_written(url, error) from error


def _not_written(url: str, error: Exception) -> ServiceError:
    return ServiceError(
        f"Forecasts cannot be written to {url}: {error!r}. Check the address and that it can be "
        "written."
    )
