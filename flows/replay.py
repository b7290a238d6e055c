"""Replay market history with one policy: the real flows, day after day, without Prefect's server.

Each market day is what the schedules and automations of a deployment would do of it: forecast with
the version in production, join late labels, look for drift, and retrain through ledger and gate
if the policy says so. Prices of the whole span are taken in at once, for each flow sees only what
was known on its day.

Settings are those of the environment, as in every flow; their home is the replay's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta

from sqlalchemy import Engine

from flows.forecast import forecast
from flows.ingest import ingest
from flows.monitor import monitor
from flows.retrain import retrain
from flows.train import train
from forecasting import events
from forecasting import replay as lines
from forecasting.datasets import remembering
from forecasting.errors import TrainingError
from forecasting.replay import DAY, RETRAIN, Policy, metered, run_id
from forecasting.sessions import sessions_between
from forecasting.settings import Settings, load_settings
from forecasting.store import engine_of
from tasks.steps import plain


@dataclass(frozen=True)
class Span:
    """What is replayed.

    Attributes:
        symbol: ticker of the source.
        first: first market day; the first version is trained as of the session before it.
        last: last market day.
    """

    symbol: str
    first: date
    last: date

    @property
    def days(self) -> list[date]:
        """Market days, in order."""
        return sessions_between(self.first, self.last)

    @property
    def eve(self) -> date:
        """The session before the first day."""
        return sessions_between(self.first - timedelta(days=14), self.first - timedelta(days=1))[-1]


OnDay = Callable[[int, int, date, str], object]
"""Called after each market day with its position, how many there are, the day, and what a retrain
came to (empty: there was none)."""


def begin(span: Span) -> None:
    """Take in the prices and train the first version, once; every policy starts from it.

    Raises:
        TrainingError: the gate refused it.
    """
    settings = load_settings()
    with plain(run_id("", "begin", span.eve), settings.home / "results"):
        ingest.fn([span.symbol], as_of=span.last)
        result = train.fn(span.symbol, as_of=span.eve)
    if result.outcome not in ("promoted", "unchanged"):
        raise TrainingError(
            f"The first version, as of {span.eve}, was refused: {' '.join(result.reasons)} "
            "A replay needs a version to start from: take a later first day."
        )


def replay(span: Span, policy: Policy, on_day: OnDay) -> None:
    """Play every market day that is not done yet, from where a process before this one ended."""
    settings, days = load_settings(), span.days
    with engine_of(settings.sql_url) as engine, remembering():
        done = lines.last_day(engine)
        for position, day in enumerate(days, start=1):
            if done is None or day > done:
                told = _play(settings, engine, span.symbol, policy, position, day)
                on_day(position, len(days), day, told)


def _play(
    settings: Settings, engine: Engine, symbol: str, policy: Policy, position: int, day: date
) -> str:
    """One market day. Each of its parts may be repeated after a crash and changes nothing then."""
    results = settings.home / "results"
    with metered() as meter, plain(run_id(policy.name, DAY, day), results, policy.name):
        # a retrain has begun in a process that was killed, and the day may have a new version
        if not lines.has_begun(engine, run_id(policy.name, RETRAIN, day)):
            forecast.fn([symbol], as_of=day, output=str(settings.home / "forecast.parquet"))
            monitor.fn(symbol, as_of=day)
    told = events.pending(engine)
    trigger = policy.trigger(position, day, told)
    outcome = _retrain(settings, engine, symbol, policy, day, trigger) if trigger else ""
    lines.end_day(engine, policy.name, symbol, day, told, meter)
    return outcome


def _retrain(
    settings: Settings, engine: Engine, symbol: str, policy: Policy, day: date, trigger: str
) -> str:
    identity = run_id(policy.name, RETRAIN, day)
    if lines.is_settled(engine, identity):
        return "settled before"
    with plain(identity, settings.home / "results", policy.name):
        result = retrain.fn(symbol, as_of=day, trigger=trigger)
    return f"{result.outcome}: {' '.join(result.reasons)}"
