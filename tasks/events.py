"""Posting events to Prefect, with proof of delivery."""

from collections.abc import Sequence
from uuid import UUID

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.filters import EventFilter, EventIDFilter, EventOccurredFilter
from prefect.events.schemas.events import Event, Resource
from sqlalchemy import Engine
from tenacity import retry, retry_if_result, stop_after_delay, wait_fixed

from forecasting import events
from forecasting.errors import ServiceError
from forecasting.settings import Settings
from forecasting.store import engine_of

CONFIRM_SECONDS = 20
MOST_AT_ONCE = 50
"""Prefect lists no more events in one answer, and refuses to be asked for more."""


@task(
    name="deliver-events",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=[1, 3, 9],
    retry_jitter_factor=0.3,
)
def deliver_events(settings: Settings) -> int:
    """Post every undelivered event of the outbox; how many were delivered."""
    delivered = deliver(settings)
    get_run_logger().info("%d event(s) delivered", delivered)
    return delivered


def deliver(settings: Settings) -> int:
    """Post every undelivered event of the outbox and read each back; how many were delivered.

    Raises:
        ServiceError: an event was accepted but cannot be read back.
        httpx.HTTPError: the API is away. Either way the events stay in the outbox.
    """
    with engine_of(settings.sql_url) as engine:
        waiting = events.pending(engine)
        for first in range(0, len(waiting), MOST_AT_ONCE):
            _deliver(engine, waiting[first : first + MOST_AT_ONCE])
    return len(waiting)


def _deliver(engine: Engine, outgoing: Sequence[events.Outgoing]) -> None:
    """Post those that the server does not list yet, wait until it lists all, and note it."""
    ids = [each.id for each in outgoing]
    arrived = False
    try:
        with get_client(sync_client=True) as client:
            known = _arrived(client, outgoing)
            _post(client, [each for each in outgoing if each.id not in known])
            arrived = _await_arrival(client, outgoing)
    finally:
        events.mark(engine, ids, delivered=arrived)
    if not arrived:
        raise ServiceError(
            f"Prefect accepted the events {', '.join(map(str, ids))} but does not list them after "
            f"{CONFIRM_SECONDS} s. They stay in the outbox and are sent with the next run."
        )


def _post(client: SyncPrefectClient, outgoing: Sequence[events.Outgoing]) -> None:
    if not outgoing:
        return
    body = [
        Event(
            id=each.id,
            occurred=each.occurred_at,
            event=each.name,
            resource=Resource({"prefect.resource.id": each.resource}),
            payload=each.payload,
        ).model_dump(mode="json")
        for each in outgoing
    ]
    client.request("POST", "/events", json=body).raise_for_status()


def _arrived(client: SyncPrefectClient, outgoing: Sequence[events.Outgoing]) -> set[UUID]:
    """Ids of those events that the server lists."""
    occurred = min(each.occurred_at for each in outgoing)
    wanted = EventFilter(
        id=EventIDFilter(id=[each.id for each in outgoing]),
        occurred=EventOccurredFilter(since=occurred),
    )
    return {event.id for event in client.read_events(wanted, limit=len(outgoing)).events}


def _await_arrival(client: SyncPrefectClient, outgoing: Sequence[events.Outgoing]) -> bool:
    wanted = {each.id for each in outgoing}

    @retry(
        stop=stop_after_delay(CONFIRM_SECONDS),
        wait=wait_fixed(0.3),
        retry=retry_if_result(lambda complete: not complete),
        retry_error_callback=lambda _: False,
    )
    def poll() -> bool:
        return wanted <= _arrived(client, outgoing)

    return poll()
