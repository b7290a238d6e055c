"""`python -m serving sync`: lays what the registry and the ingest publish into the model store.

Two followers, each in a thread of its own so that a slow registry does not hold up prices: one for
the aliases `production` and `challenger` of every forecaster, one for the published snapshots
(fsspec). Either may be away for any time: the store keeps what it has, and the follower tries
again. A version that is refused is told through the outbox (`forecasting.events`).
"""

import hashlib
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import fsspec
import msgspec
from fsspec.implementations.local import LocalFileSystem

from forecasting import events
from forecasting.contract import Snapshot, decode
from forecasting.errors import ConfigError, ContractError, RegistryError
from forecasting.events import ModelUnservable
from forecasting.registry import CONTRACT_TAG, SIGNATURE_TAG, Registry, open_registry
from forecasting.settings import Settings
from forecasting.signing import read_public
from forecasting.store import engine_of
from serving.model_store import (
    CHALLENGER,
    PRODUCTION,
    ModelStore,
    Registered,
    check,
    write_registered,
)

log = logging.getLogger(__name__)

LONGEST_WAIT_SECONDS = 5.0
REMOTE_POLL_SECONDS = 5.0
"""How often prices are looked for when they are not on this machine's disk."""
REFUSED_AGAIN_SECONDS = 60.0
JOIN_SECONDS = 5.0
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.5, 30.0
"""Of a version that could not be taken up, through no fault of its own."""
IDLE_FACTOR = 10
WAKE_SECONDS = 0.02
"""How often a poke is looked for while waiting: one `stat` each time."""
TELL_SECONDS = 0.3
MOST_TO_TELL = 1000
MOST_OF_A_REASON = 2000
POINTER = "latest.json"


class Pointer(msgspec.Struct, frozen=True):
    """`latest.json`: which snapshot file beside it is the newest, and its sha256."""

    file: str
    sha256: str


class Teller:
    """Puts what sync has to tell into the outbox of the SQL store, which `serving drain` delivers.

    A database that is away holds up nobody: events wait here meanwhile, and go with the process.
    """

    def __init__(self, sql_url: str) -> None:
        self._url = sql_url
        self._waiting: deque[ModelUnservable] = deque(maxlen=MOST_TO_TELL)

    def refused(self, forecaster: str, version: int, reason: str) -> None:
        """Have it told that a version was refused."""
        event = ModelUnservable(
            forecaster=forecaster, version=version, reason=reason[:MOST_OF_A_REASON], where="sync"
        )
        self._waiting.append(event)

    def step(self) -> list[str]:
        """Write what waits; the events' names.

        Raises:
            ServiceError: the database is away.
        """
        if not self._waiting:
            return []
        told = []
        with engine_of(self._url) as engine:
            while self._waiting:
                events.put(engine, self._waiting[0])
                told.append(self._waiting.popleft().name)
        return told


Files = frozenset[tuple[str, int, int, int]]
"""Name, inode, size and time of change of each file of a folder."""


@dataclass(frozen=True)
class _Trouble:
    """A version that could not be taken up for a reason that is not its own."""

    error: Exception
    wait: float
    until: float


class AliasFollower:
    """Brings the versions behind `production` and `challenger` of each forecaster into the store.

    Args:
        registry: where the aliases are.
        store: where the versions go.
        trusted_key: PEM file of the key that they must be signed for, if any.
        on_refusal: called once with forecaster, version and reason of each version refused.
    """

    def __init__(
        self,
        registry: Registry,
        store: ModelStore,
        trusted_key: Path | None = None,
        on_refusal: Callable[[str, int, str], object] = lambda *_: None,
    ) -> None:
        self._registry = registry
        self._store = store
        self._trusted_key = trusted_key
        self._on_refusal = on_refusal
        self._sound: dict[tuple[str, int], Files] = {}
        self._troubles: dict[tuple[str, str], _Trouble] = {}

    def step(self) -> list[str]:
        """Take up every version that an alias moved to; what was, as `name/version`.

        A version that fails its checks is noted as refused and tried again a minute later. One that
        the registry does not give out, or that the disk has no room for, is tried again soon, then
        ever less often. What was there before stays, and the other forecasters go on; no challenger
        holds a production up.

        Raises:
            RegistryError: the registry is away.
        """
        wanted = self._registry.served_versions()
        names = sorted(wanted.keys() | set(self._store.forecasters()))
        taken: list[str] = []
        for alias in (PRODUCTION, CHALLENGER):
            for name in names:
                if not self._is_later(name, alias):
                    taken += self._try(name, alias, wanted.get(name, {}))
        return taken

    def _is_later(self, name: str, alias: str) -> bool:
        trouble = self._troubles.get((name, alias))
        return trouble is not None and time.monotonic() < trouble.until

    def _try(self, name: str, alias: str, aliases: Mapping[str, int]) -> list[str]:
        """`_follow`, and another time where the registry, a key or the disk stands in the way."""
        before = self._troubles.get((name, alias))
        try:
            taken = self._follow(name, alias, aliases)
        except (RegistryError, ConfigError, OSError) as error:
            if before is None or type(before.error) is not type(error):
                log.error("%s of %s stays as it is, tried again: %s", alias, name, error)
            wait = min(before.wait * 2, LONGEST_RETRY_SECONDS) if before else FIRST_RETRY_SECONDS
            self._troubles[name, alias] = _Trouble(error, wait, time.monotonic() + wait)
            return []
        if self._troubles.pop((name, alias), None):
            log.info("%s of %s is followed again", alias, name)
        return taken

    def _follow(self, name: str, alias: str, aliases: Mapping[str, int]) -> list[str]:
        version = aliases.get(alias)
        if alias == CHALLENGER and version in (None, aliases.get(PRODUCTION)):
            return [f"{name} without a challenger"] if self._store.drop_challenger(name) else []
        if version is None:
            return []  # what is in production stays until something else is
        if self._is_there(name, version, alias) or self._was_refused(name, version, alias):
            self._store.forget_refusal(name, version, REFUSED_AGAIN_SECONDS, alias)
            return []
        try:
            self._take(name, version, alias)
        except ContractError as error:
            self._refuse(name, version, alias, str(error))
            return []
        self._note_sound(name, version)
        log.info("installed %s version %d as %s", name, version, alias)
        return [f"{name}/{version}"]

    def _is_there(self, name: str, version: int, alias: str) -> bool:
        """Whether the store serves it, and it is whole: checked again if a file of it changed."""
        folder = self._store.version_folder(name, version)
        try:
            if version != self._pointed(name, alias):
                return False
            if self._sound.get((name, version)) == _files(folder):
                return True
            check(folder, name, version, self._trusted_key)
        except ContractError as error:
            if self._sound.pop((name, version), None) is not None:
                log.warning("%s version %d is damaged in the store: %s", name, version, error)
            return False
        self._note_sound(name, version)
        return True

    def _note_sound(self, name: str, version: int) -> None:
        self._sound[name, version] = _files(self._store.version_folder(name, version))

    def _pointed(self, name: str, alias: str) -> int | None:
        if alias == CHALLENGER:
            return self._store.challenger(name)
        current = self._store.current(name)
        return current.version if current else None

    def _was_refused(self, name: str, version: int, alias: str) -> bool:
        refused = self._store.refusals(name).get(alias)
        return (
            refused is not None
            and refused.version == version
            and refused.age_seconds() < REFUSED_AGAIN_SECONDS
            and refused.judged == self._judged(name, version)
        )

    def _judged(self, name: str, version: int) -> str:
        """What the registry says of a version that its judgement depends on."""
        tags = self._registry.version(name, version).tags
        return f"{tags.get(CONTRACT_TAG, '')} {tags.get(SIGNATURE_TAG, '')}"

    def _refuse(self, name: str, version: int, alias: str, reason: str) -> None:
        before = self._store.refusals(name).values()
        log.warning("refused %s version %d as %s: %s", name, version, alias, reason)
        self._store.refuse(name, version, reason, alias, self._judged(name, version))
        if all(each.version != version for each in before):
            self._on_refusal(name, version, reason)

    def _take(self, name: str, version: int, alias: str) -> None:
        registered = self._registered(name, version)
        if self._reuse(registered):
            self._store.adopt(name, version, alias)
            return
        folder = self._store.incoming()
        try:
            self._registry.download(name, version, folder)
            write_registered(folder, registered)
            self._store.install(name, version, folder, trusted_key=self._trusted_key, alias=alias)
        finally:
            self._store.clean(folder)

    def _registered(self, name: str, version: int) -> Registered:
        tags = self._registry.version(name, version).tags
        digest = tags.get(CONTRACT_TAG, "")
        if not digest:
            raise ContractError(
                f"{name} version {version} should carry the tag {CONTRACT_TAG} in the registry, "
                "as every version that was registered by this project does; it has none. Train "
                "and register it again."
            )
        return Registered(name, version, digest, tags.get(SIGNATURE_TAG, ""))

    def _reuse(self, registered: Registered) -> bool:
        """Whether the version lies in the store already, and is what the registry says now."""
        name, version = registered.forecaster, registered.version
        folder = self._store.version_folder(name, version)
        if not folder.is_dir():
            return False
        try:
            check(folder, name, version, self._trusted_key, registered)
        except ContractError:
            return False
        self._store.describe(registered)
        return True


def _files(folder: Path) -> Files:
    found = set()
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            stat = entry.stat()
            found.add((entry.name, stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return frozenset(found)


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


def follow(
    step: Callable[[], Sequence[object] | None],
    what: str,
    seconds: float,
    stop: threading.Event,
    wake: Callable[[], object] | None = None,
) -> None:
    """Call `step` every `seconds` until `stop`; while it fails, ever less often, said once.

    Args:
        step: gives back what it took up, or nothing.
        what: is followed, for the log.
        seconds: between two looks; more where looking costs much, see `pause_after`.
        stop: ends it.
        wake: what it returns is looked at all the time; a change ends the wait.
    """
    wait, said, look = seconds, "", 0.0
    while not stop.is_set():
        seen, started = wake and wake(), (time.monotonic(), time.thread_time())
        try:
            taken = step()
        except Exception as error:  # noqa: BLE001  (a store's own kind of error must not end it)
            if repr(error) != said:
                log.error("%s cannot be followed, what is there stays: %s", what, error)
            wait = min(max(wait, seconds) * 2, max(LONGEST_WAIT_SECONDS, seconds))
            said, taken = repr(error), None
        else:
            if said:
                log.info("%s can be followed again", what)
            wait, said = seconds, ""
        if not taken:
            look = pause_after(time.monotonic() - started[0], time.thread_time() - started[1])
        _wait(max(wait, look), stop, wake, seen)


def pause_after(seconds: float, cpu_seconds: float) -> float:
    """How long not to look again after a look that found nothing new.

    At least ten times what it took, so that neither this process nor the registry is busy with it
    for more than a tenth of the time; what was waited for (a slow registry) counts up to a bound.
    """
    return max(IDLE_FACTOR * cpu_seconds, min(IDLE_FACTOR * seconds, LONGEST_WAIT_SECONDS))


def _wait(
    seconds: float, stop: threading.Event, wake: Callable[[], object] | None, seen: object
) -> None:
    """Wait until the time is over, `stop` is set, or `wake` returns something else than `seen`."""
    deadline = time.monotonic() + seconds
    step = WAKE_SECONDS if wake else seconds
    while not stop.is_set() and (wake is None or wake() == seen):
        left = deadline - time.monotonic()
        if left <= 0:
            return
        stop.wait(min(left, step))


def main(settings: Settings) -> int:
    """Follow until SIGTERM or SIGINT.

    Raises:
        ConfigError: the trusted key cannot be read.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    trusted_key = Path(settings.trusted_key) if settings.trusted_key else None
    if trusted_key is not None:
        read_public(trusted_key)
    store = ModelStore(settings.model_store)
    store.clean_incoming()
    teller = Teller(settings.sql_url)
    registry = open_registry(settings)
    models = AliasFollower(registry, store, trusted_key, teller.refused)
    prices = PriceFollower(settings.published, store)
    pause = max(settings.poll_seconds, REMOTE_POLL_SECONDS if prices.is_remote else 0.0)
    threads = [
        threading.Thread(target=follow, args=arguments, daemon=True)
        for arguments in (
            (models.step, "the registry", settings.poll_seconds, stop, store.poked),
            (prices.step, "the price folder", pause, stop),
            (teller.step, "the outbox", TELL_SECONDS, stop),
        )
    ]
    for thread in threads:
        thread.start()
    log.info("following %s and %s into %s", registry.shown, settings.published, store.root)
    stop.wait()
    for thread in threads:
        thread.join(JOIN_SECONDS)
    return 0
