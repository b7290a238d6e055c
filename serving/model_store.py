"""The model store: a folder of verified model versions and latest prices that web workers read.

    models/<forecaster>/<version>/      a model version (contract.json, model.onnx, golden.json)
    models/<forecaster>/current.json    {"version": 3, "previous": [2, 1]}: what is to be served
    models/<forecaster>/refused.json    {"version": 4, "reason": ...}: what was not let in, and why
    prices/<symbol>.json                latest rows of a symbol (contract.Snapshot)

Every write is a rename, so a reader sees the old or the new, never half of one.
"""

import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import msgspec

from forecasting.contract import Snapshot, decode, encode, read_contract
from forecasting.errors import ContractError
from forecasting.inference import Forecaster

CURRENT_FILE = "current.json"
REFUSED_FILE = "refused.json"
KEPT_VERSIONS = 3
"""Earlier versions that stay on disk to fall back on."""

Fingerprint = tuple[tuple[str, int, int, int], ...]
"""Name, inode, modification time and size of files: differs when any was replaced or written."""


class Current(msgspec.Struct, frozen=True):
    """Which version is to be served, and those before it, latest first."""

    version: int
    previous: tuple[int, ...] = ()


class Refused(msgspec.Struct, frozen=True):
    """A version that was not let in."""

    version: int
    reason: str
    refused_at: datetime

    def age_seconds(self) -> float:
        """How long ago that was."""
        return (datetime.now(UTC) - self.refused_at).total_seconds()


class ModelStore:
    """Reads and writes one model store folder. Holds no state."""

    def __init__(self, root: Path) -> None:
        self.root = root

    # what readers use ---------------------------------------------------------------------------
    def forecasters(self) -> list[str]:
        """Names of the forecasters that have a folder."""
        return sorted(_folders(self.root / "models"))

    def current(self, forecaster: str) -> Current | None:
        """What is to be served; None if nothing was ever installed.

        Raises:
            ContractError: `current.json` cannot be read.
        """
        path = self._home(forecaster) / CURRENT_FILE
        try:
            return msgspec.json.decode(path.read_bytes(), type=Current)
        except FileNotFoundError:
            return None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ContractError(
                f"{path} should hold {{'version': <number>}}: {error}. "
                "The sync process writes it anew; or remove it."
            ) from error

    def fallbacks(self, forecaster: str) -> list[int]:
        """Installed versions to fall back on, best first: previously served, then the newest."""
        try:
            current = self.current(forecaster)
        except ContractError:
            current = None
        installed = sorted(
            (int(name) for name in _folders(self._home(forecaster)) if name.isdigit()), reverse=True
        )
        if current is None:
            return installed
        return [number for number in current.previous if number in installed]

    def version_folder(self, forecaster: str, version: int) -> Path:
        """Where a version lies."""
        return self._home(forecaster) / str(version)

    def refused(self, forecaster: str) -> Refused | None:
        """The version that sync last refused, if it was not replaced by a good one."""
        try:
            raw = (self._home(forecaster) / REFUSED_FILE).read_bytes()
            return msgspec.json.decode(raw, type=Refused)
        except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
            return None

    def model_fingerprint(self, forecaster: str) -> Fingerprint:
        """Changes when `current.json`, `refused.json` or a file of the current version changes."""
        home = self._home(forecaster)
        paths = [home / CURRENT_FILE, home / REFUSED_FILE]
        try:
            current = self.current(forecaster)
        except ContractError:
            current = None
        if current is not None:
            paths += sorted(home.glob(f"{current.version}/*"))
        return _fingerprint(paths)

    def price_files(self) -> dict[str, Fingerprint]:
        """Symbols that have a snapshot, each with its file's fingerprint."""
        paths = sorted((self.root / "prices").glob("*.json"))
        return {path.stem: _fingerprint([path]) for path in paths}

    def snapshot(self, symbol: str) -> Snapshot:
        """Latest rows of a symbol.

        Raises:
            ContractError: malformed, or of another symbol.
        """
        path = self._price_file(symbol)
        snapshot = decode(path.read_bytes(), Snapshot, str(path))
        if snapshot.symbol != symbol or len(snapshot.dates) != len(snapshot.ohlcv):
            raise ContractError(
                f"{path} should hold rows of {symbol}, one a date; got {snapshot.symbol} with "
                f"{len(snapshot.dates)} dates and {len(snapshot.ohlcv)} rows."
            )
        return snapshot

    # what sync uses -----------------------------------------------------------------------------
    def incoming(self) -> Path:
        """A fresh empty folder in the store, to fill and then `install`."""
        folder = self.root / "incoming" / uuid4().hex
        folder.mkdir(parents=True)
        return folder

    def clean_incoming(self) -> None:
        """Remove what an interrupted download left."""
        shutil.rmtree(self.root / "incoming", ignore_errors=True)

    def install(self, forecaster: str, version: int, folder: Path) -> None:
        """Verify a folder, move it to its place and make it the current version.

        Args:
            forecaster: registered name, which the contract must carry too.
            version: number in the registry.
            folder: in the same file system, see `incoming`; it is gone afterwards.

        Raises:
            ContractError: not a good version; the current one stays.
        """
        check(folder, forecaster, version)
        target = self.version_folder(forecaster, version)
        if target.exists():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        self.make_current(forecaster, version)

    def make_current(self, forecaster: str, version: int) -> None:
        """Point `current.json` to an installed version and forget versions long gone."""
        home = self._home(forecaster)
        try:
            before = self.current(forecaster)
        except ContractError:
            before = None
        chain = (before.version, *before.previous) if before else ()
        previous = tuple(n for n in dict.fromkeys(chain) if n != version)[:KEPT_VERSIONS]
        write_atomically(home / CURRENT_FILE, msgspec.json.encode(Current(version, previous)))
        (home / REFUSED_FILE).unlink(missing_ok=True)
        for name in _folders(home):
            if name.isdigit() and int(name) not in (version, *previous):
                shutil.rmtree(home / name, ignore_errors=True)

    def refuse(self, forecaster: str, version: int, reason: str) -> None:
        """Note why a version was not let in."""
        refused = Refused(version, reason, datetime.now(UTC))
        write_atomically(self._home(forecaster) / REFUSED_FILE, msgspec.json.encode(refused))

    def forget_refusal(self, forecaster: str, version: int, seconds: float) -> None:
        """Forget a refusal older than `seconds` of a version other than `version`.

        Production moved away from it; should it come back, it is judged anew.
        """
        refused = self.refused(forecaster)
        if refused and refused.version != version and refused.age_seconds() > seconds:
            (self._home(forecaster) / REFUSED_FILE).unlink(missing_ok=True)

    def put_snapshot(self, snapshot: Snapshot) -> None:
        """Replace the latest rows of a symbol."""
        write_atomically(self._price_file(snapshot.symbol), encode(snapshot))

    def _home(self, forecaster: str) -> Path:
        return self.root / "models" / forecaster

    def _price_file(self, symbol: str) -> Path:
        return self.root / "prices" / f"{symbol}.json"


def check(folder: Path, forecaster: str, version: int) -> Forecaster:
    """Load a folder as a version of `forecaster`.

    Raises:
        ContractError: incomplete, altered, or of another forecaster.
    """
    name = read_contract(folder).forecaster
    if name != forecaster:
        raise ContractError(f"{folder} is a version of {name}; {forecaster} was expected.")
    return Forecaster.load(folder, version)


def write_atomically(path: Path, raw: bytes) -> None:
    """Write a file so that readers see the old bytes or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as handle:
        handle.write(raw)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def _folders(parent: Path) -> Iterator[str]:
    if parent.is_dir():
        yield from (entry.name for entry in os.scandir(parent) if entry.is_dir())


def _fingerprint(paths: list[Path]) -> Fingerprint:
    found = []
    for path in paths:
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        found.append((path.name, stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return tuple(found)
