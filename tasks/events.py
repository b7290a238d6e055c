"""Posting events to Prefect, with proof of delivery."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect import get_run_logger
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client

from forecasting import events
from forecasting.settings import Settings
from forecasting.store import engine_of
from tasks.steps import is_plain, task


@task(
    name="deliver-events",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=[1, 3, 9],
    retry_jitter_factor=0.3,
)
def deliver_events(settings: Settings) -> int:
    """Post every undelivered event of the outbox; how many were delivered."""
    if is_plain():  # a replay takes the events out of the outbox itself
        return 0
    delivered = deliver(settings)
    get_run_logger().info("%d event(s) delivered", delivered)
    return delivered


@contextmanager
def telling(settings: Settings) -> Iterator[None]:
    """Deliver what waits in the outbox when a flow ends, well or badly (not when it is stopped).

    Use it inside a flow. A failed delivery fails no flow: its events wait for the next one or for
    `serving drain`.
    """
    try:
        yield
    except Exception:
        _tell(settings)
        raise
    _tell(settings)


def _tell(settings: Settings) -> None:
    if is_plain():  # see `deliver_events`
        return
    state = deliver_events(settings, return_state=True)
    if state.is_failed():
        get_run_logger().warning("events wait in the outbox: %s", state.message)


def deliver(settings: Settings) -> int:
    """Post every undelivered event of the outbox and read each back; how many were delivered.

    Raises:
        ServiceError: an event was accepted but cannot be read back.
        httpx.HTTPError: the API is away. Either way the events stay in the outbox.
    """
    with engine_of(settings.sql_url) as engine:
        return events.deliver(engine, _post)


def _post(path: events.Path, body: object) -> httpx.Response:
    with get_client(sync_client=True) as client:
        return client.request("POST", path, json=body)
