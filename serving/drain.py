"""`python -m serving drain`: moves the prediction log from the spool into SQL every second.

Beside it, where `PREFECT_API_URL` names a Prefect server, it delivers what waits in the outbox: a
refused version shows in Prefect without a flow having to run first.
"""

import logging
import os
import signal
import threading
from collections.abc import Mapping
from functools import partial

import httpx
from sqlalchemy.exc import SQLAlchemyError

from forecasting import events
from forecasting.errors import PerennialError, ServiceError
from forecasting.outcomes import drain
from forecasting.predictions import has_undrained
from forecasting.settings import Settings
from forecasting.store import engine_of

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 30.0
DELIVER_SECONDS = 2.0
ASK_SECONDS = 10.0


def drain_once(settings: Settings) -> int:
    """Drain whatever lies in the spool now; returns how many answers were stored.

    The database is opened afresh, so that one that was replaced or repaired is taken up.

    Raises:
        ServiceError: the database is away or damaged; the spool is kept.
    """
    if not has_undrained(settings.spool_dir):
        return 0
    with engine_of(settings.sql_url) as engine:
        return drain(engine, settings.spool_dir)


def deliver_once(settings: Settings, client: httpx.Client) -> int:
    """Deliver whatever waits in the outbox now; how many events were delivered.

    Raises:
        ServiceError: the database is away, or Prefect does not list what it accepted.
        httpx.HTTPError: Prefect is away or refuses. Either way the events stay in the outbox.
    """
    with engine_of(settings.sql_url) as engine:
        return events.deliver(engine, partial(_post, client))


def main(settings: Settings) -> int:
    """Drain until SIGTERM or SIGINT, then once more."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    api = os.environ.get("PREFECT_API_URL", "")
    if api:  # a thread of its own: Prefect may be slow, and drives no prediction away
        threading.Thread(target=_deliver, args=(settings, api, stop), daemon=True).start()
    log.info("draining %s into SQL", settings.spool_dir)
    wait, said = INTERVAL_SECONDS, ""
    while not stop.is_set():
        try:
            stored = drain_once(settings)
        except (ServiceError, OSError) as error:
            if str(error) != said:
                log.error("%s Trying again.", error)
            wait, said = min(wait * 2, LONGEST_WAIT_SECONDS), str(error)
        else:
            if said:
                log.info("the database takes predictions again: %d stored", stored)
            wait, said = INTERVAL_SECONDS, ""
        stop.wait(wait)
    return _last(settings)


def _last(settings: Settings) -> int:
    try:
        drain_once(settings)
    except (ServiceError, OSError) as error:
        log.error("%s What lies in the spool is drained at the next start.", error)
        return 1
    return 0


def _deliver(settings: Settings, api: str, stop: threading.Event) -> None:
    """Deliver events until `stop`; while it fails, ever less often, said once."""
    log.info("delivering events to %s", api)
    wait, said = DELIVER_SECONDS, ""
    while not stop.is_set():
        try:
            with _client(api, os.environ) as client:
                delivered = deliver_once(settings, client)
        except (PerennialError, httpx.HTTPError, httpx.InvalidURL, SQLAlchemyError) as error:
            wait, said = _failed(error, wait, said)
        except (OSError, ValueError, KeyError, TypeError) as error:  # an answer not of Prefect's
            wait, said = _failed(error, wait, said)
        else:
            if delivered:
                log.info("%d event(s) delivered", delivered)
            wait, said = DELIVER_SECONDS, ""
        stop.wait(wait)


def _failed(error: Exception, wait: float, said: str) -> tuple[float, str]:
    kind = type(error).__name__
    if kind != said:
        log.error("events wait in the outbox: %s Trying again.", error)
    return min(wait * 2, LONGEST_WAIT_SECONDS), kind


def _client(api: str, environment: Mapping[str, str]) -> httpx.Client:
    """A client of Prefect's API, with the credentials that Prefect's own would send."""
    headers = events.credentials(environment)
    return httpx.Client(base_url=api, headers=headers, timeout=ASK_SECONDS)


def _post(client: httpx.Client, path: events.Path, body: object) -> httpx.Response:
    return client.post(path, json=body)
