"""`python -m serving sync`: lays what the registry and the ingest publish into the model store.

Two followers, each in a thread of its own so that a slow registry does not hold up prices: one for
the alias `production` of every forecaster, one for the published snapshots (fsspec). Either may be
away for any time: the store keeps what it has, and the follower tries again.
"""

import hashlib
import logging
import shutil
import signal
import threading
from collections.abc import Callable
from typing import Any

import fsspec
import msgspec
from fsspec.implementations.local import LocalFileSystem

from forecasting.contract import Snapshot, decode
from forecasting.errors import ContractError, RegistryError
from forecasting.registry import Registry, open_registry
from forecasting.settings import Settings
from serving.model_store import ModelStore, check

log = logging.getLogger(__name__)

LONGEST_WAIT_SECONDS = 5.0
REMOTE_POLL_SECONDS = 5.0
"""How often prices are looked for when they are not on this machine's disk."""
REFUSED_AGAIN_SECONDS = 60.0
JOIN_SECONDS = 5.0
POINTER = "latest.json"


class Pointer(msgspec.Struct, frozen=True):
    """`latest.json`: which snapshot file beside it is the newest, and its sha256."""

    file: str
    sha256: str


class AliasFollower:
    """Brings the version behind each alias `production` into the store."""

    def __init__(self, registry: Registry, store: ModelStore) -> None:
        self._registry = registry
        self._store = store
        self._sound: set[tuple[str, int]] = set()

    def step(self) -> list[str]:
        """Install every version that production moved to; what was installed, as `name/version`.

        A version that fails its checks is noted as refused and tried again a minute later; the
        version served before stays.

        Raises:
            RegistryError: the registry is away, or does not give out the files of a version.
        """
        installed, failed = [], None
        for name, version in sorted(self._registry.production_versions().items()):
            if self._is_current(name, version) or self._was_refused(name, version):
                self._store.forget_refusal(name, version, REFUSED_AGAIN_SECONDS)
                continue
            try:
                self._install(name, version)
            except RegistryError as error:  # tried again soon; the other forecasters go on
                failed = error
            except ContractError as error:
                self._store.refuse(name, version, str(error))
                log.warning("refused %s version %d: %s", name, version, error)
            else:
                installed.append(f"{name}/{version}")
                log.info("installed %s version %d", name, version)
        if failed is not None:
            raise failed
        return installed

    def _is_current(self, name: str, version: int) -> bool:
        """Whether the store serves it; what lay there before this process is checked once."""
        try:
            current = self._store.current(name)
            if current is None or current.version != version:
                return False
            if (name, version) not in self._sound:
                check(self._store.version_folder(name, version), name, version)
        except ContractError:
            return False
        self._sound.add((name, version))
        return True

    def _was_refused(self, name: str, version: int) -> bool:
        refused = self._store.refused(name)
        return (
            refused is not None
            and refused.version == version
            and refused.age_seconds() < REFUSED_AGAIN_SECONDS
        )

    def _install(self, name: str, version: int) -> None:
        folder = self._store.incoming()
        try:
            self._registry.download(name, version, folder)
            self._store.install(name, version, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class PriceFollower:
    """Brings the newest published snapshot of each symbol into the store.

    Attributes:
        is_remote: whether `url` is anything but this machine's disk.
    """

    def __init__(self, url: str, store: ModelStore) -> None:
        self._files, self._root = fsspec.core.url_to_fs(url)
        self._store = store
        self._pointers: dict[str, bytes] = {}
        self._errors: dict[str, str] = {}
        self.is_remote = not isinstance(self._files, LocalFileSystem)

    def step(self) -> list[str]:
        """Take every snapshot whose pointer changed; the symbols.

        Raises:
            OSError: the published folder cannot be read.
        """
        taken = []
        for symbol in self._symbols():
            folder = f"{self._root}/{symbol}"
            try:
                raw = self._read(f"{folder}/{POINTER}")
                if raw == self._pointers.get(symbol):
                    continue
                self._store.put_snapshot(self._fetch(folder, symbol, raw))
            except FileNotFoundError:
                continue  # nothing published yet, or being replaced
            except (ContractError, OSError) as error:  # the other symbols go on
                self._say(symbol, str(error))
                continue
            self._pointers[symbol] = raw
            self._errors.pop(symbol, None)
            taken.append(symbol)
        return taken

    def _symbols(self) -> list[str]:
        try:
            if self.is_remote:
                self._files.invalidate_cache()
            entries = self._files.ls(self._root, detail=True)
        except FileNotFoundError:
            return []
        return sorted(
            entry["name"].rstrip("/").rsplit("/", 1)[-1]
            for entry in entries
            if entry["type"] == "directory"
        )

    def _fetch(self, folder: str, symbol: str, raw: bytes) -> Snapshot:
        where = f"{folder}/{POINTER}"
        try:
            pointer = msgspec.json.decode(raw, type=Pointer)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ContractError(
                f'{where} should hold {{"file": ..., "sha256": ...}}: {error}. Ingest again.'
            ) from error
        if "/" in pointer.file:
            raise ContractError(f"{where} should name a file beside it; got {pointer.file!r}.")
        content = self._read(f"{folder}/{pointer.file}")
        found = hashlib.sha256(content).hexdigest()
        if found != pointer.sha256:
            raise ContractError(
                f"{folder}/{pointer.file} is altered: sha256 {pointer.sha256} expected, {found} "
                "found. Ingest again."
            )
        snapshot = decode(content, Snapshot, f"{folder}/{pointer.file}")
        if snapshot.symbol != symbol:
            raise ContractError(f"{folder} should hold {symbol}; got {snapshot.symbol}.")
        return snapshot

    def _read(self, path: str) -> bytes:
        content: bytes = self._files.cat_file(path)
        return content

    def _say(self, symbol: str, error: str) -> None:
        if self._errors.get(symbol) != error:
            self._errors[symbol] = error
            log.warning("prices of %s stay as they are: %s", symbol, error)


def follow(step: Callable[[], Any], what: str, seconds: float, stop: threading.Event) -> None:
    """Call `step` every `seconds` until `stop`; while it fails, ever less often, said once."""
    wait, said = seconds, ""
    while not stop.is_set():
        try:
            step()
        except Exception as error:  # noqa: BLE001  (a store's own kind of error must not end it)
            if repr(error) != said:
                log.error("%s cannot be followed, what is there stays: %s", what, error)
            wait = min(max(wait, seconds) * 2, max(LONGEST_WAIT_SECONDS, seconds))
            said = repr(error)
        else:
            if said:
                log.info("%s can be followed again", what)
            wait, said = seconds, ""
        stop.wait(wait)


def main(settings: Settings) -> int:
    """Follow until SIGTERM or SIGINT."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    store = ModelStore(settings.model_store)
    store.clean_incoming()
    models = AliasFollower(open_registry(settings), store)
    prices = PriceFollower(settings.published, store)
    pause = max(settings.poll_seconds, REMOTE_POLL_SECONDS if prices.is_remote else 0.0)
    threads = [
        threading.Thread(
            target=follow, args=(models.step, "the registry", settings.poll_seconds, stop)
        ),
        threading.Thread(target=follow, args=(prices.step, "the price folder", pause, stop)),
    ]
    for thread in threads:
        thread.daemon = True
        thread.start()
    log.info("following %s and %s into %s", settings.mlflow_uri, settings.published, store.root)
    stop.wait()
    for thread in threads:
        thread.join(JOIN_SECONDS)
    return 0
