"""Typed, versioned events, and the outbox that keeps each until its delivery is confirmed.

Nothing here imports Prefect: whoever delivers hands in how to POST to its API. Flows do it through
Prefect's client, `serving drain` through plain HTTP.
"""

import base64
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

import httpx
import msgspec
from filelock import FileLock, Timeout
from sqlalchemy import Connection, Engine, func, select, text, update
from sqlalchemy.dialects import postgresql, sqlite

from forecasting.errors import ServiceError
from forecasting.store import now, outbox

CONFIRM_SECONDS = 20
"""How long an event may take until Prefect lists it; it stores them in batches."""
MOST_AT_ONCE = 50
"""Prefect lists no more events in one answer, and refuses to be asked for more."""
LOCK_SECONDS = 120
_LOCK_KEY = 0x7065726E  # of PostgreSQL's advisory lock: "pern"

Path = Literal["/events", "/events/filter"]
Post = Callable[[Path, object], httpx.Response]
"""POSTs JSON to a path of Prefect's API; the answer, whatever its status."""


class DriftDetected(msgspec.Struct, frozen=True, kw_only=True):
    """The market moved away from what the version in production was trained on.

    `features` are those that drifted; `volatility` is new over old, where it shifted for good.
    """

    schema: Literal[1] = 1
    symbol: str
    as_of: date
    forecaster: str
    version: int
    share: float
    threshold: float
    features: tuple[str, ...]
    volatility: float | None = None
    dataset_md5: str

    name = "perennial.drift.detected"

    @property
    def resource(self) -> str:
        """Prefect resource id that the event is about."""
        return f"perennial.symbol.{self.symbol}"


class DataRejected(msgspec.Struct, frozen=True, kw_only=True):
    """An ingest refused prices that break the rules; the last good dataset stays."""

    schema: Literal[1] = 1
    symbols: tuple[str, ...]
    as_of: date
    reason: str

    name = "perennial.data.rejected"

    @property
    def resource(self) -> str:
        """Prefect resource id that the event is about."""
        return "perennial.dataset"


class DataMissing(msgspec.Struct, frozen=True, kw_only=True):
    """A source gave no prices of a day: it is away, or does not know what it was asked for."""

    schema: Literal[1] = 1
    symbols: tuple[str, ...]
    as_of: date
    reason: str

    name = "perennial.data.missing"

    @property
    def resource(self) -> str:
        """Prefect resource id that the event is about."""
        return "perennial.dataset"


class DataUpdated(msgspec.Struct, frozen=True, kw_only=True):
    """An ingest made a dataset version with rows that no earlier one had; told once a version."""

    schema: Literal[1] = 1
    symbols: tuple[str, ...]
    as_of: date
    dataset_md5: str

    name = "perennial.data.updated"

    @property
    def resource(self) -> str:
        """Prefect resource id that the event is about."""
        return "perennial.dataset"


class DataFaulty(msgspec.Struct, frozen=True, kw_only=True):
    """The newest prices cannot be right, or are not there; `faults` says what is wrong.

    They are in the dataset, where later rows or a revision may put them right.
    """

    schema: Literal[1] = 1
    symbol: str
    as_of: date
    faults: tuple[str, ...]
    dataset_md5: str

    name = "perennial.data.faulty"

    @property
    def resource(self) -> str:
        """Prefect resource id that the event is about."""
        return f"perennial.symbol.{self.symbol}"


class PerformanceDegraded(msgspec.Struct, frozen=True, kw_only=True):
    """Forecasts of the version in production got worse than those of what it is measured by.

    `evidence` is an e-value: the odds against no degradation that the days since `since` bring, at
    least one over the false-alarm rate of the whole watch (Ville's inequality). CRPS are means over
    these days in bp of log return, `horizon` days ahead where that speaks loudest; `coverage` is
    the share of them that the 80 % interval held.
    """

    schema: Literal[1] = 1
    symbol: str
    as_of: date
    forecaster: str
    version: int
    against: str
    since: date
    days: int
    horizon: int = 1
    crps_bp: float
    against_crps_bp: float
    coverage: float | None = None
    evidence: float

    name = "perennial.performance.degraded"

    @property
    def resource(self) -> str:
        """Prefect resource id that the event is about."""
        return f"perennial.symbol.{self.symbol}"


class ModelAged(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing alarmed, but the version in production has been left alone for long enough.

    `since` is the market day of the last retrain, or of the version's own training; `days` are the
    trading days from there, at least `wait`.
    """

    schema: Literal[1] = 1
    symbol: str
    as_of: date
    forecaster: str
    version: int
    since: date
    days: int
    wait: int

    name = "perennial.model.aged"

    @property
    def resource(self) -> str:
        """Prefect resource id that the event is about."""
        return f"perennial.symbol.{self.symbol}"


class ModelProvisional(msgspec.Struct, frozen=True, kw_only=True):
    """The version in production was let in only because the one before was worse beyond doubt, and
    its own forecasts do not say yet that it is good: a better one is asked for.

    `since` is the market day of the last retrain, or of the version's own training; `days` are the
    trading days from there, at least `wait`, which grows with the retrains `refused` in a row.
    """

    schema: Literal[1] = 1
    symbol: str
    as_of: date
    forecaster: str
    version: int
    since: date
    days: int
    wait: int
    refused: int

    name = "perennial.model.provisional"

    @property
    def resource(self) -> str:
        """Prefect resource id that the event is about."""
        return f"perennial.symbol.{self.symbol}"


class ModelPromoted(msgspec.Struct, frozen=True, kw_only=True):
    """A newer version holds the alias `production`; `served` is what the server said of it."""

    schema: Literal[1] = 1
    forecaster: str
    version: int
    previous: int | None
    who: str
    why: str
    served: str

    name = "perennial.model.promoted"

    @property
    def resource(self) -> str:
        """Prefect resource id that the event is about."""
        return f"perennial.forecaster.{self.forecaster}"


class ModelRefused(msgspec.Struct, frozen=True, kw_only=True):
    """The gate, or a person, did not let a candidate into production."""

    schema: Literal[1] = 1
    forecaster: str
    as_of: date
    run_id: str
    reasons: tuple[str, ...]

    name = "perennial.model.refused"

    @property
    def resource(self) -> str:
        """Prefect resource id that the event is about."""
        return f"perennial.forecaster.{self.forecaster}"


class ModelRolledBack(msgspec.Struct, frozen=True, kw_only=True):
    """An earlier version took the place of `rolled_back`; None: there was none before it."""

    schema: Literal[1] = 1
    forecaster: str
    version: int | None
    rolled_back: int
    who: str
    why: str

    name = "perennial.model.rolled-back"

    @property
    def resource(self) -> str:
        """Prefect resource id that the event is about."""
        return f"perennial.forecaster.{self.forecaster}"


class ModelCondemned(msgspec.Struct, frozen=True, kw_only=True):
    """A version on probation is worse than `previous`, and a person is to approve its rollback.

    `evidence` is an e-value, at least one over the false-alarm rate; `probation` is its line.
    """

    schema: Literal[1] = 1
    forecaster: str
    version: int
    previous: int
    as_of: date
    probation: str
    evidence: float
    why: str

    name = "perennial.model.condemned"

    @property
    def resource(self) -> str:
        """Prefect resource id that the event is about."""
        return f"perennial.forecaster.{self.forecaster}"


class ModelUnservable(msgspec.Struct, frozen=True, kw_only=True):
    """The server cannot take up a version that an alias names; what it served before stays."""

    schema: Literal[1] = 1
    forecaster: str
    version: int
    reason: str
    where: Literal["sync", "web"]

    name = "perennial.model.unservable"

    @property
    def resource(self) -> str:
        """Prefect resource id that the event is about."""
        return f"perennial.forecaster.{self.forecaster}"


Event = (
    DriftDetected
    | PerformanceDegraded
    | ModelAged
    | ModelProvisional
    | DataRejected
    | DataMissing
    | DataUpdated
    | DataFaulty
    | ModelPromoted
    | ModelRefused
    | ModelRolledBack
    | ModelCondemned
    | ModelUnservable
)


RETRAINING = frozenset(
    {DriftDetected.name, PerformanceDegraded.name, ModelProvisional.name, ModelAged.name}
)
"""Events that ask for a retrain; the ledger decides."""


class Outgoing(msgspec.Struct, frozen=True):
    """One event of the outbox, ready to be posted."""

    id: uuid.UUID
    name: str
    resource: str
    payload: dict[str, object]
    occurred_at: datetime


def put(engine: Engine, event: Event) -> uuid.UUID:
    """Write an event into the outbox; its id."""
    with engine.begin() as connection:
        return _put(connection, uuid.uuid4(), event)


def put_once(engine: Engine, event: Event, same: str = "") -> uuid.UUID:
    """Write an event into the outbox unless the same was written before; its id.

    Args:
        same: what makes two events of one name the same; all of their content if empty.
    """
    with engine.begin() as connection:
        return put_once_with(connection, event, same)


def put_once_with(connection: Connection, event: Event, same: str = "") -> uuid.UUID:
    """`put_once` in a transaction of the caller: the event is there if what it tells is."""
    return _put(connection, _identity(connection, event, same), event)


def was_put(connection: Connection, event: type[Event], same: str) -> bool:
    """Whether `put_once` wrote such an event, delivered or not."""
    query = select(outbox.c.id).where(outbox.c.id == str(_identity(connection, event, same)))
    return connection.execute(query).first() is not None


def _identity(connection: Connection, event: Event | type[Event], same: str) -> uuid.UUID:
    content = f"{event.name} {same}" if same else msgspec.json.encode(event).decode()
    # homes that share a Prefect server share no ids: it would drop the second event
    home = connection.engine.url.render_as_string(hide_password=True)
    return uuid.uuid5(uuid.NAMESPACE_OID, f"{home} {content}")


def _put(connection: Connection, identity: uuid.UUID, event: Event) -> uuid.UUID:
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    connection.execute(
        dialect.insert(outbox)
        .values(
            id=str(identity),
            name=event.name,
            resource=event.resource,
            payload=msgspec.to_builtins(event),
            occurred_at=now(),
            attempts=0,
        )
        .on_conflict_do_nothing()
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


def credentials(environment: Mapping[str, str]) -> dict[str, str]:
    """Headers of a request to Prefect's API, as its own clients send them."""
    if auth := environment.get("PREFECT_API_AUTH_STRING"):
        return {"Authorization": f"Basic {base64.b64encode(auth.encode()).decode()}"}
    if key := environment.get("PREFECT_API_KEY"):
        return {"Authorization": f"Bearer {key}"}
    return {}


def deliver(engine: Engine, post: Post) -> int:
    """Post every undelivered event and read each back; how many were delivered.

    One delivery at a time, whoever does it: an event that is posted twice could start two runs.

    Raises:
        ServiceError: an event was accepted but cannot be read back, or another delivery hangs.
        httpx.HTTPError: the API is away or refuses. Either way the events stay in the outbox.
    """
    if not pending(engine):
        return 0
    with _exclusive(engine):
        waiting = pending(engine)
        for first in range(0, len(waiting), MOST_AT_ONCE):
            _deliver(engine, post, waiting[first : first + MOST_AT_ONCE])
    return len(waiting)


def body(outgoing: Sequence[Outgoing]) -> list[dict[str, object]]:
    """Events as Prefect's `POST /events` takes them."""
    return [
        {
            "id": str(each.id),
            "occurred": each.occurred_at.isoformat(),
            "event": each.name,
            "resource": {"prefect.resource.id": each.resource},
            "related": [],
            "payload": each.payload,
        }
        for each in outgoing
    ]


def _deliver(engine: Engine, post: Post, outgoing: Sequence[Outgoing]) -> None:
    """Post those that the server does not list yet, wait until it lists all, and note it."""
    arrived = False
    try:
        known = _arrived(post, outgoing)
        missing = [each for each in outgoing if each.id not in known]
        if missing:
            post("/events", body(missing)).raise_for_status()
        arrived = _await_arrival(post, outgoing)
    finally:
        mark(engine, [each.id for each in outgoing], delivered=arrived)
    if not arrived:
        raise ServiceError(
            f"Prefect accepted the events {', '.join(str(each.id) for each in outgoing)} but does "
            f"not list them after {CONFIRM_SECONDS} s. They stay in the outbox and are sent again."
        )


def _arrived(post: Post, outgoing: Sequence[Outgoing]) -> set[uuid.UUID]:
    """Ids of those events that the server lists."""
    occurred = [each.occurred_at for each in outgoing]
    second = timedelta(seconds=1)
    wanted = {
        "id": {"id": [str(each.id) for each in outgoing]},
        "occurred": {
            "since": (min(occurred) - second).isoformat(),
            "until": (max(occurred) + second).isoformat(),
        },
    }
    answer = post("/events/filter", {"filter": wanted, "limit": len(outgoing)})
    answer.raise_for_status()
    listed: list[dict[str, Any]] = answer.json()["events"]
    return {uuid.UUID(event["id"]) for event in listed}


def _await_arrival(post: Post, outgoing: Sequence[Outgoing]) -> bool:
    wanted = {each.id for each in outgoing}
    deadline = time.monotonic() + CONFIRM_SECONDS
    while not wanted <= _arrived(post, outgoing):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.3)
    return True


@contextmanager
def _exclusive(engine: Engine) -> Iterator[None]:
    """Hold the outbox: a lock of the database, or of a file beside SQLite's."""
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'"))
            connection.execute(select(func.pg_advisory_xact_lock(_LOCK_KEY)))
            yield
        return
    lock = f"{engine.url.database}.outbox.lock"
    try:
        with FileLock(lock, timeout=LOCK_SECONDS):
            yield
    except Timeout as error:
        raise ServiceError(
            f"Another process holds {lock} for more than {LOCK_SECONDS} s; look for a hanging "
            "flow or `serving drain`."
        ) from error


def _aware(value: datetime) -> datetime:
    return value if value.tzinfo else value.replace(tzinfo=UTC)
