"""Which market days a symbol's daily round has done, and which are due, in order and each once."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import date, timedelta

from filelock import FileLock, Timeout
from sqlalchemy import Engine, func, select
from sqlalchemy.dialects import postgresql, sqlite

from forecasting.errors import ServiceError
from forecasting.sessions import sessions_between
from forecasting.settings import Settings
from forecasting.store import market_days, now

LOCK_SECONDS = 1800.0
_A_FORTNIGHT = timedelta(days=14)


def due(
    engine: Engine, symbols: Sequence[str], until: date, closures: Collection[date] = ()
) -> list[tuple[date, list[str]]]:
    """Sessions up to `until` that are not done yet, oldest first, each with its symbols.

    A symbol without any record begins with the newest session.

    Args:
        closures: days without trading that the calendar does not know.
    """
    days: dict[date, list[str]] = {}
    for symbol in dict.fromkeys(symbols):
        for day in _open_days(last_done(engine, symbol), until, closures):
            days.setdefault(day, []).append(symbol)
    return sorted(days.items())


def _open_days(last: date | None, until: date, closures: Collection[date]) -> list[date]:
    first = until - _A_FORTNIGHT if last is None else last + timedelta(days=1)
    days = [day for day in sessions_between(first, until) if day not in closures]
    return days[-1:] if last is None else days


def last_done(engine: Engine, symbol: str) -> date | None:
    """The newest session that the symbol's round has done."""
    query = select(func.max(market_days.c.day)).where(market_days.c.symbol == symbol)
    with engine.connect() as connection:
        return connection.execute(query).scalar_one_or_none()


def done_on(engine: Engine, day: date) -> list[str]:
    """Symbols whose round has done that session."""
    query = select(market_days.c.symbol).where(market_days.c.day == day)
    with engine.connect() as connection:
        return list(connection.execute(query).scalars())


def record(
    engine: Engine, symbols: Sequence[str], day: date, prices_md5: str, flow_run_id: str
) -> None:
    """Write down that a day is done; a second time changes nothing."""
    dialect = postgresql if engine.dialect.name == "postgresql" else sqlite
    rows = [
        {
            "symbol": symbol,
            "day": day,
            "prices_md5": prices_md5,
            "flow_run_id": flow_run_id,
            "done_at": now(),
        }
        for symbol in symbols
    ]
    with engine.begin() as connection:
        connection.execute(dialect.insert(market_days).on_conflict_do_nothing(), rows)


@contextmanager
def one_round_at_a_time(settings: Settings) -> Iterator[None]:
    """Wait for another round of this home; the system lets go when its holder dies.

    Raises:
        ServiceError: another round takes longer than half an hour.
    """
    path = settings.home / "locks" / "daily.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=LOCK_SECONDS):
            yield
    except Timeout as error:
        raise ServiceError(
            f"Another daily round holds {path} for more than {LOCK_SECONDS:.0f} s; look for a "
            "hanging run of the deployment daily."
        ) from error
