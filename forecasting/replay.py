"""Replays of market history: when a policy retrains, and what a replayed home says came of it.

A replay keeps no state of its own: a market day is done once its line is in `costs`, and everything
else is where the flows put it.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from os import times
from time import perf_counter
from uuid import NAMESPACE_OID, uuid5

import numpy as np
import pandas as pd
from sqlalchemy import Engine, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from forecasting import metrics, outcomes
from forecasting.costs import WHOLE
from forecasting.events import (
    RETRAINING,
    DriftDetected,
    ModelProvisional,
    Outgoing,
    PerformanceDegraded,
)
from forecasting.metrics import BASIS_POINTS, Array
from forecasting.store import costs, now, outbox, probations, retrains

MONTH, QUARTER = 21, 63
"""Market days; longer than the cooldown that is set by default."""
DAY, RETRAIN = WHOLE, "retrain"
"""Lines of `costs`: of a market day without its retrain, and of a retrain."""
WATCHING = ("forecast", "monitor")
"""Flows of a market day whose lines say what the home grew by."""
NOT_RUN = ("skipped", "running", "rolled-back")
"""States of the ledger that are no retrain; the last holds one back after a rollback."""
SOURCES = ("batch",)
"""How the forecasts of a replay came to be."""
LAG = 20
"""Days over which differences between policies are taken to hang together: a version in production
stays there for weeks."""


@dataclass(frozen=True)
class Policy:
    """When to retrain.

    Attributes:
        name: in tables and folders.
        every: market days between two retrains; 0: none by the calendar.
        events: names of the events that start one.
        days: on which there is one in any case; of an oracle that knows when the market changed.
    """

    name: str
    every: int = 0
    events: frozenset[str] = frozenset()
    days: frozenset[date] = frozenset()

    def trigger(self, position: int, day: date, told: Sequence[Outgoing]) -> str:
        """What starts a retrain after a market day; empty: nothing does.

        Args:
            position: of the day in the replay, from 1.
            day: the market day.
            told: events of the day, as an automation hears them.
        """
        if day in self.days or (self.every and position % self.every == 0):
            return f"{self.name}: market day {position}"
        heard = [event for event in told if event.name in self.events]
        return f"{heard[0].name} {heard[0].id}" if heard else ""


_ON_DRIFT = frozenset({DriftDetected.name})
_ON_PERFORMANCE = frozenset({PerformanceDegraded.name, ModelProvisional.name})
POLICIES = {
    policy.name: policy
    for policy in (
        Policy("never"),
        Policy("monthly", every=MONTH),
        Policy("quarterly", every=QUARTER),
        Policy("drift", events=_ON_DRIFT),
        Policy("performance", events=_ON_PERFORMANCE),
        Policy("both", events=_ON_DRIFT | _ON_PERFORMANCE),
        Policy("loop", events=RETRAINING),
    )
}


# --- lines of a replay -----------------------------------------------------------------------


@dataclass
class Meter:
    """Wall and CPU seconds between start and end, CPU of ended child processes included."""

    wall: float = 0.0
    cpu: float = 0.0


@contextmanager
def metered() -> Iterator[Meter]:
    """Fill a meter with what the block takes."""
    meter, wall, cpu = Meter(), perf_counter(), sum(times()[:4])
    try:
        yield meter
    finally:
        meter.wall, meter.cpu = perf_counter() - wall, sum(times()[:4]) - cpu


def run_id(policy: str, what: str, day: date) -> str:
    """What stands for a flow run's id: the same each time that day is played."""
    return str(uuid5(NAMESPACE_OID, f"replay {policy} {what} {day}"))


def last_day(engine: Engine) -> date | None:
    """The last market day that is done."""
    with engine.connect() as connection:
        query = select(func.max(costs.c.as_of)).where(costs.c.flow == DAY)
        return connection.execute(query).scalar_one_or_none()


def has_begun(engine: Engine, flow_run_id: str) -> bool:
    """Whether a retrain was asked for, whatever came of it."""
    query = select(retrains.c.id).where(retrains.c.flow_run_id == flow_run_id)
    with engine.connect() as connection:
        return connection.execute(query).first() is not None


def is_settled(engine: Engine, flow_run_id: str) -> bool:
    """Whether a retrain came to its end, in a process that was killed before the day's end."""
    query = select(retrains.c.id).where(
        retrains.c.flow_run_id == flow_run_id, retrains.c.state.not_in(("running", "failed"))
    )
    with engine.connect() as connection:
        return connection.execute(query).first() is not None


def decisions(engine: Engine, day: date) -> list[str]:
    """What came of the retrains that were asked for on a day, in their order."""
    query = select(retrains.c.state, retrains.c.reason).where(retrains.c.as_of == day)
    with engine.connect() as connection:
        rows = connection.execute(query.order_by(retrains.c.created_at)).all()
    return [f"{state}: {reason}" for state, reason in rows]


def count_events(engine: Engine, names: Collection[str]) -> int:
    """How many events of these names there have been."""
    query = select(func.count()).select_from(outbox).where(outbox.c.name.in_(names))
    with engine.connect() as connection:
        return int(connection.execute(query).scalar_one())


def end_day(
    engine: Engine, policy: str, symbol: str, day: date, told: Sequence[Outgoing], meter: Meter
) -> None:
    """A market day is done, and its events are heard, both or neither."""
    inside = costs.c.as_of == day, costs.c.flow.in_(WATCHING)
    grown = select(func.coalesce(func.sum(costs.c.bytes), 0)).where(*inside).scalar_subquery()
    with engine.begin() as connection:
        ids = [str(event.id) for event in told]
        heard = {"delivered_at": now(), "attempts": outbox.c.attempts + 1}
        waiting = outbox.c.id.in_(ids) & outbox.c.delivered_at.is_(None)
        connection.execute(update(outbox).where(waiting).values(heard))
        dialect = postgresql if engine.dialect.name == "postgresql" else sqlite
        identity = run_id(policy, DAY, day)
        line = dialect.insert(costs).values(
            id=identity,
            flow=DAY,
            flow_run_id=identity,
            symbol=symbol,
            as_of=day,
            policy=policy,
            outcome="done",
            wall_seconds=meter.wall,
            cpu_seconds=meter.cpu,
            bytes=grown,
            started_at=now(),
        )
        connection.execute(line.on_conflict_do_nothing())


# --- what came of it -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Summary:
    """What one policy came to.

    Attributes:
        policy: its name.
        days: market days played.
        crps: mean over days and horizons, basis points of log return.
        coverage: share of outcomes in the central 80 % interval, over days and horizons.
        coverage95: the same of 95 %.
        retrains, promotions, refusals, skips, rollbacks: how many.
        cpu_minutes: of the retrains.
        watch_cpu_minutes: of the days: forecast, monitor, labels.
        wall_minutes: of all.
        days_per_minute: of the days without their retrains.
        losses: mean CRPS over the horizons by origin, for comparisons.
        retrained: days of the retrains, and what they came to.
        megabytes: that its home holds in the end; files of MLflow's runs lie beside it.
    """

    policy: str
    days: int
    crps: float
    coverage: float
    coverage95: float
    retrains: int
    promotions: int
    refusals: int
    skips: int
    rollbacks: int
    cpu_minutes: float
    watch_cpu_minutes: float
    wall_minutes: float
    days_per_minute: float
    losses: pd.Series
    retrained: list[tuple[date, str]] = field(default_factory=list)
    megabytes: float = 0.0

    def figures(self) -> dict[str, float]:
        """Those of one line of JSON, rounded."""
        names = (
            *("days", "crps", "coverage", "coverage95", "retrains", "promotions", "refusals"),
            *("skips", "rollbacks", "cpu_minutes", "watch_cpu_minutes", "wall_minutes"),
            "megabytes",
        )
        return {name: round(getattr(self, name), 4) for name in names}


def summarise(engine: Engine, policy: str, symbol: str) -> Summary:
    """What a replayed home says of its policy.

    Raises:
        ValueError: not one forecast of it has its actual.
    """
    scored = outcomes.scored(engine, symbol, sources=SOURCES)
    if scored.empty:
        raise ValueError(f"No forecast of {symbol} has its actual; play a longer span.")
    with engine.connect() as connection:
        spent = pd.read_sql(select(costs).order_by(costs.c.as_of), connection)
        ledger = connection.execute(
            select(retrains.c.as_of, retrains.c.state, retrains.c.flow_run_id).order_by(
                retrains.c.created_at
            )
        ).all()
        undone = connection.execute(
            select(func.count()).select_from(probations).where(probations.c.state == "rolled-back")
        ).scalar_one()
    days, trained = spent[spent["flow"] == DAY], spent[spent["flow"] == RETRAIN]
    ran = [line for line in ledger if line.state not in NOT_RUN]
    states = [state for _, state, _ in ledger]
    return Summary(
        policy=policy,
        days=len(days),
        crps=float(scored["crps_bp"].mean()),
        coverage=_coverage(scored, 0.8),
        coverage95=_coverage(scored, 0.95),
        retrains=len({line.flow_run_id for line in ran}),  # one that was cut off has two lines
        promotions=states.count("promoted"),
        refusals=states.count("refused"),
        skips=states.count("skipped"),
        rollbacks=int(undone),
        cpu_minutes=float(trained["cpu_seconds"].sum()) / 60,
        watch_cpu_minutes=float(days["cpu_seconds"].sum()) / 60,
        wall_minutes=float(days["wall_seconds"].sum() + trained["wall_seconds"].sum()) / 60,
        days_per_minute=60 / float(days["wall_seconds"].mean()) if len(days) else 0.0,
        losses=scored.groupby("origin")["crps_bp"].mean(),
        retrained=[(line.as_of, line.state) for line in ran],
    )


def _coverage(scored: pd.DataFrame, mass: float) -> float:
    prices = np.array(scored["quantiles"].tolist(), dtype=np.float64)
    levels = scored["levels"].iloc[0]
    return float(metrics.inside(scored["actual"].to_numpy(), prices, levels, mass).mean())


def against(summary: Summary, base: Summary) -> tuple[float, float, float]:
    """Relative CRPS difference to another policy on the days of both, with its 95 % interval.

    Returns:
        (difference, lower, upper); -0.01 is 1 % better than `base`.

    Raises:
        ValueError: too few days in common.
    """
    both: Array = (
        pd.concat([summary.losses, base.losses], axis=1, join="inner").to_numpy() / BASIS_POINTS
    )
    return metrics.relative_ci(both[:, 0], both[:, 1], LAG)
