"""Arrow IPC and Parquet: tables as other libraries write them, damaged ones, and bombs."""

import io
import subprocess
import sys
from contextlib import suppress
from datetime import date, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forecasting.contract import COLUMNS
from serving import columnar
from serving.columnar import FILE, MEDIA_TYPES, PARQUET, STREAM
from serving.problems import ProblemError
from serving.schemas import Forecast, HorizonForecast
from tests.models import price_rows

EPOCH = date(1970, 1, 1)
DAYS, VALUES = price_rows(8)
NUMBERS = [(day - EPOCH).days for day in DAYS]
SYMBOLS = ("GOOG", "AAPL")
DAY_COLUMN = pa.array(DAYS * 2, pa.date32())

every_format = pytest.mark.parametrize("media_type", MEDIA_TYPES)


def table(**columns) -> pa.Table:
    values = {
        "symbol": pa.array([name for name in SYMBOLS for _ in DAYS]),
        "date": DAY_COLUMN,
        **{name: pa.array([row[i] for row in VALUES] * 2) for i, name in enumerate(COLUMNS)},
    }
    return pa.table(values | columns)


def encode(data: pa.Table, media_type: str, compression="none", **options) -> bytes:
    sink = io.BytesIO()
    if media_type == PARQUET:
        pq.write_table(data, sink, compression=compression, **options)
        return sink.getvalue()
    opened = pa.ipc.new_stream if media_type == STREAM else pa.ipc.new_file
    codec = None if compression == "none" else compression
    with opened(sink, data.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(data, max_chunksize=5)
    return sink.getvalue()


def read(data: pa.Table, media_type: str, max_rows=100, **options):
    return columnar.read(encode(data, media_type, **options), media_type, max_rows)


def refusal(body: bytes | pa.Table, media_type: str, max_rows=100):
    raw = body if isinstance(body, bytes) else encode(body, media_type)
    with pytest.raises(ProblemError) as caught:
        columnar.read(raw, media_type, max_rows)
    assert len(caught.value.detail) < 1000
    return f"{caught.value.status} {caught.value.kind}: {caught.value.detail}"


def assert_windows(got, symbols=SYMBOLS, rtol=0.0):
    assert [window.symbol for window in got] == list(symbols)
    for window in got:
        assert window.days.tolist() == NUMBERS
        assert (window.days.dtype, window.ohlcv.dtype) == (np.int64, np.float64)
        np.testing.assert_allclose(window.ohlcv, VALUES, rtol=rtol)


# tables


@every_format
@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_tables_are_read_compressed_or_not(media_type, compression):
    assert_windows(read(table(), media_type, compression=compression))


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "snappy"},
        {"compression": "gzip"},
        {"compression": "brotli"},
        {"use_dictionary": False},
        {"row_group_size": 3},
        {"data_page_size": 32, "write_batch_size": 1},
        {"data_page_version": "2.0", "compression": "zstd"},
        {"store_schema": False},
        {"write_statistics": False},
        {"write_page_index": True, "write_page_checksum": True},
        {"use_dictionary": False, "column_encoding": {"open": "BYTE_STREAM_SPLIT"}},
    ],
)
def test_parquet_is_read_as_writers_may_write_it(options):
    assert_windows(read(table(), PARQUET, **options))


def text(kind: pa.DataType, names=("GOOG", "AAPL")) -> pa.Array:
    values = pa.array([name for name in names for _ in DAYS])
    return (
        values.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else values.cast(kind)
    )


@every_format
@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.dictionary(pa.int32(), pa.large_string()),
    ],
    ids=str,
)
def test_symbols_may_be_any_strings(media_type, kind):
    assert_windows(read(table(symbol=text(kind)), media_type))
    sliced = table(symbol=text(kind)).slice(1).slice(0, 15)
    assert [window.symbol for window in read(sliced, media_type)] == list(SYMBOLS)


@every_format
@pytest.mark.parametrize(
    "kind",
    [
        pa.date64(),
        *(pa.timestamp(unit) for unit in ("s", "ms", "us", "ns")),
        pa.timestamp("ns", "UTC"),
        pa.string(),
        pa.large_string(),
        pa.string_view(),
    ],
    ids=str,
)
def test_dates_may_be_days_midnights_or_text(media_type, kind):
    assert_windows(read(table(date=DAY_COLUMN.cast(kind)), media_type))


@every_format
@pytest.mark.parametrize("zone", ["America/New_York", "Europe/Berlin", "+05:30", "-0500"])
def test_midnights_of_a_time_zone_are_its_days(media_type, zone):
    offset = {"+05:30": "Asia/Kolkata", "-0500": "America/Bogota"}
    moments = [
        datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(offset.get(zone, zone)))
        for day in DAYS * 2
    ]
    for unit, ticks in (("s", 1), ("ns", 10**9)):  # from integers: pandas may be loaded or not
        since = pa.array([int(moment.timestamp()) * ticks for moment in moments], pa.int64())
        column = since.cast(pa.timestamp(unit, zone))
        assert_windows(read(table(date=column), media_type))


@every_format
@pytest.mark.parametrize(
    "kind",
    [
        pa.float32(),
        pa.float16(),
        pa.int16(),
        pa.uint64(),
        pa.decimal64(10, 2),
        pa.decimal128(30, 4),
        pa.decimal256(60, 4),
    ],
    ids=str,
)
def test_prices_may_be_any_numbers(media_type, kind):
    columns = {name: table()[name].cast(kind, safe=False) for name in COLUMNS[:4]}
    with np.errstate(over="ignore"):
        assert_windows(read(table(**columns), media_type), rtol=0.02)


@every_format
def test_frames_of_pandas_are_read(media_type, tmp_path):
    frame = pd.DataFrame(VALUES, columns=list(COLUMNS))
    frame.insert(0, "date", pd.to_datetime(DAYS).tz_localize("America/New_York"))
    both = pd.concat([frame.assign(symbol=name) for name in SYMBOLS], ignore_index=True)
    both["symbol"] = both["symbol"].astype("category")
    assert_windows(read(pa.Table.from_pandas(both), media_type))
    both.to_feather(tmp_path / "table.feather")
    assert_windows(columnar.read((tmp_path / "table.feather").read_bytes(), FILE, 100))
    both.to_parquet(tmp_path / "table.parquet")
    assert_windows(columnar.read((tmp_path / "table.parquet").read_bytes(), PARQUET, 100))


@every_format
def test_symbols_come_in_the_order_of_first_appearance_and_may_interleave(media_type):
    mixed = table().take([i // 2 + 8 * (1 - i % 2) for i in range(16)])
    assert_windows(read(mixed, media_type), ("AAPL", "GOOG"))


@every_format
def test_infinities_and_nan_are_left_to_the_price_check(media_type):
    odd = [np.nan, np.inf, -np.inf, 1e300] + [1.0] * 12
    window, _ = read(table(open=pa.array(odd)), media_type)
    assert np.array_equal(window.ohlcv[:, 0], odd[:8], equal_nan=True)


# refusals


@every_format
@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"adjusted": DAY_COLUMN}, "Unknown: 'adjusted'"),
        ({"symbol": pa.array([7] * 16)}, "Column symbol: string"),
        ({"symbol": pa.array([b"GOOG"] * 16)}, "Column symbol: string"),
        ({"symbol": pa.array(["GOOG", None, ""] * 5 + ["GOOG"])}, "10 rows break this: 1, 2, 4"),
        ({"symbol": pa.array(["G" * 65] * 16)}, "at most 64 bytes"),
        ({"symbol": pa.array(["G" * 65] * 16, pa.string_view())}, "at most 64 bytes"),
        ({"date": pa.array([7] * 16)}, "Column date: date, timestamp or string"),
        ({"date": pa.array(["2008-01-02"] * 15 + ["2.1.2008"])}, "1 rows break this: 15 "),
        ({"date": pa.array([date(2008, 1, 2), None] * 8)}, "1, 3, 5, 7, 9, ..."),
        ({"date": pa.array([datetime(2008, 1, 2), datetime(2008, 1, 2, 3)] * 8)}, "1, 3, 5, 7, 9"),
        ({"date": pa.array([2**62, -(2**62)] * 8, pa.timestamp("us"))}, "0, 1, 2, 3, 4"),
        ({"date": pa.array([0, 2**31 - 1] * 8, pa.date32())}, "1, 3, 5, 7, 9"),
        ({"date": pa.array([0, 1] * 8, pa.timestamp("us", "UTC"))}, "1, 3, 5, 7, 9"),
        ({"date": pa.array([2**62] * 16, pa.timestamp("us", "UTC"))}, "0, 1, 2, 3, 4"),
        ({"date": pa.array([0] * 16, pa.timestamp("s", "Europe/Berlin"))}, "16 rows"),
        ({"open": pa.array(["1.0"] * 16)}, "Column open: float, integer or decimal"),
        ({"open": pa.array([True] * 16)}, "Column open: float, integer or decimal"),
        ({"open": pa.array([[1.0]] * 16)}, "Column open: float, integer or decimal"),
        ({"open": pa.array([1.0, None] * 8)}, "a value was expected in every row; 8 rows"),
    ],
)
def test_other_columns_are_refused_by_name_and_row(media_type, columns, said):
    assert said in refusal(table(**columns), media_type)


@every_format
@pytest.mark.parametrize(
    "zone", ["../../etc/passwd", "/etc/passwd", "Nowhere/No", "+99:99", "x" * 500]
)
def test_time_zones_that_are_none_are_refused(media_type, zone):
    column = pa.array([0] * 16, pa.timestamp("s", zone))
    assert "400 unreadable-table" in refusal(table(date=column), media_type)


@every_format
def test_missing_twice_and_no_rows_are_refused(media_type):
    assert "missing: open" in refusal(table().drop_columns(["open"]), media_type)
    twice = table().append_column("open", table()["open"])
    assert "each once" in refusal(twice, media_type)
    assert "At least one row" in refusal(table().slice(0, 0), media_type)


def test_other_media_types_are_refused():
    assert "415 unsupported-media-type" in refusal(b"", "text/csv")
    with pytest.raises(ProblemError):
        columnar.write([], "text/csv")


@every_format
def test_bodies_of_another_format_are_unreadable(media_type):
    for other in (b"", b"PAR1", b"ARROW1", b"PAR1PAR1PAR1", b"{}", b"\0" * 64, b"\xff" * 64):
        assert "400 unreadable-table" in refusal(other, media_type)
    for other in set(MEDIA_TYPES) - {media_type}:
        assert "400 unreadable-table" in refusal(encode(table(), other), media_type)


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_encodings_of_text_that_may_multiply_bytes_are_refused(encoding):
    options = {"use_dictionary": False, "column_encoding": {"symbol": encoding}}
    assert "400 unreadable-table" in refusal(encode(table(), PARQUET, **options), PARQUET)


# size


@every_format
def test_too_many_rows_are_refused_before_they_are_unpacked(media_type):
    assert "413 table-too-large: At most 15 rows" in refusal(table(), media_type, 15)
    assert len(read(table(), media_type, 16)) == 2


def long_dictionary(size: int) -> pa.Table:
    return table(symbol=pa.DictionaryArray.from_arrays([0] * 16, ["A" * size]))


@every_format
@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_bombs_are_refused_before_they_are_unpacked(media_type, compression):
    body = encode(long_dictionary(36 * 2**20), media_type, compression)
    assert len(body) < 2**19
    before = pa.default_memory_pool().max_memory()
    said = refusal(body, media_type)
    assert "413 table-too-large" in said
    assert "bytes of unpacked data" in said
    assert pa.default_memory_pool().max_memory() == before


def test_a_dictionary_longer_than_the_table_may_be_is_refused():
    wide = table(symbol=pa.DictionaryArray.from_arrays([0] * 16, [f"S{i}" for i in range(200)]))
    for media_type in (STREAM, FILE):
        assert "At most 100 rows" in refusal(wide, media_type)
    assert "At most 100 values of a page" in refusal(wide, PARQUET)


@every_format
def test_large_headers_are_refused(media_type):
    data = table().replace_schema_metadata({"note": "x" * 40_000})
    assert "413 table-too-large" in refusal(data, media_type)


def test_many_parts_are_refused():
    sink = io.BytesIO()
    empty = table().slice(0, 0).combine_chunks()
    with pa.ipc.new_stream(sink, empty.schema) as writer:
        for _ in range(1100):
            writer.write_batch(
                pa.RecordBatch.from_arrays(
                    [c.combine_chunks() for c in empty.columns], schema=empty.schema
                )
            )
    assert "At most 1024 record batches" in refusal(sink.getvalue(), STREAM)
    long = pa.concat_tables([table()] * 20)
    body = encode(long, PARQUET, data_page_size=1, write_batch_size=1, use_dictionary=False)
    assert "At most 1024 pages" in refusal(body, PARQUET, 1000)


# damage

BODIES = [
    (media_type, encode(data, media_type, compression))
    for media_type in MEDIA_TYPES
    for compression in ("none", "zstd")
    for data in (
        table(),
        table(
            symbol=text(pa.dictionary(pa.int8(), pa.string())), date=DAY_COLUMN.cast(pa.string())
        ),
        table(
            symbol=text(pa.string_view()),
            open=table()["open"].cast(pa.decimal128(20, 4), safe=False),
        ),
    )
]


@settings(max_examples=250, deadline=None)
@given(st.data(), st.sampled_from(BODIES))
def test_damaged_files_are_a_problem_or_windows(data, sent):
    media_type, body = sent
    raw = bytearray(body)
    near_an_end = st.integers(0, 1500) | st.integers(max(len(raw) - 1500, 0), len(raw) - 1)
    for _ in range(data.draw(st.integers(1, 4))):
        place = min(data.draw(near_an_end), len(raw) - 1)
        raw[place] = data.draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
    cut = data.draw(st.just(len(raw)) | st.integers(0, len(raw)))
    with suppress(ProblemError):
        columnar.read(bytes(raw[:cut]), media_type, 100)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(MEDIA_TYPES), st.booleans())
def test_random_bytes_are_a_problem(noise, media_type, dressed):
    if dressed and media_type == PARQUET:
        noise = b"PAR1" + noise + len(noise).to_bytes(4, "little") + b"PAR1"
    elif dressed:
        header = b"" if media_type == STREAM else b"ARROW1\0\0"
        noise = header + b"\xff\xff\xff\xff" + len(noise).to_bytes(4, "little") + noise
    with pytest.raises(ProblemError):
        columnar.read(noise, media_type, 100)


def test_a_footer_that_ends_pyarrows_process_is_not_read_through_its_metadata():
    """`RowGroupMetaData.column` of pyarrow 25 lets a C++ exception out, which aborts."""
    body = encode(table(), PARQUET)
    size = int.from_bytes(body[-8:-4], "little")
    footer = len(body) - 8 - size
    for place in range(footer, len(body) - 8, 3):
        damaged = bytearray(body)
        damaged[place] ^= 0x04
        with suppress(ProblemError):
            columnar.read(bytes(damaged), PARQUET, 100)


# answers


def forecasts(levels=(0.1, 0.5, 0.9)):
    return [
        Forecast(
            id=f"id-{symbol}",
            symbol=symbol,
            forecaster="perennial-goog",
            model_version=3,
            run_id="r" * 32,
            dataset_md5="d" * 32,
            prices_md5=None,
            as_of=date(2008, 1, 2),
            origin=date(2008, 1, 2),
            origin_close=100.5,
            levels=list(levels),
            forecast=[
                HorizonForecast(
                    h, date(2008, 1, 2) + timedelta(days=h), 100.0 + h, [98.5, 100.0, 102.0]
                )
                for h in (1, 2)
            ],
        )
        for symbol in ("GOOG", "Ünï")
    ]


@every_format
def test_answers_are_read_by_arrow(media_type):
    body = columnar.write(forecasts(), media_type)
    if media_type == PARQUET:
        got = pq.read_table(io.BytesIO(body))
    else:
        opened = pa.ipc.open_stream if media_type == STREAM else pa.ipc.open_file
        got = opened(body).read_all()
    got.validate(full=True)
    rows = got.to_pylist()
    assert len(rows) == 4
    assert rows[3] == {
        "id": "id-Ünï",
        "symbol": "Ünï",
        "forecaster": "perennial-goog",
        "model_version": 3,
        "run_id": "r" * 32,
        "dataset_md5": "d" * 32,
        "as_of": date(2008, 1, 2),
        "origin": date(2008, 1, 2),
        "origin_close": 100.5,
        "horizon": 2,
        "target": date(2008, 1, 4),
        "median": 102.0,
        "quantiles": [98.5, 100.0, 102.0],
        "levels": [0.1, 0.5, 0.9],
    }


@every_format
def test_no_answers_are_an_empty_table(media_type):
    assert columnar.write([], media_type)


def test_neither_pandas_nor_pyarrow_compute_is_imported(tmp_path):
    paths = []
    for number, (media_type, body) in enumerate(BODIES):
        path = tmp_path / str(number)
        path.write_bytes(body)
        paths.append((str(path), media_type))
    code = f"""
import sys
from pathlib import Path
from serving import columnar
for path, media_type in {paths}:
    assert len(columnar.read(Path(path).read_bytes(), media_type, 100)) == 2
    columnar.write([], media_type)
print([name for name in ("pandas", "pyarrow.compute", "pyarrow.dataset") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
