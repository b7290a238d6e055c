"""`python -m serving drain`: moves the prediction log from the spool into SQL every second."""

import logging
import signal
import threading

from forecasting.errors import ServiceError
from forecasting.outcomes import drain
from forecasting.predictions import has_undrained
from forecasting.settings import Settings
from forecasting.store import engine_of

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 30.0


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


def main(settings: Settings) -> int:
    """Drain until SIGTERM or SIGINT, then once more."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
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
