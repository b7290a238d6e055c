"""HTTP as uvicorn speaks it, with limits for clients that are slow, large, many or malformed.

`protocol_class(settings)` is uvicorn's httptools protocol and differs from it in this:

- from a request's first byte to its last `request_seconds` may pass, then 408; a connection that
  sends nothing is closed after as long, and one that takes none of an answer is dropped;
- URL, headers and trailers have limits (414, 431), also while the parser still collects them;
- above `max_connections` a connection is answered 503 and closed;
- what is no HTTP is answered with a problem as well (400), counted and not logged;
- an answer that ends a connection is sent after those to earlier requests on it, and is not lost:
  see `_Protocol._say`;
- a wish for another protocol (`Upgrade: h2c`, as Java's client sends it) is ignored as HTTP allows
  (RFC 9110, section 7.8); uvicorn would drop the body of such a request;
- trailers do not become headers.

Time is looked at by one timer for all connections of a worker, so a request sets no timer of its
own and a limit may be passed by `_SWEEP_SECONDS`.
"""

import asyncio
import copyreg
import math
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import httptools
import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from forecasting.settings import Settings
from serving.corked import CorkedTransport
from serving.exchange import SECURITY_HEADERS
from serving.problems import MEDIA_TYPE, RETRY_AFTER_SECONDS, Problem, ProblemError

MAX_URL_BYTES = 8 * 1024
MAX_HEADER_BYTES = 32 * 1024
MAX_HEADERS = 100

_MAX_UNPARSED = MAX_URL_BYTES + MAX_HEADER_BYTES + 4096
"""Bytes with neither a body nor a request's end in them: of an unfinished head, or of trailers."""
_SWEEP_SECONDS = 1.0
_LINGER_SECONDS = 2.0
_LINGER_BYTES = 1024 * 1024
_MAX_LINGERING = 256
_VERSIONS = ("1.1", "1.0")
_HOP_BY_HOP = (b"upgrade", b"http2-settings")


@dataclass(frozen=True)
class Limits:
    """What a protocol class is made for (see the settings of the same names)."""

    request_seconds: float
    max_connections: int


def protocol_class(settings: Settings) -> type["LimitedProtocol"]:
    """The protocol with the limits of these settings, for `uvicorn.Config(http=...)`."""
    return _made(Limits(settings.request_seconds, settings.max_connections))


# the answers --------------------------------------------------------------------------------------
def request_timeout(seconds: float) -> ProblemError:
    """408: the request did not come to its end."""
    return ProblemError(
        "request-timeout",
        408,
        "Request timeout",
        f"A whole request within {seconds:g} s was expected; it was still incomplete by then. Send "
        "it again in one go or in smaller parts, or raise PERENNIAL_REQUEST_SECONDS.",
    )


def headers_too_large() -> ProblemError:
    """431: more headers than the server reads."""
    return ProblemError(
        "headers-too-large",
        431,
        "Headers too large",
        f"At most {MAX_HEADERS} headers with at most {MAX_HEADER_BYTES} bytes in all were "
        "expected; more came. Leave out those that this server does not need, such as cookies.",
    )


def uri_too_long() -> ProblemError:
    """414: a longer URL than the server reads."""
    return ProblemError(
        "uri-too-long",
        414,
        "URI too long",
        f"At most {MAX_URL_BYTES} bytes of URL were expected; more came. Send what is long in the "
        "body of a POST.",
    )


def overloaded(limit: int) -> ProblemError:
    """503: as many connections as the worker takes."""
    return ProblemError(
        "overloaded",
        503,
        "Overloaded",
        f"At most {limit} connections at once were expected; they are all taken. Use connections "
        f"again (keep-alive) and try in {RETRY_AFTER_SECONDS} s, or raise "
        "PERENNIAL_MAX_CONNECTIONS or PERENNIAL_WEB_WORKERS.",
    )


def bad_request(reason: str) -> ProblemError:
    """400: no HTTP, or HTTP that could be read in two ways."""
    return ProblemError(
        "bad-request",
        400,
        "Bad request",
        f"A request in HTTP/1.1 was expected; what came is none: {reason}. Send it with an HTTP "
        "client, to http:// and not https:// unless a proxy in front of this server speaks TLS.",
    )


def _rendered(problem: ProblemError, headers: list[tuple[bytes, bytes]], with_body: bool) -> bytes:
    body = msgspec.json.encode(
        Problem(f"/problems/{problem.kind}", problem.title, problem.status, problem.detail)
    )
    headers = [
        *headers,
        (b"content-type", MEDIA_TYPE.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"x-request-id", secrets.token_hex(8).encode()),
        *SECURITY_HEADERS,
        (b"connection", b"close"),
    ]
    if problem.status == 503:
        headers.append((b"retry-after", str(RETRY_AFTER_SECONDS).encode()))
    lines = [name + b": " + value + b"\r\n" for name, value in headers]
    return b"".join([STATUS_LINE[problem.status], *lines, b"\r\n", body if with_body else b""])


# the protocol -------------------------------------------------------------------------------------
# How far the request that is being received has come. Plain numbers: an Enum's members cost more
# to look up than everything else that is done for a header.
_IDLE = 0  # not begun
_HEAD = 1
_BODY = 2
_REFUSED = 3  # nothing is read any more on this connection


class _Sweeper:
    """Looks at all connections of one server from time to time."""

    def __init__(
        self, connections: set[Any], loop: asyncio.AbstractEventLoop, seconds: float
    ) -> None:
        self.lingering = 0
        self._connections = connections
        self._loop = loop
        self._seconds = min(_SWEEP_SECONDS, seconds / 4)
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Look again in a while, until there are no connections."""
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        now = self._loop.time()
        for connection in list(self._connections):
            if isinstance(connection, LimitedProtocol):
                connection.look(now)
        if self._connections:
            self.start()


class _Remade(type):
    """Of classes that have no name: spawned workers get the limits and make the class again."""

    limits: Limits


class LimitedProtocol(HttpToolsProtocol, metaclass=_Remade):
    """One connection. Used through `protocol_class`.

    Attributes:
        limits: of every connection of this class.
        refused: how many requests and connections it has refused, by kind of problem.
    """

    limits: ClassVar[Limits]
    refused: ClassVar[Counter[str]]
    sweepers: ClassVar[WeakKeyDictionary[ServerState, _Sweeper]]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        sweeper = self.sweepers.get(server_state)
        if sweeper is None:
            sweeper = _Sweeper(self.connections, self.loop, self.limits.request_seconds)
            self.sweepers[server_state] = sweeper
        self._sweeper = sweeper
        self._phase = _IDLE
        self._deadline = math.inf
        self._progressed = False
        self._unparsed = 0
        self._header_bytes = 0
        self._without_upgrade = False
        self._deferred: ProblemError | None = None
        self._lingers = False
        self._unsent, self._unsent_since = 0, 0.0

    # what the transport calls -----------------------------------------------------------------
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, or say that there are too many."""
        self._corked = CorkedTransport(transport, self.loop)
        super().connection_made(self._corked)  # type: ignore[arg-type]
        self._unsent_since = self.loop.time()
        self._deadline = self._unsent_since + self.limits.request_seconds
        self._sweeper.start()
        if len(self.connections) - self._sweeper.lingering > self.limits.max_connections:
            self._refuse(overloaded(self.limits.max_connections))

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        if self._lingers:
            self._lingers = False
            self._sweeper.lingering -= 1
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; in place of uvicorn's, which logs a warning for every request that is none."""
        if self._phase == _REFUSED:
            self._discard(len(data))
            return
        self._unset_keepalive_if_required()
        if self._phase == _IDLE:
            self._phase = _HEAD
            self._deadline = self.loop.time() + self.limits.request_seconds
        self._progressed = False
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            raised = error.__context__  # in one of the callbacks
            self._refuse(raised if isinstance(raised, ProblemError) else bad_request(_said(error)))
            return
        if self._progressed:
            self._unparsed = 0
        else:
            self._unparsed += len(data)
            if self._unparsed > _MAX_UNPARSED:
                self._refuse(headers_too_large())

    def shutdown(self) -> None:
        """Close as soon as what is being answered is answered."""
        if self._phase == _REFUSED and self._deferred is None:
            self.transport.close()
        else:
            super().shutdown()

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as error:
                if self._without_upgrade:
                    # The parser takes what follows for the other protocol: begin again without.
                    data = self._head_without_upgrade() + data[error.args[0] :]
                    self.parser = httptools.HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                    continue
                if self._should_upgrade():
                    self.handle_websocket_upgrade()
            return

    # what the parser calls --------------------------------------------------------------------
    def on_message_begin(self) -> None:
        """A request begins, perhaps in the same piece of data as the last one ended."""
        if self._phase == _IDLE:
            self._phase = _HEAD
            self._deadline = self.loop.time() + self.limits.request_seconds
        self._header_bytes = 0
        self._without_upgrade = False
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A piece of the URL."""
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            raise uri_too_long()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer (which counts, but is no header of the request)."""
        self._header_bytes += len(name) + len(value) + 4  # ": " and the line's end
        if self._header_bytes > MAX_HEADER_BYTES or len(self.headers) == MAX_HEADERS:
            raise headers_too_large()
        if self._phase != _HEAD:
            return
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The request goes to the application."""
        if (
            self.parser.should_upgrade()
            and self.parser.get_method() != b"CONNECT"
            and not self._should_upgrade()
        ):
            self._without_upgrade = True
            return
        version = self.parser.get_http_version()
        if version not in _VERSIONS:
            raise bad_request(f"its version is HTTP/{version}")
        super().on_headers_complete()
        self._phase = _BODY

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._progressed = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is there as a whole."""
        if self._without_upgrade:
            return
        self._progressed = True
        self._phase = _IDLE
        self._deadline = math.inf
        if self.cycle.response_complete:  # before its body had come, which ended the keep-alive
            self._deadline = self.loop.time() + self.timeout_keep_alive
        super().on_message_complete()

    # what an answer calls ---------------------------------------------------------------------
    def on_response_complete(self) -> None:
        """An answer is sent; after the last one that is owed comes the refusal, if there is one."""
        self._corked.flush()  # the answer is whole now
        is_last = not self.pipeline
        super().on_response_complete()
        if is_last and self._deferred is not None and not self.transport.is_closing():
            self._say(self._deferred)

    # what the sweeper calls -------------------------------------------------------------------
    def look(self, now: float) -> None:
        """Act if the connection's time is over, or if it has taken nothing for too long."""
        if self._deadline <= now:
            self._expire(now)
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent < self._unsent:
            self._unsent_since = now
        elif now - self._unsent_since > self.limits.request_seconds:
            self.transport.abort()
        self._unsent = unsent

    def _expire(self, now: float) -> None:
        if self._phase == _REFUSED or self._phase == _IDLE:
            self._deadline = math.inf
            self.transport.close()
        elif (
            self.flow.read_paused
            or self.pipeline
            or (self._phase == _HEAD and self._is_answering())
        ):  # it is the server that is slow
            self._deadline = now + self.limits.request_seconds
        else:
            self._refuse(request_timeout(self.limits.request_seconds))

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # the end of a connection ------------------------------------------------------------------
    def _refuse(self, problem: ProblemError) -> None:
        """Answer the request that is being received with a problem, and read no more."""
        self.refused[problem.kind] += 1
        in_body = self._phase == _BODY
        self._phase = _REFUSED
        self._deadline = math.inf
        self._unparsed = 0
        if self.transport.is_closing():
            return
        if in_body and self.pipeline:
            self.pipeline.popleft()  # this request, which waits behind others
            self._deferred = problem
        elif not in_body and self._is_answering():
            self._deferred = problem
        elif in_body and self.cycle.response_started:
            self.transport.close()
        else:
            self._say(problem)

    def _say(self, problem: ProblemError) -> None:
        """Send a problem and close.

        A socket closed while more data arrives makes the system reset the connection, which takes
        the answer from a client that is still sending. So only the sending side is closed, and
        what comes is thrown away until the client closes, or for `_LINGER_SECONDS` (RFC 9112,
        section 9.6).
        """
        self._deferred = None
        self._unset_keepalive_if_required()
        if self._is_answering():  # the application still waits for the body
            self.cycle.disconnected = True
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()
        with_body = self.parser.get_method() != b"HEAD"
        self.transport.write(_rendered(problem, self.server_state.default_headers, with_body))
        if self.transport.can_write_eof() and self._sweeper.lingering < _MAX_LINGERING:
            self.transport.write_eof()
            self.flow.resume_reading()
            self._lingers = True
            self._sweeper.lingering += 1
            self._deadline = self.loop.time() + _LINGER_SECONDS
        else:
            self.transport.close()

    def _discard(self, size: int) -> None:
        self._unparsed += size
        if self._lingers and self._unparsed > _LINGER_BYTES:
            self.transport.close()

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        for name, value in self.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(o for o in options if o.lower() not in _HOP_BY_HOP)
            if name not in _HOP_BY_HOP:
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])


def _said(error: httptools.HttpParserError) -> str:
    if isinstance(error, httptools.HttpParserCallbackError):
        return "its URL cannot be read"
    return str(error).strip().rstrip(".") or "it cannot be read"


def _made(limits: Limits) -> type[LimitedProtocol]:
    class Made(LimitedProtocol):
        pass

    Made.limits = limits
    Made.refused = Counter()
    Made.sweepers = WeakKeyDictionary()
    return Made


def _reduce(cls: _Remade) -> str | tuple[Callable[..., _Remade], tuple[Limits]]:
    return cls.__qualname__ if cls is LimitedProtocol else (_made, (cls.limits,))


copyreg.pickle(_Remade, _reduce)
