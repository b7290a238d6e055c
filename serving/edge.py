"""The outermost layer of every request: who asks, how often, how long it took, and the hot paths.

The two routes that carry the load are answered here, before the framework; everything else goes
through it. Both ways end in the same service.
"""

import logging
import re
import secrets
import time
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING

from litestar.enums import ScopeType

from serving import native, problems
from serving.exchange import JSON, Exchange
from serving.problems import CLIENT_GONE, ClientGoneError, ProblemError
from serving.worker import Worker

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)
Trace = Callable[[Exchange, str], None]
access_log = logging.getLogger("serving.access")

_LATEST = f"{native.FORECAST}/"
OPEN_PATHS = frozenset(
    ("/health", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready", "/ping")
)
"""Answered to anybody at any time: whoever supervises the server has no key."""
SIGNED_PATHS = frozenset(("/hooks/registry",))

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset(("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"))


class Edge:
    """The ASGI application that the server runs: limits, figures and hot paths around another.

    Args:
        app: what answers all but the hot paths.
        worker: whose figures and limits these are.
        trace: called with exchange and route when an answer begins, if there are traces.
    """

    def __init__(
        self,
        app: "ASGIApp",
        worker: Worker,
        trace: Trace | None = None,
    ) -> None:
        self._app = app
        self._trace = trace
        self._worker = worker
        self._prefix = secrets.token_hex(6)
        self._numbers = count(1)
        self._most = worker.settings.max_concurrency
        self._logs_access = worker.settings.access_log

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request."""
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        worker, began = self._worker, time.perf_counter()
        exchange = Exchange(scope, receive, send, self._identity(scope))
        if self._trace is not None:
            exchange.send = _traced(exchange, send, self._trace)
        worker.busy += 1
        try:
            await self._answer(exchange)
        except ProblemError as problem:
            await exchange.refuse(problem)
        except ClientGoneError:
            exchange.status = CLIENT_GONE
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            await exchange.refuse(problems.internal())
        finally:
            worker.busy -= 1
            self._note(exchange, time.perf_counter() - began)

    async def _answer(self, exchange: Exchange) -> None:
        scope = exchange.scope
        path, method = scope["path"], exchange.method
        if path not in OPEN_PATHS:
            self._admit(exchange, path)
        if path == native.FORECAST and method == "POST":
            body = await native.post_forecast(self._worker, exchange)
            await exchange.reply(200, JSON, body)
        elif method == "GET" and path.startswith(_LATEST) and path.count("/") == 3:
            body = native.get_forecast(self._worker, exchange, path[len(_LATEST) :])
            await exchange.reply(200, JSON, body)
        else:
            await exchange.hand_over(self._app)

    def _admit(self, exchange: Exchange, path: str) -> None:
        worker = self._worker
        key = None if path in SIGNED_PATHS else worker.keys.check(exchange.scope["headers"])
        address = exchange.scope.get("client")
        exchange.client = key.name if key else address[0] if address else ""
        worker.admit(exchange.client, key)
        if worker.busy > self._most:
            raise problems.overloaded(self._most)

    def _identity(self, scope: "Scope") -> bytes:
        """The client's own request id if it sent a proper one, else a new one."""
        for name, value in scope["headers"]:
            if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
                return value
        return f"{self._prefix}-{next(self._numbers):x}".encode()

    def _note(self, exchange: Exchange, seconds: float) -> None:
        scope = exchange.scope
        route = _route(exchange)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._worker.telemetry.answered(method, route, exchange.version, exchange.status, seconds)
        if self._logs_access:
            access_log.info(
                "%s %s %d",
                scope["method"],
                scope["path"],
                exchange.status,
                extra={
                    "status": exchange.status,
                    "milliseconds": round(seconds * 1000, 3),
                    "client": exchange.client,
                    "version": exchange.version,
                },
            )


def _route(exchange: Exchange) -> str:
    return exchange.route or exchange.scope.get("path_template") or "unmatched"


def _traced(exchange: Exchange, send: "Send", trace: Trace) -> "Send":
    async def outer(message: "Message") -> None:
        if message["type"] == "http.response.start":  # a span ends with the answer's last byte
            trace(exchange, _route(exchange))
        await send(message)

    return outer
