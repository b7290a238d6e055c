"""Has volatility changed for good? A shift of its level that nothing foretold.

Volatility comes and goes in clusters, so a wild month is no sign of a new regime; one that the past
did not lead to expect is. What is watched is therefore the surprise: the log variance of a day
against its forecast from the last 1, 5, 22 and 64 sessions, a heterogeneous autoregression (Corsi
2009) fitted to the span that the version in production learned from. A lasting shift leaves a trail
in it, which fades as the forecast comes round to the new level; how fast is known from the weights.
The statistic is the generalised likelihood ratio of such a trail that began on any of the last 15
sessions (Willsky and Jones 1976; Basseville and Nikiforov 1993, section 7.2.4), in standard
deviations.

It counts beyond the prediction limit for the largest value of the next quarter: that of a
log-normal variable of which the quarters of the training span are the sample (Hahn and Meeker 1991,
section 4.8). Rises and falls have a limit each. Looked at every session, one is reached in about
one of twenty quarters in which nothing happens.
"""

import math
from dataclasses import dataclass
from datetime import date

import numpy as np
import pandas as pd
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy import stats

from forecasting.errors import DataError, HistoryError

Array = NDArray[np.float64]

SPANS = (1, 5, 22, 64)
"""Sessions whose means the forecast is made of."""
LAGS = 15
"""Sessions back to which a shift may have begun."""
QUARTER = 63
LEAST_QUARTERS = 3
LOUDER, CALMER = 0.02, 0.005
"""Share of quarters in which each side's limit is reached by chance, if the forecast's weights were
known; they are estimates, so that it comes to twice that. A calmer market hurts less."""
_FLOOR = 1e-6
_NIGHT = 0.12
"""Weight of the overnight move's square, which tells a seventh of what the day's range tells."""
_WARM = SPANS[-1] + 1


@dataclass(frozen=True)
class Shift:
    """The lasting shift of volatility that the newest sessions look most like.

    Attributes:
        score: the statistic, in standard deviations; negative for a calmer market.
        limit: what it is held to, of the same sign.
        began: session on which it would have begun.
        ratio: new volatility over old.
    """

    score: float
    limit: float
    began: date
    ratio: float

    @property
    def found(self) -> bool:
        """Whether it is beyond the limit."""
        return abs(self.score) > abs(self.limit)

    def __str__(self) -> str:
        return (
            f"{self.ratio:.2g} times as large since about {self.began} "
            f"({self.score:+.1f} sd, limit {self.limit:+.1f})"
        )


@dataclass(frozen=True, eq=False)
class Expectation:
    """What a training span leads one to expect.

    Attributes:
        level: mean log variance.
        weights: of the deviations from `level` that the forecast is made of, by span.
        deviation: standard deviation of the surprise.
        trail: [LAGS], what a lasting shift by 1 leaves of surprise, from its first day on.
        limits: score beyond which a rise, and below which a fall counts.
        quarters: of the training span, that the limit is told from.
    """

    level: float
    weights: Array
    deviation: float
    trail: Array
    limits: tuple[float, float]
    quarters: int


def learn(frame: pd.DataFrame, train_start: date, train_end: date) -> Expectation:
    """Weights, trail and limit of a training span.

    Args:
        frame: adjusted prices by session, columns open, high, low, close; rows before
            `train_start` are used as history.
        train_start: first session of the span.
        train_end: last one.

    Raises:
        HistoryError: the span is too short to tell usual from unusual.
        DataError: a price is not finite or not positive.
    """
    known = frame.loc[: pd.Timestamp(train_end)]
    variance = _daily(known)
    means = _means(variance)
    span = (known.index >= pd.Timestamp(train_start)) & np.isfinite(means).all(axis=1)
    quarters = (int(span.sum()) - LAGS) // QUARTER
    if quarters < LEAST_QUARTERS:
        raise HistoryError(
            f"The training span {train_start} to {train_end} has {int(span.sum())} sessions with a "
            f"history of {SPANS[-1]}; {LEAST_QUARTERS * QUARTER + LAGS} are needed to tell a "
            "lasting shift of volatility from a usual one."
        )
    level = float(variance[span].mean())
    weights = np.asarray(
        np.linalg.lstsq(means[span] - level, variance[span] - level, rcond=None)[0], np.float64
    )
    surprise = variance - level - (means - level) @ weights
    deviation = float(surprise[span].std())
    trail = _trail(weights)
    scores = _scores(surprise[span] / deviation, trail)[-quarters * QUARTER :]
    limits = _limit(scores.max(axis=1), LOUDER), -_limit(-scores.min(axis=1), CALMER)
    return Expectation(level, weights, deviation, trail, limits, quarters)


def _limit(largest: Array, share: float) -> float:
    """What the next quarter's largest value reaches with that probability."""
    maxima = np.log(largest.reshape(-1, QUARTER).max(axis=1))
    count = len(maxima)
    width = stats.t.ppf(1 - share, count - 1) * math.sqrt(1 + 1 / count)
    return math.exp(maxima.mean() + width * maxima.std(ddof=1))


def alarms(expectation: Expectation, frame: pd.DataFrame) -> NDArray[np.bool_]:
    """Whether each session would say that there is a shift; False where history is too short."""
    scores = _scores(_surprise(expectation, frame), expectation.trail)
    rise, fall = expectation.limits
    found: NDArray[np.bool_] = np.any((scores > rise) | (scores < fall), axis=1)
    return found


def look(expectation: Expectation, frame: pd.DataFrame, day: date) -> Shift:
    """What the newest session up to `day` says of a lasting shift.

    Raises:
        HistoryError: too few sessions are known by then.
        DataError: a price is not finite or not positive.
    """
    known = frame.loc[: pd.Timestamp(day)].iloc[-_WARM - LAGS :]
    if len(known) < _WARM + LAGS:
        raise HistoryError(f"{len(known)} sessions are known on {day}; {_WARM + LAGS} are needed.")
    scores = _scores(_surprise(expectation, known)[-LAGS:], expectation.trail)[-1]
    rise, fall = expectation.limits
    length = int(np.argmax(np.maximum(scores / rise, scores / fall))) + 1
    score = float(scores[length - 1])
    size = score * expectation.deviation / float(np.linalg.norm(expectation.trail[:length]))
    began = known.index[-length].date()
    return Shift(score, rise if score > 0 else fall, began, math.exp(size / 2))


def _daily(frame: pd.DataFrame) -> Array:
    """Log variance of each day from its range and body (Garman and Klass 1980) and its night."""
    values = frame[["open", "high", "low", "close"]].to_numpy(np.float64)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise DataError(
            "Prices that are not finite or not positive; a positive number is expected. Ingest "
            "validated prices."
        )
    opened, high, low, close = np.log(values).T
    width, body = (high - low) ** 2, (close - opened) ** 2
    # a day that went one way all through would have next to none of it
    day = np.maximum(0.5 * width - (2 * math.log(2) - 1) * body, 0.1 * width)
    night = np.square(opened[1:] - close[:-1])
    night = np.concatenate([[night.mean() if len(night) else 0.0], night])
    logs: Array = np.log(day + _NIGHT * night + _FLOOR)
    return logs


def _means(variance: Array) -> Array:
    """[sessions, spans], up to the day before; NaN where there are too few."""
    known = pd.Series(variance).shift(1)
    return np.column_stack([known.rolling(span).mean() for span in SPANS])


def _surprise(expectation: Expectation, frame: pd.DataFrame) -> Array:
    """In standard deviations."""
    variance = _daily(frame)
    level = expectation.level
    expected = level + (_means(variance) - level) @ expectation.weights
    found: Array = (variance - expected) / expectation.deviation
    return found


def _trail(weights: Array) -> Array:
    """1 less what the forecast has come round by."""
    shares = np.stack([np.minimum(np.arange(LAGS), span) / span for span in SPANS])
    trail: Array = 1 - weights @ shares
    return trail


def _scores(surprise: Array, trail: Array) -> Array:
    """[sessions, LAGS]: the statistic of a shift that began 1, 2, ... sessions back."""
    padded = np.concatenate([np.zeros(LAGS - 1), surprise])
    templates = np.zeros((LAGS, LAGS))
    for length in range(1, LAGS + 1):
        part = trail[:length]
        templates[LAGS - length :, length - 1] = part / np.linalg.norm(part)
    scores: Array = sliding_window_view(padded, LAGS) @ templates
    return scores
