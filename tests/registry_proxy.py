"""A registry that misbehaves: a proxy before a real MLflow server, switched while it runs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import httpx

Mode = Literal["pass", "slow", "html", "truncated", "broken", "deaf", "down"]
_HOP = {"connection", "content-length", "content-encoding", "host", "transfer-encoding", "date"}


class _Quiet(ThreadingHTTPServer):
    """Says nothing of clients that go away."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass


class RegistryProxy:
    """Passes requests on, or not, as `mode` says.

    Attributes:
        mode: `slow` answers after `delay` seconds, `html` gives a proxy's page with 200,
            `truncated` the first half of an answer that was announced whole, `broken` a 500,
            `deaf` nothing ever, `down` closes the connection at once.
        only: the part of a path that a request must hold to be mistreated; empty: every one.
        seen: modes in which requests came.
    """

    def __init__(self, target: str) -> None:
        self.mode: Mode = "pass"
        self.delay = 10.0
        self.only = ""
        self.seen: list[tuple[Mode, str]] = []
        self._over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                mode = outer.mode if outer.only in self.path else "pass"
                outer.seen.append((mode, self.path))
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if mode == "deaf":
                    outer._over.wait()
                if mode in ("deaf", "down"):
                    self.close_connection = True
                    return
                if mode == "slow":
                    outer._over.wait(outer.delay)
                if mode == "html":
                    self.answer(200, "text/html", b"<html><h1>It works!</h1></html>")
                elif mode == "broken":
                    self.answer(500, "text/html", b"<html>Internal Server Error</html>")
                else:
                    self.pass_on(body, half=mode == "truncated")

            def pass_on(self, body: bytes, *, half: bool) -> None:
                kept = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
                got = httpx.request(
                    self.command, target + self.path, content=body, headers=kept, timeout=60
                )
                kind = got.headers.get("Content-Type", "application/octet-stream")
                self.answer(got.status_code, kind, got.content, half=half)

            def answer(self, status: int, kind: str, body: bytes, *, half: bool = False) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                try:
                    self.wfile.write(body[: len(body) // 2] if half else body)
                except OSError:
                    self.close_connection = True
                self.close_connection |= half

            do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = handle_any  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = _Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self) -> Iterator["RegistryProxy"]:
        """Answer until the block ends."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def came(self, mode: Mode) -> int:
        """How many requests came in a mode."""
        return sum(each == mode for each, _ in self.seen)
