"""Is one forecaster worse than another? A test that may be looked at every day.

A gambler starts with 1 and bets each day that the first one's loss will be the larger. Where it is
not larger on average, whatever came before, the wealth is a supermartingale: it ever reaches
1 / alpha with a probability of at most alpha (Ville 1939), however often and for however long one
looks. Such a wealth is an e-value; those of independent claims may be averaged, and products of
them taken.

What is bet on is x = (loss - reference) / max(loss, reference) of a day, in [-1, 1] as the betting
needs it (Waudby-Smith and Ramdas 2023, "Estimating means of bounded random variables by betting"),
and free of how wild the day was. Wealth is the mean over a grid of constant stakes, so that nothing
has to be tuned. Losses of forecasts h days ahead overlap: they are h interleaved series whose
wealths are averaged (Henzi and Ziegel 2022, "Valid sequential inference on probability forecast
performance").
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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


def evidence(losses: NDArray[np.float64], reference: NDArray[np.float64], lag: int = 1) -> Evidence:
    """Evidence that `losses` are larger than `reference` on average.

    Args:
        losses: of the one that is watched, one a day in order, positive, shape (n,).
        reference: of the other one on the same days, shape (n,).
        lag: days ahead of the forecasts.

    Raises:
        ValueError: shapes differ, or a loss is negative or no number.
    """
    path = wealth(losses, reference, lag)
    if not len(path):
        return Evidence(1.0, 1.0, 0, float("nan"))
    mean = float(np.mean(reference))
    relative = float(np.mean(losses)) / mean - 1 if mean > 0 else float("nan")
    return Evidence(float(path[-1]), float(max(1.0, path.max())), len(path), relative)


def wealth(
    losses: NDArray[np.float64], reference: NDArray[np.float64], lag: int = 1
) -> NDArray[np.float64]:
    """The e-value after each day, shape (n,); arguments as of `evidence`."""
    outcome = _outcomes(losses, reference)
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


def _outcomes(losses: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.float64]:
    if losses.shape != reference.shape or losses.ndim != 1:
        raise ValueError(
            f"One loss a day of each was expected; shapes are {losses.shape}, {reference.shape}."
        )
    both = np.stack([losses, reference])
    if not np.all(np.isfinite(both)) or np.any(both < 0):
        raise ValueError("Losses should be finite and not negative.")
    largest = both.max(axis=0)
    difference = losses - reference
    found: NDArray[np.float64] = np.zeros_like(largest)
    np.divide(difference, largest, out=found, where=largest > 0)
    return found
