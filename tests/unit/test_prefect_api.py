"""The small Prefect client against a small real HTTP server: patience, idempotency, errors."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deployments.prefect_api import PAGE, PrefectApi
from forecasting.errors import ServiceError
from tests.services import free_port


class Answering:
    """Answers with what stands in `answers`, one after the other; the last one stays."""

    def __init__(self, *answers: tuple[int, object]) -> None:
        self.answers = list(answers)
        self.bodies: list[dict[str, object]] = []
        self.authorized: set[str | None] = set()
        self.found: dict[str, object] = {"id": "deployment-1"}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply(200, outer.found)

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                outer.bodies.append(json.loads(self.rfile.read(length)))
                self._reply(*outer.answers[0])
                if len(outer.answers) > 1:
                    outer.answers.pop(0)

            def _reply(self, status: int, value: object) -> None:
                outer.authorized.add(self.headers["Authorization"])
                raw = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Answering":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def busy() -> Iterator[Answering]:
    unavailable = (503, {"exception_message": "Service Unavailable"})
    with Answering(unavailable, unavailable, (201, {"id": "run-1"})) as server:
        yield server


def test_a_busy_server_is_asked_again_for_the_same_run(busy: Answering) -> None:
    with PrefectApi(busy.url) as api:
        assert api.start("train/train", {"symbol": "GOOG"}) == "run-1"
    assert len(busy.bodies) == 3
    assert len({body["idempotency_key"] for body in busy.bodies}) == 1


def test_two_starts_are_two_runs() -> None:
    with Answering((201, {"id": "run-1"})) as server, PrefectApi(server.url) as api:
        for _ in range(2):
            api.start("train/train", {})
        assert len({body["idempotency_key"] for body in server.bodies}) == 2


def test_a_refusal_is_told_at_once_with_what_the_server_said() -> None:
    with Answering((409, {"detail": "as_of is not a date"})) as server:
        with PrefectApi(server.url) as api, pytest.raises(ServiceError, match="is not a date"):
            api.start("train/train", {"as_of": "yesterday"})
        assert len(server.bodies) == 1


def test_more_runs_than_an_answer_holds_are_all_read() -> None:
    first = [{"id": f"run-{number}", "name": "a run"} for number in range(PAGE)]
    answers = (200, first), (200, first[:3])
    with Answering(*answers) as server, PrefectApi(server.url) as api:
        assert len(api.runs("retrain")) == PAGE + 3
    assert [body["offset"] for body in server.bodies] == [0, PAGE]
    assert all(body["limit"] == PAGE for body in server.bodies)


def test_a_server_that_is_away_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with PrefectApi(url, patience=0.5) as api, pytest.raises(ServiceError, match=url):
        api.runs("retrain")
