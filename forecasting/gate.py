"""Whether a candidate may go to production: a pure function of evidence, which fails closed.

All contestants are scored on the same most recent days by CRPS (basis points, lower is better),
averaged over horizons and, where a forecaster has several symbols, over the symbols of a day. A
bound is the one-sided upper bound of the candidate's relative difference of mean CRPS, with HAC
variance, since forecasts overlap. A candidate has to hold all of this:

- **Random walk**: the bound is at most `tolerance`. Where evidence is too thin for that (the mean
  is no higher, the bound is), a candidate that passes against production passes: what a refusal
  would serve is production, not the random walk. A first model has no such way.
- **Best classical baseline** (GARCH or HAR, whichever did better on the validation days, so that
  the gate's days do not choose): the bound is at most `classical_tolerance`. It is wider, since on
  120 overlapping days the bound lies about a percent above the mean: an equal candidate should
  pass, one that gives away what the baseline gains over the random walk should not.
- **Production**: better beyond doubt, which is a bound below zero. Where evidence is too thin for
  that, a candidate that has learned from later days passes if it is not inferior, which is a bound
  of at most `tolerance`: of two equal models the fresher one has seen more of today's market. One
  that has learned from the same days only would be chosen by chance, and is refused.
  Where it is better beyond doubt, what walk and baseline object, in a slice too, is taken back, and
  that its intervals hold too much, or too little where production's hold no more: a refusal would
  serve what is worse still. After a market has changed it may take a year until a candidate has
  learned enough of it to pass their bounds. Such a promotion is provisional: the monitor goes on
  asking for a better version.
- **Slices**: in no slice of at least `SLICE_DAYS` days (calm, volatile, after earnings) is it shown
  to be worse than random walk or production by more than `SLICE_MARGIN` (lower bound).
- **Intervals**: neither central interval is shown to hold a share outside `INTERVALS`. The margin
  of error is the wider of HAC and binomial.
- **Leaks**: nothing it has learned from reaches into the gate's days, and its score is at most
  `IMPLAUSIBLE` below the best of all baselines: nobody is that good who has not seen the answer.
- **Reserved days**: the first three bounds are one-sided 95 % bounds on days that judged nobody
  yet. Where the days have judged other candidates, `uses` times on average, what may go wrong by
  chance is shared out: the confidence is 1 - 0.05 / (1 + uses), as Bonferroni would have it.

Whatever cannot be judged is refused, with a reason that a person can read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from forecasting.metrics import (
    Array,
    diebold_mariano,
    hac_variance,
    inside,
    mean_ci,
    relative_ci,
)

BOUND = 0.95
"""Confidence of a one-sided bound on days that have judged nobody yet."""
SLICE_DAYS = 30
"""Fewest days on which a slice is judged."""
SLICE_MARGIN = 0.02
"""How much worse a slice has to be shown to be before it refuses."""
INTERVALS = {0.8: (0.76, 0.90), 0.95: (0.92, 0.99)}
"""Share that each central interval may hold. Too narrow is a promise that is not kept; too wide is
mostly paid for in CRPS, so there is more room above."""
IMPLAUSIBLE = 0.2
"""No honest forecaster of daily returns is known to beat GARCH by more than a few percent."""
BETTER = "Better beyond doubt than production, which a refusal would serve; but:"
"""Of a provisional promotion, before what would refuse another candidate."""
CANDIDATE, WALK, PRODUCTION = "candidate", "random walk", "production"

Row = dict[str, str | float]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What everybody forecast on the gate's days: n windows of any symbols, h horizons, k levels.

    Attributes:
        origins: datetime64[D] [n], day of the last row seen.
        symbols: [n], whose window it is.
        last_close: [n], close at the origin.
        returns: [n, h], cumulative log returns that came true.
        levels: [k].
        quantiles: [n, h, k], the candidate's, of log returns; NaN where it does not answer.
        crps: [n, h] in basis points, by contestant: `CANDIDATE`, `WALK`, every classical baseline
            that could be computed, and `PRODUCTION` if there is one.
        classical: the classical baseline that did best on the validation days; empty: none.
        volatility: [n], rank (0 to 1) of the volatility known at the origin among the symbol's.
        slices: [n] each, the windows of a slice by its name.
        served: [n], windows of symbols that production knows.
        fresher: whether the candidate has learned from later days than production.
        held: [n, h] each, whether production's central interval of a probability held the outcome,
            False where it does not answer; no entry where it gives no such interval.
        problems: what was found wrong before any score, such as a leak.
    """

    origins: NDArray[np.datetime64]
    symbols: NDArray[np.str_]
    last_close: Array
    returns: Array
    levels: tuple[float, ...]
    quantiles: Array
    crps: Mapping[str, ArrayLike]
    classical: str
    volatility: Array
    slices: Mapping[str, NDArray[np.bool_]]
    served: NDArray[np.bool_]
    fresher: bool
    held: Mapping[float, NDArray[np.bool_]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @classmethod
    def nothing(cls, problem: str) -> "Evidence":
        """Of a candidate that cannot even be loaded."""
        none = np.empty(0)
        return cls(
            origins=np.empty(0, dtype="datetime64[D]"),
            symbols=np.empty(0, dtype=np.str_),
            last_close=none,
            returns=np.empty((0, 0)),
            levels=(),
            quantiles=np.empty((0, 0, 0)),
            crps={},
            classical="",
            volatility=none,
            slices={},
            served=np.empty(0, dtype=np.bool_),
            fresher=False,
            problems=(problem,),
        )

    @property
    def days(self) -> NDArray[np.datetime64]:
        """The days that the windows begin on, ascending."""
        return np.unique(self.origins)

    @property
    def answered(self) -> bool:
        """Whether the candidate answered everything: else the days have told nothing of it."""
        return len(self.origins) > 0 and bool(np.isfinite(self.quantiles).all())


@dataclass(frozen=True)
class Rule:
    """What is asked of a candidate; see the module's docstring.

    Attributes:
        tolerance: largest bound against random walk and, if fresher, production; 0.01 for 1 %.
        classical_tolerance: largest bound against the best classical baseline.
        min_days: fewest days on which a verdict is given.
        uses: how often, on average, the days have judged another candidate.
    """

    tolerance: float
    classical_tolerance: float
    min_days: int
    uses: float = 0.0

    @property
    def confidence(self) -> float:
        """Of the bounds against others."""
        return 1.0 - (1.0 - BOUND) / (1.0 + self.uses)


@dataclass(frozen=True)
class Pairing:
    """The candidate against one opponent on the same days.

    Attributes:
        opponent: name.
        crps: mean CRPS of the opponent.
        difference: mean of candidate minus opponent in basis points, with its two-sided 95 %
            interval `low` to `high`.
        relative: candidate over opponent minus 1; -0.02 is 2 % better.
        upper: its one-sided upper bound at the verdict's confidence.
        dm_t, dm_p: Diebold-Mariano test of equal scores, two-sided; negative favours the candidate.
            None where the differences never vary.
        limit: largest `upper` that passes; None where the opponent is shown only.
    """

    opponent: str
    crps: float
    difference: float
    low: float
    high: float
    relative: float
    upper: float
    dm_t: float | None
    dm_p: float
    limit: float | None


@dataclass(frozen=True)
class Slice:
    """The candidate against one opponent in one slice; `lower` is a one-sided 95 % bound.

    Attributes:
        relative, lower: None on fewer days than `SLICE_DAYS`.
    """

    name: str
    opponent: str
    days: int
    relative: float | None
    lower: float | None


@dataclass(frozen=True)
class Interval:
    """What share of outcomes the central interval of probability `mass` held, all horizons.

    `low` to `high` is where the true share lies: one-sided 95 % bounds on either side. Production's
    own held `production` of the same outcomes; None where it does not answer all.
    """

    mass: float
    share: float
    low: float
    high: float
    production: float | None


@dataclass(frozen=True)
class GateVerdict:
    """What the gate decided and on what evidence. Scores are mean CRPS in basis points.

    Attributes:
        promote: whether the candidate may go to production.
        provisional: whether it may only as better than what is there, not as good as it should be.
        reasons: why not; empty exactly if `promote`.
        notes: what a reader of the figures should know besides.
        candidate_crps: None where it could not be computed, as with the figures below.
        production_crps: None also if nothing is in production.
        random_walk_crps: of the random walk on the same windows.
        classical: name of the best classical baseline on the validation days; empty: none.
        classical_crps: of that baseline on the same windows.
        relative_to_random_walk: candidate over random walk minus 1; -0.02 is 2 % better.
        upper: upper bound (one-sided, HAC) of that relative difference, at `confidence`.
        windows: windows on which all were scored.
        days: days on which these windows begin.
        first_day, last_day: of these, ISO; empty where there are none.
        tolerance: largest `upper` that passes.
        uses: how often, on average, the days had judged another candidate.
        confidence: of the bounds against others, which is higher on days used before.
        pairings: one an opponent.
        slices: one a slice and opponent.
        intervals: one a central interval.
        table: one row a contestant, for reports.
    """

    promote: bool
    provisional: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    candidate_crps: float | None
    production_crps: float | None
    random_walk_crps: float | None
    classical: str
    classical_crps: float | None
    relative_to_random_walk: float | None
    upper: float | None
    windows: int
    days: int
    first_day: str
    last_day: str
    tolerance: float
    uses: float
    confidence: float
    pairings: tuple[Pairing, ...]
    slices: tuple[Slice, ...]
    intervals: tuple[Interval, ...]
    table: tuple[Row, ...]

    def summary(self) -> str:
        """One paragraph for logs and reports."""
        if not self.promote:
            return "Refused: " + " ".join(self.reasons)
        word = "Promoted provisionally" if self.provisional else "Promoted"
        text = (
            f"{word}: CRPS {self.candidate_crps:.1f} bp over {self.windows} windows, "
            f"{self.relative_to_random_walk:+.1%} against the random walk's "
            f"{self.random_walk_crps:.1f} (upper {percent(self.confidence)} bound "
            f"{self.upper:+.1%}), {self.classical} {self.classical_crps:.1f}"
        )
        if self.production_crps is not None:
            text += f", production {self.production_crps:.1f}"
        return " ".join([f"{text}.", *self.notes])


def percent(share: float) -> str:
    """0.95 as `95 %`, 0.975 as `97.5 %`."""
    return f"{100 * share:.3g} %"


def judge(evidence: Evidence, rule: Rule) -> GateVerdict:
    """Decide on a candidate; the rule is that of the module's docstring.

    Returns:
        The verdict; bad evidence is a refusal, not an error.
    """
    found = _Findings(list(evidence.problems))
    scores: dict[str, Array] = {}
    if len(evidence.origins) or not found.problems:
        faults, scores = _admissible(evidence, rule.min_days)
        found.problems += faults
        if not faults:
            _compare(evidence, scores, rule, found)
    means = {name: _mean(evidence, name, values) for name, values in scores.items()}
    walk = next((each for each in found.pairings if each.opponent == WALK), None)
    days = evidence.days
    return GateVerdict(
        promote=not found.problems,
        provisional=found.provisional and not found.problems,
        reasons=tuple(found.problems),
        notes=tuple(found.notes),
        candidate_crps=_finite(means.get(CANDIDATE)),
        production_crps=_finite(means.get(PRODUCTION)),
        random_walk_crps=_finite(means.get(WALK)),
        classical=evidence.classical,
        classical_crps=_finite(means.get(evidence.classical)),
        relative_to_random_walk=walk.relative if walk else None,
        upper=walk.upper if walk else None,
        windows=len(evidence.origins),
        days=len(days),
        first_day=str(days[0]) if len(days) else "",
        last_day=str(days[-1]) if len(days) else "",
        tolerance=rule.tolerance,
        uses=rule.uses,
        confidence=rule.confidence,
        pairings=tuple(found.pairings),
        slices=tuple(found.slices),
        intervals=tuple(found.intervals),
        table=tuple(found.table),
    )


@dataclass
class _Findings:
    """What speaks against the candidate, and the figures behind it, as they are found."""

    problems: list[str]
    provisional: bool = False
    notes: list[str] = field(default_factory=list)
    pairings: list[Pairing] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)
    intervals: list[Interval] = field(default_factory=list)
    table: list[Row] = field(default_factory=list)


# --- can it be judged at all -------------------------------------------------------------------


def _admissible(evidence: Evidence, min_days: int) -> tuple[list[str], dict[str, Array]]:
    """What is wrong with the scores, and those that are arrays [n, h]."""
    problems: list[str] = []
    scores: dict[str, Array] = {}
    for name, values in evidence.crps.items():
        try:
            array = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            problems.append(f"The scores of the {name} are not numbers ({error}).")
            continue
        if array.ndim != 2 or 0 in array.shape:
            problems.append(
                f"The scores of the {name} have shape {array.shape}; [windows, horizons] expected."
            )
            continue
        scores[name] = array
        if array.shape != evidence.returns.shape:
            continue  # told below
        counted = array[evidence.served] if name == PRODUCTION else array
        bad = int((~np.isfinite(counted)).sum())
        if bad:
            problems.append(
                f"{bad} of {counted.size} scores of the {name} are not finite numbers; "
                "no comparison can be trusted."
            )
    missing = [name for name in (CANDIDATE, WALK) if name not in evidence.crps]
    problems += [f"There are no scores of the {name}." for name in missing]
    if evidence.classical not in evidence.crps:
        problems.append("No classical baseline could be computed to compare with.")
    return problems + _mismatch(evidence, scores, min_days), scores


def _mismatch(evidence: Evidence, scores: dict[str, Array], min_days: int) -> list[str]:
    problems = []
    shapes = {name: array.shape for name, array in scores.items()}
    wanted = evidence.returns.shape
    if any(shape != wanted for shape in shapes.values()):
        seen = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        problems.append(
            f"Scores do not cover the same windows and horizons, which are {wanted}: {seen}."
        )
    if PRODUCTION in scores and not evidence.served.any():
        problems.append("The model in production serves none of the candidate's symbols.")
    days = len(evidence.days)
    if days < min_days:
        problems.append(f"Only {days} windows to judge on; at least {min_days} are required.")
    crossed = int((np.diff(evidence.quantiles, axis=-1) < -1e-6).any(axis=-1).sum())
    if crossed:
        problems.append(
            f"Quantiles of the candidate cross in {crossed} forecasts: a higher level should "
            "never have a lower price."
        )
    return problems


# --- what speaks against it --------------------------------------------------------------------


def _compare(evidence: Evidence, scores: dict[str, Array], rule: Rule, found: _Findings) -> None:
    lag = 2 * scores[CANDIDATE].shape[1]
    by_window = {name: array.mean(axis=1) for name, array in scores.items()}
    try:
        for name in scores:
            if name != CANDIDATE:
                found.pairings.append(_pairing(evidence, by_window, name, lag, rule))
        found.intervals += [_interval(evidence, mass, lag) for mass in INTERVALS]
        found.slices += _slices(evidence, by_window, lag)
    except ValueError as error:
        found.problems.append(f"The candidate cannot be compared: {error}.")
        return
    objections = {each.opponent: _objection(each, evidence, rule) for each in found.pairings}
    found.notes += _thin(found.pairings, objections)
    against_walk = [each for each in found.slices if each.opponent == WALK]
    against_production = [each for each in found.slices if each.opponent == PRODUCTION]
    lesser = [each for each in objections.values() if each]
    lesser += _cautious(found.intervals) + _worse_slices(against_walk)
    kept = [each for each in found.intervals if _holds_no_less(each)]
    lesser += _overconfident(kept)
    grave = _implausible(found.pairings, scores)
    grave += _overconfident([each for each in found.intervals if each not in kept])
    grave += _worse_slices(against_production)
    if grave or found.problems or not _is_better(evidence, found.pairings):
        found.problems += lesser + grave
    elif lesser:
        found.provisional = True
        found.notes += [BETTER, *lesser]
    found.table += _table(evidence, scores, lag)


def _by_day(origins: NDArray[np.datetime64], values: Array) -> Array:
    """Mean over the windows of each day, in order of time: [n] to [days]."""
    _, day = np.unique(origins, return_inverse=True)
    mean: Array = np.bincount(day, values) / np.bincount(day)
    return mean


def _series(
    evidence: Evidence, by_window: dict[str, Array], name: str, chosen: NDArray[np.bool_]
) -> tuple[Array, Array]:
    """Scores of candidate and opponent on the same days [days]."""
    if name == PRODUCTION:
        chosen = chosen & evidence.served
    origins = evidence.origins[chosen]
    return (
        _by_day(origins, by_window[CANDIDATE][chosen]),
        _by_day(origins, by_window[name][chosen]),
    )


def _pairing(
    evidence: Evidence, by_window: dict[str, Array], name: str, lag: int, rule: Rule
) -> Pairing:
    everything = np.ones(len(evidence.origins), dtype=np.bool_)
    mine, theirs = _series(evidence, by_window, name, everything)
    relative, _, upper = relative_ci(mine, theirs, lag, level=2 * rule.confidence - 1)
    difference, low, high = mean_ci(mine - theirs, lag, level=BOUND)
    t, p = diebold_mariano(mine - theirs, lag)
    limits = {WALK: rule.tolerance, evidence.classical: rule.classical_tolerance}
    limits[PRODUCTION] = rule.tolerance if evidence.fresher else 0.0
    return Pairing(
        opponent=name,
        crps=float(theirs.mean()),
        difference=difference,
        low=low,
        high=high,
        relative=relative,
        upper=upper,
        dm_t=_finite(t),
        dm_p=p,
        limit=limits.get(name),
    )


def _objection(pairing: Pairing, evidence: Evidence, rule: Rule) -> str:
    """Why the opponent stands in the way of a promotion; empty if it does not."""
    name, limit, upper = pairing.opponent, pairing.limit, pairing.upper
    same_data = name == PRODUCTION and not evidence.fresher
    if limit is None or upper < 0.0 or (upper <= limit and not same_data):
        return ""
    figures = (
        f"mean CRPS {pairing.crps + pairing.difference:.2f} bp against {pairing.crps:.2f} bp "
        f"({pairing.relative:+.2%}), upper {percent(rule.confidence)} bound {upper:+.2%}"
    )
    if same_data:
        return (
            f"Not shown to be better than the model in production: {figures}, below zero is "
            "needed of a candidate that has learned from no later days."
        )
    opponent = {PRODUCTION: "the model in production", WALK: "the random walk"}.get(name, name)
    return f"Not shown to be as good as {opponent}: {figures}, at most {limit:+.2%} allowed."


def _thin(pairings: list[Pairing], objections: dict[str, str]) -> list[str]:
    """Take the random walk's objection back where a refusal would help nobody, and say so."""
    walk = next(each for each in pairings if each.opponent == WALK)
    replaces = objections.get(PRODUCTION) == ""
    if not (objections[WALK] and replaces and walk.relative <= 0.0):
        return []
    objections[WALK] = ""
    return [
        f"Evidence against the random walk is thin (bound {walk.upper:+.2%}, {walk.limit:+.2%} "
        "asked for); it passes as no worse than production, which a refusal would serve."
    ]


def _is_better(evidence: Evidence, pairings: list[Pairing]) -> bool:
    """Whether a refusal would serve what is worse beyond doubt. Symbols that production does not
    serve would get a first model."""
    return bool(evidence.served.all()) and any(
        each.opponent == PRODUCTION and each.upper < 0.0 for each in pairings
    )


def _implausible(pairings: list[Pairing], scores: dict[str, Array]) -> list[str]:
    """Of all baselines the best on these very days: a market that suits one is no leak."""
    baselines = [each for each in pairings if each.opponent != PRODUCTION]
    best = min(baselines, key=lambda each: each.crps)
    mine = float(scores[CANDIDATE].mean())
    if best.relative >= -IMPLAUSIBLE:
        return []
    return [
        f"Too good to be true: mean CRPS {mine:.2f} bp is {-best.relative:.0%} below "
        f"{best.opponent}'s {best.crps:.2f} bp, the best of all baselines; more than "
        f"{IMPLAUSIBLE:.0%} means that it has seen the gate's days. Look for what leaks."
    ]


def _interval(evidence: Evidence, mass: float, lag: int) -> Interval:
    held = inside(evidence.returns, evidence.quantiles, evidence.levels, mass).mean(axis=1)
    series = _by_day(evidence.origins, held)
    days = len(series)
    variance = max(hac_variance(series, lag), mass * (1.0 - mass) / days)
    half = float(stdtrit(days - 1, BOUND)) * float(np.sqrt(variance))
    share = float(series.mean())
    standing = None
    if mass in evidence.held and evidence.served.all():
        standing = float(_by_day(evidence.origins, evidence.held[mass].mean(axis=1)).mean())
    return Interval(mass, share, max(share - half, 0.0), min(share + half, 1.0), standing)


def _holds_no_less(interval: Interval) -> bool:
    """Whether a refusal would serve intervals that hold as little."""
    return interval.production is not None and interval.production <= interval.share


def _overconfident(intervals: list[Interval]) -> list[str]:
    return [
        f"Overconfident: {_held(each)} (at most {each.high:.1%} within error"
        + ("" if each.production is None else f", {each.production:.1%} in production")
        + f"); at least {INTERVALS[each.mass][0]:.0%} is asked for."
        for each in intervals
        if each.high < INTERVALS[each.mass][0]
    ]


def _cautious(intervals: list[Interval]) -> list[str]:
    return [
        f"Too cautious: {_held(each)} (at least {each.low:.1%} within error); at most "
        f"{INTERVALS[each.mass][1]:.0%} is asked for."
        for each in intervals
        if each.low > INTERVALS[each.mass][1]
    ]


def _held(interval: Interval) -> str:
    return f"the {percent(interval.mass)} interval held {interval.share:.1%} of outcomes"


def _slices(evidence: Evidence, by_window: dict[str, Array], lag: int) -> list[Slice]:
    found = []
    for name, chosen in evidence.slices.items():
        for opponent in (WALK, PRODUCTION):
            if opponent not in by_window:
                continue
            mine, theirs = _series(evidence, by_window, opponent, chosen)
            relative = lower = None
            if len(mine) >= max(SLICE_DAYS, 2 * lag + 1):
                relative, lower, _ = relative_ci(mine, theirs, lag, level=2 * BOUND - 1)
            found.append(Slice(name, opponent, len(mine), relative, lower))
    return found


def _worse_slices(slices: list[Slice]) -> list[str]:
    return [
        f"Worse than the {each.opponent} on the {each.days} days that are {each.name}: "
        f"{each.relative:+.2%}, lower 95 % bound {each.lower:+.2%}, at most "
        f"{SLICE_MARGIN:+.2%} allowed."
        for each in slices
        if each.lower is not None and each.lower > SLICE_MARGIN
    ]


def _table(evidence: Evidence, scores: dict[str, Array], lag: int) -> list[Row]:
    """One row a contestant: mean CRPS overall and per horizon, Diebold-Mariano to the walk."""
    walk = scores[WALK].mean(axis=1)
    rows = []
    for name, array in scores.items():
        chosen = evidence.served if name == PRODUCTION else np.ones(len(array), dtype=np.bool_)
        theirs = _by_day(evidence.origins[chosen], array[chosen].mean(axis=1))
        base = _by_day(evidence.origins[chosen], walk[chosen])
        t, p = diebold_mariano(theirs - base, lag)
        row: Row = {"contestant": name, "crps_bp": round(float(array[chosen].mean()), 3)}
        by_horizon = enumerate(array[chosen].mean(axis=0), start=1)
        row |= {f"day_{h}": round(float(v), 3) for h, v in by_horizon}
        row["relative"] = round(float(theirs.mean() / base.mean()) - 1.0, 5)
        if np.isfinite(t):
            row |= {"dm_t": round(t, 3), "dm_p": round(p, 4)}
        rows.append(row)
    return rows


def _mean(evidence: Evidence, name: str, scores: Array) -> float | None:
    """Over all windows that count; None where there are none."""
    if scores.shape != evidence.returns.shape:
        return None
    counted = scores[evidence.served] if name == PRODUCTION else scores
    return float(counted.mean()) if counted.size else None


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and np.isfinite(value) else None
