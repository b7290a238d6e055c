"""Reading a request's body: bounded in size, decompressed where it says so."""

import zlib
from typing import TYPE_CHECKING, Any

from serving import problems
from serving.problems import ClientGoneError

if TYPE_CHECKING:
    from litestar.types import Receive

_GZIP = 16 + zlib.MAX_WBITS
_WINDOW_BITS = {b"gzip": _GZIP, b"x-gzip": _GZIP, b"deflate": zlib.MAX_WBITS}
_IDENTITY = (b"", b"identity")


async def read_body(headers: dict[bytes, bytes], receive: "Receive", max_mb: float) -> bytes:
    """The whole body of a request, decompressed.

    Args:
        headers: of the request, names in lower case.
        receive: of ASGI.
        max_mb: most megabytes, before and after decompression.

    Raises:
        ProblemError: too large, or compressed in a way that cannot be read.
        ClientGoneError: the connection is closed.
    """
    most = int(max_mb * 1_000_000)
    _check_length(headers.get(b"content-length"), most, max_mb)
    body = await _received(receive, most, max_mb)
    encoding = headers.get(b"content-encoding", b"").strip().lower()
    return body if encoding in _IDENTITY else decompressed(body, encoding, max_mb)


def decompressed(body: bytes, encoding: bytes, max_mb: float) -> bytes:
    """A gzip or deflate body, never more than the limit of it.

    Raises:
        ProblemError: truncated, damaged, too large, or of another encoding.
    """
    if encoding not in _WINDOW_BITS:
        raise problems.bad_encoding(
            "Content-Encoding gzip, deflate or none was expected; got "
            f"{encoding.decode('latin-1')[:40]!r}.",
            415,
        )
    most = int(max_mb * 1_000_000)
    decoder = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        plain = decoder.decompress(body, most + 1)
    except zlib.error as error:
        raise problems.bad_encoding(
            f"A {encoding.decode()} body was expected, as its Content-Encoding says; it cannot be "
            f"decompressed: {error}."
        ) from error
    if len(plain) > most:
        raise problems.body_too_large(max_mb)
    if not decoder.eof or decoder.unused_data:
        what = "goes on after its end" if decoder.eof else "ends too early"
        raise problems.bad_encoding(f"A whole {encoding.decode()} body was expected; it {what}.")
    return plain


def _check_length(header: bytes | None, most: int, max_mb: float) -> None:
    if header is not None and header.isdigit() and int(header) > most:
        raise problems.body_too_large(max_mb)


async def _received(receive: "Receive", most: int, max_mb: float) -> bytes:
    chunks, size, more = [], 0, True
    while more:
        message: Any = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        chunk = message.get("body", b"")
        chunks.append(chunk)
        size += len(chunk)
        if size > most:
            raise problems.body_too_large(max_mb)
        more = message.get("more_body", False)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
