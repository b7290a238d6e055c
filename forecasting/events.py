"""Typed, versioned events, and the outbox that keeps each until its delivery is confirmed.

Nothing here knows Prefect: a task posts what `pending` returns and calls `mark` afterwards.
"""

import uuid
from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Literal

import msgspec
from sqlalchemy import Engine, insert, select, update

from forecasting.store import now, outbox


class DriftDetected(msgspec.Struct, frozen=True, kw_only=True):
    """The market moved away from what the version in production was trained on."""

    schema: Literal[1] = 1
    symbol: str
    as_of: date
    forecaster: str
    version: int
    share: float
    threshold: float
    features: tuple[str, ...]
    dataset_md5: str

    name = "perennial.drift.detected"

    @property
    def resource(self) -> str:
        """Prefect resource id that the event is about."""
        return f"perennial.symbol.{self.symbol}"


class Outgoing(msgspec.Struct, frozen=True):
    """One event of the outbox, ready to be posted."""

    id: uuid.UUID
    name: str
    resource: str
    payload: dict[str, object]
    occurred_at: datetime


def put(engine: Engine, event: DriftDetected) -> uuid.UUID:
    """Write an event into the outbox; its id."""
    identity = uuid.uuid4()
    with engine.begin() as connection:
        connection.execute(
            insert(outbox).values(
                id=str(identity),
                name=event.name,
                resource=event.resource,
                payload=msgspec.to_builtins(event),
                occurred_at=now(),
            )
        )
    return identity


def pending(engine: Engine) -> list[Outgoing]:
    """Events whose delivery is not confirmed yet, oldest first."""
    query = select(outbox).where(outbox.c.delivered_at.is_(None)).order_by(outbox.c.occurred_at)
    with engine.connect() as connection:
        rows = connection.execute(query).mappings().all()
    return [
        Outgoing(
            id=uuid.UUID(row["id"]),
            name=row["name"],
            resource=row["resource"],
            payload=row["payload"],
            occurred_at=_aware(row["occurred_at"]),
        )
        for row in rows
    ]


def mark(engine: Engine, ids: Sequence[uuid.UUID], *, delivered: bool) -> None:
    """Count an attempt for each event and, if `delivered`, close it."""
    values: dict[str, object] = {"attempts": outbox.c.attempts + 1}
    if delivered:
        values["delivered_at"] = now()
    with engine.begin() as connection:
        connection.execute(
            update(outbox).where(outbox.c.id.in_([str(each) for each in ids])).values(values)
        )


def _aware(value: datetime) -> datetime:
    return value if value.tzinfo else value.replace(tzinfo=UTC)
