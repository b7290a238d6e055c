"""Probation: a new version is watched beside the one whose place it took, and gives way if worse.

    watching ──▶ passed         the days went by
        ├──────▶ rolled-back    worse beyond doubt; the other one is in production again
        ├──────▶ kept           worse beyond doubt; a person had it stay
        └──────▶ superseded     another promotion came first

A probation belongs to one line of `promotions`. Each market day both versions forecast from the
same rows; what came true decides by an e-value that may be looked at every day (`sequential`): a
version that is no worse is rolled back with a probability of at most `alpha` for the whole watch.
A version that goes back to an earlier one is not watched: that was decided already.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sqlalchemy import Engine, Row, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from forecasting import audit, metrics
from forecasting.errors import RegistryError
from forecasting.sequential import wealth
from forecasting.sessions import sessions_after, sessions_between
from forecasting.store import exclude_writers, now, predictions, probations, promotions

State = Literal["watching", "passed", "rolled-back", "kept", "superseded"]
LEAST_SCALE = 0.5
"""Of the CRPS that the version before expects of itself: where two forecasts are nearly the same
nothing much is bet."""
STANDING = ("moved", "confirmed")
"""States of a promotion that holds."""


@dataclass(frozen=True)
class Probation:
    """One line of the table.

    Attributes:
        id: of the promotion that began it.
        previous: version that is scored beside `version`.
        started: first origin that counts.
        days: market days that it is watched for.
        evidence: of the last look, see `Finding.as_json`.
    """

    id: str
    forecaster: str
    version: int
    previous: int
    started: date
    days: int
    state: State
    evidence: dict[str, Any]

    @property
    def condemned(self) -> bool:
        """Whether a look found the version worse, be it rolled back by now or not."""
        return bool(self.evidence.get("worse"))

    @property
    def summary(self) -> str:
        """The last look in one line."""
        return str(self.evidence.get("summary", "Nobody looked yet."))


@dataclass(frozen=True)
class Replacement:
    """A promotion that holds; `previous` is what it replaced, None for the first one."""

    id: str
    forecaster: str
    version: int
    previous: int | None


@dataclass(frozen=True)
class Finding:
    """What the days so far say.

    Attributes:
        days: of which the next day's outcome is known.
        peak: largest e-value so far, mean of those of the nearest and the farthest horizon.
        worse: whether `peak` reached 1 / alpha.
        crps_bp, previous_crps_bp: mean over these days one day ahead; NaN without days.
        horizon: the farthest, days ahead.
        far_relative: mean CRPS at that horizon over the previous version's, less 1; NaN without.
    """

    days: int
    peak: float
    worse: bool
    crps_bp: float
    previous_crps_bp: float
    horizon: int
    far_relative: float

    @property
    def relative(self) -> float:
        """CRPS one day ahead over the previous version's, less 1; NaN where there is none."""
        if not self.previous_crps_bp > 0:
            return float("nan")
        return self.crps_bp / self.previous_crps_bp - 1

    def summary(self, previous: int) -> str:
        """One line for people."""
        if not self.days:
            return f"No day was scored beside version {previous} yet."
        far = ""
        if np.isfinite(self.far_relative):
            far = f", {self.far_relative:+.1%} at {self.horizon} days"
        word = "Worse than" if self.worse else "Not shown to be worse than"
        return (
            f"{word} version {previous} on {self.days} days: CRPS {self.crps_bp:.1f} bp against "
            f"{self.previous_crps_bp:.1f} bp ({self.relative:+.1%}{far}), e-value {self.peak:.3g}."
        )

    def as_json(self, previous: int, as_of: date, alpha: float) -> dict[str, Any]:
        """For the table; what is not a number is null."""
        figures = {
            "peak": self.peak,
            "crps_bp": self.crps_bp,
            "previous_crps_bp": self.previous_crps_bp,
            "relative": self.relative,
            "far_relative": self.far_relative,
        }
        return {
            "summary": self.summary(previous),
            "as_of": as_of.isoformat(),
            "days": self.days,
            "horizon": self.horizon,
            "alpha": alpha,
            "worse": self.worse,
            **{name: value if np.isfinite(value) else None for name, value in figures.items()},
        }


def weigh(pairs: pd.DataFrame, horizon: int, alpha: float) -> Finding:
    """Is the version worse than the one before it?

    The e-values one day ahead and at the farthest horizon are averaged day by day, which is an
    e-value again however they hang together.

    Args:
        pairs: one row a forecast that both versions made: `origin`, `target`, `horizon`, `crps`
            and `previous_crps` in bp of log return, and `scale`, the most by which the first can be
            the smaller, whatever comes; those of several symbols are averaged.
        horizon: the farthest, days ahead, whether or not any of it came true yet: a bet is on one
            horizon from its first day.
        alpha: probability of condemning a version that is no worse.

    Raises:
        ValueError: a CRPS is negative or no number.
    """
    if pairs.empty:
        return Finding(0, 1.0, False, float("nan"), float("nan"), horizon, float("nan"))
    columns = ["crps", "previous_crps", "scale"]
    daily = pairs.groupby(["horizon", "origin", "target"])[columns].mean().reset_index()
    daily = daily.sort_values("origin")
    near, far = daily[daily["horizon"] == 1], daily[daily["horizon"] == horizon]
    targets = np.unique(daily["target"].to_numpy())
    value = (_value_at(near, 1, targets) + _value_at(far, horizon, targets)) / 2
    peak = max(1.0, float(value.max()))
    return Finding(
        days=len(near),
        peak=peak,
        worse=peak >= 1 / alpha,
        crps_bp=float(near["crps"].mean()),
        previous_crps_bp=float(near["previous_crps"].mean()),
        horizon=horizon,
        far_relative=float(far["crps"].mean() / far["previous_crps"].mean() - 1),
    )


def _value_at(daily: pd.DataFrame, lag: int, days: NDArray[np.datetime64]) -> NDArray[np.float64]:
    """E-value as known on each of `days`, from what came true by then; 1 before the first."""
    losses, reference, scale = (
        daily[name].to_numpy() for name in ("crps", "previous_crps", "scale")
    )
    path = wealth(losses, reference, lag, scale)
    known = np.searchsorted(daily["target"].to_numpy(), days, side="right")
    return np.concatenate([[1.0], path])[known]


def pair(scored: pd.DataFrame, watched: Probation) -> pd.DataFrame:
    """Forecasts that both versions made from the same rows of ours.

    Args:
        scored: of one symbol, as `outcomes.scored` reads them.
        watched: its versions and first origin.

    Returns:
        Arguments of `weigh`.
    """
    first, last = watched.started, sessions_after(watched.started, watched.days)[-1]
    chosen = scored[
        (scored["forecaster"] == watched.forecaster)
        & (scored["origin"] >= pd.Timestamp(first))
        & (scored["origin"] < pd.Timestamp(last))
        & scored["prices_md5"].notna()  # rows that a client sent can be anything
    ]
    keys = ["symbol", "origin", "target", "horizon"]
    own, other = (
        chosen[chosen["model_version"] == version].drop_duplicates(keys)
        for version in (watched.version, watched.previous)
    )
    told = [*keys, "crps_bp", "origin_close", "levels", "quantiles"]
    both = own[told].merge(other[told], on=keys, suffixes=("", "_before"))
    return both[keys].assign(
        crps=both["crps_bp"],
        previous_crps=both["crps_bp_before"],
        scale=[_scale(row) for row in both.to_dict("records")],
    )


def farthest(engine: Engine, watched: Probation) -> int:
    """The farthest horizon that both versions forecast, days ahead; 1 where there is none yet."""
    query = (
        select(func.max(predictions.c.horizon))
        .where(
            predictions.c.forecaster == watched.forecaster,
            predictions.c.model_version.in_((watched.version, watched.previous)),
            predictions.c.origin >= watched.started,
        )
        .group_by(predictions.c.model_version)
    )
    with engine.connect() as connection:
        return min(connection.execute(query).scalars(), default=1)


def _scale(row: Mapping[Any, Any]) -> float:
    """The most by which the version's CRPS could have been the smaller, bp of log return.

    Known before the outcome, so that a bet on the difference favours neither wide forecasts nor
    narrow ones.
    """
    own, other = (
        metrics.BASIS_POINTS
        * np.log(np.asarray(row[f"quantiles{side}"]) / row[f"origin_close{side}"])
        for side in ("", "_before")
    )
    levels = row["levels"]
    if levels != row["levels_before"]:
        other = np.interp(levels, row["levels_before"], other)
    most = float(metrics.most_better(own, other, levels))
    return max(most, LEAST_SCALE * float(metrics.expected_crps(other, levels)))


# --- the table -------------------------------------------------------------------------------


def watching(engine: Engine, forecaster: str) -> list[Probation]:
    """Probations of a forecaster that have not ended, oldest first; one, but for a moment."""
    wanted = probations.c.forecaster == forecaster, probations.c.state == "watching"
    query = select(probations).where(*wanted).order_by(probations.c.created_at)
    with engine.connect() as connection:
        return [_as_probation(row) for row in connection.execute(query)]


def history(engine: Engine, forecaster: str) -> list[Probation]:
    """Every probation of a forecaster, newest first."""
    query = select(probations).where(probations.c.forecaster == forecaster)
    with engine.connect() as connection:
        rows = connection.execute(query.order_by(probations.c.created_at.desc()))
        return [_as_probation(row) for row in rows]


def find(engine: Engine, identity: str) -> Probation:
    """One probation.

    Raises:
        RegistryError: there is none of that id.
    """
    query = select(probations).where(probations.c.id == identity)
    with engine.connect() as connection:
        row = connection.execute(query).one_or_none()
    if row is None:
        raise RegistryError(
            f"There is no probation {identity}; ids are those of promotions, as the table "
            "`probations` holds them."
        )
    return _as_probation(row)


def standing(engine: Engine, forecaster: str) -> Replacement | None:
    """The newest promotion that holds."""
    names = tuple(Replacement.__dataclass_fields__)
    query = (
        select(*(promotions.c[name] for name in names))
        .where(promotions.c.forecaster == forecaster, promotions.c.state.in_(STANDING))
        .order_by(promotions.c.created_at.desc())
        .limit(1)
    )
    with engine.connect() as connection:
        row = connection.execute(query).mappings().one_or_none()
    return Replacement(**row) if row is not None else None


def asks_for_one(engine: Engine, newest: Replacement) -> bool:
    """Whether a promotion calls for a probation and has none: it replaced an earlier version."""
    if newest.previous is None or newest.version < newest.previous:
        return False
    return newest.id not in {each.id for each in history(engine, newest.forecaster)}


def begin(engine: Engine, newest: Replacement, trained: date, today: date, days: int) -> None:
    """Begin the probation of a promotion that replaced a version, unless it has begun.

    Its first origin is the session that the version was trained as of: neither version knows what
    came after. One that was watched before is watched from today.

    Args:
        trained: `as_of` of the version.
        today: newest session that is known.
        days: market days that it is to be watched for.
    """
    before = {each.version for each in history(engine, newest.forecaster)}
    dialect: ModuleType = postgresql if engine.dialect.name == "postgresql" else sqlite
    day = today if newest.version in before else trained
    line = asdict(newest) | {
        "started": sessions_between(day - timedelta(days=14), day)[-1],
        "days": days,
        "state": "watching",
        "evidence": {},
        "created_at": now(),
        "updated_at": now(),
    }
    with engine.begin() as connection:
        connection.execute(dialect.insert(probations).values(line).on_conflict_do_nothing())


def _is_overtaken(evidence: dict[str, Any], there: Probation) -> bool:
    """Whether what was written meanwhile counts for more: a condemnation, or a later day's look."""
    later = str(there.evidence.get("as_of", "")) > str(evidence.get("as_of", ""))
    return there.condemned or (later and not evidence.get("worse"))


def record(
    engine: Engine,
    watched: Probation,
    state: State,
    who: str,
    evidence: dict[str, Any] | None = None,
) -> Probation:
    """Write down a look, or an end; the line afterwards. One that has ended stays as it is, and so
    does what a look at a later day found, or that it condemned the version.

    An end is a line of the audit as well, by `who`.
    """
    own = probations.c.id == watched.id
    told = {} if evidence is None else {"evidence": evidence}
    with engine.begin() as connection:
        exclude_writers(connection, probations)
        there = _as_probation(connection.execute(select(probations).where(own)).one())
        if evidence is not None and _is_overtaken(evidence, there):
            return there
        changed = connection.execute(
            update(probations)
            .where(own, probations.c.state == "watching")
            .values(state=state, updated_at=now(), **told)
        ).rowcount
        after = _as_probation(connection.execute(select(probations).where(own)).one())
        if changed and state != "watching":
            audit.add(
                connection,
                "probation",
                after.forecaster,
                version=after.version,
                who=who,
                reason=after.summary,
                details={"id": after.id, "state": state, "previous": after.previous},
            )
    return after


def forecast_days(engine: Engine, watched: Probation) -> set[tuple[int, date, str]]:
    """Version, origin and symbol of each forecast that is in the prediction log already."""
    log = predictions.c
    query = select(log.model_version, log.origin, log.symbol).where(
        log.forecaster == watched.forecaster,
        log.source == "shadow",
        log.prices_md5.is_not(None),
        log.horizon == 1,
        log.origin >= watched.started,
    )
    with engine.connect() as connection:
        return {(version, origin, symbol) for version, origin, symbol in connection.execute(query)}


def _as_probation(row: Row[Any]) -> Probation:
    return Probation(**{name: getattr(row, name) for name in Probation.__dataclass_fields__})
