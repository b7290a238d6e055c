"""The model store: a folder of verified model versions and latest prices that web workers read.

    models/<forecaster>/<version>/       a model version (contract.json, model.onnx, golden.json),
                                         and registry.json: what the registry says of it
    models/<forecaster>/current.json     {"version": 3, "previous": [2, 1]}: what is to be served
    models/<forecaster>/challenger.json  {"version": 4}: what is compared with it, if anything is
    models/<forecaster>/refused.json     {"production": {"version": 5, "reason": ...}}: what was not
                                         let in behind which alias, and why
    prices/<symbol>.json                 latest rows of a symbol (contract.Snapshot)
    changed                              replaced after every change: the one file to look at
    poke                                 replaced to have sync look at the registry at once

Every write is a rename, so a reader sees the old or the new, never half of one.
"""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import msgspec

from forecasting.contract import (
    CONTRACT_FILE,
    Snapshot,
    decode,
    encode,
    read_contract,
    sha256_file,
)
from forecasting.errors import ContractError
from forecasting.inference import Forecaster

CURRENT_FILE = "current.json"
CHALLENGER_FILE = "challenger.json"
REFUSED_FILE = "refused.json"
REGISTRY_FILE = "registry.json"
CHANGED_FILE = "changed"
POKE_FILE = "poke"
PRODUCTION = "production"
CHALLENGER = "challenger"
KEPT_VERSIONS = 3
"""Earlier versions that stay on disk to fall back on."""

Mark = tuple[int, ...]
"""Inode, modification time and size of one file; empty if it is missing."""
Fingerprint = tuple[tuple[str, Mark], ...]
"""Name and mark of files: differs when any was replaced or written."""


class Registered(msgspec.Struct, frozen=True):
    """`registry.json`: what the registry says of a version that lies in the store.

    Attributes:
        contract_sha256: of `contract.json`, as it was when the version was registered.
        signature: see `forecasting.signing`; empty if there is none.
    """

    forecaster: str
    version: int
    contract_sha256: str
    signature: str = ""


class Challenger(msgspec.Struct, frozen=True):
    """Which version is compared with the current one."""

    version: int


class Current(msgspec.Struct, frozen=True):
    """Which version is to be served, and those before it, latest first."""

    version: int
    previous: tuple[int, ...] = ()


class Refused(msgspec.Struct, frozen=True):
    """A version that was not let in.

    Attributes:
        judged: what the registry said of it then; when it says something else, it is judged anew.
    """

    version: int
    reason: str
    refused_at: datetime
    judged: str = ""

    def age_seconds(self) -> float:
        """How long ago that was."""
        return (datetime.now(UTC) - self.refused_at).total_seconds()


class ModelStore:
    """Reads and writes one model store folder. Holds no state."""

    def __init__(self, root: Path) -> None:
        self.root = root

    # what readers use ---------------------------------------------------------------------------
    def generation(self) -> Mark:
        """Differs after every change: inode, time and size of one file; empty before the first."""
        return _mark(self.root / CHANGED_FILE)

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

    def challenger(self, forecaster: str) -> int | None:
        """Version that is compared with the current one, or None.

        Raises:
            ContractError: `challenger.json` cannot be read.
        """
        path = self._home(forecaster) / CHALLENGER_FILE
        try:
            return msgspec.json.decode(path.read_bytes(), type=Challenger).version
        except FileNotFoundError:
            return None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ContractError(
                f"{path} should hold {{'version': <number>}}: {error}. "
                "The sync process writes it anew; or remove it."
            ) from error

    def fallbacks(self, forecaster: str) -> list[int]:
        """Installed versions to fall back on, best first: previously served, then the newest.

        A challenger is none of them: it was never in production.
        """
        installed = self._installed(forecaster)
        try:
            current = self.current(forecaster)
        except ContractError:
            current = None
        if current is not None:
            return [number for number in current.previous if number in installed]
        try:
            challenger = self.challenger(forecaster)
        except ContractError:
            return []
        return sorted((number for number in installed if number != challenger), reverse=True)

    def version_folder(self, forecaster: str, version: int) -> Path:
        """Where a version lies."""
        return self._home(forecaster) / str(version)

    def refused(self, forecaster: str) -> Refused | None:
        """What sync last refused behind the alias `production`, if no good one replaced it."""
        return self.refusals(forecaster).get(PRODUCTION)

    def refusals(self, forecaster: str) -> dict[str, Refused]:
        """What sync last refused behind each alias, if no good one replaced it."""
        try:
            raw = (self._home(forecaster) / REFUSED_FILE).read_bytes()
            return msgspec.json.decode(raw, type=dict[str, Refused])
        except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
            return {}

    def model_fingerprint(self, forecaster: str) -> Fingerprint:
        """Changes when a pointer of the forecaster does, or a file of a version that one names."""
        home = self._home(forecaster)
        paths = [home / CURRENT_FILE, home / CHALLENGER_FILE, home / REFUSED_FILE]
        try:
            named = self._named(forecaster, previous=False)
        except ContractError:
            named = set()
        for version in sorted(named):
            paths += sorted(home.glob(f"{version}/*"))
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

    def poke(self) -> None:
        """Have sync look at the registry at once.

        Raises:
            OSError: the store cannot be written; sync looks at its usual pace.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        _write_mark(self.root / POKE_FILE)

    # what sync uses -----------------------------------------------------------------------------
    def poked(self) -> Mark:
        """Differs after every `poke`."""
        return _mark(self.root / POKE_FILE)

    def incoming(self) -> Path:
        """A fresh empty folder in the store, to fill and then `install`."""
        folder = self.root / "incoming" / uuid4().hex
        folder.mkdir(parents=True)
        return folder

    def clean(self, folder: Path) -> None:
        """Remove a folder of `incoming`, if it is still there."""
        shutil.rmtree(folder, ignore_errors=True)

    def clean_incoming(self) -> None:
        """Remove what an interrupted download or write left, and have readers look again."""
        shutil.rmtree(self.root / "incoming", ignore_errors=True)
        for pattern in (".*.tmp", "models/*/.*.tmp", "models/*/*/.*.tmp", "prices/.*.tmp"):
            for path in self.root.glob(pattern):
                path.unlink(missing_ok=True)
        with self._change():
            pass  # one that was interrupted may not have been announced

    def install(
        self,
        forecaster: str,
        version: int,
        folder: Path,
        *,
        trusted_key: Path | None = None,
        alias: str = PRODUCTION,
    ) -> None:
        """Verify a folder, move it to its place and make it current (or the challenger).

        Args:
            forecaster: registered name, which the contract must carry too.
            version: number in the registry.
            folder: in the same file system, see `incoming`; it is gone afterwards.
            trusted_key: see `check`.
            alias: behind which the version is served.

        Raises:
            ContractError: not a good version; what is there stays.
            ConfigError: `trusted_key` cannot be read.
            OSError: the disk is full; what is there stays.
        """
        check(folder, forecaster, version, trusted_key)
        target = self.version_folder(forecaster, version)
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._change():
            if target.exists():  # a damaged one; aside at once, so that half of it is never there
                target.rename(self.incoming() / "replaced")
            folder.rename(target)
        self.adopt(forecaster, version, alias)

    def adopt(self, forecaster: str, version: int, alias: str) -> None:
        """Make an installed version the current one, or the challenger."""
        if alias == CHALLENGER:
            self.make_challenger(forecaster, version)
        else:
            self.make_current(forecaster, version)

    def describe(self, version: Registered) -> None:
        """Bring an installed version's `registry.json` up to date."""
        path = self.version_folder(version.forecaster, version.version) / REGISTRY_FILE
        raw = msgspec.json.encode(version)
        if not path.is_file() or path.read_bytes() != raw:
            with self._change():
                write_atomically(path, raw)

    def make_current(self, forecaster: str, version: int) -> None:
        """Point `current.json` to an installed version and forget versions long gone."""
        try:
            before = self.current(forecaster)
        except ContractError:
            before = None
        chain = (before.version, *before.previous) if before else ()
        previous = tuple(n for n in dict.fromkeys(chain) if n != version)[:KEPT_VERSIONS]
        with self._change():
            self._write(forecaster, CURRENT_FILE, Current(version, previous))
            self._drop_refusals(forecaster, PRODUCTION, version)
        self._prune(forecaster)

    def make_challenger(self, forecaster: str, version: int) -> None:
        """Point `challenger.json` to an installed version."""
        with self._change():
            self._write(forecaster, CHALLENGER_FILE, Challenger(version))
            self._drop_refusals(forecaster, CHALLENGER)
        self._prune(forecaster)

    def drop_challenger(self, forecaster: str) -> bool:
        """Take the challenger, and a refusal of one, away; whether there was any."""
        path = self._home(forecaster) / CHALLENGER_FILE
        if not path.exists() and CHALLENGER not in self.refusals(forecaster):
            return False
        with self._change():
            path.unlink(missing_ok=True)
            self._drop_refusals(forecaster, CHALLENGER)
        self._prune(forecaster)
        return True

    def refuse(
        self,
        forecaster: str,
        version: int,
        reason: str,
        alias: str = PRODUCTION,
        judged: str = "",
    ) -> None:
        """Note why a version was not let in behind an alias."""
        refused = Refused(version, reason, datetime.now(UTC), judged)
        noted = self.refusals(forecaster) | {alias: refused}
        with self._change():
            self._write(forecaster, REFUSED_FILE, noted)

    def forget_refusal(
        self, forecaster: str, version: int, seconds: float, alias: str = PRODUCTION
    ) -> None:
        """Forget a refusal older than `seconds` of a version other than `version`.

        The alias moved away from it; should it come back, it is judged anew.
        """
        refused = self.refusals(forecaster).get(alias)
        if refused and refused.version != version and refused.age_seconds() > seconds:
            with self._change():
                self._drop_refusals(forecaster, alias)

    def put_snapshot(self, snapshot: Snapshot) -> None:
        """Replace the latest rows of a symbol."""
        with self._change():
            write_atomically(self._price_file(snapshot.symbol), encode(snapshot))

    # plumbing -----------------------------------------------------------------------------------
    @contextmanager
    def _change(self) -> Iterator[None]:
        """Announce what is done inside by replacing `changed`.

        The new file is there before anything is done: where a full disk refuses it nothing
        changes, so that no change stays unannounced.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with _prepared_mark(self.root / CHANGED_FILE):
            yield

    def _write(self, forecaster: str, name: str, value: object) -> None:
        write_atomically(self._home(forecaster) / name, msgspec.json.encode(value))

    def _drop_refusals(self, forecaster: str, alias: str, version: int | None = None) -> None:
        """Drop what was refused behind an alias, and `version` behind any."""
        noted = self.refusals(forecaster)
        left = {
            other: each
            for other, each in noted.items()
            if other != alias and each.version != version
        }
        if left and left != noted:
            self._write(forecaster, REFUSED_FILE, left)
        elif not left:
            (self._home(forecaster) / REFUSED_FILE).unlink(missing_ok=True)

    def _prune(self, forecaster: str) -> None:
        """Remove versions that neither pointer names; none while a pointer cannot be read."""
        try:
            named = self._named(forecaster, previous=True)
        except ContractError:
            return
        for number in self._installed(forecaster) - named:
            shutil.rmtree(self.version_folder(forecaster, number), ignore_errors=True)

    def _named(self, forecaster: str, *, previous: bool) -> set[int]:
        """Versions that the pointers name."""
        current, challenger = self.current(forecaster), self.challenger(forecaster)
        named = {challenger} if challenger is not None else set()
        if current is not None:
            named |= {current.version, *(current.previous if previous else ())}
        return named

    def _installed(self, forecaster: str) -> set[int]:
        return {int(name) for name in _folders(self._home(forecaster)) if name.isdigit()}

    def _home(self, forecaster: str) -> Path:
        return self.root / "models" / forecaster

    def _price_file(self, symbol: str) -> Path:
        return self.root / "prices" / f"{symbol}.json"


def check(
    folder: Path,
    forecaster: str,
    version: int,
    trusted_key: Path | None = None,
    registered: Registered | None = None,
) -> Forecaster:
    """Load a folder as a version of `forecaster`.

    Args:
        folder: a version's files.
        forecaster: registered name.
        version: number in the registry.
        trusted_key: PEM file of the public key that the version must be signed for. Without one a
            folder without `registry.json` is taken too: older stores have none.
        registered: what the registry says of the version; by default what `registry.json` says.

    Raises:
        ContractError: incomplete, altered, of another forecaster, not what was registered, or not
            signed.
        ConfigError: `trusted_key` cannot be read.
    """
    name = read_contract(folder).forecaster
    if name != forecaster:
        raise ContractError(f"{folder} is a version of {name}; {forecaster} was expected.")
    registered = registered or read_registered(folder)
    if registered is not None:
        _require_same(folder, registered, forecaster, version)
    if trusted_key is not None:
        _require_signed(folder, registered, forecaster, version, trusted_key)
    return Forecaster.load(folder, version)


def read_registered(folder: Path) -> Registered | None:
    """What `registry.json` of a version's folder says; None if there is none.

    Raises:
        ContractError: it cannot be read.
    """
    path = folder / REGISTRY_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Registered)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ContractError(
            f"{path} should hold forecaster, version and contract_sha256: {error}. "
            "The sync process lays the version anew when it starts."
        ) from error


def write_registered(folder: Path, version: Registered) -> None:
    """Write `registry.json` into a folder that is to be installed."""
    write_atomically(folder / REGISTRY_FILE, msgspec.json.encode(version))


def _require_same(folder: Path, registered: Registered, forecaster: str, version: int) -> None:
    if (registered.forecaster, registered.version) != (forecaster, version):
        raise ContractError(
            f"{folder} is {registered.forecaster} version {registered.version}; {forecaster} "
            f"version {version} was expected."
        )
    found = sha256_file(folder / CONTRACT_FILE)
    if found != registered.contract_sha256:
        raise ContractError(
            f"{folder / CONTRACT_FILE} is not the one that was registered: sha256 "
            f"{registered.contract_sha256} expected, {found} found. Train again."
        )


def _require_signed(
    folder: Path,
    registered: Registered | None,
    forecaster: str,
    version: int,
    trusted_key: Path,
) -> None:
    if registered is None:
        raise ContractError(
            f"{folder} should hold {REGISTRY_FILE} with a signature for {trusted_key}; it holds "
            "none. The sync process writes it when it starts."
        )
    from forecasting.signing import verify  # heavy, and only needed where a key is trusted

    verify(trusted_key, forecaster, version, registered.contract_sha256, registered.signature)


def write_atomically(path: Path, raw: bytes) -> None:
    """Write a file so that readers see the old bytes or the new ones.

    Raises:
        OSError: it cannot be written; the old bytes stay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as handle:
            handle.write(raw)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _write_mark(path: Path) -> None:
    with _prepared_mark(path):
        pass


@contextmanager
def _prepared_mark(path: Path) -> Iterator[None]:
    """Make a file before what is done inside, and put it in its place afterwards.

    It is put there after a failure too, which may have come when something was done already.
    """
    temporary = _temporary(path)
    temporary.write_bytes(b"")
    try:
        yield
    finally:
        # inodes are used again and the kernel's clock ticks slowly: the time tells them apart
        now = time.time_ns()
        os.utime(temporary, ns=(now, now))
        temporary.replace(path)


def _mark(path: Path) -> Mark:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return ()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")


def _folders(parent: Path) -> Iterator[str]:
    if parent.is_dir():
        yield from (entry.name for entry in os.scandir(parent) if entry.is_dir())


def _fingerprint(paths: list[Path]) -> Fingerprint:
    marks = ((path.name, _mark(path)) for path in paths)
    return tuple((name, mark) for name, mark in marks if mark)
