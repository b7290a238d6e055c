"""The prediction log's light end: what is recorded, and the spool that web workers write.

A worker appends what it computed as one JSON line a batch to a segment of its own and holds a lock
(`flock`) on it for as long as it may still write. Whoever drains (see `forecasting.outcomes`) reads
finished lines, remembers how far it came in `<segment>.offset` beside it, and removes a segment
once it is read to the end and nobody holds its lock. A line is in the page cache before its answers
go out, so it outlives a killed process. Lines that cannot be read are copied to `<segment>.bad`.

Repeated answers of one computed forecast are counted, not logged again: `Counted` lines carry the
total of their writer, so reading one twice changes nothing.
"""

import fcntl
import logging
import os
import re
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Literal
from uuid import uuid4

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from forecasting.contract import Contract
from forecasting.errors import ServiceError

log = logging.getLogger(__name__)

SEGMENT_BYTES = 16 * 1024 * 1024
MOST_PENDING = 16 * 1024 * 1024
"""Bytes kept in memory while the disk refuses them."""
MOST_BYTES = 1024 * 1024 * 1024
MOST_COUNTED = 10_000
"""Different answers that one writer counts before it goes on under another name."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Identity = Annotated[str, msgspec.Meta(min_length=1, max_length=36)]
Symbol = Annotated[str, msgspec.Meta(min_length=1, max_length=32)]
Moment = Annotated[datetime, msgspec.Meta(tz=True)]
Source = Literal["get", "post", "batch", "shadow", "canary"]
"""How a forecast came to be: from published prices, from a client's rows, by the flow `forecast`,
by the challenger beside the answer, or by the challenger as the answer."""


ANSWERS: tuple[Source, ...] = ("get", "post", "canary")
"""What somebody was answered."""


class Prediction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One forecast as SQL takes it; `quantiles` is [horizon][levels], in origin-day units."""

    id: Identity
    made_at: Moment
    source: Source
    symbol: Symbol
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


class Window(msgspec.Struct, frozen=True, array_like=True):
    """What a forecast was made from, and for when."""

    id: Identity
    source: Source
    symbol: Symbol
    prices_md5: Name | None
    origin: date
    origin_close: float
    targets: list[date]


class Computed(msgspec.Struct, frozen=True, kw_only=True, tag="computed", tag_field="kind"):
    """Forecasts of one version that were computed together; `quantiles` has one entry a window."""

    made_at: Moment
    forecaster: Name
    model_version: int
    run_id: Name
    dataset_md5: Name
    levels: list[float]
    windows: list[Window]
    quantiles: list[list[list[float]]]

    def __post_init__(self) -> None:
        if len(self.windows) != len(self.quantiles):
            raise ValueError("windows and quantiles do not fit together")

    def predictions(self) -> list[Prediction]:
        """One record a window."""
        return [
            Prediction(
                id=window.id,
                made_at=self.made_at,
                source=window.source,
                symbol=window.symbol,
                forecaster=self.forecaster,
                model_version=self.model_version,
                run_id=self.run_id,
                dataset_md5=self.dataset_md5,
                prices_md5=window.prices_md5,
                origin=window.origin,
                origin_close=window.origin_close,
                targets=window.targets,
                levels=self.levels,
                quantiles=quantiles,
            )
            for window, quantiles in zip(self.windows, self.quantiles, strict=True)
        ]


class Counted(msgspec.Struct, frozen=True, kw_only=True, tag="counted", tag_field="kind"):
    """How often one writer has answered the forecast of a symbol, version and day so far."""

    writer: Name
    forecaster: Name
    model_version: int
    symbol: Symbol
    origin: date
    answers: int
    last_at: Moment


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused", tag_field="kind"):
    """A version that a web worker did not let in, on its way to the outbox of events."""

    forecaster: Name
    version: int
    reason: str


class _Line(msgspec.Struct, kw_only=True, tag="computed", tag_field="kind"):
    """`Computed` with its numbers already written."""

    made_at: datetime
    forecaster: str
    model_version: int
    run_id: str
    dataset_md5: str
    levels: msgspec.Raw
    windows: Sequence[Window]
    quantiles: msgspec.Raw


_encoder = msgspec.json.Encoder()
_prediction_decoder = msgspec.json.Decoder(Prediction)
_line_decoder = msgspec.json.Decoder(Computed | Counted | Refused)
_KIND = b'{"kind":'
_MOMENT = re.compile(rb'"made_at":"([0-9T:.Z+-]+)"')
_HEAD_BYTES = 512


def json_numbers(values: NDArray[np.float32]) -> bytes:
    """JSON of a float32 array, each number as short as it can be and still be the same float32."""
    return orjson.dumps(np.ascontiguousarray(values), option=orjson.OPT_SERIALIZE_NUMPY)


def computed_line(
    contract: Contract, version: int, windows: Sequence[Window], quantiles: bytes
) -> bytes:
    """The line of forecasts that one version computed together.

    Args:
        contract: of the version.
        version: its number in the registry.
        windows: what each forecast was made from.
        quantiles: JSON (`json_numbers`) of [windows, horizon, levels].
    """
    line = _Line(
        made_at=datetime.now(UTC),
        forecaster=contract.forecaster,
        model_version=version,
        run_id=contract.run_id,
        dataset_md5=contract.dataset_md5,
        levels=msgspec.Raw(_encoder.encode(contract.quantile_levels)),
        windows=windows,
        quantiles=msgspec.Raw(quantiles),
    )
    return _encoder.encode(line)


@dataclass(frozen=True, slots=True)
class Answered:
    """What repeated answers are counted by."""

    forecaster: str
    model_version: int
    symbol: str
    origin: date


class Spool:
    """Append-only log of one process. Thread-safe.

    Args:
        folder: the spool folder, made on first use.
        name: of the process, for people who look into the folder.
        segment_bytes: size at which the next segment is begun.
        most_bytes: not drained, of all writers together, at which nothing more is taken.

    Attributes:
        written: forecasts written so far.
        failures: writes that the disk refused (their lines wait and are tried again).
        bytes: what the folder held that was not drained when it was last measured.
        oldest: about when the oldest line was written that is not drained, seconds since 1970; 0 if
            all is drained.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        segment_bytes: int = SEGMENT_BYTES,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.written = 0
        self.failures = 0
        self.bytes = 0
        self.oldest = 0.0
        self._folder = folder
        self._name = name
        self._stem = self._new_stem()
        self._segment_bytes = segment_bytes
        self._most_bytes = most_bytes
        self._counts: dict[Answered, int] = {}
        self._changed: set[Answered] = set()
        self._pending: deque[tuple[bytes, int]] = deque()
        self._pending_bytes = 0
        self._lock = threading.Lock()
        self._file: int | None = None
        self._size = 0
        self._number = 0

    @property
    def pending(self) -> int:
        """Lines that are not on disk yet."""
        return len(self._pending)

    def check(self) -> None:
        """Whether a forecast that is computed now will be taken.

        Raises:
            ServiceError: the folder is full, or too many lines wait for the disk.
        """
        if self.bytes >= self._most_bytes:
            raise ServiceError(
                f"The prediction log in {self._folder} holds {self.bytes / 1e6:.3g} MB that are "
                f"not in SQL yet; at most {self._most_bytes / 1e6:.3g} MB are kept "
                "(PERENNIAL_SPOOL_MAX_MB). See why `python -m serving drain` does not move it."
            )
        if self._pending_bytes >= MOST_PENDING:
            raise ServiceError(
                f"The prediction log in {self._folder} cannot be written and {self.pending} lines "
                "wait in memory, as many as may. Free disk space there."
            )

    def append(self, record: Prediction | Refused) -> None:
        """Write one forecast or refusal; see `write`."""
        self.write(_encoder.encode(record), 1 if isinstance(record, Prediction) else 0)

    def write(self, line: bytes, forecasts: int) -> None:
        """Write one line (without its end). If the disk refuses it, it waits in memory.

        Raises:
            ServiceError: see `check`; the line was not taken.
        """
        self.check()
        with self._lock:
            self._wait(line + b"\n", forecasts)
            self._write_pending()

    def count(self, answered: Answered) -> None:
        """Count one more answer of a forecast that is logged already; `flush` writes the totals."""
        with self._lock:
            self._counts[answered] = self._counts.get(answered, 0) + 1
            self._changed.add(answered)

    def measure(self) -> None:
        """Look how much there is to be drained, and since when."""
        size, oldest = 0, 0.0
        for path in self._folder.glob("*.jsonl"):
            try:
                stat, drained = path.stat(), _read_offset(path)
                size += stat.st_size - drained
                if stat.st_size > drained:
                    began = _written_at(path, drained) or stat.st_mtime
                    oldest = min(oldest or began, began)
            except FileNotFoundError:  # drained just now
                continue
        self.bytes, self.oldest = size, oldest

    def flush(self) -> bool:
        """Write what waits and the counts that changed; whether all is on disk now."""
        with self._lock:
            if not self._pending and self.bytes < self._most_bytes:
                for line in self._count_lines():  # totals: what is not told now is told later
                    self._wait(line, 0)
            self._write_pending()
            return not self._pending

    def close(self) -> None:
        """Flush, sync to disk and give the segment up to the drainer."""
        self.flush()
        with self._lock:
            if self._pending:
                log.error("%d lines could not be logged in %s", self.pending, self._folder)
            self._release(sync=True)

    def _new_stem(self) -> str:
        return f"{self._name}-{os.getpid()}-{uuid4().hex[:8]}"

    def _count_lines(self) -> list[bytes]:
        changed, self._changed = self._changed, set()
        lines = [
            _encoder.encode(
                Counted(
                    writer=self._stem,
                    forecaster=key.forecaster,
                    model_version=key.model_version,
                    symbol=key.symbol,
                    origin=key.origin,
                    answers=self._counts[key],
                    last_at=datetime.now(UTC),
                )
            )
            + b"\n"
            for key in changed
        ]
        if len(self._counts) > MOST_COUNTED:  # totals of a new name begin at nothing
            self._counts, self._stem = {}, self._new_stem()
        return lines

    def _wait(self, line: bytes, forecasts: int) -> None:
        self._pending.append((line, forecasts))
        self._pending_bytes += len(line)

    def _write_pending(self) -> None:
        while self._pending:
            try:
                self._write(self._pending[0][0])
            except OSError as error:
                if not self.failures:
                    log.error("The prediction log in %s cannot be written: %s", self._folder, error)
                self.failures += 1
                return
            line, forecasts = self._pending.popleft()
            self._pending_bytes -= len(line)
            self.written += forecasts

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
        opened = os.open(hidden, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
        fcntl.flock(opened, fcntl.LOCK_EX)
        hidden.rename(path)
        self._file, self._size = opened, 0

    def _release(self, *, sync: bool) -> None:
        if self._file is None:
            return
        if sync:
            os.fsync(self._file)
        os.close(self._file)
        self._file = None


class Batch(msgspec.Struct, frozen=True):
    """Some lines of one segment, and where they end."""

    records: list[Prediction]
    counts: list[Counted]
    refusals: list[Refused]
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
        batch = Batch([], [], [], [], self.offset + end)
        for line in raw[:end].split(b"\n"):
            if not line.strip():
                continue
            try:
                _decode(line, batch)
            except (msgspec.DecodeError, ValueError):
                batch.bad.append(line)
        return batch

    def commit(self, batch: Batch, refused: Sequence[Prediction | Counted | Refused]) -> None:
        """Set bad lines and refused records aside, then remember that the batch is done."""
        aside = batch.bad + [_encoder.encode(record) for record in refused]
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


def _decode(line: bytes, batch: Batch) -> None:
    if not line.startswith(_KIND):
        batch.records.append(_prediction_decoder.decode(line))
        return
    found = _line_decoder.decode(line)
    if isinstance(found, Counted):
        batch.counts.append(found)
    elif isinstance(found, Refused):
        batch.refusals.append(found)
    else:
        batch.records.extend(found.predictions())


def _read_offset(segment: Path) -> int:
    """How far a segment is drained; from the start if unknown (lines are stored only once)."""
    try:
        offset = int(segment.with_suffix(".offset").read_text())
    except (FileNotFoundError, ValueError):
        return 0
    return offset if 0 <= offset <= segment.stat().st_size else 0


def _written_at(segment: Path, offset: int) -> float | None:
    """When the line at `offset` was written, seconds since 1970, if it says so at its beginning."""
    with segment.open("rb") as handle:
        handle.seek(offset)
        found = _MOMENT.search(handle.read(_HEAD_BYTES))
    return datetime.fromisoformat(found[1].decode()).timestamp() if found else None


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
