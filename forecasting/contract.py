"""What crosses from the loop to the server: a model version's folder, and the latest prices.

A model version is a folder that explains itself: `model.onnx`, `golden.json` (one input with its
output) and `contract.json`, which names the sha256 of every other file. This module is light on
purpose (numpy-free, no pandas), since the web workers import it.
"""

import hashlib
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from forecasting.errors import ContractError

CONTRACT_VERSION = 1
MODEL_FILE = "model.onnx"
GOLDEN_FILE = "golden.json"
CONTRACT_FILE = "contract.json"
COLUMNS = ("open", "high", "low", "close", "volume")
QUANTILE_LEVELS = tuple(round(i / 40, 3) for i in range(1, 40))
"""39 levels, 0.025 to 0.975."""


class Contract(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a model version is and how to call it.

    Inputs of the graph: `ohlcv` float32 [batch, context, 5] (columns as in `columns`), `dates`
    int64 [batch, context] (days since 1970-01-01), `symbol` int64 [batch] (index into
    `symbols`). Output: `quantiles` float32 [batch, horizon, len(quantile_levels)], prices.
    """

    version: int = CONTRACT_VERSION
    forecaster: str
    symbols: tuple[str, ...]
    kind: Literal["lstm", "volatility"]
    context: int
    horizon: int
    columns: tuple[str, ...] = COLUMNS
    quantile_levels: tuple[float, ...] = QUANTILE_LEVELS
    as_of: date
    train_start: date
    train_end: date
    dataset_md5: str
    dataset_rev: str
    run_id: str
    git_commit: str
    files: dict[str, str]

    def symbol_index(self, symbol: str) -> int:
        """Index of `symbol` in the graph's `symbol` input.

        Raises:
            ContractError: this version does not serve the symbol.
        """
        if symbol not in self.symbols:
            raise ContractError(
                f"{self.forecaster} serves {', '.join(self.symbols)}; got symbol {symbol!r}."
            )
        return self.symbols.index(symbol)

    def symbol_input(self, symbol: str) -> int:
        """What to ask the graph with: the index, or 0 for a symbol that this version does not list.

        The network looks at rows, and not at whose they are.
        """
        return self.symbols.index(symbol) if symbol in self.symbols else 0


class Golden(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input of the graph with the output it must reproduce (batch of 1)."""

    ohlcv: list[list[list[float]]]
    dates: list[list[int]]
    symbol: list[int]
    quantiles: list[list[list[float]]]


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Latest rows of one symbol as known on `as_of`, published by ingest, followed by the server.

    `ohlcv` has one row per entry of `dates`, oldest first, in the order of `COLUMNS`, adjusted
    for splits and dividends known by then so that the last row is as traded.
    """

    symbol: str
    as_of: date
    dataset_md5: str
    dataset_rev: str
    dates: list[date]
    ohlcv: list[tuple[float, float, float, float, float]]


class AnyContract(msgspec.Struct, frozen=True):
    """What contracts of every version have in common."""

    version: int = CONTRACT_VERSION


T = TypeVar("T", Contract, Golden, Snapshot, AnyContract)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def encode(value: Contract | Golden | Snapshot) -> bytes:
    """Readable JSON with sorted keys, so equal values are equal bytes."""
    return msgspec.json.format(msgspec.json.encode(value, order="deterministic"), indent=1)


def decode(raw: bytes, kind: type[T], where: str) -> T:
    """Decode and validate one of this module's files.

    Raises:
        ContractError: not JSON, or not of that type; the message names `where` and the field.
    """
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ContractError(f"{where} is not a valid {kind.__name__}: {error}.") from error


def read_contract(folder: Path) -> Contract:
    """Read `contract.json` of a model folder and check that this code understands it.

    Raises:
        ContractError: missing, malformed, or of another contract version.
    """
    path = folder / CONTRACT_FILE
    if not path.is_file():
        raise ContractError(f"{folder} holds no {CONTRACT_FILE}; it is not a model version.")
    raw = path.read_bytes()
    version = decode(raw, AnyContract, str(path)).version
    if version != CONTRACT_VERSION:  # before its fields, which another version may have changed
        raise ContractError(
            f"{path} has contract version {version}; this code reads {CONTRACT_VERSION}."
        )
    return decode(raw, Contract, str(path))


def verify_files(folder: Path, contract: Contract) -> None:
    """Check presence and sha256 of every file that the contract names.

    Raises:
        ContractError: a file is missing or altered.
    """
    for name, expected in sorted(contract.files.items()):
        path = folder / name
        if not path.is_file():
            raise ContractError(f"{folder} lacks {name}, which its contract names.")
        got = sha256_file(path)
        if got != expected:
            raise ContractError(f"{path} is altered: sha256 {expected} expected, {got} found.")


def seal(folder: Path, facts: Mapping[str, object]) -> Contract:
    """Write `contract.json` into a folder that holds the model's files; hashes are taken here.

    Args:
        folder: holds `model.onnx` and `golden.json`; every other file in it is named too.
        facts: the fields of `Contract` but `files`.
    """
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != CONTRACT_FILE)
    files = {name: sha256_file(folder / name) for name in names}
    contract = msgspec.convert({**facts, "files": files}, Contract)
    (folder / CONTRACT_FILE).write_bytes(encode(contract))
    return contract
