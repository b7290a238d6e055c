"""Clients that send nonsense, too much, too often or without a key: told why, and nobody suffers.

Every case goes to a really running server, in each protocol where it applies; after each the server
still answers.
"""

import gzip
import io
import json
import re
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest

from forecasting.contract import COLUMNS
from serving.columnar import FILE, PARQUET, STREAM
from serving.keys import new_key
from serving.schemas import Traffic
from serving.traffic import write_traffic
from tests.models import EPOCH
from tests.services import free_port
from tests.serving.running import (
    FORECASTER,
    Server,
    install,
    put_prices,
    request_body,
    started,
    until,
    web,
)

MAX_WINDOWS, MAX_ROWS = 4, 512
JSON = "application/json"
INFER = f"/v2/models/{FORECASTER}/infer"
MARK = "@@"
SECURITY = {
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    install(home, 3, symbols=("GOOG", "AAPL"))
    put_prices(home)
    with web(home, max_windows=MAX_WINDOWS, max_rows=MAX_ROWS, access_log="true") as running:
        yield running
        assert "Traceback" not in running.log
        assert '"level": "ERROR"' not in running.log


@pytest.fixture(autouse=True)
def _answers_afterwards(request):
    yield
    if "server" in request.fixturenames:
        running = request.getfixturevalue("server")
        assert running.get("/v1/forecast/GOOG").is_success
        assert running.popen.poll() is None, running.popen.returncode


# what is sent -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Form:
    """One way to send a window of prices as JSON, and the status of what is wrong in it."""

    path: str
    status: int

    def build(self, rows: list[dict[str, Any]], symbol: Any = "GOOG", windows: int = 1) -> Any:
        return BUILD[self](rows, symbol, windows)


NATIVE, MANY, OIP = Form("/v1/forecast", 422), Form("/v1/forecasts", 422), Form(INFER, 400)
SPLIT, RECORDS = Form("/invocations", 422), Form("/invocations?", 422)
INPUTS = Form("/invocations??", 400)
FORMS = [NATIVE, MANY, OIP, SPLIT, RECORDS, INPUTS]
NAMES = ["native", "many", "oip", "split", "records", "inputs"]
every_form = pytest.mark.parametrize("form", FORMS, ids=NAMES)


def _days(rows):
    return [
        row["date"] if row["date"] == MARK else (date.fromisoformat(row["date"]) - EPOCH).days
        for row in rows
    ]


def _prices(rows):
    return [[row[name] for name in COLUMNS] for row in rows]


def _table(rows, symbol, windows):
    names = [symbol] if windows == 1 else [f"S{number}" for number in range(windows)]
    return [{"symbol": name, **row} for name in names for row in rows]


def _split(rows, symbol, windows):
    data = [list(row.values()) for row in _table(rows, symbol, windows)]
    return {"dataframe_split": {"columns": ["symbol", "date", *COLUMNS], "data": data}}


def _oip(rows, symbol, windows):
    count = len(rows)
    kind = "BYTES" if isinstance(symbol, str) else "INT64"
    given = (
        ("ohlcv", "FP32", [windows, count, 5], [_prices(rows)] * windows),
        ("dates", "INT64", [windows, count], [_days(rows)] * windows),
        ("symbol", kind, [windows], [symbol] * windows),
    )
    return {
        "inputs": [
            {"name": name, "datatype": datatype, "shape": shape, "data": data}
            for name, datatype, shape, data in given
        ]
    }


def _inputs(rows, symbol, windows):
    return {
        "inputs": {
            "ohlcv": [_prices(rows)] * windows,
            "dates": [_days(rows)] * windows,
            "symbol": [symbol] * windows,
        }
    }


BUILD = {
    NATIVE: lambda rows, symbol, windows: {"symbol": symbol, "rows": rows},
    MANY: lambda rows, symbol, windows: {"windows": [{"symbol": symbol, "rows": rows}] * windows},
    OIP: _oip,
    SPLIT: _split,
    RECORDS: lambda rows, symbol, windows: {"dataframe_records": _table(rows, symbol, windows)},
    INPUTS: _inputs,
}


def rows(count: int = 64) -> list[dict[str, Any]]:
    return request_body(count)["rows"]


def body_with(form: Form, field: str, raw: bytes) -> bytes:
    """A good body, but for the raw JSON of one value in row 10."""
    given = rows()
    if field != "symbol":
        given[10][field] = MARK
    body = form.build(given, MARK if field == "symbol" else "GOOG")
    return json.dumps(body).encode().replace(f'"{MARK}"'.encode(), raw)


def post(server: Server, form: Form | str, body: Any, **headers: str) -> httpx.Response:
    path = form if isinstance(form, str) else form.path
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": JSON} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    return server.client.post(path, content=content, headers=headers)


def assert_refused(response: httpx.Response, *statuses: int, kind: str = "", says: str = "") -> str:
    """That it is a problem as every other one, with the headers of every other one; its detail."""
    told = response.json()
    expected = statuses or range(400, 500)
    assert response.status_code in expected, (response.status_code, told)
    assert response.headers["content-type"] == "application/problem+json"
    assert told["status"] == response.status_code
    assert re.fullmatch(r"/problems/[a-z-]+", told["type"])
    assert told["title"]
    assert 10 < len(told["detail"]) < 1000
    if kind:
        assert told["type"] == f"/problems/{kind}", told
    assert says in told["detail"], told["detail"]
    assert_headers(response)
    return told["detail"]


def assert_headers(response: httpx.Response) -> None:
    assert {name: response.headers.get(name) for name in SECURITY} == SECURITY
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", response.headers["x-request-id"])
    assert not [name for name in response.headers if name.startswith("access-control")]


@every_form
def test_what_is_changed_below_is_good_to_begin_with(server, form):
    answer = post(server, form, form.build(rows()))
    assert answer.status_code == 200, answer.text
    assert_headers(answer)


# values -------------------------------------------------------------------------------------------
NO_PRICES = [
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e400",
    b"-1e400",
    b"1" + b"0" * 400,
    b'"12"',
    b'"\\ud800"',
    b"null",
    b"true",
    b"[]",
    b"{}",
    b"0",
    b"-0.0",
    b"-1",
    b"1e39",
    b"1e-320",
    b"01",
    b"0x10",
]


@every_form
@pytest.mark.parametrize("raw", NO_PRICES, ids=lambda raw: raw[:12].decode())
def test_no_price(server, form, raw):
    says = assert_refused(post(server, form, body_with(form, "close", raw)), 400, 422)
    assert "expected" in says.lower() or "must be" in says
    if raw[:1] in b'"nt[{' and b"ud800" not in raw:  # JSON, but no number
        assert "close" in says or "ohlcv" in says


@every_form
@pytest.mark.parametrize(
    "raw",
    [
        b'""',
        b'"2008-13-01"',
        b'"02/01/2008"',
        b'"2008-01-02T12:00:00"',
        b'"2008-01-02\\u0000"',
        b'"\\ud800"',
        b"NaN",
        b"null",
        b"true",
        b"1.5",
        b"1" + b"0" * 400,
        b"-99999999999999",
    ],
    ids=lambda raw: raw[:12].decode(),
)
def test_no_date(server, form, raw):
    says = assert_refused(post(server, form, body_with(form, "date", raw)), 400, 422)
    if raw in (b"null", b"true", b"1.5", b'""', b'"2008-13-01"'):
        assert "date" in says


@every_form
@pytest.mark.parametrize("twice", [False, True], ids=["unsorted", "twice"])
def test_dates_that_do_not_ascend(server, form, twice):
    given = rows()
    given[10]["date"] = given[11 if twice else 20]["date"]
    says = assert_refused(post(server, form, form.build(given)), 422, kind="bad-dates")
    assert "row 11" in says
    assert "Sort the rows" in says


@every_form
def test_high_below_low(server, form):
    given = rows()
    given[10]["high"] = given[10]["low"] / 2
    refused = post(server, form, form.build(given))
    assert_refused(refused, 422, kind="bad-prices", says="high not below low")


NO_SYMBOLS = [
    b'"../../../etc/passwd"',
    b'"%2e%2e%2f"',
    b'"\\u0000"',
    b'"GOOG\\u0000"',
    b'"goog"',
    b'""',
    b'"' + b"x" * 10_000 + b'"',
    b'"\\ud800"',
    b'"\xff\xfe"',
    b'"\xed\xa0\x80"',
    b"null",
    b"true",
    b'["GOOG"]',
    b"-1",
    b"7",
    b"1e400",
]


@every_form
@pytest.mark.parametrize("raw", NO_SYMBOLS, ids=lambda raw: raw[:12].decode("latin-1"))
def test_no_symbol(server, form, raw):
    says = assert_refused(post(server, form, body_with(form, "symbol", raw)), 400, 404, 422)
    assert "/etc/passwd" not in says or "got '../../../etc/passwd'" in says


@every_form
def test_keys_that_come_twice_count_once(server, form):
    """JSON leaves open what that means; the last one counts, as in every common parser."""
    body = form.build(rows())
    key, value = next(iter(body.items()))
    answer = post(
        server,
        form,
        f'{{"{key}": {json.dumps(type(value)())}, '.encode() + json.dumps(body).encode()[1:],
    )
    assert answer.status_code == 200, answer.text


# shapes and sizes ---------------------------------------------------------------------------------
MALFORMED = {
    "nothing": b"",
    "a brace": b"{",
    "a word": b"GOOG",
    "not UTF-8": b"\xff\xfe",
    "a comma too many": b'{"symbol": "GOOG",, }',
    "100,000 brackets": b"[" * 100_000,
    "100,000 objects": b'{"a":' * 100_000,
    "closed brackets": b"[" * 100_000 + b"]" * 100_000,
    "NUL": b"\x00" * 10,
    "UTF-16": json.dumps({"symbol": "GOOG"}).encode("utf-16"),
}


@every_form
@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_no_json(server, form, content):
    refused = post(server, form, content)
    if form in (NATIVE, MANY) and content[:1] in (b"[", b"{") and len(content) > 1:
        assert_refused(refused, 400, 422)  # the shape is looked at while it is parsed
    else:
        assert_refused(refused, 400, kind="malformed-json", says="JSON")


@every_form
@pytest.mark.parametrize("body", [[], {}, None, 1, "GOOG", {"rows": {}}, {"x" * 100_000: 1}])
def test_json_of_another_shape(server, form, body):
    assert_refused(post(server, form, body), form.status, 422)


@every_form
def test_too_few_rows(server, form):
    says = assert_refused(post(server, form, form.build(rows(63))), form.status)
    assert "64" in says
    assert "63" in says


@every_form
def test_too_many_rows(server, form):
    says = assert_refused(post(server, form, form.build(rows(MAX_ROWS + 1))), form.status)
    assert str(MAX_ROWS + 1) in says
    assert "At most 512 rows" in says or "[windows, 64, 5]" in says


@pytest.mark.parametrize("form", FORMS[1:], ids=NAMES[1:])
def test_too_many_windows(server, form):
    good = post(server, form, form.build(rows(), windows=MAX_WINDOWS))
    assert good.status_code == (404 if form in (SPLIT, RECORDS) else 200)  # S0 is not served
    refused = post(server, form, form.build(rows(), windows=MAX_WINDOWS + 1))
    assert_refused(refused, 422, kind="window-count", says="1 to 4 windows")


def test_no_windows(server):
    assert_refused(post(server, MANY, {"windows": []}), 422, kind="window-count")


@pytest.mark.parametrize("index", range(3), ids=["ohlcv", "dates", "symbol"])
@pytest.mark.parametrize(
    "change",
    [
        {"shape": []},
        {"shape": [0, 64, 5]},
        {"shape": [-1, 64, 5]},
        {"shape": [2**62, 2**62, 2**62]},
        {"shape": [1, 2, 3, 4]},
        {"shape": ["1"]},
        {"datatype": "FP16"},
        {"data": []},
        {"data": [[[]]]},
        {"data": {}},
        {"data": None},
        {"name": "close"},
        {"parameters": {"binary_data_size": 10**12}},
        {"parameters": {"shared_memory_region": "x"}},
    ],
    ids=str,
)
def test_tensors_of_another_shape(server, index, change):
    body = OIP.build(rows())
    body["inputs"][index] |= change
    refused = post(server, OIP, body)
    says = assert_refused(refused, 400)
    assert refused.json()["error"] == says  # where clients of the protocol look


@pytest.mark.parametrize("length", ["0", "-1", "x", "1e3", "99999999", "9" * 400, "٣"])
def test_header_lengths_that_are_none(server, length):
    refused = server.client.post(
        INFER,
        content=json.dumps(OIP.build(rows())),
        headers=[(b"inference-header-content-length", length.encode())],
    )
    assert_refused(refused, 400)


@every_form
def test_a_large_body(server, form):
    content = b'{"symbol": "' + b"x" * 4_100_000 + b'"}'
    refused = post(server, form, content)
    assert_refused(refused, 413, kind="body-too-large", says="PERENNIAL_MAX_BODY_MB")


# encodings ----------------------------------------------------------------------------------------
@every_form
def test_compressed_bodies(server, form):
    content = json.dumps(form.build(rows())).encode()
    for encoding, packed in (
        ("gzip", gzip.compress(content)),
        ("x-gzip", gzip.compress(content)),
        ("deflate", zlib.compress(content)),
        ("GZIP", gzip.compress(content)),
        ("identity", content),
    ):
        assert post(server, form, packed, content_encoding=encoding).status_code == 200


BROKEN = {
    "truncated": lambda packed: packed[:-20],
    "not gzip": lambda packed: b"GOOG" * 20,
    "empty": lambda packed: b"",
    "goes on": lambda packed: packed + b"more",
    "wrong checksum": lambda packed: packed[:-8] + b"\0" * 8,
}


@every_form
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_broken_gzip(server, form, broken):
    packed = gzip.compress(json.dumps(form.build(rows())).encode())
    refused = post(server, form, broken(packed), content_encoding="gzip")
    assert_refused(refused, 400, kind="bad-encoding", says="gzip")


@every_form
def test_a_gzip_bomb(server, form):
    bomb = gzip.compress(b"[" * 200_000_000, compresslevel=1)
    assert len(bomb) < 4_000_000
    assert_refused(post(server, form, bomb, content_encoding="gzip"), 413, kind="body-too-large")


@every_form
@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "x" * 500, "identity, gzip"])
def test_other_encodings(server, form, encoding):
    refused = post(server, form, form.build(rows()), content_encoding=encoding)
    assert_refused(refused, 415, kind="bad-encoding", says="gzip, deflate or none")


@every_form
@pytest.mark.parametrize(
    "media_type",
    [
        "text/plain",
        "application/xml",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "application/jsonx",
        "json",
        "x" * 1000,
    ],
    ids=lambda text: text[:20],
)
def test_other_media_types(server, form, media_type):
    refused = post(server, form, form.build(rows()), content_type=media_type)
    assert_refused(refused, 415, kind="unsupported-media-type", says="application/json")


@pytest.mark.parametrize("media_type", [STREAM, FILE, PARQUET])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"ARROW1\0\0" + b"\xff" * 64, b"\xff" * 1000])
def test_tables_that_are_none(server, media_type, content):
    refused = post(server, "/v1/forecasts", content, content_type=media_type)
    assert_refused(refused, 400, kind="unreadable-table", says=media_type)


def test_tables_of_too_many_rows_and_windows(server):
    def stream(count: int, symbols: int) -> bytes:
        long = _table(rows(count), "GOOG", symbols)
        for row in long:
            row["date"] = date.fromisoformat(row["date"])
        table, sink = pa.Table.from_pylist(long), io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue()

    def sent(count: int, symbols: int) -> httpx.Response:
        return post(server, "/v1/forecasts", stream(count, symbols), content_type=STREAM)

    assert_refused(sent(MAX_ROWS + 1, 1), 422, kind="too-many-rows")
    assert_refused(sent(64, MAX_WINDOWS + 1), 422, kind="window-count")
    assert_refused(sent(MAX_ROWS + 1, MAX_WINDOWS), 413, kind="table-too-large")


# paths --------------------------------------------------------------------------------------------
def test_percent_encoded_names_are_names(server):
    assert server.get("/v1/forecast/%47OO%47").json()["symbol"] == "GOOG"
    assert server.get(f"/v2/models/{FORECASTER.replace('-', '%2D')}/ready").status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "..%2f..%2fapi-keys.json",
        "%00",
        "GOOG%00",
        "%ff%fe",
        "%ed%a0%80",
        "GOOG%0d%0aset-cookie:x",
        "<script>",
        "%25",
        "%",
        "%zz",
        "x" * 4000,
        "%F0%9F%A6%86",
    ],
    ids=lambda name: name[:12],
)
@pytest.mark.parametrize("path", ["/v1/forecast/{}", "/v2/models/{}", "/v2/models/{}/ready"])
def test_paths_to_nothing(server, path, name):
    (answer,) = raw(server, f"GET {path.format(name)} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    assert answer.status == 404
    assert "set-cookie" not in answer.headers
    assert answer.problem["type"] in ("/problems/unknown-symbol", "/problems/unknown-model") or (
        answer.problem["type"] == "/problems/not-found"  # %2f is a slash to the router
    )


@pytest.mark.parametrize(
    "path", ["/v1/forecast/../../etc/passwd", "/v1/forecast/", "/v1/forecast/a/b", "/v2/models/.."]
)
def test_paths_with_other_slashes(server, path):
    (answer,) = raw(server, f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    assert answer.status in (404, 405)
    assert answer.problem["status"] == answer.status


# HTTP ---------------------------------------------------------------------------------------------
@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def problem(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/problem+json"
        assert {name: self.headers.get(name) for name in SECURITY} == SECURITY
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.headers["x-request-id"])
        told = json.loads(self.body)
        assert told["status"] == self.status
        assert told["title"]
        assert told["detail"]
        return told


@contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.client.base_url.port), timeout=20) as made:
        yield made


def received(connection: socket.socket, method: str = "GET") -> Answer:
    response = HTTPResponse(connection, method=method)
    response.begin()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, response.read())


def raw(server: Server, sent: bytes) -> list[Answer]:
    """The answer to bytes on a connection of their own."""
    with connected(server) as connection:
        connection.sendall(sent)
        return [received(connection)]


def posted(body: bytes, *headers: str, version: str = "1.1", path: str = "/v1/forecast") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "host: x", f"content-type: {JSON}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def test_http_1_0(server):
    body = json.dumps(request_body()).encode()
    with connected(server) as connection:
        connection.sendall(posted(body, f"content-length: {len(body)}", version="1.0"))
        assert received(connection).status == 200
        assert connection.recv(1) == b""


def test_chunked_bodies(server):
    body = json.dumps(request_body()).encode()
    chunks = b"".join(
        b"%x\r\n%b\r\n" % (len(piece), piece)
        for piece in (body[at : at + 1000] for at in range(0, len(body), 1000))
    )
    (answer,) = raw(server, posted(chunks + b"0\r\n\r\n", "transfer-encoding: chunked"))
    assert answer.status == 200
    for broken in (b"zz\r\n", b"5\r\nhello!!\r\n", b"-1\r\n", b"ffffffffffffffffff\r\n"):
        (answer,) = raw(server, posted(broken, "transfer-encoding: chunked"))
        assert (answer.status, answer.problem["type"]) == (400, "/problems/bad-request")


def test_a_body_with_two_lengths(server):
    """Who believes one and who the other lets requests be smuggled in between."""
    for headers in (
        ("content-length: 2", "content-length: 3"),
        ("content-length: 2", "transfer-encoding: chunked"),
        ("content-length: -2",),
        ("content-length: 2x",),
        ("transfer-encoding: gzip, identity",),
    ):
        (answer,) = raw(server, posted(b"{}\r\n\r\n", *headers))
        assert (answer.status, answer.problem["type"]) == (400, "/problems/bad-request"), headers


def test_pipelined_requests_are_answered_in_order(server):
    good = json.dumps(request_body()).encode()
    sent = [
        posted(good, f"content-length: {len(good)}"),
        posted(b"{", "content-length: 1"),
        b"GET /v1/forecast/GOGO HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /v1/forecast/GOOG HTTP/1.1\r\nhost: x\r\n\r\n",
        b"DELETE /v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
        posted(good, f"content-length: {len(good)}"),
    ]
    with connected(server) as connection:
        file = connection.makefile("rb")
        connection.sendall(b"".join(sent))
        assert [_next_status(file) for _ in sent] == [200, 400, 404, 200, 405, 200]


def _next_status(file) -> int:
    status = int(file.readline().split()[1])
    size = 0
    while (line := file.readline().strip().lower()) != b"":
        name, _, value = line.partition(b":")
        size = int(value) if name == b"content-length" else size
    assert len(file.read(size)) == size
    return status


@pytest.mark.parametrize(
    ("sent", "status", "kind"),
    [
        (b"GET /v1/models HTTP/1.1\r\nx: " + b"a" * 40_000 + b"\r\n\r\n", 431, "headers-too-large"),
        (b"GET /v1/models HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431, "headers-too-large"),
        (b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 414, "uri-too-long"),
        (b"GET /v1/models HTTP/1.1\r\na\x00b: c\r\n\r\n", 400, "bad-request"),
        (b"GET /v1/models HTTP/1.1\r\na: b\x00c\r\n\r\n", 400, "bad-request"),
        (b"GET /v1/models HTTP/3.7\r\n\r\n", 400, "bad-request"),
        (b"GET  /v1/models\r\n\r\n", 400, "bad-request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 40, 400, "bad-request"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "bad-request"),
        (b"\r\n\r\nGOOG please\r\n\r\n", 400, "bad-request"),
    ],
    ids=["header", "headers", "URL", "NUL name", "NUL value", "3.7", "0.9", "TLS", "HTTP/2", "no"],
)
def test_no_http(server, sent, status, kind):
    (answer,) = raw(server, sent)
    assert (answer.status, answer.problem["type"]) == (status, f"/problems/{kind}")


def test_request_ids(server):
    def echoed(*sent: bytes) -> str:
        headers = [(b"x-request-id", each) for each in sent]
        return server.client.get("/v1/models", headers=headers).headers["x-request-id"]

    assert echoed(b"my-Request_7.1") == "my-Request_7.1"
    assert echoed(b"a" * 64) == "a" * 64
    made = [
        echoed(sent)
        for sent in (b"", b"a" * 65, b"a b", b"<script>", b"\xff", b'"', b"a;b", b"a/b", b"a%0d")
    ]
    assert len(set(made)) == len(made)
    assert all(re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]+", each) for each in made)
    refused = server.client.get("/nowhere", headers={"x-request-id": "mine"})
    assert refused.headers["x-request-id"] == "mine"


def test_nobody_is_let_in_from_other_origins(server):
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    for method in ("GET", "POST", "OPTIONS"):
        for path in ("/v1/models", "/v1/forecast", INFER, "/invocations", "/ping", "/schema"):
            assert_no_cors(server.client.request(method, path, headers=headers))


def assert_no_cors(response: httpx.Response) -> None:
    assert not [name for name in response.headers if name.startswith("access-control")]


# logs ---------------------------------------------------------------------------------------------
def test_every_request_is_one_line_of_the_access_log(server):
    asked = [("GET", "/v1/forecast/GOOG", 200), ("GET", "/nowhere", 404), ("PUT", "/ping", 405)]
    for number, (method, path, status) in enumerate(asked):
        answer = server.client.request(method, path, headers={"x-request-id": f"line-{number}"})
        assert answer.status_code == status

    def lines() -> list[dict[str, Any]]:
        found = [json.loads(line) for line in server.log_lines]
        return [line for line in found if line.get("request_id", "").startswith("line-")]

    until(lambda: len(lines()) == len(asked), "the lines")
    for number, (line, (method, path, status)) in enumerate(zip(lines(), asked, strict=True)):
        assert line["request_id"] == f"line-{number}"
        assert (line["message"], line["status"]) == (f"{method} {path} {status}", status)
        assert 0 < line["milliseconds"] < 20_000
        assert line["logger"] == "serving.access"


def test_no_line_of_a_log_can_be_forged(server):
    forged = "/v1/forecast/x%0a%7B%22level%22:%22ERROR%22%7D"
    assert server.get(forged).status_code == 404
    for line in server.log_lines:
        assert json.loads(line)["level"] == "INFO"


# overload -----------------------------------------------------------------------------------------
def test_above_the_limit_some_are_asked_to_come_again(tmp_path):
    install(tmp_path, 3)
    put_prices(tmp_path)
    body = json.dumps(request_body()).encode()
    with web(tmp_path, max_concurrency=1) as server:
        with connected(server) as slow:
            slow.sendall(posted(body[:100], f"content-length: {len(body)}"))
            until(lambda: server.get("/v1/models").status_code == 503, "its request to be read")
            refused = server.get("/v1/forecast/GOOG")
            assert_refused(refused, 503, kind="overloaded", says="PERENNIAL_MAX_CONCURRENCY")
            assert int(refused.headers["retry-after"]) > 0
            for path in ("/health/live", "/health/ready", "/ping", "/health", "/v2/health/live"):
                assert server.get(path).status_code == 200
            slow.sendall(body[100:])
            assert received(slow).status == 200
        assert server.get("/v1/forecast/GOOG").status_code == 200
        assert statuses_of_many(server, body)[200] > 0


def statuses_of_many(server: Server, body: bytes) -> Counter[int]:
    """What 12 clients at once get, all of whom get something."""
    seen: Counter[int] = Counter()

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=20) as client:
            for _ in range(10):
                answer = client.post("/v1/forecast", content=body)
                assert answer.status_code == 200 or int(answer.headers["retry-after"]) > 0
                seen[answer.status_code] += 1

    clients = [threading.Thread(target=ask) for _ in range(12)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(30)
    assert not any(client.is_alive() for client in clients)
    assert sum(seen.values()) == 120
    assert set(seen) <= {200, 503}
    return seen


# keys ---------------------------------------------------------------------------------------------
@dataclass
class Guarded:
    server: Server
    key: str
    slow: str


RATE = 5


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[Guarded]:
    home = tmp_path_factory.mktemp("guarded")
    install(home, 3)
    put_prices(home)
    keys = home / "api-keys.json"
    fast, slow = new_key(keys, "anna"), new_key(keys, "bob", rate=RATE)
    with web(home, web_workers=2, access_log="true") as server:
        yield Guarded(server, fast, slow)
        assert fast not in server.log
        assert slow not in server.log


NEEDS_KEY = [
    "/v1/forecast/GOOG",
    "/v1/models",
    "/metrics",
    "/v2",
    "/schema",
    "/version",
    "/nowhere",
]


@pytest.mark.parametrize("path", NEEDS_KEY)
def test_nothing_without_a_key(guarded, path):
    server = guarded.server
    for headers in (
        {},
        {"authorization": "Bearer pk_nonsense"},
        {"authorization": "Bearer"},
        {"authorization": f"Basic {guarded.key}"},
        {"x-api-key": ""},
        {"x-api-key": guarded.key + "x"},
        {"x-api-key": "x" * 10_000},
    ):
        refused = server.client.get(path, headers=headers)
        assert_refused(refused, 401, kind="unauthorized")
        assert refused.headers["www-authenticate"].startswith("Bearer")
        assert guarded.key not in refused.text
    good = 404 if path == "/nowhere" else 200
    for headers in (
        {"authorization": f"Bearer {guarded.key}"},
        {"authorization": f"bearer {guarded.key}"},
        {"x-api-key": guarded.key},
    ):
        assert server.client.get(path, headers=headers).status_code == good


@pytest.mark.parametrize("form", [NATIVE, MANY, OIP, SPLIT], ids=["native", "many", "oip", "split"])
def test_nothing_is_computed_without_a_key(guarded, form):
    body = form.build(rows(), 0 if form is OIP else "GOOG")
    assert_refused(post(guarded.server, form, body), 401, kind="unauthorized")
    assert_refused(post(guarded.server, form, b"[" * 100_000), 401, kind="unauthorized")
    assert post(guarded.server, form, body, x_api_key=guarded.key).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/health", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready", "/ping"],
)
def test_health_is_open(guarded, path):
    assert guarded.server.get(path).status_code == 200


def test_the_rate_of_a_key_holds_over_all_workers(guarded):
    seen: Counter[int] = Counter()
    began = time.monotonic()
    for _ in range(10 * RATE):  # a connection each, so that both workers get some
        answer = httpx.get(
            f"{guarded.server.url}/v1/models", headers={"x-api-key": guarded.slow}, timeout=20
        )
        seen[answer.status_code] += 1
        if answer.status_code == 429:
            assert_refused(answer, 429, kind="rate-limited", says="'bob'")
            assert int(answer.headers["retry-after"]) >= 1
    most = RATE + RATE * (time.monotonic() - began) + 1
    assert RATE <= seen[200] <= most
    assert seen[200] + seen[429] == 10 * RATE
    other = guarded.server.client.get("/v1/models", headers={"x-api-key": guarded.key})
    assert other.status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_are_not_served_without_keys(tmp_path, host):
    with started("web", tmp_path, host=host, port=free_port()) as process:
        assert process.popen.wait(20) == 2
        assert "API keys were expected" in process.log
        assert "python -m serving key new" in process.log


# what changes while it runs, and what is switched off ---------------------------------------------
def test_without_docs_there_are_none(tmp_path):
    with web(tmp_path, ready=False, docs="false") as server:
        for path in (
            "/schema",
            "/schema/openapi.json",
            "/schema/swagger",
            "/docs",
            "/openapi.json",
        ):
            assert_refused(server.get(path), 404, kind="not-found")


def test_the_traffic_file_is_followed(server: Server):
    def shares() -> dict[str, float]:
        return server.get("/v1/models").json()["traffic"]

    path = Path(server.home / "traffic.json")
    assert shares() == {"shadow_share": 0.0, "canary_share": 0.0}
    write_traffic(path, Traffic(0.5, 0.25))
    until(lambda: shares() == {"shadow_share": 0.5, "canary_share": 0.25}, "the shares")
    write_traffic(path, Traffic(0.0, 1.0))
    until(lambda: shares() == {"shadow_share": 0.0, "canary_share": 1.0}, "other shares")
    path.unlink()
    until(lambda: shares() == {"shadow_share": 0.0, "canary_share": 0.0}, "no shares")
