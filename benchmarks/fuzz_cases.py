"""The cases of `benchmarks.fuzz`: what is sent, and what may be expected of it.

Every case comes from a generator seeded with the seed and the case's number.
"""

import gzip
import json
import random
import struct
import zlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from benchmarks import windows

Ends = Literal["", "half-close", "reset"]
Pairs = list[tuple[bytes, bytes]]

_METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "BREW", "get")
_PATHS = (
    "/",
    "/v1/forecast",
    "/v1/forecast/GOOG",
    "/v1/forecast/",
    "/v1/forecast/GOOG/",
    "/v1/models",
    "/v1/traffic",
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models",
    "/v2/models/perennial-goog",
    "/v2/models/perennial-goog/ready",
    "/v2/models/perennial-goog/versions/1",
    "/v2/models/perennial-goog/versions/1/infer",
    "/v2/models/perennial-goog/infer",
    "/v2/models/nobody/infer",
    "/v2/repository/index",
    "/invocations",
    "/ping",
    "/version",
    "/health/live",
    "/health/ready",
    "/metrics",
    "/schema",
    "/schema/openapi.json",
    "/schema/swagger",
    "/hooks/registry",
)
_TAILS = ("?", "/", "//", "/..", "/%2e%2e/", "%00", "%", "%zz", ";x", "#", "?a=b&a=")
_POSTS = ("/v1/forecast", "/v2/models/perennial-goog/infer", "/invocations")
_TYPES = (
    "application/json",
    "application/json; charset=utf-8",
    "application/json; charset=utf-16",
    "application/json;",
    "APPLICATION/JSON",
    "text/csv",
    "text/plain",
    "application/octet-stream",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "multipart/form-data",
    "application/problem+json",
    "application/msgpack",
    "image/png",
    "",
    "/",
    "nonsense",
    "application/json, text/csv",
    "\xff\xfe",
)
_ENCODINGS = ("gzip", "x-gzip", "deflate", "br", "zstd", "identity", "gzip, gzip", "GZIP", "", "?")
_JUNK: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    0.0,
    -0.0,
    1e-320,
    1e38,
    3.5e38,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "GOOG",
    "2013-02-29",
    "0000-00-00",
    "9999-12-31",
    "\u0000",
    "\ud800",
    "\U0001f4a9" * 50,
    "x" * 5000,
    "NaN",
    [],
    {},
    [[]],
    [None],
    {"": {}},
    [[[[[[[[[[]]]]]]]]]],
)
_NAMES = (
    b"Accept",
    b"Accept-Encoding",
    b"Authorization",
    b"X-API-Key",
    b"Cookie",
    b"Connection",
    b"Content-Encoding",
    b"Content-Length",
    b"Content-Type",
    b"Expect",
    b"Forwarded",
    b"Host",
    b"If-None-Match",
    b"Inference-Header-Content-Length",
    b"Keep-Alive",
    b"Origin",
    b"Range",
    b"Referer",
    b"TE",
    b"Trailer",
    b"Transfer-Encoding",
    b"Upgrade",
    b"Via",
    b"X-Forwarded-For",
    b"X-HTTP-Method-Override",
    b"X-Request-ID",
    b"traceparent",
    b"",
    b"bad name",
    b"bad\x00name",
    b"\xc3\xa9",
)
_VALUES = (
    b"",
    b"*",
    b"*/*",
    b"close",
    b"keep-alive",
    b"Upgrade, HTTP2-Settings",
    b"h2c",
    b"websocket",
    b"100-continue",
    b"200-maybe",
    b"gzip",
    b"chunked",
    b"gzip, chunked",
    b"identity",
    b"chunked, chunked",
    b"0",
    b"-1",
    b"1",
    b"99999999999999999999",
    b"0x10",
    b"1, 1",
    b"bytes=0-0",
    b"text/html;q=0.9,*;q=",
    b"Bearer",
    b"Bearer x",
    b"Bearer \xff\xfe",
    b"Basic Og==",
    b"application/json",
    b"a" * 9000,
    b"\xf0\x9f\x92\xa9",
    b"\x00",
    b"\t \t",
    b"00-" + b"f" * 32 + b"-" + b"f" * 16 + b"-01",
    b"../../etc/passwd",
    b"%00",
    b"'; DROP TABLE predictions; --",
)


@dataclass(frozen=True)
class Case:
    """Bytes to send.

    Attributes:
        kind: of hostility, for the count.
        parts: written one after the other.
        methods: of the requests in it, one answer each.
        ends: what is done after the last part.
        answered: well-formed HTTP: it must get an answer to each request.
        good: every request in it must be answered with 200.
        keeps: the connection may be used again.
    """

    kind: str
    parts: list[bytes]
    methods: list[str]
    ends: Ends = ""
    answered: bool = False
    good: bool = False
    keeps: bool = False


@dataclass(frozen=True)
class Maker:
    """Makes cases: equal makers make equal ones."""

    seed: int
    key: str
    context: int

    def case(self, number: int) -> Case:
        """One case."""
        rng = random.Random(f"{self.seed}/{number}")
        make = rng.choices(_MAKERS, _WEIGHTS)[0]
        return make(self, rng)

    @cached_property
    def bodies(self) -> dict[str, bytes]:
        """A good body for each address that takes one."""
        one = windows.last_windows(1, self.context)
        two = windows.last_windows(2, self.context)
        makers = (windows.rows_body, windows.oip_body, windows.mlflow_body)
        found = dict(zip(_POSTS, (make(one) for make in makers), strict=True))
        return found | {"two": windows.oip_body(two)}

    @cached_property
    def values(self) -> dict[str, Any]:
        """The good bodies as JSON values."""
        return {path: json.loads(body) for path, body in self.bodies.items()}

    @property
    def auth(self) -> Pairs:
        """The key's header, if there is a key."""
        return [(b"Authorization", b"Bearer " + self.key.encode())] if self.key else []

    def post(self, path: str, body: bytes, extra: Pairs | None = None) -> bytes:
        """A well-formed POST of JSON."""
        headers = [(b"Content-Type", b"application/json"), *self.auth, *(extra or [])]
        return request("POST", path, headers, body)


def request(method: str, path: str, headers: Pairs, body: bytes | None = None) -> bytes:
    """One request with Host and, when there is a body, Content-Length."""
    lines = [f"{method} {path} HTTP/1.1".encode("latin-1", "replace"), b"Host: 127.0.0.1"]
    lines += [name + b": " + value for name, value in headers]
    if body is not None:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")


# good -------------------------------------------------------------------------------------------
def _good(maker: Maker, rng: random.Random) -> Case:
    """What must be answered with 200 in the midst of all this."""
    if rng.random() < 0.5:
        raw = request("GET", f"/v1/forecast/{windows.SYMBOL}", maker.auth)
        return Case("good", [raw], ["GET"], answered=True, good=True, keeps=True)
    raw = maker.post("/v1/forecast", maker.bodies["/v1/forecast"])
    return Case("good", [raw], ["POST"], answered=True, good=True, keeps=True)


def _good_pieces(maker: Maker, rng: random.Random) -> Case:
    """A good request that comes in pieces, or chunked."""
    body = maker.bodies["/v1/forecast"]
    if rng.random() < 0.5:
        raw = maker.post("/v1/forecast", body)
        parts = _cut(rng, raw, 6)
        return Case("pieces", parts, ["POST"], answered=True, good=True, keeps=True)
    headers = [(b"Content-Type", b"application/json"), (b"Transfer-Encoding", b"chunked")]
    head = request("POST", "/v1/forecast", [*headers, *maker.auth])
    raw = head + _chunked(rng, body)
    return Case("chunked", [raw], ["POST"], answered=True, good=True, keeps=True)


# bodies -----------------------------------------------------------------------------------------
def _mutated_json(maker: Maker, rng: random.Random) -> Case:
    """A good body with some of its values, keys or lists changed."""
    path = rng.choice(_POSTS)
    value = deepcopy(maker.values[path])
    for _ in range(rng.randint(1, 4)):
        value = _mutate(rng, value)
    body = json.dumps(value).encode("utf-8", "surrogatepass")
    return Case("json", [maker.post(path, body)], ["POST"], answered=True, keeps=True)


def _random_json(maker: Maker, rng: random.Random) -> Case:
    """JSON that has nothing to do with it."""
    body = json.dumps(_value(rng, 4)).encode("utf-8", "surrogatepass")
    raw = maker.post(rng.choice(_POSTS), body)
    return Case("json", [raw], ["POST"], answered=True, keeps=True)


def _mutated_bytes(maker: Maker, rng: random.Random) -> Case:
    """A good body with bytes flipped, cut out, doubled or put in."""
    path = rng.choice(_POSTS)
    body = _damage(rng, maker.bodies[path])
    return Case("bytes", [maker.post(path, body)], ["POST"], answered=True, keeps=True)


def _deep(maker: Maker, rng: random.Random) -> Case:
    """Nesting without end."""
    depth = rng.choice((50, 500, 1100, 5000, 100_000))
    opening, closing = rng.choice(((b"[", b"]"), (b'{"rows":', b"}"), (b'{"a":[', b"]}")))
    body = opening * depth + rng.choice((b"", b"1", b"null")) + closing * rng.choice((0, depth))
    raw = maker.post(rng.choice(_POSTS), body)
    return Case("deep", [raw], ["POST"], answered=True, keeps=True)


def _sizes(maker: Maker, rng: random.Random) -> Case:
    """Too few rows, too many, none; many windows; many numbers."""
    value = deepcopy(maker.values["/v1/forecast"])
    choice = rng.random()
    if choice < 0.5:
        value["rows"] = (value["rows"] * 30)[: rng.choice((0, 1, 63, 65, 128, 1000, 1900))]
        body = json.dumps(value).encode()
        return Case("sizes", [maker.post(_POSTS[0], body)], ["POST"], answered=True, keeps=True)
    tensors = deepcopy(maker.values["two"])
    tensor = rng.choice(tensors["inputs"])
    tensor["shape"] = rng.choice(
        ([0], [], [-1, 64, 5], [2**40, 64, 5], [1, 2, 3, 4], [2, 64, 5, 1], [64, 2, 5], [1.5])
    )
    if rng.random() < 0.3:
        tensor["data"] = tensor["data"] * rng.choice((0, 2, 50))
    raw = maker.post(_POSTS[1], json.dumps(tensors).encode())
    return Case("sizes", [raw], ["POST"], answered=True, keeps=True)


def _large(maker: Maker, rng: random.Random) -> Case:
    """A body above every limit: refused, before or after it was read."""
    size = rng.choice((4_000_001, 5_000_000))
    raw = maker.post(rng.choice(_POSTS), b" " * size)
    return Case("large", [raw], ["POST"], answered=False)


def _content_type(maker: Maker, rng: random.Random) -> Case:
    path = rng.choice(_POSTS)
    headers = [(b"Content-Type", rng.choice(_TYPES).encode("latin-1"))]
    raw = request("POST", path, [*headers, *maker.auth], maker.bodies[path])
    return Case("type", [raw], ["POST"], answered=True, keeps=True)


def _content_encoding(maker: Maker, rng: random.Random) -> Case:
    """Compressed bodies: whole, cut short, damaged, of another kind, much larger inside."""
    path = rng.choice(_POSTS)
    plain = maker.bodies[path] if rng.random() < 0.8 else b" " * rng.choice((10**6, 2 * 10**7))
    packed = rng.choice(_PACKERS)(plain)
    choice = rng.random()
    if choice < 0.4:
        packed = packed[: rng.randrange(len(packed))]
    elif choice < 0.7:
        packed = _damage(rng, packed)
    headers = [
        (b"Content-Encoding", rng.choice(_ENCODINGS).encode()),
        (b"Content-Type", b"application/json"),
    ]
    raw = request("POST", path, [*headers, *maker.auth], packed)
    return Case("encoding", [raw], ["POST"], answered=True, keeps=True)


def _binary_tensors(maker: Maker, rng: random.Random) -> Case:
    """The protocol's binary extension, right and wrong."""
    value, rest = deepcopy(maker.values[_POSTS[1]]), b""
    for tensor in value["inputs"]:
        kind = {"FP32": "f", "INT64": "q"}[tensor["datatype"]]
        raw = struct.pack(f"<{len(tensor['data'])}{kind}", *tensor.pop("data"))
        size = len(raw) if rng.random() < 0.8 else rng.choice((0, -1, 1, len(raw) + 8, 2**62))
        tensor["parameters"] = {"binary_data_size": size}
        rest += raw
    header = json.dumps(value if rng.random() < 0.6 else _mutate(rng, value)).encode()
    length = len(header) if rng.random() < 0.7 else rng.choice((0, 1, len(header) + 1, 10**9, -5))
    if rng.random() < 0.3:
        rest = _damage(rng, rest)
    extra = [(b"Inference-Header-Content-Length", b"%d" % length)]
    raw = maker.post(_POSTS[1], header + rest, extra)
    return Case("binary", [raw], ["POST"], answered=True, keeps=True)


# framing ----------------------------------------------------------------------------------------
def _bad_chunks(maker: Maker, rng: random.Random) -> Case:
    """Chunks that lie about their size, do not end, or are none."""
    headers = [(b"Content-Type", b"application/json"), (b"Transfer-Encoding", b"chunked")]
    head = request("POST", rng.choice(_POSTS), [*headers, *maker.auth])
    good = _chunked(rng, maker.bodies["/v1/forecast"])
    bad = rng.choice(
        (
            good[: rng.randrange(len(good))],
            _damage(rng, good),
            b"zz\r\nhello\r\n0\r\n\r\n",
            b"-1\r\nx\r\n0\r\n\r\n",
            b"ffffffffffffffffffff\r\nx",
            b"5;" + b"e" * 20000 + b"\r\nhello\r\n0\r\n\r\n",
            b"0\r\nTrailer: x\r\n\r\n",
            b"",
        )
    )
    return Case("chunks", [head + bad], ["POST"], ends="half-close")


def _bad_length(maker: Maker, rng: random.Random) -> Case:
    """Lengths that are wrong, doubled, or beside chunks."""
    body = maker.bodies["/v1/forecast"]
    lengths = (b"0", b"-1", b"abc", b"99999999999999999999", b"7000", b"+5", b"5, 5", b" ", b"1e3")
    headers = [
        (b"Content-Type", b"application/json"),
        (b"Content-Length", rng.choice(lengths)),
        *maker.auth,
    ]
    if rng.random() < 0.3:
        headers.append((b"Content-Length", b"%d" % len(body)))
    if rng.random() < 0.3:
        headers.append((b"Transfer-Encoding", b"chunked"))
    raw = request("POST", rng.choice(_POSTS), headers) + body[: rng.choice((0, 5, len(body)))]
    return Case("length", [raw], ["POST"], ends="half-close")


def _headers(maker: Maker, rng: random.Random) -> Case:
    """Headers of every sort, well-formed or not."""
    headers = [(rng.choice(_NAMES), rng.choice(_VALUES)) for _ in range(rng.choice((1, 2, 5, 300)))]
    method, path = rng.choice(("GET", "POST")), rng.choice(_PATHS)
    body = maker.bodies["/v1/forecast"] if method == "POST" else None
    raw = request(method, path, [*maker.auth, *headers], body)
    if rng.random() < 0.1:
        raw = raw.replace(b"\r\n", rng.choice((b"\n", b"\r", b"\r\n ")), rng.randint(1, 3))
    return Case("headers", [raw], [method], ends="half-close")


def _large_head(maker: Maker, rng: random.Random) -> Case:
    """A request line or a header without end."""
    size = rng.choice((8_000, 70_000, 300_000))
    if rng.random() < 0.5:
        raw = request("GET", "/v1/forecast/" + "a" * size, maker.auth)
    else:
        raw = request("GET", "/v1/models", [(b"X-Large", b"a" * size), *maker.auth])
    return Case("head", [raw], ["GET"], ends="half-close")


def _path_and_method(maker: Maker, rng: random.Random) -> Case:
    method = rng.choice(_METHODS)
    path = rng.choice(_PATHS)
    if rng.random() < 0.5:
        path += rng.choice(
            ("?", "/", "//", "/..", "/%2e%2e/", "%00", "%", "%zz", ";x", "#", "?a=b")
        )
        path += "".join(chr(rng.randint(33, 126)) for _ in range(rng.randint(0, 12)))
    body = maker.bodies["/v1/forecast"] if rng.random() < 0.3 else None
    headers = [(b"Content-Type", b"application/json"), *maker.auth]
    return Case("path", [request(method, path, headers, body)], [method], ends="half-close")


def _symbols(maker: Maker, rng: random.Random) -> Case:
    """Percent-encoded names of symbols, and versions."""
    name = bytes(rng.choice((rng.randint(0, 255), 46, 47)) for _ in range(rng.randint(1, 20)))
    shown = "".join(f"%{byte:02x}" for byte in name)
    path = rng.choice(("/v1/forecast/{}", "/v2/models/{}", "/v2/models/{}/infer", "/{}")).format(
        shown
    )
    return Case("path", [request("GET", path, maker.auth)], ["GET"], answered=True, keeps=True)


def _pipeline(maker: Maker, rng: random.Random) -> Case:
    """Several requests in one write; each must be answered, in order."""
    methods, raw = [], b""
    for _ in range(rng.randint(2, 12)):
        method = rng.choice(("GET", "GET", "POST"))
        methods.append(method)
        if method == "GET":
            path = rng.choice(("/v1/forecast/GOOG", "/v1/models", "/health/live", "/nowhere"))
            raw += request("GET", path, maker.auth)
        else:
            damaged = _damage(rng, maker.bodies["/v1/forecast"])
            body = rng.choice((maker.bodies["/v1/forecast"], damaged))
            raw += maker.post("/v1/forecast", body)
    parts = [raw] if rng.random() < 0.7 else _cut(rng, raw, 5)
    return Case("pipeline", parts, methods, answered=True, keeps=True)


def _garbage(_: Maker, rng: random.Random) -> Case:
    """What is no HTTP/1.1 at all."""
    raw = rng.choice(
        (
            rng.randbytes(rng.randint(1, 400)),
            b"\r\n" * rng.randint(1, 50),
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(300),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(20),
            b"GET /health/live\r\n\r\n",
            b"GET /health/live HTTP/1.0\r\n\r\n",
            b"GET /health/live HTTP/9.9\r\nHost: x\r\n\r\n",
            b"GET http://127.0.0.1/health/live HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET  /health/live  HTTP/1.1\r\n\r\n",
            b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n",
            b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /health/live HTTP/1.1\r\n\r\n",
        )
    )
    return Case("garbage", [raw], ["GET"], ends="half-close")


def _upgrade(maker: Maker, rng: random.Random) -> Case:
    headers = [
        (b"Connection", b"Upgrade"),
        (b"Upgrade", rng.choice((b"websocket", b"h2c", b"nothing"))),
        (b"Sec-WebSocket-Key", b"dGhlIHNhbXBsZSBub25jZQ=="),
        (b"Sec-WebSocket-Version", rng.choice((b"13", b"0"))),
        *maker.auth,
    ]
    raw = request("GET", rng.choice(_PATHS), headers)
    return Case("upgrade", [raw], ["GET"], ends="half-close")


def _credentials(maker: Maker, rng: random.Random) -> Case:
    """Without a key, or with a wrong one."""
    value = rng.choice(
        (
            b"",
            b"Bearer ",
            b"Bearer " + b"a" * rng.choice((1, 43, 5000)),
            b"Bearer " + rng.randbytes(8).hex().encode(),
            b"bearer " + maker.key.encode(),
            b"Bearer  " + maker.key.encode(),
            b"Bearer " + maker.key.encode()[:-1],
            b"Basic " + maker.key.encode(),
            b"Bearer \x80\xff",
        )
    )
    name = rng.choice((b"Authorization", b"X-API-Key", b"Proxy-Authorization"))
    headers = [(name, value)] if rng.random() < 0.8 else []
    raw = request("GET", rng.choice(_PATHS), headers)
    return Case("credentials", [raw], ["GET"], answered=b"\x80" not in value, keeps=True)


def _aborted(maker: Maker, rng: random.Random) -> Case:
    """A client that goes away, in the middle or right after asking."""
    raw = maker.post("/v1/forecast", maker.bodies["/v1/forecast"]) * rng.choice((1, 1, 3))
    cut = rng.choice((len(raw), rng.randrange(1, len(raw))))
    return Case("aborted", [raw[:cut]], ["POST"], ends="reset")


# mutations --------------------------------------------------------------------------------------
def _junk(rng: random.Random) -> Any:  # noqa: ANN401  (JSON)
    return deepcopy(rng.choice(_JUNK))  # a copy, for lists among it may be mutated in turn


def _mutate(rng: random.Random, value: Any) -> Any:  # noqa: ANN401  (JSON)
    """`value` with one thing in it changed, somewhere."""
    if rng.random() < 0.02 or not isinstance(value, dict | list) or not value:
        return _junk(rng)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        choice = rng.random()
        if choice < 0.08:
            del value[key]
        elif choice < 0.14:
            value[rng.choice(("", "extra", key + "x", "rows", "inputs"))] = _junk(rng)
        elif choice < 0.2:
            value[key] = _junk(rng)
        else:
            value[key] = _mutate(rng, value[key])
        return value
    index, choice = rng.randrange(len(value)), rng.random()
    if choice < 0.08:
        del value[index]
    elif choice < 0.14:
        value.insert(index, deepcopy(value[rng.randrange(len(value))]))
    elif choice < 0.18:
        rng.shuffle(value)
    elif choice < 0.22:
        value[index] = _junk(rng)
    elif choice < 0.25:
        del value[index:]
    else:
        value[index] = _mutate(rng, value[index])
    return value


def _value(rng: random.Random, depth: int) -> Any:  # noqa: ANN401
    """A JSON value by chance."""
    choice = rng.random()
    if depth == 0 or choice < 0.4:
        return _junk(rng)
    if choice < 0.7:
        return [_value(rng, depth - 1) for _ in range(rng.randint(0, 5))]
    names = ("symbol", "rows", "inputs", "date", "open", "data", "shape", "", "name", "é")
    return {rng.choice(names): _value(rng, depth - 1) for _ in range(rng.randint(0, 5))}


def _damage(rng: random.Random, raw: bytes) -> bytes:
    """Bytes with a few of them changed, cut out, doubled or put in."""
    damaged = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5, 40))):
        if not damaged:
            break
        at, length = rng.randrange(len(damaged)), rng.randint(1, 9)
        choice = rng.randrange(6)
        if choice == 0:
            damaged[at] ^= 1 << rng.randrange(8)
        elif choice == 1:
            del damaged[at : at + length]
        elif choice == 2:
            damaged[at:at] = damaged[at : at + length]
        elif choice == 3:
            damaged[at:at] = rng.randbytes(length)
        elif choice == 4:
            damaged[at] = rng.choice(b'[]{}",:-.eE0\\\x00\xff\xed ')
        elif rng.random() < 0.3:
            del damaged[at:]
    return bytes(damaged)


def _cut(rng: random.Random, raw: bytes, count: int) -> list[bytes]:
    marks = sorted(rng.sample(range(1, len(raw)), count - 1))
    return [raw[a:b] for a, b in zip([0, *marks], [*marks, len(raw)], strict=True)]


def _chunked(rng: random.Random, body: bytes) -> bytes:
    parts = _cut(rng, body, rng.choice((1, 2, 9, 60)))
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def _deflate_raw(plain: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(plain) + packer.flush()


def _gzip(plain: bytes) -> bytes:
    return gzip.compress(plain, compresslevel=1, mtime=0)


_PACKERS: tuple[Callable[[bytes], bytes], ...] = (
    _gzip,
    _gzip,
    zlib.compress,
    _deflate_raw,
    lambda plain: _gzip(plain) + b"trailing",
    lambda plain: _gzip(plain[:100]) + _gzip(plain[100:]),
    lambda plain: plain,
    lambda _: b"\x1f\x8b",
)
_WEIGHTED: dict[Callable[[Maker, random.Random], Case], float] = {
    _good: 6,
    _good_pieces: 4,
    _mutated_json: 24,
    _random_json: 8,
    _mutated_bytes: 12,
    _deep: 1,
    _sizes: 4,
    _large: 0.1,
    _content_type: 4,
    _content_encoding: 5,
    _binary_tensors: 6,
    _bad_chunks: 4,
    _bad_length: 3,
    _headers: 6,
    _large_head: 1,
    _path_and_method: 6,
    _symbols: 2,
    _pipeline: 6,
    _garbage: 4,
    _upgrade: 1,
    _credentials: 3,
    _aborted: 3,
}
_MAKERS, _WEIGHTS = list(_WEIGHTED), list(_WEIGHTED.values())
