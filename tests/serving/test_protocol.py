"""The HTTP protocol's limits, over raw sockets against uvicorn itself, on both event loops."""

import asyncio
import json
import logging
import pickle
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import pytest
import uvicorn

from forecasting.settings import load_settings
from serving.protocol import MAX_HEADER_BYTES, MAX_HEADERS, MAX_URL_BYTES, protocol_class
from tests.serving.running import until

Loop = Literal["asyncio", "uvloop"]
LARGE = 16_000_000
STRICT_SECONDS = 0.3


# a server -----------------------------------------------------------------------------------------
class App:
    """Says what it got: /wait when told to, /early without the body, /half begins without it."""

    def __init__(self) -> None:
        self.waiting = threading.Event()
        self.cut_off = threading.Event()
        self.go = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path, body = scope["path"], b""
        if path == "/wait":
            self.waiting.set()
            while not self.go.is_set():
                await asyncio.sleep(0.005)
        more = path not in ("/early", "/half")
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.cut_off.set()
                return
            body, more = body + message["body"], message["more_body"]
        got = {
            "method": scope["method"],
            "path": path,
            "body": body.decode() if len(body) < 1000 else len(body),
            "headers": [[name.decode(), value.decode()] for name, value in scope["headers"]],
        }
        answer = b"x" * LARGE if path == "/large" else json.dumps(got).encode()
        headers = [(b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if path == "/half":
            await receive()
        await send({"type": "http.response.body", "body": answer})


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """A client that sends bytes and reads answers."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.file.close()
        self.socket.close()

    def send(self, data: bytes) -> "Wire":
        self.socket.sendall(data)
        return self

    def answer(self, head: bool = False) -> Answer:
        version, status, *_ = self.file.readline().split()
        assert version == b"HTTP/1.1"
        headers = {}
        while (line := self.file.readline().rstrip()) != b"":
            name, _, value = line.decode().partition(": ")
            headers[name] = value
        size = 0 if head or status == b"100" else int(headers["content-length"])
        return Answer(int(status), headers, self.file.read(size))

    def ask(self, data: bytes) -> Answer:
        return self.send(data).answer()

    def closed(self) -> bool:
        """Whether the server closes without another byte; waits for it."""
        return self.file.read(1) == b""

    def trickle(self, data: bytes, seconds: float = 10) -> None:
        """Send byte after byte until the server answers or closes."""
        deadline = time.monotonic() + seconds
        for byte in data:
            assert time.monotonic() < deadline, "the server did not lose its patience"
            self.socket.sendall(bytes([byte]))
            if select.select([self.socket], [], [], 0.02)[0]:
                return
        raise AssertionError("the server took everything")


@dataclass
class Running:
    server: uvicorn.Server
    app: App
    port: int
    refused: dict[str, int] = field(default_factory=dict)

    def connect(self) -> Wire:
        return Wire(self.port)

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)


@contextmanager
def served(loop: Loop, keep_alive: int = 5, **values: object) -> Iterator[Running]:
    """uvicorn in a thread; that it ends in time, whatever hangs on it, is part of every test."""
    app, protocol = App(), protocol_class(load_settings(**values))
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        loop=loop,
        lifespan="off",
        log_config=None,
        timeout_keep_alive=keep_alive,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            until(lambda: server.started, "the server to start")
            yield Running(server, app, port, protocol.refused)
        finally:
            app.go.set()
            server.should_exit = True
            thread.join(15)
            assert not thread.is_alive()


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def loop(request) -> Loop:
    return request.param


@pytest.fixture(scope="module")
def patient(loop):
    with served(loop, request_seconds=20) as running:
        yield running


@pytest.fixture(scope="module")
def strict(loop):
    with served(loop, keep_alive=1, request_seconds=STRICT_SECONDS) as running:
        yield running


@pytest.fixture
def server(patient):
    for event in (patient.app.waiting, patient.app.cut_off, patient.app.go):
        event.clear()
    yield patient
    patient.app.go.set()


@pytest.fixture
def hasty(strict):
    for event in (strict.app.waiting, strict.app.cut_off, strict.app.go):
        event.clear()
    yield strict
    strict.app.go.set()


def get(path: str = "/", *lines: str, version: str = "1.1", method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", "host: x", *lines, "", ""]).encode()


def post(body: bytes, *lines: str, path: str = "/") -> bytes:
    return get(path, f"content-length: {len(body)}", *lines, method="POST") + body


CHUNKED = get("/", "transfer-encoding: chunked", method="POST")


def assert_refused(wire: Wire, status: int, kind: str, *said: str) -> None:
    answer = wire.answer()
    problem = answer.json
    assert (answer.status, problem["status"]) == (status, status), problem
    assert problem["type"] == f"/problems/{kind}"
    assert problem["title"]
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["connection"] == "close"
    assert "date" in answer.headers
    for text in ("expected", *said):
        assert text in problem["detail"]
    assert wire.closed()


# HTTP as it should be -----------------------------------------------------------------------------
def test_requests_of_all_kinds_on_one_connection(server):
    with server.connect() as wire:
        assert wire.ask(get("/a")).json["path"] == "/a"
        assert wire.ask(post(b"hello")).json["body"] == "hello"
        assert wire.ask(CHUNKED + b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n").json["body"] == (
            "hello world"
        )
        answer = wire.send(get("/b", method="HEAD")).answer(head=True)
        assert (answer.status, answer.body) == (200, b"")
        assert wire.ask(post(b"y" * 1_000_000)).json["body"] == 1_000_000
        assert wire.ask(get("/c", "connection: close")).status == 200
        assert wire.closed()


def test_http_1_0_is_answered_and_closed(server):
    with server.connect() as wire:
        answer = wire.ask(get(version="1.0"))
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert wire.closed()


def test_a_client_that_expects_100_is_told_to_continue(server):
    with server.connect() as wire:
        head, _, body = post(b"hello", "expect: 100-continue").rpartition(b"\r\n\r\n")
        assert wire.ask(head + b"\r\n\r\n").status == 100
        assert wire.ask(body).json["body"] == "hello"


def test_pipelined_requests_are_answered_in_order(server):
    with server.connect() as wire:
        wire.send(get("/wait") + post(b"second", path="/2") + get("/3"))
        assert server.app.waiting.wait(10)
        server.app.go.set()
        assert [wire.answer().json["path"] for _ in range(3)] == ["/wait", "/2", "/3"]


def test_trailers_are_not_taken_for_headers(server):
    with server.connect() as wire:
        wire.send(CHUNKED + b"5\r\nhello\r\n0\r\nx-api-key: late\r\nx-2: 2\r\n\r\n" + get("/2"))
        for _ in range(2):
            assert "late" not in wire.answer().body.decode()


def test_a_wish_for_http_2_is_ignored(server):
    wish = ("Connection: Upgrade, HTTP2-Settings, x-a", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAA")
    with server.connect() as wire:
        wire.send(post(b"hello", *wish) + get("/2", *wish) + get("/3"))
        first = wire.answer().json
        assert (first["method"], first["body"]) == ("POST", "hello")
        assert first["headers"] == [["host", "x"], ["content-length", "5"], ["connection", "x-a"]]
        assert [wire.answer().json["path"] for _ in range(2)] == ["/2", "/3"]


@pytest.mark.parametrize("size", [1, 7])
def test_requests_in_small_pieces(server, size):
    wish = ("connection: upgrade", "upgrade: h2c")
    data = get("/1") + post(b"hello", *wish) + CHUNKED + b"5\r\nworld\r\n0\r\nx: y\r\n\r\n"
    with server.connect() as wire:
        for start in range(0, len(data), size):
            wire.send(data[start : start + size])
        assert [wire.answer().json["body"] for _ in range(3)] == ["", "hello", "world"]


# slow clients -------------------------------------------------------------------------------------
def test_a_connection_that_sends_nothing_is_closed_without_a_word(hasty):
    with hasty.connect() as wire:
        start = time.monotonic()
        assert wire.closed()
        assert time.monotonic() - start > STRICT_SECONDS * 0.9


@pytest.mark.parametrize("start", [b"", get()], ids=["first", "second"])
def test_a_trickled_head_times_out(hasty, start):
    with hasty.connect() as wire:
        if start:
            assert wire.ask(start).status == 200
        wire.trickle(get("/", *["x: y"] * 90))
        assert_refused(wire, 408, "request-timeout", f"{STRICT_SECONDS} s", "REQUEST_SECONDS")


def test_trickled_line_breaks_time_out(hasty):
    with hasty.connect() as wire:
        wire.trickle(b"\r\n" * 500)
        assert_refused(wire, 408, "request-timeout")


@pytest.mark.parametrize("head", [get("/", "content-length: 9999", method="POST"), CHUNKED])
def test_a_trickled_body_times_out_and_the_application_is_told(hasty, head):
    with hasty.connect() as wire:
        wire.send(head)
        wire.trickle(b"1\r\na\r\n" * 200)
        assert_refused(wire, 408, "request-timeout")
        assert hasty.app.cut_off.wait(10)


def test_an_answered_request_is_not_answered_again(hasty):
    with hasty.connect() as wire:
        assert wire.ask(get("/early", "content-length: 9999", method="POST")).status == 200
        wire.trickle(b"x" * 500)
        assert wire.closed()


def test_a_connection_answered_before_the_body_came_goes_on_and_ends(hasty):
    with hasty.connect() as wire:
        assert wire.ask(get("/early", "content-length: 5", method="POST")).status == 200
        assert wire.ask(b"hello" + get("/2")).json["path"] == "/2"
        assert wire.ask(get("/early", "content-length: 5", method="POST")).status == 200
        wire.send(b"hello")
        assert wire.closed()


def test_idle_connections_and_slow_answers_have_more_time(hasty):
    big = post(b"z" * 500_000, path="/wait")  # more than is read before the application asks
    with hasty.connect() as idle, hasty.connect() as pipelined, hasty.connect() as slow:
        pipelined.send(get("/wait") + b"GET /2")
        sender = threading.Thread(target=slow.send, args=(big,))
        sender.start()
        assert hasty.app.waiting.wait(10)
        assert idle.ask(get()).status == 200
        for _ in range(2):
            with hasty.connect() as clock:  # closed when the time of a request has passed
                assert clock.closed()
        hasty.app.go.set()
        assert slow.answer().json["body"] == 500_000
        sender.join()
        assert pipelined.answer().json["path"] == "/wait"
        assert pipelined.ask(b" HTTP/1.1\r\n\r\n").json["path"] == "/2"
        assert idle.ask(get()).status == 200


def test_a_client_that_does_not_read_is_dropped(hasty):
    with hasty.connect() as wire:
        wire.send(get("/large"))
        assert select.select([wire.socket], [], [], 10)[0]
        until(lambda: hasty.connections == 0, "the connection to be dropped", 10)
    with hasty.connect() as wire:
        assert len(wire.ask(get("/large")).body) == LARGE


# large requests -----------------------------------------------------------------------------------
def test_the_longest_url(server):
    with server.connect() as wire:
        assert wire.ask(get("/" + "u" * (MAX_URL_BYTES - 1))).status == 200
        wire.send(get("/" + "u" * MAX_URL_BYTES))
        assert_refused(wire, 414, "uri-too-long", str(MAX_URL_BYTES))


def test_the_most_headers(server):
    with server.connect() as wire:
        assert wire.ask(get("/", *["x: y"] * (MAX_HEADERS - 1))).status == 200
        wire.send(get("/", *["x: y"] * MAX_HEADERS))
        assert_refused(wire, 431, "headers-too-large", str(MAX_HEADERS), str(MAX_HEADER_BYTES))


def test_the_longest_headers(server):
    room = MAX_HEADER_BYTES - len("host: x\r\n") - len("x: \r\n")
    with server.connect() as wire:
        assert wire.ask(get("/", "x: " + "y" * room)).status == 200
        assert wire.ask(get("/", "x: " + "y" * room)).status == 200
        wire.send(get("/", "x: " + "y" * (room + 1)))
        assert_refused(wire, 431, "headers-too-large")


@pytest.mark.parametrize(
    "start",
    [
        b"GET / HTTP/1.1\r\nx: ",
        b"GET / HTTP/1.1\r\n" + b"x",
        CHUNKED + b"1\r\na\r\n0\r\nx: ",
        CHUNKED + b"1;x=",
        get() + b"GET / HTTP/1.1\r\nx: ",
    ],
    ids=["value", "name", "trailer", "chunk extension", "second request"],
)
def test_what_never_ends_is_refused_and_the_answer_arrives(server, start):
    with server.connect() as wire:
        wire.send(start + b"y" * 600_000)  # much more than is read before the refusal
        if start.startswith(get()):
            assert wire.answer().status == 200
        assert_refused(wire, 431, "headers-too-large")


def test_head_is_refused_without_a_body(server):
    with server.connect() as wire:
        wire.send(get("/", *["x: y"] * 200, method="HEAD"))
        assert wire.answer(head=True).status == 431
        assert wire.closed()


# what is no HTTP ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50,
        get(version="1.7"),
        get(version="11"),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\r\n\r\n",
        get(version="2.0"),
        b"G\0T / HTTP/1.1\r\n\r\n",
        b"GET /a b HTTP/1.1\r\n\r\n",
        get("http://["),
        get("x:443", method="CONNECT"),
        get("/", "bad header: 1"),
        get("/", "x: \0"),
        get("/", "x : 1"),
        b"GET / HTTP/1.1\nhost: x\n\n",
        post(b"hello", "transfer-encoding: chunked"),
        get("/", "transfer-encoding: chunked", "content-length: 5", method="POST"),
        post(b"hello", "content-length: 6"),
        get("/", "content-length: -5", method="POST"),
        get("/", "content-length: 5x", method="POST"),
        get("/", "content-length: 99999999999999999999999", method="POST"),
        get("/", "transfer-encoding: gzip", method="POST"),
        get("/", "transfer-encoding: chunked, gzip", method="POST"),
        CHUNKED + b"xyz\r\n",
        CHUNKED + b"-1\r\n",
        CHUNKED + b"5\r\nhelloo\r\n",
        CHUNKED + b"fffffffffffffffff\r\n",
        CHUNKED + b"5\nhello\n",
    ],
)
def test_what_is_no_http_is_refused_without_a_log_line(server, data, caplog):
    caplog.set_level(logging.INFO)
    before = server.refused["bad-request"]
    with server.connect() as wire:
        wire.send(data)
        assert_refused(wire, 400, "bad-request", "HTTP/1.1")
    assert server.refused["bad-request"] == before + 1
    assert not caplog.records
    with server.connect() as wire:
        assert wire.ask(get()).status == 200


@pytest.mark.parametrize(
    "bad", [b"nonsense", CHUNKED + b"xyz\r\n", get("/", *["x: y"] * 200)], ids=str
)
def test_requests_before_a_bad_one_are_answered_first(server, bad):
    with server.connect() as wire:
        wire.send(get("/wait") + get("/2") + bad + get("/never") + b"x" * 10)
        assert server.app.waiting.wait(10)
        server.app.go.set()
        assert [wire.answer().json["path"] for _ in range(2)] == ["/wait", "/2"]
        answer = wire.answer()
        assert answer.status in (400, 431)
        assert wire.closed()


@pytest.mark.parametrize("path", ["/half", "/early"])
def test_nothing_is_added_to_an_answer_that_has_begun(server, path):
    with server.connect() as wire:
        wire.send(get(path, "transfer-encoding: chunked", method="POST"))
        wire.answer(head=path == "/half")
        wire.send(b"xyz\r\n")
        assert wire.closed()


# many clients -------------------------------------------------------------------------------------
def test_more_connections_than_allowed_are_refused_until_others_close(loop):
    with served(loop, max_connections=2, request_seconds=20) as server:
        with server.connect() as first, server.connect() as second:
            assert first.ask(get()).status == 200
            assert second.ask(get()).status == 200
            for _ in range(3):
                with server.connect() as third:
                    third.send(get())
                    assert third.answer().headers["retry-after"] == "5"
            with server.connect() as third:
                third.send(get())
                assert_refused(third, 503, "overloaded", "At most 2", "MAX_CONNECTIONS")
            assert server.refused["overloaded"] == 4
            assert first.ask(get()).status == 200

        def answered() -> bool:
            with server.connect() as wire:
                return wire.ask(get()).status == 200

        until(answered, "room for another connection", 5)


def test_a_refused_client_that_stays_does_not_hold_up_the_end(loop):
    with served(loop, request_seconds=20) as server, server.connect() as wire:
        wire.send(b"nonsense\r\n\r\n")
        assert wire.answer().status == 400
        server.server.should_exit = True
        start = time.monotonic()
        until(lambda: server.connections == 0, "the connection to be closed", 5)
        assert time.monotonic() - start < 1.5


def test_the_class_reaches_spawned_workers():
    made = protocol_class(load_settings(request_seconds=3, max_connections=5))
    again = pickle.loads(pickle.dumps(made))
    assert again.limits == made.limits
    assert (again.limits.request_seconds, again.limits.max_connections) == (3, 5)
