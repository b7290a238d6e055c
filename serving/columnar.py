"""Tables as Arrow IPC (stream or file) and Parquet: price rows in, forecasts out.

The only room of the server that knows pyarrow, which costs 30 MB: it is imported with the first
such request, and used without pandas, which its conversions to numpy would import. Files come from
anyone, so their own headers are read first, and whatever would unpack to more than a table of
prices can be is refused before Arrow unpacks it.
"""

import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, time, timedelta, timezone, tzinfo
from itertools import chain
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from forecasting.contract import COLUMNS
from serving import problems
from serving.intake import EPOCH_ORDINAL
from serving.oip import cut
from serving.problems import ProblemError
from serving.schemas import Forecast
from serving.scoring import FIRST_DAY, LAST_DAY, TABLE_COLUMNS, iso_day, windows
from serving.windows import Rows

STREAM = "application/vnd.apache.arrow.stream"
FILE = "application/vnd.apache.arrow.file"
PARQUET = "application/vnd.apache.parquet"
MEDIA_TYPES = (STREAM, FILE, PARQUET)

_MAX_HEADER = 32 * 1024
"""Bytes of an IPC message's metadata, or of a Parquet footer; seven columns need some thousand."""
_MAX_PARTS = 1024
"""IPC messages, or Parquet pages."""
_MAX_UNPACKED = 32 * 1024 * 1024
_MAX_TEXT = 64
"""Longest symbol or date, in bytes."""
_SHOWN = 5
_FILE_MAGIC, _PARQUET_MAGIC = b"ARROW1", b"PAR1"
_OFFSET = re.compile(r"([+-])([0-9]{2}):?([0-9]{2})")
_TICKS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DAY_SECONDS = 86400
_NUMBERS = {"halffloat": "f2", "float": "f4", "double": "f8"} | {
    f"{sign}int{bits}": f"{sign or 'i'}{bits // 8}"
    for sign in ("", "u")
    for bits in (8, 16, 32, 64)
}
"""Arrow's names of number types, and numpy's."""
_A_DAY = "a day (YYYY-MM-DD, or a timestamp at midnight)"
_DELTA_BYTE_ARRAY = 7
_PAGE_HEADERS = {5: (1, 2), 7: (1, 2), 8: (1, 4)}
"""Data page, dictionary page, data page v2: the fields of their number of values and encoding."""
_OF_A_STEP = ("horizon", "target", "median", "quantiles")
_I32, _I64, _BINARY, _LIST, _STRUCT = 5, 6, 8, 9, 12
_BITS = {4: 16, _I32: 32, _I64: 64}
_WIDTHS = {3: 1, 7: 8}
"""Types of Thrift's compact protocol, and the size of those that have one."""
_LISTS = {(field,): _STRUCT for field in (2, 4, 5, 7)} | {
    (4, 1): _STRUCT,
    (4, 4): _STRUCT,
    (4, 1, 3, 2): _I32,
    (4, 1, 3, 3): _BINARY,
    (4, 1, 3, 8): _STRUCT,
    (4, 1, 3, 13): _STRUCT,
    (4, 1, 3, 16, 2): _I64,
    (4, 1, 3, 16, 3): _I64,
    (4, 1, 3, 17, 2): _I32,
}
"""What the lists of a Parquet footer hold: readers do not look at the type that the list says."""
_MAX_DEPTH = 8
_Struct = dict[tuple[int, int], Any]
_READ_ERRORS = (pa.ArrowException, OSError, ValueError, LookupError, ArithmeticError, struct.error)
"""What broken bytes make of pyarrow and of the readers of headers below."""


def invalid(detail: str) -> ProblemError:
    """422: a table of another shape."""
    return ProblemError("invalid-request", 422, "Invalid request", detail)


def unreadable(media_type: str, error: Exception) -> ProblemError:
    """400: bytes that are not of the media type."""
    return ProblemError(
        "unreadable-table",
        400,
        "Unreadable table",
        f"A body of {media_type} was expected; it cannot be read: {str(error)[:200]}. Write it "
        "with a current Arrow library, uncompressed or with a codec of its defaults.",
    )


def too_large(what: str, most: int, got: int) -> ProblemError:
    """413: more than a request may hold."""
    return ProblemError(
        "table-too-large",
        413,
        "Table too large",
        f"At most {most} {what} were expected; the table announces {got}. Send less of it.",
    )


# requests ---------------------------------------------------------------------------------------


def read(body: bytes, media_type: str, max_rows: int) -> list[Rows]:
    """Decode a long table of prices: columns symbol, date, open, high, low, close and volume.

    Args:
        body: the file's bytes.
        media_type: one of `MEDIA_TYPES`.
        max_rows: most rows of the table.

    Returns:
        One window a symbol, in order of first appearance, rows in the order sent.

    Raises:
        ProblemError: 415, another media type; 400, not readable; 413, too large; 422, other
            columns, types or nulls.
    """
    readers: dict[str, Callable[[bytes, int], pa.Table]] = {
        STREAM: _read_stream,
        FILE: _read_file,
        PARQUET: _read_parquet,
    }
    if media_type not in readers:
        raise problems.unsupported_media_type(media_type[:60], " or ".join(MEDIA_TYPES))
    try:
        table = readers[media_type](body, max_rows)
        table.validate(full=True)
        return _rows(table)
    except _READ_ERRORS as error:
        raise unreadable(media_type, error) from error


def _rows(table: pa.Table) -> list[Rows]:
    if not table.num_rows:
        raise _no_rows()
    symbols = _texts("symbol", table["symbol"])
    ohlcv = np.stack([_prices(name, table[name]) for name in COLUMNS], axis=1)
    return windows(symbols, _days(table["date"]), ohlcv)


def _no_rows() -> ProblemError:
    return invalid("At least one row was expected; the table has none.")


def _check_schema(schema: pa.Schema) -> None:
    names: list[str] = schema.names
    unknown = [name for name in names if name not in TABLE_COLUMNS]
    missing = [name for name in TABLE_COLUMNS if name not in names]
    if unknown or missing or len(names) > len(TABLE_COLUMNS):
        found = ", ".join(cut(name) for name in names[:10])
        raise invalid(
            f"Columns {', '.join(TABLE_COLUMNS)} were expected, each once; got {found}. "
            f"Unknown: {', '.join(cut(name) for name in unknown[:10]) or 'none'}; missing: "
            f"{', '.join(missing) or 'none'}. Rename or drop columns."
        )
    for name in TABLE_COLUMNS:
        kind = schema.field(name).type
        expected, accepted = _ACCEPTED.get(name, ("float, integer or decimal", _is_number))
        if not accepted(kind):
            raise invalid(f"Column {name}: {expected} was expected; got {str(kind)[:60]}. Cast it.")


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _is_day(kind: pa.DataType) -> bool:
    return bool(pa.types.is_date(kind) or pa.types.is_timestamp(kind) or _is_text(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)
    )


_ACCEPTED: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    "symbol": ("string or dictionary of strings", _is_text),
    "date": ("date, timestamp or string", _is_day),
}


def _refuse_rows(name: str, bad: Sequence[int], expected: str) -> None:
    if len(bad):
        shown = ", ".join(str(row) for row in bad[:_SHOWN])
        raise invalid(
            f"Column {name}: {expected} was expected in every row; {len(bad)} rows break this: "
            f"{shown}{', ...' if len(bad) > _SHOWN else ''} (counted from 0). Repair or drop them."
        )


def _refuse_nulls(name: str, column: pa.ChunkedArray) -> None:
    if column.null_count:
        valid = [value.is_valid for value in column]
        _refuse_rows(name, [row for row, ok in enumerate(valid) if not ok], "a value")


def _texts(name: str, column: pa.ChunkedArray) -> list[str]:
    """Strings of a column; a dictionary's are not copied for each row."""
    values: list[str | None] = []
    for chunk in column.chunks:
        if pa.types.is_dictionary(chunk.type):
            known = [*_short(name, chunk.dictionary), None]
            places = chunk.indices.to_pylist()
            values += [None if place is None else known[place] for place in places]
        else:
            values += _short(name, chunk)
    _refuse_rows(name, [row for row, value in enumerate(values) if not value], "a value")
    return [value for value in values if value is not None]


def _short(name: str, array: pa.Array) -> list[str | None]:
    """Strings of an array, after a look at their lengths: views may repeat one long text."""
    if pa.types.is_string_view(array.type):
        views = np.frombuffer(array.buffers()[1] or b"", dtype="<i4")[::4]
        lengths = views[array.offset : array.offset + len(array)]
    else:
        wide = np.dtype("<i8" if pa.types.is_large_string(array.type) else "<i4")
        offsets = np.frombuffer(array.buffers()[1] or b"", dtype=wide)
        lengths = np.diff(offsets[array.offset : array.offset + len(array) + 1])
    if lengths.size and lengths.max() > _MAX_TEXT:
        raise invalid(f"Column {name}: at most {_MAX_TEXT} bytes a text were expected.")
    return list(array.to_pylist())


def _fixed(array: pa.Array, dtype: str) -> NDArray[Any]:
    """Numbers of fixed width as they lie in the buffer."""
    if not len(array):
        return np.empty(0, dtype)
    start = array.offset * np.dtype(dtype).itemsize
    return np.frombuffer(array.buffers()[1] or b"", dtype, len(array), start)


def _joined(column: pa.ChunkedArray, dtype: str) -> NDArray[Any]:
    return np.concatenate([_fixed(chunk, dtype) for chunk in column.chunks])


def _prices(name: str, column: pa.ChunkedArray) -> NDArray[np.float64]:
    _refuse_nulls(name, column)
    dtype = _NUMBERS.get(str(column.type))
    if dtype is None:
        return np.array([float(value) for value in column.to_pylist()], dtype=np.float64)
    return _joined(column, dtype).astype(np.float64)


def _days(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Days since 1970; a timestamp must be a midnight, of its own time zone if it has one."""
    kind = column.type
    if _is_text(kind):
        texts = _texts("date", column)
        known = {text: iso_day(text) for text in set(texts)}
        days = [known[text] for text in texts]
        _refuse_rows("date", [row for row, day in enumerate(days) if day is None], _A_DAY)
        return np.array(days, dtype=np.int64)
    _refuse_nulls("date", column)
    if pa.types.is_date32(kind):
        return _known_days(_joined(column, "i4").astype(np.int64), None)
    ticks = _joined(column, "i8")
    per_second = _TICKS["ms" if pa.types.is_date64(kind) else kind.unit]
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        seconds, rest = np.divmod(ticks, per_second)
        _refuse_rows("date", np.flatnonzero(rest).tolist(), _A_DAY)
        return _local_days(seconds, _zone(kind.tz))
    return _known_days(*np.divmod(ticks, per_second * _DAY_SECONDS))


def _known_days(days: NDArray[np.int64], rest: NDArray[np.int64] | None) -> NDArray[np.int64]:
    bad = (days < FIRST_DAY) | (days > LAST_DAY)
    if rest is not None:
        bad |= rest != 0
    _refuse_rows("date", np.flatnonzero(bad).tolist(), _A_DAY)
    return days


def _local_days(seconds: NDArray[np.int64], zone: tzinfo) -> NDArray[np.int64]:
    unique, inverse = np.unique(seconds, return_inverse=True)
    _known_days(seconds // _DAY_SECONDS, None)
    moments = [datetime.fromtimestamp(int(second), UTC).astimezone(zone) for second in unique]
    off = np.array([moment.time() != time() for moment in moments], dtype=np.bool_)
    _refuse_rows("date", np.flatnonzero(off[inverse]).tolist(), _A_DAY)
    found = np.array([moment.toordinal() - EPOCH_ORDINAL for moment in moments], dtype=np.int64)
    return found[inverse]


def _zone(name: str) -> tzinfo:
    offset = _OFFSET.fullmatch(name)
    if offset is None:
        return ZoneInfo(name)
    minutes = 60 * int(offset[2]) + int(offset[3])
    return timezone(timedelta(minutes=-minutes if offset[1] == "-" else minutes))


# Arrow IPC


class _Flat(NamedTuple):
    """A table of a flatbuffer: https://flatbuffers.dev/internals/."""

    data: memoryview
    at: int

    def _slot(self, field: int) -> int:
        """Where a field's value lies; 0 if the table has none."""
        vtable = self.at - _unpack("<i", self.data, self.at)
        if 4 + 2 * field >= _unpack("<H", self.data, vtable):
            return 0
        offset = _unpack("<H", self.data, vtable + 4 + 2 * field)
        return self.at + offset if offset else 0

    def number(self, field: int, form: str) -> int:
        at = self._slot(field)
        return _unpack(form, self.data, at) if at else 0

    def table(self, field: int) -> "_Flat | None":
        at = self._slot(field)
        return _Flat(self.data, at + _unpack("<I", self.data, at)) if at else None

    def pairs(self, field: int) -> Iterator[tuple[int, int]]:
        """A vector of structs of two int64."""
        at = self._slot(field)
        if at:
            start = at + _unpack("<I", self.data, at)
            for place in range(_unpack("<I", self.data, start)):
                where = start + 4 + 16 * place
                yield _unpack("<q", self.data, where), _unpack("<q", self.data, where + 8)


def _unpack(form: str, data: memoryview, at: int) -> int:
    if at < 0:
        raise ValueError("an offset points before the data")
    return int(struct.unpack_from(form, data, at)[0])


def _read_file(body: bytes, max_rows: int) -> pa.Table:
    """An IPC file is its magic, a stream, and an index of the stream that is not needed."""
    if not body.startswith(_FILE_MAGIC):
        raise ValueError(f"it does not begin with {_FILE_MAGIC.decode()}")
    return _read_stream(memoryview(body)[8:], max_rows)


def _read_stream(body: bytes | memoryview, max_rows: int) -> pa.Table:
    options = pa.ipc.IpcReadOptions(use_threads=False)
    _check_messages(body, max_rows)
    with pa.ipc.open_stream(pa.py_buffer(body), options=options) as reader:
        _check_schema(reader.schema)
        return reader.read_all()


def _check_messages(body: bytes | memoryview, max_rows: int) -> None:
    """Add up what every message announces, without unpacking any."""
    rows = unpacked = 0
    for count, message in enumerate(pa.ipc.MessageReader.open_stream(pa.py_buffer(body))):
        metadata = memoryview(message.metadata)
        _at_most("bytes of metadata", _MAX_HEADER, len(metadata))
        _at_most("record batches", _MAX_PARTS, count)
        batch = _record_batch(message.type, metadata)
        if batch is not None:
            length = batch.number(0, "<q")
            rows = rows + length if message.type == "record batch" else rows
            unpacked += _unpacked(batch, message.body)
            _at_most("rows", max_rows, max(rows, length))
            _at_most("bytes of unpacked data", _MAX_UNPACKED, unpacked)


def _record_batch(kind: str, metadata: memoryview) -> _Flat | None:
    """The batch in a message (Message.fbs, Schema.fbs of the Arrow format), if it has one."""
    header = _Flat(metadata, _unpack("<I", metadata, 0)).table(2)
    if header is None or kind not in ("record batch", "dictionary"):
        return None
    return header if kind == "record batch" else header.table(1)


def _unpacked(batch: _Flat, body: pa.Buffer | None) -> int:
    """Bytes that a batch's compressed buffers announce: an int64 before each; -1: as it is."""
    if batch.table(3) is None or body is None:
        return 0
    data, total = memoryview(body), 0
    for offset, length in batch.pairs(2):
        announced = _unpack("<q", data, offset) if length else 0
        size = length if announced == -1 else announced
        _at_most("bytes of unpacked data", _MAX_UNPACKED, size)
        total += size
    return total


def _at_most(what: str, most: int, got: int) -> None:
    if got > most:
        raise too_large(what, most, got)
    if got < 0:
        raise ValueError(f"it announces {got} {what}")


# Parquet


class _Chunk(NamedTuple):
    """Where the pages of one column of a row group lie."""

    start: int
    end: int


class _Page(NamedTuple):
    unpacked: int
    values: int
    encoding: int


def _read_parquet(body: bytes, max_rows: int) -> pa.Table:
    """A file whose footer, then whose pages have been looked at.

    Both are read here and not through `ParquetFile.metadata`, for pyarrow ends the process on some
    footers that it should refuse.
    """
    if len(body) < 12 or body[:4] != _PARQUET_MAGIC or body[-4:] != _PARQUET_MAGIC:
        raise ValueError(f"it does not begin and end with {_PARQUET_MAGIC.decode()}")
    size = _unpack("<I", memoryview(body), len(body) - 8)
    if size > len(body) - 12:
        raise ValueError("its footer begins before the file")
    _at_most("bytes of footer", _MAX_HEADER, size)
    footer, _ = _thrift_struct(body, len(body) - 8 - size, ())
    groups = footer.get((4, _LIST), [])
    rows = [group[3, _I64] for group in groups]
    _at_most("rows", max_rows, max(sum(rows), *rows, footer[3, _I64], 0))
    if not any(rows):
        raise _no_rows()
    chunks = [_chunk(column, len(body)) for group in groups for column in group[1, _LIST]]
    _check_pages(chain.from_iterable(_pages(body, chunk) for chunk in chunks), max_rows)
    file = pq.ParquetFile(
        pa.BufferReader(body),
        read_dictionary=["symbol", "date"],
        pre_buffer=False,
        thrift_string_size_limit=_MAX_HEADER,
        thrift_container_size_limit=_MAX_HEADER,
    )
    _check_schema(file.schema_arrow)
    return file.read_row_groups(list(range(len(groups))), use_threads=False)


def _chunk(column: _Struct, size: int) -> _Chunk:
    metadata = column[3, _STRUCT]
    start, length = metadata[9, _I64], metadata[7, _I64]
    if 0 < metadata.get((11, _I64), 0) < start:
        start = metadata[11, _I64]
    if start < len(_PARQUET_MAGIC) or length < 0 or start + length > size:
        raise ValueError("a column lies outside the file")
    return _Chunk(start, start + length)


def _pages(body: bytes, chunk: _Chunk) -> Iterator[_Page]:
    """Page headers of a column: PageHeader in parquet.thrift of the Parquet format."""
    at = chunk.start
    while at < chunk.end:
        header, start = _thrift_struct(body, at, ())
        at = start + header[3, _I32]
        kinds = [kind for kind in _PAGE_HEADERS if (kind, _STRUCT) in header]
        if len(kinds) != 1 or not start <= at <= chunk.end:
            raise ValueError("a page header is not one, or ends outside its column")
        values, encoding = (header[kinds[0], _STRUCT][n, _I32] for n in _PAGE_HEADERS[kinds[0]])
        yield _Page(header[2, _I32], values, encoding)


def _check_pages(pages: Iterable[_Page], max_rows: int) -> None:
    unpacked = 0
    for count, page in enumerate(pages):
        unpacked += max(page.unpacked, 0)
        _at_most("pages", _MAX_PARTS, count)
        _at_most("bytes of unpacked data", _MAX_UNPACKED, max(unpacked, page.unpacked))
        _at_most("values of a page", max_rows, page.values)
        if page.encoding == _DELTA_BYTE_ARRAY:
            raise ValueError("encoding DELTA_BYTE_ARRAY, which may unpack to anything, is not read")


def _thrift_struct(data: bytes, at: int, path: tuple[int, ...]) -> tuple[_Struct, int]:
    """A struct of Thrift's compact protocol as (field, kind) -> value, and where it ends.

    As strict as the reader that comes after, so that both see the same: a field of another kind
    than expected is another field.
    https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
    """
    if len(path) > _MAX_DEPTH:
        raise ValueError("structs nest too deep")
    fields: _Struct = {}
    field = 0
    while head := data[at]:
        kind = head & 0x0F
        field, at = (field + (head >> 4), at + 1) if head >> 4 else _zigzag(data, at + 1, 16)
        value, at = _thrift_value(data, at, kind, (*path, field))
        fields[field, kind] = value
    return fields, at + 1


def _thrift_value(data: bytes, at: int, kind: int, path: tuple[int, ...]) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, at
    if kind in _BITS:
        return _zigzag(data, at, _BITS[kind])
    if kind == _BINARY:
        size, at = _varint(data, at, 31)
        return None, at + size
    if kind == _LIST:
        return _thrift_list(data, at, path)
    if kind == _STRUCT:
        return _thrift_struct(data, at, path)
    if kind in _WIDTHS:
        return None, at + _WIDTHS[kind]
    raise ValueError(f"type {kind} has no place in Parquet's headers")


def _thrift_list(data: bytes, at: int, path: tuple[int, ...]) -> tuple[list[Any], int]:
    size, kind = data[at] >> 4, data[at] & 0x0F
    at += 1
    if size == 15:
        size, at = _varint(data, at, 31)
    if kind != _LISTS.get(path, kind) or kind in (1, 2):
        raise ValueError("a list of the wrong type")
    values = []
    for _ in range(size):
        value, at = _thrift_value(data, at, kind, path)
        values.append(value)
    return values, at


def _varint(data: bytes, at: int, bits: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if value >> bits or shift > 70:
            raise ValueError(f"a number does not fit {bits} bits")
        if data[at - 1] < 0x80:
            return value, at


def _zigzag(data: bytes, at: int, bits: int) -> tuple[int, int]:
    value, at = _varint(data, at, bits)
    return (value >> 1) ^ -(value & 1), at


# answers ----------------------------------------------------------------------------------------

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("symbol", pa.string()),
        ("forecaster", pa.string()),
        ("model_version", pa.int64()),
        ("run_id", pa.string()),
        ("dataset_md5", pa.string()),
        ("as_of", pa.date32()),
        ("origin", pa.date32()),
        ("origin_close", pa.float64()),
        ("horizon", pa.int32()),
        ("target", pa.date32()),
        ("median", pa.float64()),
        ("quantiles", pa.list_(pa.float64())),
        ("levels", pa.list_(pa.float64())),
    ]
)


def write(forecasts: Sequence[Forecast], media_type: str) -> bytes:
    """Encode answers as a long table, one row a forecast and horizon.

    Args:
        forecasts: in the order of the rows.
        media_type: one of `MEDIA_TYPES`.

    Raises:
        ProblemError: 415, another media type.
    """
    if media_type not in MEDIA_TYPES:
        raise problems.unsupported_media_type(media_type[:60], " or ".join(MEDIA_TYPES))
    batch = _batch(forecasts)
    sink = pa.BufferOutputStream()
    if media_type == PARQUET:
        pq.write_table(pa.Table.from_batches([batch]), sink)
    else:
        opened = pa.ipc.new_stream if media_type == STREAM else pa.ipc.new_file
        with opened(sink, _SCHEMA) as writer:
            writer.write_batch(batch)
    return bytes(sink.getvalue())


def _batch(forecasts: Sequence[Forecast]) -> pa.RecordBatch:
    """Built from buffers: conversions from Python lists would import pandas."""
    rows = [(item, step) for item in forecasts for step in item.forecast]
    values: dict[str, list[Any]] = {
        name: [getattr(item, name) for item, _ in rows]
        for name in _SCHEMA.names
        if name not in _OF_A_STEP
    } | {name: [getattr(step, name) for _, step in rows] for name in _OF_A_STEP}
    arrays = [_array(field.type, values[field.name]) for field in _SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA)


def _array(kind: pa.DataType, values: list[Any]) -> pa.Array:
    if pa.types.is_string(kind):
        raw = [value.encode() for value in values]
        buffers = [_offsets([len(value) for value in raw]), pa.py_buffer(b"".join(raw))]
        return pa.Array.from_buffers(kind, len(values), [None, *buffers])
    if pa.types.is_list(kind):
        flat = _array(kind.value_type, [number for value in values for number in value])
        sizes = _offsets([len(value) for value in values])
        return pa.Array.from_buffers(kind, len(values), [None, sizes], children=[flat])
    if pa.types.is_date32(kind):
        values = [day.toordinal() - EPOCH_ORDINAL for day in values]
    dtype = "i4" if pa.types.is_date32(kind) else _NUMBERS[str(kind)]
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.array(values, dtype))])


def _offsets(sizes: list[int]) -> pa.Buffer:
    return pa.py_buffer(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))
