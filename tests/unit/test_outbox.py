import uuid
from datetime import UTC, date, timedelta

import pytest
from sqlalchemy import Engine, select

from forecasting.events import DriftDetected, Outgoing, mark, pending, put
from forecasting.store import engine_of, now, outbox
from tests.postgres import postgres_schema


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'perennial.db'}"
        return
    with postgres_schema() as address:
        yield f"{address}%20-ctimezone%3DAsia/Tokyo"  # a server that does not think in UTC


@pytest.fixture
def engine(url):
    with engine_of(url) as opened:
        yield opened


def drift(symbol: str = "GOOG", day: int = 2) -> DriftDetected:
    return DriftDetected(
        symbol=symbol,
        as_of=date(2008, 1, day),
        forecaster=f"perennial-{symbol.lower()}",
        version=1,
        share=0.75,
        threshold=0.5,
        features=("volatility", "volume"),
        dataset_md5="d" * 32,
    )


def rows(engine: Engine) -> dict[uuid.UUID, tuple[int, bool]]:
    with engine.connect() as connection:
        found = connection.execute(select(outbox)).mappings().all()
    return {
        uuid.UUID(row["id"]): (row["attempts"], row["delivered_at"] is not None) for row in found
    }


def test_an_event_waits_with_all_it_says(engine):
    identity = put(engine, drift())
    (waiting,) = pending(engine)
    assert waiting == Outgoing(
        id=identity,
        name="perennial.drift.detected",
        resource="perennial.symbol.GOOG",
        payload={
            "schema": 1,
            "symbol": "GOOG",
            "as_of": "2008-01-02",
            "forecaster": "perennial-goog",
            "version": 1,
            "share": 0.75,
            "threshold": 0.5,
            "features": ["volatility", "volume"],
            "volatility": None,
            "dataset_md5": "d" * 32,
        },
        occurred_at=waiting.occurred_at,
    )


def test_events_wait_in_the_order_of_their_writing(engine):
    written = [put(engine, drift(symbol)) for symbol in ("GOOG", "IBM", "AAPL", "MSFT")]
    assert [each.id for each in pending(engine)] == written
    assert len(set(written)) == 4


def test_when_it_happened_is_the_same_instant_with_a_timezone(engine):
    before = now()
    put(engine, drift())
    after = now()
    (waiting,) = pending(engine)
    assert waiting.occurred_at.tzinfo is not None
    assert before <= waiting.occurred_at <= after
    assert waiting.occurred_at.astimezone(UTC) - before < timedelta(minutes=1)


def test_a_failed_delivery_counts_an_attempt_and_the_event_waits_on(engine):
    first, second = put(engine, drift()), put(engine, drift(day=3))
    mark(engine, [first], delivered=False)
    mark(engine, [first, second], delivered=False)
    assert rows(engine) == {first: (2, False), second: (1, False)}
    assert [each.id for each in pending(engine)] == [first, second]


def test_a_delivered_event_waits_no_longer_and_is_kept(engine):
    first, second = put(engine, drift()), put(engine, drift(day=3))
    mark(engine, [first], delivered=False)
    mark(engine, [first], delivered=True)
    assert [each.id for each in pending(engine)] == [second]
    assert rows(engine) == {first: (2, True), second: (0, False)}


def test_marking_nothing_or_an_unknown_event_changes_nothing(engine):
    known = put(engine, drift())
    mark(engine, [], delivered=True)
    mark(engine, [uuid.uuid4()], delivered=True)
    assert rows(engine) == {known: (0, False)}


def test_what_waits_survives_the_process_that_wrote_it(url):
    with engine_of(url) as engine:
        kept, delivered = put(engine, drift()), put(engine, drift(day=3))
        mark(engine, [kept], delivered=False)
        mark(engine, [delivered], delivered=True)
        before = pending(engine)
    with engine_of(url) as engine:
        assert pending(engine) == before
        assert [each.id for each in before] == [kept]
        assert rows(engine)[kept] == (1, False)


def test_an_empty_outbox_has_nothing_waiting(engine):
    assert pending(engine) == []
