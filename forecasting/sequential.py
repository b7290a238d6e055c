"""Is one forecaster worse than another, or its interval wrong? Tests for looking at every day.

A gambler starts with 1 and bets each day that the first one's loss will be the larger. Where it is
not larger on average, whatever came before, the wealth is a supermartingale: it ever reaches
1 / alpha with a probability of at most alpha (Ville 1939), however often and for however long one
looks. Such a wealth is an e-value; those of independent claims may be averaged, and products of
them taken.

What is bet on is x = (loss - reference) / scale of a day, at least -1 as the betting needs it
(Waudby-Smith and Ramdas 2023, "Estimating means of bounded random variables by betting"). The scale
is the most that the first one can win by, whatever happens; it is known with both forecasts, before
the outcome, so that x is 0 on average exactly where the losses are equal (`forecasting.metrics`).
Without a scale the larger of the two losses is taken. That depends on the outcome, and x then leans
against wide forecasts and towards narrow ones: it is for losses of which nothing else is known.
Whether an interval holds too little, or too much, is the same bet on being missed.

Wealth is the mean over a grid of constant stakes, so that nothing has to be tuned. Losses of
forecasts h days ahead overlap: they are h interleaved series whose wealths are averaged (Henzi and
Ziegel 2022, "Valid sequential inference on probability forecast performance").

Who bets against a forecaster that is good for years has little left when it turns bad. So with
`fresh` half of the wealth is kept back for gamblers who begin later, the j-th with 1 / 2j(j+1) of
all: together they still begin with 1, and late changes are found as well.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

STAKES = (0.03, 0.06, 0.12, 0.25, 0.5, 0.9)
"""Shares of the wealth that are bet; the best one is about mean over variance of x."""


@dataclass(frozen=True)
class Evidence:
    """What the days so far say against "no worse on average".

    Attributes:
        value: e-value after the last day, from 0; 1 says nothing.
        peak: its largest value so far. It never falls, and by itself is the test.
        days: how many there are.
        relative: mean loss over mean reference, less 1; above 0: worse. NaN without days, or
            where all of the reference is 0.
    """

    value: float
    peak: float
    days: int
    relative: float

    def found(self, alpha: float) -> bool:
        """Whether it is worse, at a false-alarm probability of `alpha` for the whole watch."""
        return self.peak >= 1 / alpha


def evidence(
    losses: Array,
    reference: Array,
    lag: int = 1,
    scale: Array | None = None,
    fresh: int = 0,
) -> Evidence:
    """Evidence that `losses` are larger than `reference` on average.

    Args:
        losses: of the one that is watched, one a day in order, not negative, shape (n,).
        reference: of the other one on the same days, shape (n,).
        lag: days ahead of the forecasts.
        scale: the most by which `losses` can be the smaller, of each day and known before it,
            positive, shape (n,); the larger of both losses if absent.
        fresh: days after which another gambler begins; 0: none does.

    Raises:
        ValueError: shapes differ, a loss is negative or no number, or a scale too small.
    """
    path = wealth(losses, reference, lag, scale, fresh)
    if not len(path):
        return Evidence(1.0, 1.0, 0, float("nan"))
    mean = float(np.mean(reference))
    relative = float(np.mean(losses)) / mean - 1 if mean > 0 else float("nan")
    return Evidence(float(path[-1]), float(max(1.0, path.max())), len(path), relative)


def wealth(
    losses: Array,
    reference: Array,
    lag: int = 1,
    scale: Array | None = None,
    fresh: int = 0,
) -> Array:
    """The e-value after each day, shape (n,); arguments as of `evidence`."""
    return _grow(_outcomes(losses, reference, scale), lag, fresh)


def coverage_wealth(
    missed: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    least: float,
    most: float,
    lag: int = 1,
    fresh: int = 0,
) -> Array:
    """The e-value against an interval that is right, or wrong for reasons that are not its own.

    Half of the wealth is bet on an interval that is too narrow: it misses with a probability above
    `most`, and above that of the reference's interval. Half on one that is too wide: below `least`
    and below the reference. Each is the smaller of two wealths, so that neither claim can do alone.

    Args:
        missed: whether the outcome of each day lay outside, in order, shape (n,).
        reference: whether it lay outside of the reference's interval, shape (n,).
        least: smallest probability of a miss that is no fault, in (0, 1).
        most: largest one.
        lag: days ahead of the forecasts.
        fresh: days after which another gambler begins; 0: none does.

    Returns:
        After each day, shape (n,).

    Raises:
        ValueError: the probabilities are none or not in order, or shapes differ.
    """
    if not 0 < least <= most < 1 or missed.shape != reference.shape:
        raise ValueError(
            f"0 < least <= most < 1 was expected, and a miss of both on each day; got {least:g}, "
            f"{most:g} and shapes {missed.shape}, {reference.shape}."
        )
    own, other = missed.astype(np.float64), reference.astype(np.float64)
    narrow = np.minimum(_grow((own - most) / most, lag, fresh), _grow(own - other, lag, fresh))
    wide = np.minimum(
        _grow((least - own) / (1 - least), lag, fresh), _grow(other - own, lag, fresh)
    )
    both: Array = (narrow + wide) / 2
    return both


def _grow(outcome: Array, lag: int, fresh: int) -> Array:
    """Wealth after each of the outcomes, each at least -1; mean over stakes and series."""
    if not fresh:
        return _grow_from_start(outcome, lag)
    total = _grow_from_start(outcome, lag) / 2
    kept = 0.5
    for number, start in enumerate(range(fresh, len(outcome), fresh), start=1):
        share = 0.5 / (number * (number + 1))
        total[:start] += share
        total[start:] += share * _grow_from_start(outcome[start:], lag)
        kept -= share
    return total + kept


def _grow_from_start(outcome: Array, lag: int) -> Array:
    total = np.zeros(len(outcome))
    for start in range(lag):
        own = np.arange(start, len(outcome), lag)
        if not len(own):
            total += 1.0
            continue
        factors = 1 + np.multiply.outer(np.asarray(STAKES), outcome[own])
        series = np.cumprod(factors, axis=1).mean(axis=0)
        since = (np.arange(len(outcome)) - start) // lag  # last own day, -1 before the first
        total += np.where(since >= 0, series[np.maximum(since, 0)], 1.0)
    return total / lag


def _outcomes(losses: Array, reference: Array, scale: Array | None) -> Array:
    if losses.shape != reference.shape or losses.ndim != 1:
        raise ValueError(
            f"One loss a day of each was expected; shapes are {losses.shape}, {reference.shape}."
        )
    both = np.stack([losses, reference])
    if not np.all(np.isfinite(both)) or np.any(both < 0):
        raise ValueError("Losses should be finite and not negative.")
    difference = losses - reference
    largest = both.max(axis=0) if scale is None else scale
    if largest.shape != losses.shape or not np.all(difference >= -largest * (1 + 1e-9)):
        raise ValueError(
            "A scale of each day was expected, no smaller than what the losses are the smaller by."
        )
    found: Array = np.zeros_like(difference)
    np.divide(difference, largest, out=found, where=largest > 0)
    return np.maximum(found, -1.0)
