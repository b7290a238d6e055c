"""Whether a candidate may go to production: a pure function of scores, which fails closed.

All contestants are scored on the same windows by CRPS (basis points, lower is better), averaged
over horizons. Whatever cannot be judged is refused, with a reason that a person can read.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from forecasting.metrics import Array, diebold_mariano, relative_ci

BOUND = 0.95
"""Confidence of the one-sided upper bound."""

Row = dict[str, str | float]


@dataclass(frozen=True)
class GateVerdict:
    """What the gate decided and on what evidence. Scores are mean CRPS in basis points.

    Attributes:
        promote: whether the candidate may go to production.
        reasons: why not; empty exactly if `promote`.
        candidate_crps: None where it could not be computed, as with the figures below.
        production_crps: None also if nothing is in production.
        random_walk_crps: of the random walk on the same windows.
        relative_to_random_walk: candidate over random walk minus 1; -0.02 is 2 % better.
        upper95: upper 95 % bound (one-sided, HAC) of that relative difference.
        windows: windows on which all were scored.
        tolerance: largest `upper95` that passes.
        table: one row a contestant, for reports.
    """

    promote: bool
    reasons: tuple[str, ...]
    candidate_crps: float | None
    production_crps: float | None
    random_walk_crps: float | None
    relative_to_random_walk: float | None
    upper95: float | None
    windows: int
    tolerance: float
    table: tuple[Row, ...]

    def summary(self) -> str:
        """One paragraph for logs and reports."""
        if not self.promote:
            return "Refused: " + " ".join(self.reasons)
        text = (
            f"Promoted: CRPS {self.candidate_crps:.1f} bp over {self.windows} windows, "
            f"{self.relative_to_random_walk:+.1%} against the random walk's "
            f"{self.random_walk_crps:.1f} (upper 95 % bound {self.upper95:+.1%})"
        )
        if self.production_crps is not None:
            text += f", production {self.production_crps:.1f}"
        return text + "."


def judge(
    candidate: ArrayLike,
    random_walk: ArrayLike,
    production: ArrayLike | None,
    *,
    tolerance: float,
    min_windows: int,
) -> GateVerdict:
    """Decide on a candidate.

    It must be no worse than the random walk (upper 95 % bound of the relative difference of mean
    CRPS at most `tolerance`) and, if a model is in production, have a lower mean than that model.

    Args:
        candidate: CRPS in basis points [n, h], windows in time order.
        random_walk: the same for the random walk [n, h].
        production: the same for the model in production [n, h]; None if there is none.
        tolerance: e.g. 0.01 for 1 %.
        min_windows: fewest windows on which a verdict is given.

    Returns:
        The verdict; bad scores are a refusal, not an error.
    """
    given = {"candidate": candidate, "random walk": random_walk}
    if production is not None:
        given["production"] = production
    problems, scores = _admissible(given, min_windows)
    means = {name: float(values.mean()) for name, values in scores.items()}
    windows = len(scores["candidate"]) if "candidate" in scores else 0
    relative = upper = None
    table: tuple[Row, ...] = ()
    if not problems:
        lag = 2 * scores["candidate"].shape[1]
        problems, relative, upper = _compare(scores, means, lag, tolerance)
        table = _table(scores, means, lag)
    return GateVerdict(
        promote=not problems,
        reasons=tuple(problems),
        candidate_crps=_finite(means.get("candidate")),
        production_crps=_finite(means.get("production")),
        random_walk_crps=_finite(means.get("random walk")),
        relative_to_random_walk=relative,
        upper95=upper,
        windows=windows,
        tolerance=tolerance,
        table=table,
    )


def _admissible(
    given: dict[str, ArrayLike], min_windows: int
) -> tuple[list[str], dict[str, Array]]:
    """Scores as arrays [n, h], and what is wrong with them."""
    problems: list[str] = []
    scores: dict[str, Array] = {}
    for name, values in given.items():
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
        bad = int((~np.isfinite(array)).sum())
        if bad:
            problems.append(
                f"{bad} of {array.size} scores of the {name} are not finite numbers; "
                "no comparison can be trusted."
            )
    return problems + _mismatch(scores, min_windows), scores


def _mismatch(scores: dict[str, Array], min_windows: int) -> list[str]:
    problems = []
    shapes = {name: array.shape for name, array in scores.items()}
    if len(set(shapes.values())) > 1:
        seen = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        problems.append(f"Scores do not cover the same windows and horizons: {seen}.")
    fewest = min((array.shape[0] for array in scores.values()), default=0)
    if fewest < min_windows:
        problems.append(f"Only {fewest} windows to judge on; at least {min_windows} are required.")
    return problems


def _compare(
    scores: dict[str, Array], means: dict[str, float], lag: int, tolerance: float
) -> tuple[list[str], float | None, float | None]:
    """What speaks against the candidate, its relative difference and the bound of it."""
    by_window = {name: array.mean(axis=1) for name, array in scores.items()}
    try:
        relative, _, upper = relative_ci(
            by_window["candidate"], by_window["random walk"], lag, level=2 * BOUND - 1
        )
    except ValueError as error:
        return [f"The candidate cannot be compared with the random walk: {error}."], None, None
    problems = []
    mine, walk = means["candidate"], means["random walk"]
    if not upper <= tolerance:
        problems.append(
            f"Not shown to be as good as the random walk: mean CRPS {mine:.2f} bp against "
            f"{walk:.2f} bp ({relative:+.2%}), upper 95 % bound {upper:+.2%}, "
            f"at most {tolerance:+.2%} allowed."
        )
    theirs = means.get("production")
    if theirs is not None and not mine < theirs:
        problems.append(
            f"No better than the model in production: mean CRPS {mine:.2f} bp against "
            f"{theirs:.2f} bp on the same {len(scores['candidate'])} windows."
        )
    return problems, relative, upper


def _table(scores: dict[str, Array], means: dict[str, float], lag: int) -> tuple[Row, ...]:
    """One row a contestant: mean CRPS overall and per horizon, Diebold-Mariano to the walk."""
    walk = scores["random walk"].mean(axis=1)
    rows = []
    for name, array in scores.items():
        row: Row = {"contestant": name, "crps_bp": round(means[name], 3)}
        row |= {f"day_{h}": round(float(v), 3) for h, v in enumerate(array.mean(axis=0), start=1)}
        if means["random walk"] > 0.0:
            row["relative"] = round(means[name] / means["random walk"] - 1.0, 5)
        if len(walk) > 2 * lag:
            t, p = diebold_mariano(array.mean(axis=1) - walk, lag)
            row |= {"dm_t": round(t, 3), "dm_p": round(p, 4)}
        rows.append(row)
    return tuple(rows)


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
