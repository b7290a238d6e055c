"""Somebody's webhook: a real HTTP server that keeps what it is sent."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class Receiver:
    """What was sent to `url`."""

    url: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    types: set[str | None] = field(default_factory=set)

    def await_all(self, names: set[str], seconds: float = 60) -> None:
        """Return once each of the automations has told something."""
        deadline = time.monotonic() + seconds
        while missing := names - {each["automation"] for each in self.messages}:
            assert time.monotonic() < deadline, f"not told: {sorted(missing)}"
            time.sleep(0.1)


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver that listens until the block ends."""
    made = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            made.types.add(self.headers["Content-Type"])
            made.messages.append(json.loads(body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}/hook"
    thread = Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
