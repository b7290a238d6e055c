"""What the loop costs: wall time, CPU time and disk of every run of a flow, in SQL.

CPU time is that of the process and of all that it started, Ray's workers and killed ones included
as far as the operating system still tells: `usage` adds up what the process and its ended children
used and what its living descendants have used so far. A flow that runs inside another has a line of
its own, and the outer one's has what is left: lines add up.
"""

import logging
import os
import resource
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

import pandas as pd
import psutil
from sqlalchemy import Engine, insert, select
from sqlalchemy.exc import SQLAlchemyError

from forecasting.store import costs, now

_log = logging.getLogger(__name__)


WHOLE = "day"
"""Line of a replay for a market day: it holds what the lines of the flows in it hold."""


@dataclass
class Spent:
    """What a run has cost when it is over; whoever runs it says what it came to.

    Attributes:
        outcome: such as `promoted`; `failed` where the run raised.
        wall_seconds: from its start to its end, less what ran inside it.
        cpu_seconds: of the process and its children, less the same.
        bytes: that the home grew by, negative if it shrank; of the outermost run alone.
    """

    outcome: str = "done"
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    bytes: int = 0


def usage() -> float:
    """CPU seconds used so far by this process, its ended children and its living descendants."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # gone in the meantime
            times = child.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def size(folder: Path) -> int:
    """Bytes of the files below a folder; 0 where there is none."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # gone in the meantime
                total += (Path(where) / name).lstat().st_size
    return total


@dataclass
class _Inside:
    """What measured runs inside of this one took."""

    wall: float = 0.0
    cpu: float = 0.0


_inside: ContextVar[_Inside | None] = ContextVar("inside", default=None)


@contextmanager
def measured(
    engine: Engine,
    home: Path,
    flow: str,
    symbol: str,
    as_of: date,
    *,
    flow_run_id: str = "local",
    policy: str = "",
) -> Iterator[Spent]:
    """Measure what runs inside, and write it down whether it ends well or not.

    What cannot be written is a line of the log: what was done stands.

    Args:
        engine: from `store.open_engine`.
        home: whose growth is measured.
        flow: name of the flow.
        symbol: symbol, or forecaster of several.
        as_of: the day it pretends to be.
        flow_run_id: of Prefect.
        policy: of a replay; empty otherwise.
    """
    spent, started_at, outer, inner = Spent(), now(), _inside.get(), _Inside()
    token = _inside.set(inner)
    began, cpu, before = time.monotonic(), usage(), 0 if outer else size(home)
    try:
        yield spent
    except BaseException:
        spent.outcome = "failed"
        raise
    finally:
        _inside.reset(token)
        wall, used = time.monotonic() - began, max(0.0, usage() - cpu)
        if outer:
            outer.wall, outer.cpu = outer.wall + wall, outer.cpu + used
        spent.wall_seconds = max(0.0, wall - inner.wall)
        spent.cpu_seconds = max(0.0, used - inner.cpu)
        spent.bytes = 0 if outer else size(home) - before
        line = {
            "id": str(uuid.uuid4()),
            "flow": flow,
            "flow_run_id": flow_run_id,
            "symbol": symbol,
            "as_of": as_of,
            "policy": policy,
            "outcome": spent.outcome,
            "wall_seconds": spent.wall_seconds,
            "cpu_seconds": spent.cpu_seconds,
            "bytes": spent.bytes,
            "started_at": started_at,
        }
        try:
            with engine.begin() as connection:
                connection.execute(insert(costs).values(line))
        except SQLAlchemyError as error:
            _log.warning("What %s cost is not written down: %s", flow, error)


def read(engine: Engine, since: datetime | None = None) -> pd.DataFrame:
    """One row a run, in the order of their starts; columns as of the table `costs`."""
    query = select(costs).order_by(costs.c.started_at)
    if since is not None:
        query = query.where(costs.c.started_at >= since.astimezone(UTC))
    with engine.connect() as connection:
        rows = connection.execute(query).mappings().all()
    table = pd.DataFrame(rows, columns=list(costs.columns.keys()))
    table["started_at"] = [_aware(each) for each in table["started_at"]]
    return table


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Runs, failures, wall and CPU minutes and megabytes of each flow, and their sum.

    Args:
        table: as `read` returns.

    Returns:
        Index: flow, with `all` at the end, in which nothing counts twice. Columns: `runs`,
        `failed`, `wall_minutes`, `cpu_minutes`, `megabytes`.
    """
    shown = pd.DataFrame(
        {
            "flow": table["flow"],
            "runs": 1,
            "failed": (table["outcome"] == "failed").astype(int),
            "wall_minutes": table["wall_seconds"] / 60,
            "cpu_minutes": table["cpu_seconds"] / 60,
            "megabytes": table["bytes"] / 1e6,
        }
    )
    by_flow = shown.groupby("flow").sum()
    total = shown[shown["flow"] != WHOLE].drop(columns="flow").sum().to_frame("all").T
    joined = pd.concat([by_flow, total])
    return joined.astype({"runs": int, "failed": int})


def _aware(value: datetime) -> datetime:
    return value if value.tzinfo else value.replace(tzinfo=UTC)
