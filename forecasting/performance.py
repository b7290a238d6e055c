"""How good is a version in use, and is it worse than it should be? Read from the prediction log.

Scored are the forecasts of our own prices, one of each origin: the first that was made. A client's
own rows can be anything, so answers to them are not. Beside the version stands, on the same days,
a random walk that knew what was known then (the spread of the last 250 residuals): in a wild market
both are bad, and only a version that is worse than the walk has degraded.

Degradation is tested after every day without inflating false alarms (`forecasting.sequential`):
bets that the CRPS is worse than the walk's, and bets that the 80 % interval holds too little or too
much and the walk's does not, each one day ahead and at the longest horizon. They are averaged, and
the mean counts once it reaches 1 / alpha. Intervals that are too narrow cost little CRPS: the
second bet finds them first.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sqlalchemy import Engine, select

from forecasting import metrics, sequential
from forecasting.baselines import random_walk_quantiles
from forecasting.events import PerformanceDegraded
from forecasting.metrics import Array
from forecasting.store import predictions

WALK = "random walk, last 250 residuals"
WALK_RESIDUALS = 250
ROLLING = 60
"""Newest known days that the rolling scores are means of."""
MISSED, SLACK = 0.2, 0.05
"""Share of outcomes outside the 80 % interval, and how far off it may be in the long run. The best
forecasters of GOOG, AAPL, IBM and MSFT from 2008 to 2013 are up to 0.046 off."""
FRESH = 63
"""Sessions, a quarter, after which somebody bets anew: a good version may turn bad."""
LEAST_ROWS = 60
"""Sessions before an origin without which the walk's spread is too rough to be measured by."""
LEAST_SCALE = 0.5
"""Of the walk's expected CRPS: where two forecasts are nearly the same nothing much is bet."""

Claim = Literal["crps", "coverage"]


@dataclass(frozen=True, eq=False)
class Logged:
    """Forecasts of a version with what came true; n origins, h horizons, k levels.

    Attributes:
        origins: sessions from which they start, ascending [n].
        targets: sessions that are forecast [n, h].
        levels: probabilities of the quantiles [k].
        quantiles: of the log return since the origin [n, h, k].
        walk: the random walk's, of the same [n, h, k].
        returns: log returns that came true [n, h]; NaN where not known yet.
    """

    origins: NDArray[np.datetime64]
    targets: NDArray[np.datetime64]
    levels: tuple[float, ...]
    quantiles: Array
    walk: Array
    returns: Array

    def __len__(self) -> int:
        return len(self.origins)

    @classmethod
    def nothing(cls) -> "Logged":
        """No forecasts, of no horizon."""
        days, quantiles = np.empty((0, 0), dtype="datetime64[D]"), np.empty((0, 0, 0))
        return cls(days.ravel(), days, (), quantiles, quantiles, np.empty((0, 0)))


@dataclass(frozen=True)
class Scores:
    """Means over the newest days known of one horizon; NaN where there are none.

    Attributes:
        horizon: trading days ahead.
        days: how many.
        since: first origin of them.
        crps_bp: of the log return, basis points.
        walk_crps_bp: the random walk's on the same days.
        expected_crps_bp: what the forecasts themselves expected, told before any label.
        cover80: share of outcomes in the 80 % interval.
        cover95: share in the 95 % interval.
        mae_over_walk: mean absolute error of the median over that of the last price.
        coming_crps_bp: what the forecasts that have no label yet expect.
    """

    horizon: int
    days: int
    since: date | None
    crps_bp: float
    walk_crps_bp: float
    expected_crps_bp: float
    cover80: float
    cover95: float
    mae_over_walk: float
    coming_crps_bp: float

    @property
    def expected_error(self) -> float:
        """What came over what was expected, less 1."""
        return _relative(self.crps_bp, self.expected_crps_bp)

    @property
    def over_walk(self) -> float:
        """CRPS over the random walk's, less 1."""
        return _relative(self.crps_bp, self.walk_crps_bp)


@dataclass(frozen=True)
class Bet:
    """One of the bets that the version has degraded.

    Attributes:
        claim: `crps`: worse than the walk's; `coverage`: the 80 % interval is wrong.
        horizon: trading days ahead.
        days: how many were bet on.
        value: wealth after the last day, an e-value.
        own: mean CRPS in bp, or share of outcomes in the interval.
        against: the walk's mean CRPS in bp, or 0.8.
    """

    claim: Claim
    horizon: int
    days: int
    value: float
    own: float
    against: float


@dataclass(frozen=True)
class Performance:
    """What the days up to `as_of` say of one version for one symbol.

    Attributes:
        symbol: whose forecasts.
        forecaster: who made them.
        version: of the forecaster.
        as_of: last day whose prices are known.
        since: first origin that is scored; None without any.
        days: on which any label became known.
        evidence: largest e-value so far of the mean of all bets; 1 says nothing.
        alpha: probability of a false alarm in the whole watch.
        found_on: day on which the evidence reached 1 / alpha, if it did.
        rolling: scores of the newest `ROLLING` days, one a horizon.
        bets: as they stand.
    """

    symbol: str
    forecaster: str
    version: int
    as_of: date
    since: date | None
    days: int
    evidence: float
    alpha: float
    found_on: date | None
    rolling: tuple[Scores, ...]
    bets: tuple[Bet, ...]

    @property
    def degraded(self) -> bool:
        """Whether the version is worse than it should be, beyond the odds of chance."""
        return self.found_on is not None

    @property
    def as_good_as_walk(self) -> bool:
        """Whether the means of the newest `ROLLING` days are, one day ahead and at the longest
        horizon; it says so of an equal one on every other day. False on fewer days."""
        told = [*self.rolling[:1], *self.rolling[-1:]]
        return bool(told) and all(each.days >= ROLLING and each.over_walk <= 0.0 for each in told)

    @property
    def strongest(self) -> Bet | None:
        """The bet that won most; None where none is settled yet."""
        settled = (bet for bet in self.bets if bet.days)
        return max(settled, key=lambda bet: bet.value, default=None)

    def table(self) -> list[dict[str, Any]]:
        """One row a horizon, for reports."""
        return [_row(asdict(each) | _derived(each)) for each in self.rolling]

    def bet_table(self) -> list[dict[str, Any]]:
        """One row a bet, for reports."""
        return [_row(asdict(each)) for each in self.bets]

    def scores(self) -> dict[tuple[str, int], float]:
        """Every finite score by name and horizon; 0 is of no one horizon."""
        found = {("evidence", 0): self.evidence, ("scored_days", 0): float(self.days)}
        for each in self.rolling:
            values = asdict(each) | _derived(each)
            for name in values.keys() - {"horizon", "since", "days"}:
                found[name, each.horizon] = values[name]
        for bet in self.bets:
            found[f"evidence_{bet.claim}", bet.horizon] = bet.value
        return {key: value for key, value in found.items() if np.isfinite(value)}

    def event(self) -> PerformanceDegraded:
        """What is told, of the bet that won most.

        Raises:
            ValueError: no forecast has its label yet.
        """
        strongest = self.strongest
        if strongest is None or self.since is None:
            raise ValueError(f"Nothing can be told of {self}: no forecast has its label yet.")
        same = {bet.claim: bet for bet in self.bets if bet.horizon == strongest.horizon}
        return PerformanceDegraded(
            symbol=self.symbol,
            as_of=self.as_of,
            forecaster=self.forecaster,
            version=self.version,
            against=WALK,
            since=self.since,
            days=strongest.days,
            horizon=strongest.horizon,
            crps_bp=same["crps"].own,
            against_crps_bp=same["crps"].against,
            coverage=same["coverage"].own,
            evidence=self.evidence,
        )

    def summary(self) -> str:
        """One sentence for logs and reports."""
        strongest = self.strongest
        if strongest is None:
            return f"Performance of version {self.version}: no forecast has its label yet."
        told = (
            f"{'Degraded' if self.degraded else 'Not degraded'}: evidence {self.evidence:.3g} of "
            f"{1 / self.alpha:.3g} after {self.days} days of version {self.version}"
        )
        if strongest.claim == "crps":
            what = f"CRPS {strongest.own:.1f} bp, the random walk's {strongest.against:.1f}"
        else:
            what = f"the 80 % interval holds {strongest.own:.1%}"
        return f"{told}; most of all at horizon {strongest.horizon}: {what}."


def look(
    engine: Engine,
    symbol: str,
    forecaster: str,
    version: int,
    frame: pd.DataFrame,
    as_of: date,
    alpha: float,
    *,
    since: date | None = None,
) -> Performance:
    """Score a version by the prediction log, and test whether it has degraded.

    Args:
        engine: of the prediction log.
        symbol: whose forecasts.
        forecaster: who made them.
        version: of the forecaster.
        frame: adjusted prices as known on `as_of`, indexed by session.
        as_of: labels after this day are not looked at, whatever the frame holds.
        alpha: probability of a false alarm in the whole watch, in (0, 1).
        since: only forecasts from this origin on, such as the day the version was trained on.

    Returns:
        What the days say; without any forecast that can be scored nothing is degraded.
    """
    logged = read_log(engine, symbol, forecaster, version, frame, as_of, since=since)
    return judge(logged, symbol, forecaster, version, as_of, alpha)


def judge(
    logged: Logged, symbol: str, forecaster: str, version: int, as_of: date, alpha: float
) -> Performance:
    """What `look` says of forecasts that were read before; arguments as there."""
    bets, days, wealth = place_bets(logged)
    reached = days[wealth >= 1 / alpha]
    return Performance(
        symbol=symbol,
        forecaster=forecaster,
        version=version,
        as_of=as_of,
        since=_day(logged.origins[0]) if len(logged) else None,
        days=len(days),
        evidence=float(wealth.max(initial=1.0)),
        alpha=alpha,
        found_on=_day(reached[0]) if len(reached) else None,
        rolling=tuple(_scores(logged, step, as_of) for step in range(logged.returns.shape[1])),
        bets=bets,
    )


def read_log(
    engine: Engine,
    symbol: str,
    forecaster: str,
    version: int,
    frame: pd.DataFrame,
    as_of: date,
    *,
    since: date | None = None,
) -> Logged:
    """Forecasts of our own prices, the first of each origin, with what came by `as_of`.

    Arguments as of `look`. Left out are origins that are no session of the frame or have too few
    before them for the random walk, and forecasts of other quantile levels than the newest's.
    """
    known = frame.loc[: pd.Timestamp(as_of)]
    first = _first_of_each_origin(engine, symbol, forecaster, version, since, as_of)
    enough = set(pd.DatetimeIndex(known.index[LEAST_ROWS:]).date)
    usable = [
        rows
        for rows in first
        if rows[0].origin in enough
        and len(rows) == len(first[-1])
        and rows[0].levels == first[-1][0].levels
    ]
    if not usable:
        return Logged.nothing()
    origins = np.array([rows[0].origin for rows in usable], dtype="datetime64[D]")
    targets = np.array([[row.target for row in rows] for rows in usable], dtype="datetime64[D]")
    prices = np.array([[row.quantiles for row in rows] for rows in usable])
    closes = np.array([rows[0].origin_close for rows in usable])
    log_close = np.log(known["close"])
    after = log_close.reindex(targets.ravel()).to_numpy().reshape(targets.shape)
    horizon, levels = targets.shape[1], tuple(usable[0][0].levels)
    return Logged(
        origins=origins,
        targets=targets,
        levels=levels,
        quantiles=np.log(prices / closes[:, None, None]),
        walk=random_walk_quantiles(known, origins, horizon, levels, WALK_RESIDUALS),
        returns=after - log_close.reindex(origins).to_numpy()[:, None],
    )


def _first_of_each_origin(
    engine: Engine,
    symbol: str,
    forecaster: str,
    version: int,
    since: date | None,
    as_of: date,
) -> list[list[Any]]:
    """Rows of one forecast an origin, by horizon; origins ascend."""
    of = predictions.c
    query = select(of.id, of.origin, of.origin_close, of.target, of.levels, of.quantiles).where(
        of.symbol == symbol,
        of.forecaster == forecaster,
        of.model_version == version,
        of.prices_md5.is_not(None),
        of.origin <= as_of,
    )
    if since is not None:
        query = query.where(of.origin >= since)
    query = query.order_by(of.origin, of.made_at, of.id, of.horizon)
    found: dict[date, list[Any]] = {}
    with engine.connect() as connection:
        for row in connection.execute(query):
            rows = found.setdefault(row.origin, [])
            if not rows or rows[0].id == row.id:
                rows.append(row)
    return list(found.values())


def _scores(logged: Logged, step: int, as_of: date) -> Scores:
    """Of the newest days known, `step` + 1 days ahead."""
    known = np.flatnonzero(np.isfinite(logged.returns[:, step]))[-ROLLING:]
    coming = logged.quantiles[logged.targets[:, step] > np.datetime64(as_of), step]
    own, walk = logged.quantiles[known, step], logged.walk[known, step]
    returns, levels = logged.returns[known, step], logged.levels
    middle = np.array([np.interp(0.5, levels, each) for each in own])
    still = _mean(np.abs(returns))
    return Scores(
        horizon=step + 1,
        days=len(known),
        since=_day(logged.origins[known[0]]) if len(known) else None,
        crps_bp=_mean(metrics.crps(returns, own, levels)) * metrics.BASIS_POINTS,
        walk_crps_bp=_mean(metrics.crps(returns, walk, levels)) * metrics.BASIS_POINTS,
        expected_crps_bp=_mean(metrics.expected_crps(own, levels)) * metrics.BASIS_POINTS,
        cover80=_mean(metrics.inside(returns, own, levels, 0.8)),
        cover95=_mean(metrics.inside(returns, own, levels, 0.95)),
        mae_over_walk=_mean(np.abs(returns - middle)) / still if still > 0 else float("nan"),
        coming_crps_bp=_mean(metrics.expected_crps(coming, levels)) * metrics.BASIS_POINTS,
    )


def place_bets(logged: Logged) -> tuple[tuple[Bet, ...], NDArray[np.datetime64], Array]:
    """Bet on every day that the version has degraded.

    Returns:
        (bets as they stand, days on which any was settled [d], mean wealth after each [d]).
    """
    if not len(logged):
        return (), logged.origins, np.empty(0)
    settled = [
        (bet, days, path)
        for step in sorted({0, logged.returns.shape[1] - 1})
        for bet, days, path in _bets_on(logged, step)
    ]
    every = np.unique(np.concatenate([days for _, days, _ in settled]))
    total = np.zeros(len(every))
    for _, days, path in settled:
        total += np.concatenate([[1.0], path])[np.searchsorted(days, every, side="right")]
    return tuple(bet for bet, _, _ in settled), every, total / len(settled)


def _bets_on(logged: Logged, step: int) -> Iterator[tuple[Bet, NDArray[np.datetime64], Array]]:
    """CRPS and coverage `step` + 1 days ahead: the bet, its days, its wealth after each."""
    known = np.isfinite(logged.returns[:, step])
    days, returns = logged.targets[known, step], logged.returns[known, step]
    own, walk, levels = logged.quantiles[known, step], logged.walk[known, step], logged.levels
    lag = step + 1
    losses, reference = (metrics.crps(returns, each, levels) for each in (own, walk))
    scale = np.maximum(
        metrics.most_better(own, walk, levels), LEAST_SCALE * metrics.expected_crps(walk, levels)
    )
    path = sequential.wealth(losses, reference, lag, scale, FRESH)
    means = (_mean(each) * metrics.BASIS_POINTS for each in (losses, reference))
    yield Bet("crps", lag, len(days), _last(path), *means), days, path
    held, walk_held = (metrics.inside(returns, each, levels, 1 - MISSED) for each in (own, walk))
    path = sequential.coverage_wealth(~held, ~walk_held, MISSED - SLACK, MISSED + SLACK, lag, FRESH)
    yield Bet("coverage", lag, len(days), _last(path), _mean(held), 1 - MISSED), days, path


def _derived(scores: Scores) -> dict[str, float]:
    return {"over_walk": scores.over_walk, "expected_error": scores.expected_error}


def _row(values: dict[str, Any]) -> dict[str, Any]:
    """Values as JSON has them: NaN is None, a date its text."""
    plain: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, date):
            plain[name] = value.isoformat()
        else:
            missing = isinstance(value, float) and not np.isfinite(value)
            plain[name] = None if missing else value
    return plain


def _relative(value: float, base: float) -> float:
    return value / base - 1 if base > 0 else float("nan")


def _last(path: Array) -> float:
    return float(path[-1]) if len(path) else 1.0


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _day(value: np.datetime64) -> date:
    day: date = value.astype("datetime64[D]").astype(object)
    return day
