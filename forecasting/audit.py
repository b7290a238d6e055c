"""The audit: who or what did what to the loop, when and why, line after line.

A line is written in the transaction of the change that it tells of, so that neither stands without
the other. The database refuses to change or delete one (`migrations.versions.v0002_record`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import msgspec
from sqlalchemy import Connection, Engine, insert, select

from forecasting.store import audit, now

Kind = Literal["alias", "trigger", "skip", "retrain", "verdict", "approval", "probation"]
"""What a line is of: an alias moved (or its move confirmed or undone); a retrain was asked for and
began, was not let begin, or was not even asked for; it ended; the gate judged; a person was asked;
a probation ended."""


@dataclass(frozen=True)
class Entry:
    """One line of the audit.

    Attributes:
        number: ascending, in the order of writing.
        subject: forecaster or symbol that it is about.
        version: model version that it is about, if of one.
        who: person, flow run or event behind it.
        details: whatever else is known, by kind.
    """

    number: int
    at: datetime
    kind: Kind
    subject: str
    version: int | None
    who: str
    reason: str
    details: dict[str, object]


def add(
    connection: Connection,
    kind: Kind,
    subject: str,
    *,
    who: str,
    reason: str,
    version: int | None = None,
    details: Mapping[str, object] | None = None,
) -> None:
    """Write a line in the connection's transaction; fields as of `Entry`."""
    connection.execute(
        insert(audit).values(
            at=now(),
            kind=kind,
            subject=subject,
            version=version,
            who=who[:200],
            reason=reason,
            details=dict(details or {}),
        )
    )


def says(connection: Connection, kind: Kind, subject: str, who: str, reason: str) -> bool:
    """Whether there is such a line already."""
    wanted = {"kind": kind, "subject": subject, "who": who[:200], "reason": reason}
    query = select(audit.c.number).filter_by(**wanted).limit(1)
    return connection.execute(query).first() is not None


def read(
    engine: Engine, subject: str | None = None, since: datetime | None = None
) -> Iterator[Entry]:
    """Lines in the order of writing: all, or those of one subject or from a moment on."""
    query = select(audit).order_by(audit.c.number)
    if subject is not None:
        query = query.where(audit.c.subject == subject)
    if since is not None:
        query = query.where(audit.c.at >= since.astimezone(UTC))
    with engine.connect() as connection:
        for row in connection.execute(query).mappings():
            yield Entry(**{**row, "at": _aware(row["at"])})


def to_json(entry: Entry) -> str:
    """One line of JSON, fields as of `Entry`."""
    return msgspec.json.encode(entry).decode()


def _aware(value: datetime) -> datetime:
    return value if value.tzinfo else value.replace(tzinfo=UTC)
