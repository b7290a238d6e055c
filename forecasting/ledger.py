"""The retrain ledger: who asked for a retrain, what came of it, and what keeps them few.

Retrains of one forecaster run one at a time with a cooldown between two, and those of all
forecasters have a budget for a week. A request that is against any of it is written down as
skipped, with the reason.
"""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import takewhile

from sqlalchemy import Connection, Engine, Row, insert, select, update

from forecasting import audit
from forecasting.events import ModelAged, ModelProvisional
from forecasting.sessions import count_sessions, exchange_day
from forecasting.settings import Clock, Settings
from forecasting.store import exclude_writers, now, retrains

COUNTED = ("promoted", "refused", "unchanged", "rolled-back")
"""States that start a cooldown; a failed or skipped retrain does not."""
_UNTOLD = ("running", "failed")
"""States of a retrain whose CPU time may not be known."""
LOST_AFTER = timedelta(hours=5)
"""A retrain that runs longer was killed: the timeouts of its steps add up to less than four."""
WEEK = timedelta(days=7)
FIRST_WAIT = 20
"""Trading days until age, or a provisional version, asks first, where there is no cooldown."""
MOST_DOUBLINGS = 3
"""Of a provisional version's wait, where age asks for nothing."""
KEPT_FOR_ALARMS = 2
"""Runs of a week's budget, if it is larger, that are taken by alarms only, not by the calendar."""


@dataclass(frozen=True)
class Limits:
    """What keeps retrains few; 0 is no limit.

    Attributes:
        cooldown_days: trading days between two retrains of one forecaster.
        runs: most retrains of all forecasters that start in a week; failed ones count.
        cpu_minutes: CPU time of all retrains in a week after which none starts. What one that runs
            or was killed has spent is not known: it counts as much as the newest that ended.
        clock: whether days pass on the wall or by the market days `as_of` of the requests.
        patience: how long a retrain may run until it counts as lost.
    """

    cooldown_days: int = 0
    runs: int = 0
    cpu_minutes: float = 0
    clock: Clock = "wall"
    patience: timedelta = LOST_AFTER

    @classmethod
    def of(cls, settings: Settings) -> "Limits":
        """Those of the settings; one that may wait for a person is not lost while it does."""
        waits = timedelta(hours=settings.approval_hours if settings.approval else 0)
        return cls(
            settings.retrain_cooldown_days,
            settings.retrain_budget_runs,
            settings.retrain_budget_cpu_minutes,
            settings.clock,
            LOST_AFTER + waits,
        )


@dataclass(frozen=True)
class Entry:
    """One line of the ledger."""

    id: str
    skipped: bool
    reason: str


@dataclass(frozen=True)
class _Line:
    """What an earlier line says that bears on a new request."""

    symbol: str
    as_of: date
    flow_run_id: str
    state: str
    cpu_seconds: float
    created_at: datetime


@dataclass(frozen=True)
class _Request:
    symbol: str
    as_of: date
    at: datetime
    limits: Limits
    trigger: str

    def sessions_since(self, line: _Line) -> int:
        """Trading days between a line and this request, whichever is the later one."""
        if self.limits.clock == "market":
            return abs(count_sessions(line.as_of, self.as_of))
        return count_sessions(exchange_day(line.created_at), exchange_day(self.at))

    def same_week(self, line: _Line) -> bool:
        """Whether a line lies in the week of which this request is the end."""
        if self.limits.clock == "market":
            return abs(line.as_of - self.as_of) < WEEK
        return self.at - line.created_at < WEEK


def claim(
    engine: Engine, *, symbol: str, as_of: date, trigger: str, flow_run_id: str, limits: Limits
) -> Entry:
    """Write a request into the ledger; skipped, with the reason, where the limits are against it.

    The check and the line are one transaction that excludes other writers, so that two requests
    at once cannot both pass.

    Args:
        engine: from `store.open_engine`.
        symbol: whose forecaster, or the forecaster of several.
        as_of: the market day of the request.
        trigger: what asked.
        flow_run_id: the Prefect flow run; one that starts again goes on from its own earlier line.
        limits: what the request must keep within.
    """
    identity, request = str(uuid.uuid4()), _Request(symbol, as_of, now(), limits, trigger)
    with engine.connect() as connection:
        exclude_writers(connection, retrains)
        _close_lost(connection, symbol, flow_run_id, limits.patience)
        reason = _against(request, _others(connection, flow_run_id))
        connection.execute(
            insert(retrains).values(
                id=identity,
                symbol=symbol,
                as_of=as_of,
                trigger=trigger,
                flow_run_id=flow_run_id,
                state="skipped" if reason else "running",
                reason=reason,
                created_at=request.at,
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


def running(engine: Engine) -> set[str]:
    """Flow runs of the retrains that have begun and not ended."""
    query = select(retrains.c.flow_run_id).where(retrains.c.state == "running")
    with engine.connect() as connection:
        return set(connection.execute(query).scalars())


def last_asked(engine: Engine, symbol: str) -> tuple[date | None, int]:
    """Market day of the newest retrain that was let start, and how many age had asked for by then.

    Args:
        engine: from `store.open_engine`.
        symbol: as in `claim`.

    Returns:
        (day, a failed one's too, None without any; retrains that age asked for since the last one
        that something else did, failed ones left out).
    """
    lines = _let_start(engine, symbol)
    counted = [line.trigger for line in lines if line.state in COUNTED]
    row = len(list(takewhile(_of_age, counted)))
    return (lines[0].as_of if lines else None), row


def wait_for_age(settings: Settings, row: int) -> int:
    """Trading days after the newest retrain on which age asks for the next one; 0: never.

    The more of a market is known, the less a few days more say of it: a cooldown after the retrain
    that an alarm asked for (or after the first training), and twice as long each time, so that each
    learns from as many new days as there had been.

    Args:
        settings: cooldown, and the most days.
        row: retrains that age has asked for since then.
    """
    most, cooldown = settings.retrain_after_days, settings.retrain_cooldown_days
    if not most:
        return 0
    return max(cooldown, min(most, (cooldown or FIRST_WAIT) << min(row, most.bit_length())))


def last_retrain(engine: Engine, symbol: str) -> tuple[date | None, int]:
    """Market day of the newest retrain that came to something, and how many in a row came to no
    other version.

    Args:
        engine: from `store.open_engine`.
        symbol: as in `claim`.

    Returns:
        (day, None without any; refused and unchanged ones since the last promotion).
    """
    lines = [line for line in _let_start(engine, symbol) if line.state in COUNTED]
    in_vain = takewhile(lambda line: line.state in ("refused", "unchanged"), lines)
    return (lines[0].as_of if lines else None), len(list(in_vain))


def wait_if_provisional(settings: Settings, row: int) -> int:
    """Trading days after the newest retrain on which a provisional version asks for the next one.

    A cooldown, and twice as long for each in a row that came to no other version; no longer than
    age would wait at most.

    Args:
        settings: cooldown, and the most days.
        row: retrains in a row that came to no other version.
    """
    cooldown = settings.retrain_cooldown_days
    first = cooldown or FIRST_WAIT
    most = settings.retrain_after_days or first << MOST_DOUBLINGS
    return max(cooldown, min(most, first << min(row, most.bit_length())))


def _let_start(engine: Engine, symbol: str) -> Sequence[Row[date, str, str]]:
    """Day, state and trigger of every retrain that was let start, newest first."""
    let_start = (retrains.c.symbol == symbol, retrains.c.state != "skipped")
    query = select(retrains.c.as_of, retrains.c.state, retrains.c.trigger).where(*let_start)
    newest_first = query.order_by(retrains.c.as_of.desc(), retrains.c.created_at.desc())
    with engine.connect() as connection:
        return connection.execute(newest_first).all()


def _of_age(trigger: str) -> bool:
    return trigger.startswith(ModelAged.name)


def _is_no_alarm(trigger: str) -> bool:
    return trigger.startswith((ModelAged.name, ModelProvisional.name))


def close(
    engine: Engine, identity: str, state: str, reason: str, cpu_seconds: float | None = None
) -> None:
    """Write down what came of a retrain, and the CPU time that it took."""
    with engine.begin() as connection:
        line = connection.execute(
            update(retrains)
            .where(retrains.c.id == identity)
            .values(state=state, reason=reason, cpu_seconds=cpu_seconds)
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


def _close_lost(connection: Connection, symbol: str, flow_run_id: str, patience: timedelta) -> None:
    """A killed retrain cannot close its own line; it must not block the symbol."""
    running = (retrains.c.symbol == symbol, retrains.c.state == "running")
    old = retrains.c.created_at < now() - patience
    own = retrains.c.flow_run_id == flow_run_id
    for lost, reason in (
        (old, f"lost: it did not end within {patience}"),
        (own, "lost: its flow run started again"),
    ):
        closed = connection.execute(
            update(retrains)
            .where(*running, lost)
            .values(state="failed", reason=reason)
            .returning(retrains.c.id, retrains.c.trigger)
        )
        for line in closed.all():
            details = {"id": line.id, "state": "failed"}
            audit.add(
                connection, "retrain", symbol, who=line.trigger, reason=reason, details=details
            )


def _others(connection: Connection, flow_run_id: str) -> list[_Line]:
    """Every retrain that was let start, but for those of the asking flow run itself."""
    query = (
        select(*(retrains.c[name] for name in _Line.__dataclass_fields__))
        .where(retrains.c.state != "skipped", retrains.c.flow_run_id != flow_run_id)
        .order_by(retrains.c.created_at.desc())
    )
    rows = connection.execute(query).mappings().all()
    told = next((row["cpu_seconds"] for row in rows if row["cpu_seconds"] is not None), 0.0)
    lines = []
    for row in rows:
        at: datetime = row["created_at"]  # SQLite gives it back without its zone
        spent = row["cpu_seconds"]
        if spent is None:
            spent = told if row["state"] in _UNTOLD else 0.0
        values = {"created_at": at.replace(tzinfo=at.tzinfo or UTC), "cpu_seconds": spent}
        lines.append(_Line(**{**row, **values}))
    return lines


def _against(request: _Request, lines: Sequence[_Line]) -> str:
    """Why the request must not start; empty if nothing is against it."""
    rules: tuple[Callable[[_Request, Sequence[_Line]], str], ...] = (
        _running,
        _cooling,
        _runs_spent,
        _cpu_spent,
    )
    return next((reason for rule in rules if (reason := rule(request, lines))), "")


def _running(request: _Request, lines: Sequence[_Line]) -> str:
    for line in lines:
        if (line.symbol, line.state) == (request.symbol, "running"):
            return (
                f"A retrain of {request.symbol} as of {line.as_of} is running since "
                f"{line.created_at:%Y-%m-%d %H:%M} UTC (flow run {line.flow_run_id}); "
                "one at a time."
            )
    return ""


def _cooling(request: _Request, lines: Sequence[_Line]) -> str:
    limits = request.limits
    for line in lines:
        if line.symbol != request.symbol or line.state not in COUNTED:
            continue
        distance = request.sessions_since(line)
        if distance < limits.cooldown_days:
            market = limits.clock == "market"
            on = f"as of {line.as_of}" if market else f"on {exchange_day(line.created_at)}"
            away = f"from {request.as_of}" if market else "ago"
            return (
                f"{request.symbol} was retrained ({line.state}) {on}, {distance} trading days "
                f"{away}; the cooldown is {limits.cooldown_days} (PERENNIAL_RETRAIN_COOLDOWN_DAYS)."
            )
    return ""


def _runs_spent(request: _Request, lines: Sequence[_Line]) -> str:
    started = [line for line in lines if line.state != "rolled-back" and request.same_week(line)]
    runs, most = {line.flow_run_id for line in started}, request.limits.runs
    allowed = max(1, most - KEPT_FOR_ALARMS) if _is_no_alarm(request.trigger) else most
    if not most or len(runs) < allowed:
        return ""
    kept = f", of which {most - allowed} are kept for alarms" if allowed < most else ""
    return (
        f"{len(runs)} retrains were started within a week; the budget is {most}{kept} "
        "(PERENNIAL_RETRAIN_BUDGET_RUNS)."
    )


def _cpu_spent(request: _Request, lines: Sequence[_Line]) -> str:
    minutes = sum(line.cpu_seconds for line in lines if request.same_week(line)) / 60
    if not request.limits.cpu_minutes or minutes < request.limits.cpu_minutes:
        return ""
    return (
        f"Retrains took {minutes:.1f} CPU minutes within a week; the budget is "
        f"{request.limits.cpu_minutes:g} (PERENNIAL_RETRAIN_BUDGET_CPU_MINUTES)."
    )
