"""The retrain ledger: who asked for a retrain, what came of it, and the cooldown between two."""

import uuid
from dataclasses import dataclass
from datetime import date, timedelta

from sqlalchemy import Connection, Engine, insert, select, update

from forecasting import audit
from forecasting.sessions import count_sessions
from forecasting.store import exclude_writers, now, retrains

COUNTED = ("running", "promoted", "refused", "unchanged", "rolled-back")
"""States that start a cooldown; a failed or skipped retrain does not."""
LOST_AFTER = timedelta(hours=3)
"""A retrain that runs longer was killed: its steps have timeouts of an hour each."""


@dataclass(frozen=True)
class Entry:
    """One line of the ledger."""

    id: str
    skipped: bool
    reason: str


def claim(
    engine: Engine,
    *,
    symbol: str,
    as_of: date,
    trigger: str,
    flow_run_id: str,
    cooldown_days: int,
) -> Entry:
    """Write a request into the ledger; skipped if the symbol's cooldown has not passed.

    The check and the line are one transaction that excludes other writers, so that two requests
    at once cannot both pass.

    Args:
        engine: from `store.open_engine`.
        symbol: whose forecaster.
        as_of: the market day of the request; the cooldown counts market days.
        trigger: what asked.
        flow_run_id: the Prefect flow run; a repeated call by the same run is granted again.
        cooldown_days: trading days between two retrains of one symbol.
    """
    identity = str(uuid.uuid4())
    with engine.connect() as connection:
        exclude_writers(connection, retrains)
        _close_lost(connection, symbol)
        reason = _cooling(connection, symbol, as_of, flow_run_id, cooldown_days)
        connection.execute(
            insert(retrains).values(
                id=identity,
                symbol=symbol,
                as_of=as_of,
                trigger=trigger,
                flow_run_id=flow_run_id,
                state="skipped" if reason else "running",
                reason=reason,
                created_at=now(),
            )
        )
        audit.add(
            connection,
            "skip" if reason else "trigger",
            symbol,
            who=trigger,
            reason=reason or "a retrain begins",
            details={"id": identity, "as_of": as_of.isoformat(), "flow_run_id": flow_run_id},
        )
        connection.commit()
    return Entry(identity, bool(reason), reason)


def close(engine: Engine, identity: str, state: str, reason: str) -> None:
    """Write down what came of a retrain."""
    with engine.begin() as connection:
        line = connection.execute(
            update(retrains)
            .where(retrains.c.id == identity)
            .values(state=state, reason=reason)
            .returning(retrains.c.symbol, retrains.c.trigger)
        ).one()
        audit.add(
            connection,
            "retrain",
            line.symbol,
            who=line.trigger,
            reason=reason,
            details={"id": identity, "state": state},
        )


def hold(
    engine: Engine, identity: str, *, symbol: str, as_of: date, flow_run_id: str, reason: str
) -> None:
    """Start a cooldown without a retrain, because what one promoted was rolled back; once.

    Args:
        engine: from `store.open_engine`.
        identity: of what is held back for; the same again writes nothing.
        symbol: whose forecaster, as in `claim`.
        as_of: the market day of the rollback.
        flow_run_id: the Prefect flow run.
        reason: why it was rolled back.
    """
    with engine.connect() as connection:
        exclude_writers(connection, retrains)
        there = select(retrains.c.id).where(retrains.c.id == identity)
        if connection.execute(there).first() is None:
            connection.execute(
                insert(retrains).values(
                    id=identity,
                    symbol=symbol,
                    as_of=as_of,
                    trigger="rollback",
                    flow_run_id=flow_run_id,
                    state="rolled-back",
                    reason=reason,
                    created_at=now(),
                )
            )
        connection.commit()


def _close_lost(connection: Connection, symbol: str) -> None:
    """A killed retrain cannot close its own line; it must not block the symbol."""
    lost = (
        retrains.c.symbol == symbol,
        retrains.c.state == "running",
        retrains.c.created_at < now() - LOST_AFTER,
    )
    reason = f"lost: it did not end within {LOST_AFTER}"
    connection.execute(update(retrains).where(*lost).values(state="failed", reason=reason))


def _cooling(
    connection: Connection, symbol: str, as_of: date, flow_run_id: str, cooldown_days: int
) -> str:
    query = select(retrains.c.as_of, retrains.c.state, retrains.c.flow_run_id).where(
        retrains.c.symbol == symbol, retrains.c.state.in_(COUNTED)
    )
    for day, state, run in connection.execute(query):
        distance = abs(count_sessions(day, as_of))
        if distance < cooldown_days and run != flow_run_id:
            return (
                f"{symbol} was retrained ({state}) as of {day}, {distance} trading days from "
                f"{as_of}; the cooldown is {cooldown_days} (PERENNIAL_RETRAIN_COOLDOWN_DAYS)."
            )
    return ""
