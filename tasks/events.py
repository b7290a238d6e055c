"""Posting events to Prefect, with proof of delivery."""

from collections.abc import Sequence
from uuid import UUID

import httpx
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.filters import EventFilter, EventIDFilter, EventOccurredFilter
from prefect.events.schemas.events import Event, Resource
from tenacity import retry, retry_if_result, stop_after_delay, wait_fixed

from forecasting import events
from forecasting.settings import Settings
from forecasting.store import engine_of

CONFIRM_SECONDS = 20


@task(
    name="deliver-events",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=[1, 3, 9],
    retry_jitter_factor=0.3,
)
def deliver_events(settings: Settings) -> int:
    """Post every undelivered event of the outbox and read each back; how many were delivered.

    Raises:
        httpx.HTTPError: the API is away; the events stay in the outbox for the next run.
    """
    with engine_of(settings.sql_url) as engine:
        waiting = events.pending(engine)
        if not waiting:
            return 0
        ids = [each.id for each in waiting]
        delivered = False
        try:
            with get_client(sync_client=True) as client:
                _post(client, waiting)
                delivered = _arrived(client, waiting)
        finally:
            events.mark(engine, ids, delivered=delivered)
    if not delivered:
        raise httpx.ReadTimeout(f"Events {ids} were accepted but cannot be read back yet.")
    get_run_logger().info("delivered %d event(s): %s", len(ids), [e.name for e in waiting])
    return len(ids)


def _post(client: SyncPrefectClient, outgoing: Sequence[events.Outgoing]) -> None:
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


def _arrived(client: SyncPrefectClient, outgoing: Sequence[events.Outgoing]) -> bool:
    wanted: set[UUID] = {each.id for each in outgoing}

    @retry(
        stop=stop_after_delay(CONFIRM_SECONDS),
        wait=wait_fixed(0.3),
        retry=retry_if_result(lambda found: not found),
        retry_error_callback=lambda _: False,
    )
    def poll() -> bool:
        found = client.read_events(
            EventFilter(
                id=EventIDFilter(id=sorted(wanted)),
                occurred=EventOccurredFilter(since=min(each.occurred_at for each in outgoing)),
            ),
            limit=len(wanted),
        )
        return wanted <= {event.id for event in found.events}

    return poll()
