"""Delivery of events: posted once, read back, and kept in the outbox until then."""

import json
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import UTC, date, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from uuid import UUID

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.events.filters import EventFilter, EventOccurredFilter, EventResourceFilter
from prefect.settings import PREFECT_API_URL, temporary_settings

from forecasting import events
from forecasting.events import MOST_AT_ONCE, DriftDetected, ModelUnservable
from forecasting.settings import Settings
from forecasting.store import engine_of, outbox
from tasks.events import deliver
from tests.flows.support import rows_of
from tests.postgres import postgres_schema
from tests.services import free_port
from tests.serving.running import started, until

pytestmark = pytest.mark.usefixtures("prefect_server")


class Relay:
    """Passes requests on to the API and keeps what was posted; `lose_answers` hides its word."""

    def __init__(self, api: str) -> None:
        self.posted: list[bytes] = []
        self.credentials: list[str | None] = []
        self.lose_answers = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.pass_on(b"")

            def do_POST(self) -> None:
                self.pass_on(self.rfile.read(int(self.headers["Content-Length"])))

            def pass_on(self, body: bytes) -> None:
                kept = ("content-type", "x-prefect-api-version")
                headers = {name: self.headers[name] for name in kept if name in self.headers}
                answer = httpx.request(
                    self.command, f"{api}{self.path}", content=body, headers=headers
                )
                outer.credentials.append(self.headers["Authorization"])
                status, content = answer.status_code, answer.content
                if (self.command, self.path) == ("POST", "/events"):
                    outer.posted.append(body)
                    if outer.lose_answers:
                        status, content = 500, b"{}"
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def relay(prefect_server: None) -> Iterator[Relay]:
    """The API of this process is reached through a relay."""
    made = Relay(PREFECT_API_URL.value())
    thread = Thread(target=made.server.serve_forever, args=(0.05,))
    thread.start()
    with temporary_settings({PREFECT_API_URL: made.url}):
        yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


@contextmanager
def api_away() -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        yield


def put(settings: Settings, symbol: str) -> UUID:
    """A drift event of its own symbol, in the outbox."""
    with engine_of(settings.sql_url) as engine:
        return events.put(
            engine,
            DriftDetected(
                symbol=symbol,
                as_of=date(2008, 10, 24),
                forecaster=f"perennial-{symbol.lower()}",
                version=3,
                share=0.75,
                threshold=0.5,
                features=("log_range", "absolute_return"),
                dataset_md5="d" * 32,
            ),
        )


def told(symbol: str, kind: str = "symbol") -> list[tuple[UUID, str, object]]:
    """Events about a symbol (or forecaster) that Prefect lists."""
    wanted = EventFilter(
        resource=EventResourceFilter(id=[f"perennial.{kind}.{symbol}"]),
        occurred=EventOccurredFilter(since=datetime(2020, 1, 1, tzinfo=UTC)),
    )
    with get_client(sync_client=True) as client:
        found = client.read_events(wanted, limit=50).events
    return [(event.id, event.event, event.payload["version"]) for event in found]


def await_told(symbol: str, count: int, kind: str = "symbol") -> None:
    """Return once Prefect lists `count` events about a symbol (it stores them in batches)."""
    deadline = time.monotonic() + 30
    while len(told(symbol, kind)) < count:
        assert time.monotonic() < deadline, f"{count} events about {symbol} were expected"
        time.sleep(0.2)


def outbox_of(settings: Settings) -> list[tuple[int, bool]]:
    """Attempts of each event, and whether its delivery is confirmed."""
    rows = rows_of(settings, outbox, "occurred_at")
    return [(row["attempts"], row["delivered_at"] is not None) for row in rows]


def test_an_event_is_posted_and_read_back(settings):
    identity = put(settings, "POSTED")
    assert deliver(settings) == 1
    assert told("POSTED") == [(identity, "perennial.drift.detected", 3)]
    assert outbox_of(settings) == [(1, True)]


def test_an_empty_outbox_asks_nobody(settings):
    with api_away():
        assert deliver(settings) == 0


def test_a_delivered_event_is_not_delivered_again(settings):
    put(settings, "DONE")
    assert deliver(settings) == 1
    with api_away():
        assert deliver(settings) == 0
    assert outbox_of(settings) == [(1, True)]


def test_events_go_out_together_up_to_as_many_as_prefect_lists(settings, relay):
    for _ in range(MOST_AT_ONCE + 1):
        put(settings, "MANY")
    assert deliver(settings) == MOST_AT_ONCE + 1
    assert [len(json.loads(body)) for body in relay.posted] == [MOST_AT_ONCE, 1]
    assert len(told("MANY")) == MOST_AT_ONCE
    assert outbox_of(settings) == [(1, True)] * (MOST_AT_ONCE + 1)


def test_an_event_waits_while_the_api_is_away_and_attempts_are_counted(settings):
    put(settings, "AWAY")
    with api_away():
        for _ in range(2):
            with pytest.raises(httpx.ConnectError):
                deliver(settings)
    assert outbox_of(settings) == [(2, False)]
    assert told("AWAY") == []
    assert deliver(settings) == 1
    assert outbox_of(settings) == [(3, True)]
    assert len(told("AWAY")) == 1


def test_an_event_that_arrived_though_its_answer_was_lost_is_not_posted_twice(settings, relay):
    identity = put(settings, "LOST")
    relay.lose_answers = True
    with pytest.raises(httpx.HTTPStatusError):
        deliver(settings)
    assert outbox_of(settings) == [(1, False)]
    assert len(relay.posted) == 1
    relay.lose_answers = False
    await_told("LOST", 1)
    new = put(settings, "LOST")
    assert deliver(settings) == 2
    assert len(relay.posted) == 2
    assert str(new) in relay.posted[1].decode()
    assert str(identity) not in relay.posted[1].decode()
    assert {each for each, *_ in told("LOST")} == {identity, new}
    assert outbox_of(settings) == [(2, True), (1, True)]


# without a flow: `python -m serving drain` --------------------------------------------------------


def refuse(settings: Settings, forecaster: str) -> UUID:
    """A refusal, in the outbox."""
    event = ModelUnservable(forecaster=forecaster, version=3, reason="altered", where="sync")
    with engine_of(settings.sql_url) as engine:
        return events.put(engine, event)


def draining(settings: Settings, api: str, monkeypatch: pytest.MonkeyPatch, **changes: str):
    """`serving drain`, told of a Prefect server by the environment alone."""
    monkeypatch.setenv("PREFECT_API_URL", api)
    for key, value in changes.items():
        monkeypatch.setenv(key, value)
    return started("drain", settings.home)


def test_the_drainer_delivers_a_refusal_at_once_and_once(settings, relay, monkeypatch):
    with draining(settings, relay.url, monkeypatch) as drain:
        until(lambda: drain.logged("delivering events to"), "the start")
        identity = refuse(settings, "drained")
        await_told("drained", 1, "forecaster")
        until(lambda: outbox_of(settings) == [(1, True)], "the note of it")
        (event,) = json.loads(relay.posted[0])
        assert event["payload"]["reason"] == "altered"
        assert told("drained", "forecaster") == [(identity, "perennial.model.unservable", 3)]
        assert drain.stop() == 0
        assert len(relay.posted) == 1


def test_the_drainer_keeps_events_while_prefect_is_away_and_says_so_once(
    settings, relay, monkeypatch
):
    relay.lose_answers = True
    refuse(settings, "patient")
    with draining(settings, relay.url, monkeypatch) as drain:
        until(lambda: drain.logged("events wait in the outbox"), "the complaint")
        relay.lose_answers = False
        until(lambda: outbox_of(settings)[0][1], "the delivery")
        assert len(relay.posted) == 1, "it had arrived although its answer was lost"
        assert drain.log.count("events wait in the outbox") == 1
        assert "Traceback" not in drain.log
        assert drain.stop() == 0


def test_the_drainer_sends_prefects_credentials(settings, relay, monkeypatch):
    refuse(settings, "secret")
    with draining(settings, relay.url, monkeypatch, PREFECT_API_AUTH_STRING="admin:pass") as drain:
        await_told("secret", 1, "forecaster")
        assert f"Basic {b64encode(b'admin:pass').decode()}" in relay.credentials
        assert "pass" not in drain.log


def test_without_a_prefect_server_events_wait(settings, monkeypatch):
    refuse(settings, "waiting")
    with draining(settings, "", monkeypatch) as drain:
        until(lambda: drain.logged("draining"), "the start")
        assert drain.stop() == 0
    assert outbox_of(settings) == [(0, False)]


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_deliveries_at_once_post_an_event_once(settings, relay, database):
    """As a flow and the drainer do: each with an engine of its own."""
    with postgres_schema() if database == "postgresql" else nullcontext(settings.sql_url) as url:
        with engine_of(url) as engine:
            for version in range(3):
                reason = {"reason": "altered", "where": "web"}
                events.put(engine, ModelUnservable(forecaster=database, version=version, **reason))

        def send(_: int) -> int:
            with engine_of(url) as engine, httpx.Client(base_url=relay.url) as client:
                return events.deliver(engine, lambda path, body: client.post(path, json=body))

        with ThreadPoolExecutor(4) as pool:
            assert sorted(pool.map(send, range(4))) == [0, 0, 0, 3]
    posted = [event["id"] for body in relay.posted for event in json.loads(body)]
    assert len(posted) == len(set(posted)) == 3
