"""A transport that sends the head and the body of an answer in one piece.

uvicorn writes one after the other, and uvloop sends each at once: two system calls, and a client
that is woken twice. Measured, this is a quarter of what a small answer costs.
"""

import asyncio
from typing import Any


class CorkedTransport:
    """What is written in one turn of the event loop goes out at its end, together.

    Everything else is the wrapped transport's own.
    """

    __slots__ = ("_loop", "_transport", "_waiting")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._waiting: list[bytes] = []

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  (whatever the transport has)
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send it by the end of this turn."""
        if not self._waiting:
            self._loop.call_soon(self.flush)
        self._waiting.append(data)

    def flush(self) -> None:
        """Send now what waits."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            self._transport.write(b"".join(waiting))

    def write_eof(self) -> None:
        """Send what waits, and nothing more."""
        self.flush()
        self._transport.write_eof()

    def close(self) -> None:
        """Send what waits and close."""
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        """Close at once; what waits is lost."""
        self._waiting.clear()
        self._transport.abort()

    def get_write_buffer_size(self) -> int:
        """Bytes that are not sent yet."""
        return self._transport.get_write_buffer_size() + sum(map(len, self._waiting))
