"""Dataset versions: one git commit an ingest, the prices themselves in DVC.

The registry lies at `settings.data_dir`, a git and DVC repository of its own:

    prices.dvc                         md5 of the folder `prices`: the dataset's version
    prices/<SYMBOL>/rows.parquet       prices as traded, with the day each became known
    prices/<SYMBOL>/factors.parquet    splits and dividends

The commit is the record; the folder `prices` is only where DVC picks new files up, so a run killed
half-way leaves the last version current. Git is spoken through dulwich with an identity of our own:
no git configuration of the user is read or written.
"""

import hashlib
import io
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any, TypeVar

import colorama
import fsspec
import msgspec
import numpy as np
import pandas as pd
import pyarrow as arrow
import pyarrow.parquet as parquet
from dulwich.config import StackedConfig
from dulwich.errors import FileFormatException, NotGitRepository
from dulwich.objects import Blob, Commit, EmptyFileException, ShaFile, Tree
from dulwich.refs import Ref
from dulwich.repo import Repo as GitRepo
from dvc.exceptions import DvcException
from dvc.repo import Repo as DvcRepo
from dvc_data.hashfile.hash_info import HashInfo
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem

from forecasting.contract import COLUMNS, Snapshot, encode
from forecasting.errors import BadPricesError, DatasetError
from forecasting.prices import (
    TIME,
    Frame,
    RawPrices,
    adjusted,
    check_as_of,
    quarantine,
    validate,
    visible_factors,
    visible_rows,
)
from forecasting.revisions import Merged, merge
from forecasting.settings import Settings
from forecasting.sources import Payload, check_symbol, download, parse

T = TypeVar("T")
log = logging.getLogger(__name__)
colorama.deinit()  # importing dvc wraps stdout and stderr

POINTER = "latest.json"
SNAPSHOT_ROWS = 512
SNAPSHOTS_KEPT = 8

_TRACKED = "prices"
_DVC_FILE = b"prices.dvc"
_FILES = ("rows", "factors")
_BRANCH = Ref(b"refs/heads/main")
_WHO = b"perennial <perennial@localhost>"
_LOCK_SECONDS = 300
_NAMED_SYMBOLS = 20
_MOST_REMEMBERED = 32
_MD5 = re.compile(rb"md5: ([0-9a-f]{32})\.dir\b")
_HEX = re.compile(r"([0-9a-f]{32})(?:\.dir)?")
_DAMAGE = (
    NotGitRepository,
    FileFormatException,  # of a damaged object
    EmptyFileException,
    json.JSONDecodeError,
    zlib.error,
)
_DATA_ERRORS = (OSError, arrow.ArrowException)


@dataclass(frozen=True)
class DatasetVersion:
    """One version of the dataset, and what the ingest that made or confirmed it found.

    Attributes:
        md5: DVC's md5 of the folder `prices` (without `.dir`).
        rev: git commit in the data registry.
        symbols: every symbol in this version.
        as_of: date of the ingest.
        changed: whether this ingest made the version.
        rows: new sessions per ingested symbol.
        revised: sessions that the vendor changed, per ingested symbol.
        factors: new or changed splits and dividends, per ingested symbol.
        sources: name and address of the source, per ingested symbol.
    """

    md5: str
    rev: str
    symbols: tuple[str, ...]
    as_of: date
    changed: bool
    rows: dict[str, int] = field(default_factory=dict)
    revised: dict[str, int] = field(default_factory=dict)
    factors: dict[str, int] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


# --- ingest ----------------------------------------------------------------------------------


def ingest(
    settings: Settings, symbols: Sequence[str], as_of: date, *, publish_rows: bool = True
) -> DatasetVersion:
    """Take what is new up to `as_of` into the dataset: one commit, none if nothing changed.

    Safe against other processes doing the same. With `publish_rows` the latest rows of each symbol
    are published for the server, unless those of a later day are already: a training that pretends
    an earlier date must not set the served prices back (`publish` can). With `settings.dvc_remote`
    every version not yet there is pushed.

    Raises:
        SourceError: unknown symbol, or the source cannot be read.
        BadPricesError: a symbol's prices break the rules; all are refused, the bad ones are kept
            in quarantine, and the last good version stays current.
        HistoryError: `as_of` lies before the first row or in the future.
        DatasetError: the registry or the remote cannot be used. When it is the remote, the version
            is committed here, and the next ingest pushes it.
    """
    check_as_of(as_of)
    wanted = tuple(dict.fromkeys(check_symbol(symbol) for symbol in symbols))
    if not wanted:
        raise DatasetError("No symbol to ingest; at least one is expected, such as GOOG.")
    payloads = [download(settings, symbol) for symbol in wanted]
    fetched = _checked(settings, payloads, as_of)
    sources = {payload.symbol: payload.origin for payload in payloads}
    with _locked(settings):
        version, merged = _commit_new(settings, fetched, as_of, sources)
        if publish_rows:
            for symbol, result in merged.items():
                _publish_newer(settings, version, symbol, as_of, adjusted(result.raw, as_of))
        if settings.dvc_remote:
            _push(settings)
    return version


def _checked(settings: Settings, payloads: list[Payload], as_of: date) -> list[RawPrices]:
    """Parse and validate all; quarantine each bad one, then refuse."""
    good, refusals = [], []
    for payload in payloads:
        try:
            good.append(validate(parse(payload, as_of), settings.extra_closures))
        except BadPricesError as error:
            folder = _quarantine(settings, payload, error)
            refusals.append(f"{error}\nThe refused file is kept in {folder}.")
    if refusals:
        latest = current(settings)
        stays = f"version {latest.md5} stays current" if latest else "there is no version yet"
        raise BadPricesError("\n".join(refusals) + f"\nNothing was taken in; {stays}.")
    return good


def _quarantine(settings: Settings, payload: Payload, error: BadPricesError) -> Path:
    return quarantine(settings, payload.symbol, payload.file_name, payload.to_bytes(), error)


def _commit_new(
    settings: Settings, fetched: list[RawPrices], as_of: date, sources: dict[str, str]
) -> tuple[DatasetVersion, dict[str, Merged]]:
    _ensure_registry(settings)
    latest = current(settings)
    tree = _tree(settings, latest.md5) if latest else {}
    merged = {raw.symbol: _merged(settings, tree, raw, as_of) for raw in fetched}
    counts = {
        "rows": {symbol: result.new_rows for symbol, result in merged.items()},
        "revised": {symbol: result.revised_rows for symbol, result in merged.items()},
        "factors": {symbol: result.new_factors for symbol, result in merged.items()},
    }
    _log_revisions(merged, as_of)
    changed = [result.raw for result in merged.values() if result.changed]
    if latest and not changed:
        return DatasetVersion(
            latest.md5, latest.rev, latest.symbols, as_of, False, **counts, sources=sources
        ), merged
    _lay_out(settings, tree, changed)
    symbols = {name.split("/")[0] for name in tree} | merged.keys()
    return _commit(settings, tuple(sorted(symbols)), as_of, counts, sources), merged


def _merged(settings: Settings, tree: dict[str, str], raw: RawPrices, as_of: date) -> Merged:
    """`raw` merged into the stored prices; checked again where a gap could lie between them."""
    stored = _read_raw(settings, tree, raw.symbol) if f"{raw.symbol}/rows.parquet" in tree else None
    result = merge(stored, raw, as_of)
    if stored is not None and result.changed and raw.rows["date"][0] > stored.rows["date"][0]:
        rows, factors = visible_rows(result.raw, as_of), visible_factors(result.raw, as_of)
        validate(RawPrices(raw.symbol, rows, factors), settings.extra_closures)
    return result


def _log_revisions(merged: dict[str, Merged], as_of: date) -> None:
    for symbol, result in merged.items():
        if result.revised_rows:
            log.warning(
                "The source of %s changed %d sessions that were already known; the earlier values "
                "stay visible before %s.",
                symbol,
                result.revised_rows,
                as_of,
            )


# --- reading ---------------------------------------------------------------------------------

_remembered: ContextVar[dict[tuple[object, ...], Any] | None] = ContextVar(
    "remembered", default=None
)


@contextmanager
def remembering() -> Iterator[None]:
    """Within it this thread reads no prices twice: for a process that asks for them all day.

    What is remembered is named by its content, so that it cannot be out of date. It is told to
    nobody that a cache or remote is gone meanwhile.
    """
    token = _remembered.set({})
    try:
        yield
    finally:
        _remembered.reset(token)


def _once(key: tuple[object, ...], read: Callable[[], T]) -> T:
    known = _remembered.get()
    if known is None:
        return read()
    if key not in known:
        if len(known) >= _MOST_REMEMBERED:
            known.pop(next(iter(known)))
        known[key] = read()
    found: T = known[key]
    return found


def current(settings: Settings) -> DatasetVersion | None:
    """The latest version, None before the first ingest.

    Raises:
        DatasetError: the registry is damaged.
    """
    with _git(settings) as git:
        head = git.refs.follow(_BRANCH)[1] if git is not None else None
        return _version(git, git[head]) if git is not None and head is not None else None


def versions(settings: Settings) -> list[DatasetVersion]:
    """Every version, newest first.

    Raises:
        DatasetError: the registry is damaged.
    """
    return list(_versions(settings))


def _versions(settings: Settings) -> Iterator[DatasetVersion]:
    with _git(settings) as git:
        head = git.refs.follow(_BRANCH)[1] if git is not None else None
        if git is None or head is None:
            return
        for entry in git.get_walker(include=[head]):
            yield _version(git, entry.commit)


def find(settings: Settings, md5_or_rev: str | None = None) -> DatasetVersion:
    """The version with that md5 or git commit (a prefix of 7 will do); the latest if None.

    Raises:
        DatasetError: there is no such version.
    """
    latest = current(settings)
    if latest is None:
        raise DatasetError(
            f"There is no dataset in {settings.data_dir} yet; run an ingest first "
            "(the flow `ingest`, or `train`, which does it too)."
        )
    if md5_or_rev is None:
        return latest
    wanted = md5_or_rev.removesuffix(".dir")
    if len(wanted) >= 7:
        for version in _versions(settings):
            if version.md5.startswith(wanted) or version.rev.startswith(wanted):
                return version
    raise DatasetError(
        f"There is no dataset version {md5_or_rev!r} in {settings.data_dir}; the latest is "
        f"{latest.md5} (git {latest.rev[:10]}), `git log` there shows all."
    )


def source_of(settings: Settings, symbol: str, md5: str) -> str:
    """Where the newest rows of a symbol in that version came from; empty if nobody wrote it down.

    Raises:
        DatasetError: no such version.
    """
    wanted = find(settings, md5)
    history = iter(_versions(settings))
    for version in history:
        if version.rev == wanted.rev:
            found = (each.sources.get(symbol, "") for each in (version, *history))
            return next((each for each in found if each), "")
    return ""


def row_span(
    settings: Settings, symbol: str, md5: str, first: date, last: date
) -> tuple[str, int, int]:
    """Rows of a version's file that hold a span of sessions.

    Returns:
        md5 of `<symbol>/rows.parquet` and the numbers of its first and last row in the span, from
        0; rows that were revised in between are among them.

    Raises:
        DatasetError: no such version, it lacks the symbol, or has no row of the span.
    """
    version = find(settings, md5)
    tree = _tree(settings, version.md5)
    days = _read_raw(settings, tree, symbol).rows["date"].to_numpy().astype("datetime64[D]")
    inside = np.flatnonzero((days >= np.datetime64(first)) & (days <= np.datetime64(last)))
    if not len(inside):
        raise DatasetError(f"Dataset version {md5} has no row of {symbol} from {first} to {last}.")
    return tree[f"{symbol}/rows.parquet"], int(inside[0]), int(inside[-1])


def read_bytes(settings: Settings, md5: str, path: str) -> bytes:
    """A file of any version, byte for byte; fetched from the remote if it is not here.

    Args:
        md5: version, as in `DatasetVersion.md5`.
        path: such as `GOOG/rows.parquet`.

    Raises:
        DatasetError: no such version or file, or its bytes are neither here nor at the remote.
    """
    tree = _tree(settings, find(settings, md5).md5)
    if path not in tree:
        raise DatasetError(f"Dataset version {md5} has no {path}; it has {', '.join(tree)}.")
    return _object(settings, tree[path])


def load_raw(settings: Settings, symbol: str, md5_or_rev: str | None = None) -> RawPrices:
    """Everything known of a symbol in one version (the latest if None).

    Raises:
        DatasetError: no such version, or it lacks the symbol.
    """
    version = find(settings, md5_or_rev)
    return _read_raw(settings, _tree(settings, version.md5), symbol)


def load_frame(settings: Settings, symbol: str, as_of: date, md5: str | None = None) -> Frame:
    """Adjusted prices of a symbol as known on `as_of`.

    Raises:
        DatasetError: no such version, or it lacks the symbol.
        HistoryError: `as_of` lies before the first row or in the future.
    """
    check_as_of(as_of)
    if _remembered.get() is None or md5 is None:
        return adjusted(load_raw(settings, symbol, md5), as_of)
    key = ("frame", settings.data_dir, md5, symbol, as_of)
    return _once(key, lambda: adjusted(load_raw(settings, symbol, md5), as_of)).copy()


def _read_raw(settings: Settings, tree: dict[str, str], symbol: str) -> RawPrices:
    if f"{symbol}/rows.parquet" not in tree:
        known = sorted({name.split("/")[0] for name in tree})
        more = f" and {len(known) - _NAMED_SYMBOLS} more" if len(known) > _NAMED_SYMBOLS else ""
        raise DatasetError(
            f"The dataset has no symbol {symbol!r}; it has {', '.join(known[:_NAMED_SYMBOLS])}"
            f"{more}. Ingest it first."
        )
    digests = [tree[f"{symbol}/{kind}.parquet"] for kind in _FILES]
    return _once(("raw", symbol, *digests), lambda: _parsed(settings, tree, symbol))


def _parsed(settings: Settings, tree: dict[str, str], symbol: str) -> RawPrices:
    tables = []
    for kind in _FILES:
        content = _object(settings, tree[f"{symbol}/{kind}.parquet"])
        tables.append(parquet.read_table(io.BytesIO(content)).to_pandas())
    rows, factors = tables
    rows = rows.astype({"date": TIME, "known_on": TIME})
    factors = factors.astype({"ex_date": TIME, "known_on": TIME, "reason": "str"})
    return RawPrices(symbol, rows, factors)


# --- publishing ------------------------------------------------------------------------------


def publish(
    settings: Settings,
    version: DatasetVersion,
    symbol: str,
    as_of: date,
    rows: int = SNAPSHOT_ROWS,
) -> str:
    """Publish the last `rows` rows of a symbol as known on `as_of`, for the server to follow.

    Returns:
        Address of the snapshot; `latest.json` beside it names it and its sha256.

    Raises:
        DatasetError: the version lacks the symbol, or the address cannot be written.
        HistoryError: `as_of` lies before the first row or in the future.
    """
    frame = load_frame(settings, symbol, as_of, version.md5)
    return _publish(settings, version, symbol, as_of, frame, rows)


def snapshots(
    settings: Settings, version: DatasetVersion, as_of: date
) -> Callable[[str], Snapshot]:
    """What `publish` publishes as of `as_of`, symbol by symbol; the version is opened once.

    Returns:
        A function from symbol to snapshot. It raises DatasetError where the version lacks the
        symbol, HistoryError where nothing of it was known by `as_of`.

    Raises:
        DatasetError: the version's bytes are neither here nor at the remote.
        HistoryError: `as_of` lies in the future.
    """
    check_as_of(as_of)
    tree = _tree(settings, version.md5)

    def read(symbol: str) -> Snapshot:
        frame = adjusted(_read_raw(settings, tree, symbol), as_of)
        return _snapshot(version, symbol, as_of, frame, SNAPSHOT_ROWS)

    return read


def _publish_newer(
    settings: Settings, version: DatasetVersion, symbol: str, as_of: date, frame: Frame
) -> None:
    published = _published_day(settings, symbol)
    if published is not None and published > as_of:
        log.info("%s is published as of %s already; %s is not", symbol, published, as_of)
        return
    _publish(settings, version, symbol, as_of, frame)


def _published_day(settings: Settings, symbol: str) -> date | None:
    """Day of the snapshot that the pointer names; None if there is none that can be read."""
    try:
        fs, root = fsspec.core.url_to_fs(settings.published)
        raw = fs.cat_file(f"{root.rstrip('/')}/{symbol}/{POINTER}")
        return date.fromisoformat(msgspec.json.decode(raw)["file"][-15:-5])
    except (OSError, ValueError, ImportError, KeyError, TypeError):
        return None  # published anew, which also says what is wrong with the address


def _publish(
    settings: Settings,
    version: DatasetVersion,
    symbol: str,
    as_of: date,
    frame: Frame,
    rows: int = SNAPSHOT_ROWS,
) -> str:
    snapshot = encode(_snapshot(version, symbol, as_of, frame, rows))
    name = f"{version.md5}-{as_of}.json"
    pointer = msgspec.json.encode({"file": name, "sha256": hashlib.sha256(snapshot).hexdigest()})
    try:
        fs, root = fsspec.core.url_to_fs(settings.published)
        folder = f"{root.rstrip('/')}/{symbol}"
        fs.makedirs(folder, exist_ok=True)
        _write(fs, f"{folder}/{name}", snapshot)
        _write(fs, f"{folder}/{POINTER}", pointer)
        _prune(fs, folder, name)
    except (OSError, ValueError, ImportError) as error:
        raise DatasetError(
            f"Prices of {symbol} cannot be published to {settings.published}: {error}. "
            f"Check PERENNIAL_PUBLISHED_URL; version {version.md5} is committed."
        ) from error
    return f"{settings.published.rstrip('/')}/{symbol}/{name}"


def _snapshot(
    version: DatasetVersion, symbol: str, as_of: date, frame: Frame, rows: int
) -> Snapshot:
    latest = frame.iloc[-rows:]
    return Snapshot(
        symbol=symbol,
        as_of=as_of,
        dataset_md5=version.md5,
        dataset_rev=version.rev,
        dates=[day.date() for day in latest.index],
        ohlcv=list(latest[list(COLUMNS)].itertuples(index=False, name=None)),
    )


def _write(fs: Any, path: str, content: bytes) -> None:  # noqa: ANN401  (fsspec is untyped)
    """Write whole or not at all (object stores do so by themselves)."""
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, content)
        return
    _replace(Path(path), content)


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)


def _prune(fs: Any, folder: str, keep: str) -> None:  # noqa: ANN401  (fsspec is untyped)
    """Drop snapshots but the newest dates and `keep`."""
    names = [str(path).rsplit("/", 1)[-1] for path in fs.ls(folder, detail=False)]
    dated = sorted((name for name in names if name.count("-") == 3), key=lambda name: name[-15:])
    for name in dated[:-SNAPSHOTS_KEPT]:
        if name != keep:
            fs.rm_file(f"{folder}/{name}")


# --- the registry: git -----------------------------------------------------------------------


@contextmanager
def _locked(settings: Settings) -> Iterator[None]:
    """One writer at a time, also across processes; the same thread may enter twice."""
    settings.home.mkdir(parents=True, exist_ok=True)
    lock = FileLock(settings.home / "data.lock", timeout=_LOCK_SECONDS, is_singleton=True)
    try:
        with lock:
            yield
    except Timeout as error:
        raise DatasetError(
            f"Another process has held {lock.lock_file} for {_LOCK_SECONDS} s; wait for it or end "
            "it, then ingest again."
        ) from error


def _ensure_registry(settings: Settings) -> None:
    """Make the registry if there is none (whole or not at all); clear what a killed run left."""
    root = settings.data_dir
    if not root.exists():
        outside = settings.home / ".gitignore"  # a repository around us need not see us
        if not outside.exists():
            outside.write_text("*\n")
        part = root.with_name(f"{root.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        _make_registry(part)
        part.replace(root)
    for name in ("index.lock", "HEAD.lock", "config.lock", f"{_BRANCH.decode()}.lock"):
        (root / ".git" / name).unlink(missing_ok=True)


def _make_registry(root: Path) -> None:
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    (root / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
    (root / ".dvcignore").write_text("# Files that DVC leaves alone, as in .gitignore.\n")
    (root / ".gitignore").write_text(f"/{_TRACKED}\n")
    with GitRepo.init(str(root), config=StackedConfig([]), default_branch=b"main") as git:
        config = git.get_config()
        config.set((b"user",), b"name", b"perennial")
        config.set((b"user",), b"email", b"perennial@localhost")
        config.set((b"commit",), b"gpgsign", b"false")
        config.set((b"core",), b"autocrlf", b"false")
        config.write_to_path()


@contextmanager
def _git(settings: Settings) -> Iterator[GitRepo | None]:
    root = settings.data_dir
    if not root.exists():
        yield None
        return
    try:
        with GitRepo(str(root)) as git:
            yield git
    except (*_DAMAGE, KeyError, AssertionError) as error:
        raise _damaged(settings, error) from error


def _damaged(settings: Settings, error: Exception) -> DatasetError:
    return DatasetError(
        f"The data registry {settings.data_dir} is damaged ({type(error).__name__}: {error}). Move "
        "it away and ingest again, or restore it from a backup."
    )


def _version(git: GitRepo, commit: ShaFile) -> DatasetVersion:
    assert isinstance(commit, Commit)
    tree = git[commit.tree]
    assert isinstance(tree, Tree)
    blob = git[tree[_DVC_FILE][1]]
    found = _MD5.search(blob.data) if isinstance(blob, Blob) else None
    if found is None:
        raise KeyError(f"no md5 in prices.dvc of {commit.id.decode()}")
    facts = json.loads(commit.message.decode().rstrip().rsplit("\n", 1)[-1])
    return DatasetVersion(
        md5=found.group(1).decode(),
        rev=commit.id.decode(),
        symbols=tuple(facts["symbols"]),
        as_of=date.fromisoformat(facts["as_of"]),
        changed=True,
        rows=facts["rows"],
        revised=facts["revised"],
        factors=facts["factors"],
        sources=facts.get("sources", {}),  # versions before there were any tell none
    )


def _commit(
    settings: Settings,
    symbols: tuple[str, ...],
    as_of: date,
    counts: dict[str, dict[str, int]],
    sources: dict[str, str],
) -> DatasetVersion:
    """Add the folder to DVC and commit. Dated `as_of`, so equal histories have equal commits."""
    try:
        with _dvc(settings) as dvc:
            dvc.add(str(settings.data_dir / _TRACKED))
    except DvcException as error:
        raise _damaged(settings, error) from error
    facts = {"as_of": as_of.isoformat(), "symbols": symbols, **counts, "sources": sources}
    new = ", ".join(f"{symbol} +{count}" for symbol, count in counts["rows"].items())
    message = f"{new} as of {as_of}\n\n{json.dumps(facts)}\n"
    stamp = datetime.combine(as_of, time(), UTC).timestamp()
    with _git(settings) as git:
        assert git is not None
        work = git.get_worktree()
        work.stage([".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "prices.dvc"])
        rev = work.commit(
            message=message.encode(),
            author=_WHO,
            committer=_WHO,
            commit_timestamp=stamp,
            commit_timezone=0,
            no_verify=True,
            sign=False,
            config=git.get_config(),
        )
        return _version(git, git[rev])


# --- the registry: DVC -----------------------------------------------------------------------


@contextmanager
def _dvc(settings: Settings, remote: bool = False) -> Iterator[DvcRepo]:
    """DVC's view of the registry, with its caches inside it and nothing of the user's settings."""
    private = settings.data_dir / ".dvc"
    config: dict[str, Any] = {
        "core": {"site_cache_dir": str(private / "tmp" / "site"), "autostage": False},
        "cache": {"dir": str(private / "cache")},
    }
    if remote:
        config["core"]["remote"] = "store"
        config["remote"] = {"store": {"url": _remote_url(settings)}}
    with _quiet(), DvcRepo(str(settings.data_dir), config=config) as dvc:
        yield dvc


@contextmanager
def _quiet() -> Iterator[None]:
    """DVC prints advice, progress and what it then raises; we say it ourselves."""
    loggers = [logging.getLogger(name) for name in ("dvc", "dvc_data", "dvc_objects")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _cached(settings: Settings, oid: str) -> Path:
    return settings.data_dir / ".dvc" / "cache" / "files" / "md5" / oid[:2] / oid[2:]


def _object(settings: Settings, oid: str) -> bytes:
    """The bytes with that md5, from DVC's cache or else the remote."""
    path = _cached(settings, oid)
    for attempt in range(2):
        if path.is_file():
            content = path.read_bytes()
            if hashlib.md5(content, usedforsecurity=False).hexdigest() == oid.removesuffix(".dir"):
                return content
        if attempt == 0 and settings.dvc_remote:
            path.unlink(missing_ok=True)
            _pull(settings, oid)
    if settings.dvc_remote:
        where = f", and not at the remote {settings.dvc_remote} either"
    else:
        where = ", and no PERENNIAL_DVC_REMOTE is set to fetch it from"
    raise DatasetError(
        f"Data {oid} is missing or altered in {settings.data_dir / '.dvc' / 'cache'}{where}. "
        "Restore the cache, or set the remote that the dataset was pushed to."
    )


def _tree(settings: Settings, md5: str) -> dict[str, str]:
    """Path to md5 of every file of a version."""
    listing = json.loads(_object(settings, f"{md5}.dir"))
    return {entry["relpath"]: entry["md5"] for entry in listing}


def _lay_out(settings: Settings, tree: dict[str, str], changed: list[RawPrices]) -> None:
    """Make the folder `prices` equal to `tree` with the changed symbols on top."""
    root = settings.data_dir / _TRACKED
    wanted = {f"{raw.symbol}/{kind}.parquet": None for raw in changed for kind in _FILES}
    kept = {name: oid for name, oid in tree.items() if name not in wanted}
    for path in [path for path in root.rglob("*") if path.is_file()]:
        if path.relative_to(root).as_posix() not in kept:
            path.unlink()
    for name, oid in kept.items():
        path = root / name
        if not path.is_file() or hashlib.md5(path.read_bytes()).hexdigest() != oid:
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, _object(settings, oid))
    for raw in changed:
        folder = root / raw.symbol
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "rows.parquet", _parquet(raw.rows))
        _replace(folder / "factors.parquet", _parquet(raw.factors))


def _parquet(table: pd.DataFrame) -> bytes:
    """Parquet bytes that depend on the content only."""
    sink = io.BytesIO()
    plain = arrow.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None)
    parquet.write_table(plain, sink, compression="zstd", store_schema=False)
    return sink.getvalue()


# --- the registry: remote --------------------------------------------------------------------


def _remote_url(settings: Settings) -> str:
    url = settings.dvc_remote.removeprefix("file://")
    return url if "://" in url else str(Path(url).expanduser().resolve())


def _push(settings: Settings) -> None:
    """Push every version that the remote has not been given yet."""
    url = _remote_url(settings)
    if "://" not in url and not Path(url).is_dir():
        raise _remote_error(settings, "the folder does not exist; create it or mount it")
    marker = settings.data_dir / ".dvc" / "tmp" / "pushed.json"
    done = json.loads(marker.read_text()) if marker.is_file() else {}
    missing = []
    for version in _versions(settings):
        if done == {"url": url, "rev": version.rev}:
            break
        missing.append(version)
    if not missing:
        return
    hashes = {f"{version.md5}.dir" for version in missing}
    hashes |= {oid for version in missing for oid in _tree(settings, version.md5).values()}
    try:
        with _dvc(settings, remote=True) as dvc:
            result = dvc.cloud.push([HashInfo("md5", oid) for oid in sorted(hashes)])
    except (DvcException, OSError) as error:
        raise _remote_error(settings, f"{type(error).__name__}: {error}") from error
    if result.failed:
        raise _remote_error(settings, f"{len(result.failed)} files could not be written")
    _replace(marker, json.dumps({"url": url, "rev": missing[0].rev}).encode())


def _pull(settings: Settings, oid: str) -> None:
    try:
        with _locked(settings), _dvc(settings, remote=True) as dvc:
            dvc.cloud.pull([HashInfo("md5", oid)])
    except (DvcException, OSError) as error:
        raise DatasetError(
            f"Data {oid} is not in the cache, and the DVC remote {settings.dvc_remote} cannot be "
            f"read: {error}. Check PERENNIAL_DVC_REMOTE."
        ) from error


def _remote_error(settings: Settings, why: str) -> DatasetError:
    latest = current(settings)
    return DatasetError(
        f"The DVC remote {settings.dvc_remote} (PERENNIAL_DVC_REMOTE) cannot be written: {why}. "
        f"Version {latest.md5 if latest else '?'} is committed in {settings.data_dir} and stays "
        "current; the next ingest pushes it."
    )
