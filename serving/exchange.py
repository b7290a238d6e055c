"""One request on its way through the server, and what became of it."""

from typing import TYPE_CHECKING, Any

import msgspec

from serving import problems
from serving.bodies import read_body
from serving.logs import request_id
from serving.problems import ProblemError

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Message, Receive, Send

JSON = b"application/json"
NO_SNIFFING = (b"x-content-type-options", b"nosniff")
NO_STORE = (b"cache-control", b"no-store")
NOTHING_ACTIVE = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
SECURITY_HEADERS = (NO_SNIFFING, NO_STORE, NOTHING_ACTIVE)
DOCS = "/schema"
"""Its pages load scripts, which the policy of all others forbids."""

_encoder = msgspec.json.Encoder()


class Exchange:
    """One request and what became of it.

    Attributes:
        client: name of its API key, else its address.
        route: template of its path; empty while unknown.
        version: of the model that answered; empty if none did.
        status: of the answer.
    """

    __slots__ = (
        "client", "headers", "identity", "receive", "route", "scope", "send", "status", "version",
    )  # fmt: skip

    def __init__(self, scope: Any, receive: "Receive", send: "Send", identity: bytes) -> None:  # noqa: ANN401
        self.scope = scope
        self.receive = receive
        self.send = send
        self.identity = identity
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.client = ""
        self.route = ""
        self.version = ""
        self.status = 0
        request_id.set(identity.decode())

    @property
    def method(self) -> str:
        """GET for HEAD as well, which is answered alike; uvicorn leaves the body out."""
        method: str = self.scope["method"]
        return "GET" if method == "HEAD" else method

    def sticky(self) -> str:
        """By what a client is always answered by the same version while a canary runs."""
        own = self.headers.get(b"x-client-id")
        return own.decode("latin-1") if own else self.client

    def media_type(self) -> str:
        """What the request says its body is, without parameters; empty if it does not say."""
        found = self.headers.get(b"content-type", b"")
        return found.partition(b";")[0].strip().lower().decode("latin-1")

    async def body(self, max_mb: float) -> bytes:
        """The request's body; see `read_body`."""
        return await read_body(self.headers, self.receive, max_mb)

    async def reply(
        self, status: int, media_type: bytes, body: bytes, more: dict[str, str] | None = None
    ) -> None:
        """Send a whole answer."""
        self.status = status
        headers = [
            (b"content-type", media_type),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", self.identity),
            *SECURITY_HEADERS,
        ]
        if more:
            headers += [(name.lower().encode(), value.encode()) for name, value in more.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    async def refuse(self, problem: ProblemError) -> None:
        """Answer with a problem, unless an answer has begun already."""
        if self.status:
            return
        body = _encoder.encode(problem.problem(self.scope["path"]))
        await self.reply(problem.status, problems.MEDIA_TYPE.encode(), body, problem.headers)

    async def hand_over(self, app: "ASGIApp") -> None:
        """Let another application answer, under this exchange's headers."""
        scope = self.scope
        scope.setdefault("state", {})["exchange"] = self
        in_docs = scope["path"].startswith(DOCS)

        async def send(message: "Message") -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                identity = (b"x-request-id", self.identity)
                given = map(_with_head, message["headers"])
                is_page = in_docs and self.status == 200
                secured = SECURITY_HEADERS[:2] if is_page else SECURITY_HEADERS
                message["headers"] = [*given, identity, *secured]
            await self.send(message)

        method = self.method
        inner: Any = scope if scope["method"] == method else {**scope, "method": method}
        await app(inner, self.receive, send)
        self.route = self.route or inner.get("path_template", "")


def _with_head(header: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """`Allow` as it is: HEAD is answered wherever GET is."""
    name, value = header
    return (name, value + b", HEAD") if name == b"allow" and b"GET" in value else header
