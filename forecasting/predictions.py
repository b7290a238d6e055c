"""The prediction log's light end: what is recorded, and the spool that web workers write.

A worker appends each answer as one JSON line to a segment of its own and holds a lock (`flock`) on
it for as long as it may still write. Whoever drains (see `forecasting.outcomes`) reads finished
lines, remembers how far it came in `<segment>.offset` beside it, and removes a segment once it is
read to the end and nobody holds its lock. A line is in the page cache before its answer goes out,
so it outlives a killed process. Lines that cannot be read are copied to `<segment>.bad`.
"""

import fcntl
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Literal
from uuid import uuid4

import msgspec

from forecasting.errors import ServiceError

log = logging.getLogger(__name__)

SEGMENT_BYTES = 16 * 1024 * 1024
MOST_PENDING = 10_000
"""Lines kept in memory while the disk refuses them."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class Prediction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One answered forecast; `quantiles` is [horizon][levels], prices in origin-day units."""

    id: Annotated[str, msgspec.Meta(min_length=1, max_length=36)]
    made_at: Annotated[datetime, msgspec.Meta(tz=True)]
    source: Literal["get", "post"]
    symbol: Annotated[str, msgspec.Meta(min_length=1, max_length=32)]
    forecaster: Name
    model_version: int
    run_id: Name
    dataset_md5: Name
    prices_md5: Name | None
    origin: date
    origin_close: float
    targets: list[date]
    levels: list[float]
    quantiles: list[list[float]]

    def __post_init__(self) -> None:
        shape = {len(self.levels)}
        if len(self.targets) != len(self.quantiles) or {len(q) for q in self.quantiles} != shape:
            raise ValueError("targets, levels and quantiles do not fit together")


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Prediction)


class Spool:
    """Append-only log of one process. Thread-safe.

    Args:
        folder: the spool folder, made on first use.
        name: of the process, for people who look into the folder.
        segment_bytes: size at which the next segment is begun.

    Attributes:
        written: lines written so far.
        failures: writes that the disk refused (their lines wait and are tried again).
    """

    def __init__(self, folder: Path, name: str, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.written = 0
        self.failures = 0
        self._folder = folder
        self._stem = f"{name}-{os.getpid()}-{uuid4().hex[:8]}"
        self._segment_bytes = segment_bytes
        self._pending: deque[bytes] = deque()
        self._lock = threading.Lock()
        self._file: int | None = None
        self._size = 0
        self._number = 0

    @property
    def pending(self) -> int:
        """Lines that are not on disk yet."""
        return len(self._pending)

    def append(self, record: Prediction) -> None:
        """Write one line. If the disk refuses it, it is kept in memory and tried again.

        Raises:
            ServiceError: too many lines wait already; this one was not taken.
        """
        line = _encoder.encode(record) + b"\n"
        with self._lock:
            if len(self._pending) >= MOST_PENDING:
                raise ServiceError(
                    f"The prediction log in {self._folder} cannot be written and "
                    f"{MOST_PENDING} forecasts wait in memory. Free disk space there."
                )
            self._pending.append(line)
            self._write_pending()

    def flush(self) -> bool:
        """Try again what waits; whether all is on disk now."""
        with self._lock:
            self._write_pending()
            return not self._pending

    def close(self) -> None:
        """Flush, sync to disk and give the segment up to the drainer."""
        with self._lock:
            self._write_pending()
            if self._pending:
                log.error("%d forecasts could not be logged in %s", self.pending, self._folder)
            self._release(sync=True)

    def _write_pending(self) -> None:
        while self._pending:
            try:
                self._write(self._pending[0])
            except OSError as error:
                if not self.failures:
                    log.error("The prediction log in %s cannot be written: %s", self._folder, error)
                self.failures += 1
                return
            self._pending.popleft()
            self.written += 1

    def _write(self, line: bytes) -> None:
        if self._file is None or self._size >= self._segment_bytes:
            self._begin_segment()
        assert self._file is not None
        count = os.write(self._file, line)
        if count != len(line):  # disk full: take the torn part back
            os.ftruncate(self._file, self._size)
            raise OSError(f"{count} of {len(line)} bytes written")
        self._size += count

    def _begin_segment(self) -> None:
        self._release(sync=False)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._number += 1
        path = self._folder / f"{self._stem}-{self._number}.jsonl"
        hidden = path.with_suffix(".new")  # locked before a drainer can see it
        self._file = os.open(hidden, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        hidden.rename(path)
        self._size = 0

    def _release(self, *, sync: bool) -> None:
        if self._file is None:
            return
        if sync:
            os.fsync(self._file)
        os.close(self._file)
        self._file = None


class Batch(msgspec.Struct, frozen=True):
    """Some lines of one segment, and where they end."""

    records: list[tuple[bytes, Prediction]]
    bad: list[bytes]
    end: int


class Segment:
    """A segment as the drainer sees it. `finished` means that no process can append any more."""

    def __init__(self, path: Path, *, finished: bool) -> None:
        self.path = path
        self.finished = finished
        self._offset_path = path.with_suffix(".offset")
        self.offset = _read_offset(path)

    def read(self, most_bytes: int = 4 * 1024 * 1024) -> Batch | None:
        """The next complete lines, at most about `most_bytes`; None if there are none.

        The unfinished last line of a segment whose writer is gone counts as bad.
        """
        with self.path.open("rb") as handle:
            handle.seek(self.offset)
            raw = handle.read(most_bytes)
            if b"\n" not in raw:
                raw += handle.readline()
            at_end = not handle.read(1)
        end = len(raw) if self.finished and at_end else raw.rfind(b"\n") + 1
        if not end:
            return None
        records, bad = [], []
        for line in raw[:end].split(b"\n"):
            if not line.strip():
                continue
            try:
                records.append((line, _decoder.decode(line)))
            except (msgspec.DecodeError, UnicodeDecodeError):
                bad.append(line)
        return Batch(records, bad, self.offset + end)

    def commit(self, batch: Batch, refused: list[bytes]) -> None:
        """Set bad and refused lines aside, then remember that the batch is done."""
        aside = batch.bad + refused
        if aside:
            with self.path.with_suffix(".bad").open("ab") as handle:
                handle.write(b"\n".join(aside) + b"\n")
                handle.flush()
                os.fsync(handle.fileno())
            log.warning(
                "%d lines of %s cannot be read and are set aside in %s",
                len(aside),
                self.path,
                self.path.with_suffix(".bad"),
            )
        self.offset = batch.end
        temporary = self._offset_path.with_suffix(".offset.tmp")
        temporary.write_text(str(self.offset))
        temporary.replace(self._offset_path)

    def remove(self) -> None:
        """Forget a segment that is read to its end."""
        self.path.unlink()
        self._offset_path.unlink(missing_ok=True)


def _read_offset(segment: Path) -> int:
    """How far a segment is drained; from the start if unknown (lines are stored only once)."""
    try:
        offset = int(segment.with_suffix(".offset").read_text())
    except (FileNotFoundError, ValueError):
        return 0
    return offset if 0 <= offset <= segment.stat().st_size else 0


def has_undrained(folder: Path) -> bool:
    """Whether a segment holds bytes that were not drained yet, or waits to be removed."""
    for path in folder.glob("*.jsonl"):
        try:
            if path.stat().st_size > _read_offset(path) or _is_free(path):
                return True
        except FileNotFoundError:
            continue
    return False


def _is_free(path: Path) -> bool:
    with path.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextmanager
def drain_lock(folder: Path) -> Iterator[None]:
    """Only one process drains a spool folder at a time; the next one waits."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".drain.lock").open("wb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def open_segments(folder: Path) -> Iterator[Iterator[Segment]]:
    """Every segment, oldest first, under the drain lock and with its writer's state known."""
    with drain_lock(folder):
        yield _segments(folder)


def _segments(folder: Path) -> Iterator[Segment]:
    for path in sorted(folder.glob("*.jsonl"), key=lambda item: item.stat().st_mtime_ns):
        with path.open("rb") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                finished = True
            except BlockingIOError:
                finished = False
            yield Segment(path, finished=finished)
