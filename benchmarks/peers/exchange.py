"""What the quality benchmark asks of a peer in another environment: a folder with two files.

`task.npz` comes in, `quantiles.npy` goes back. The scripts beside it import it; numpy will do.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

PATHS, FAR = 4000, 6.0


@dataclass(frozen=True)
class Task:
    """One stretch of test days.

    Attributes:
        symbols: who is in `prices`; the first is the one to forecast.
        prices: float64 [symbols, rows], closes of the same sessions, NaN before a symbol's first;
            the last row is the last outcome.
        first: row of the first test origin. Nothing after it may be learned from.
        horizon: days ahead.
        levels: quantile levels [k], symmetric around a half.
        validation: rows up to `first` on which a peer may choose or calibrate.
        seed: of whatever is random.
    """

    symbols: np.ndarray
    prices: np.ndarray
    first: int
    horizon: int
    levels: np.ndarray
    validation: int
    seed: int

    @classmethod
    def read(cls, folder: Path) -> "Task":
        """Out of `task.npz`."""
        with np.load(folder / "task.npz") as file:
            return cls(
                **{name: file[name] if file[name].ndim else int(file[name]) for name in file}
            )

    def write(self, folder: Path) -> None:
        """Into `task.npz`."""
        np.savez(folder / "task.npz", **asdict(self))

    @property
    def origins(self) -> np.ndarray:
        """Rows from which forecasts start [n]."""
        return np.arange(self.first, self.prices.shape[1] - self.horizon)

    def history(self, which: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Rows in which a symbol was traded, and its closes then."""
        rows = np.flatnonzero(np.isfinite(self.prices[which]))
        return rows, self.prices[which, rows]

    @property
    def last_logs(self) -> np.ndarray:
        """Log price at each origin [n, 1, 1], to be taken off log prices that are forecast."""
        return np.log(self.prices[0, self.origins])[:, None, None]


def answer(folder: Path, quantiles: np.ndarray) -> None:
    """Write quantiles of log returns [n, horizon, k]; those that cross are sorted."""
    np.save(folder / "quantiles.npy", np.sort(quantiles.astype(np.float64), axis=-1))


def answered(folder: Path) -> np.ndarray:
    """What a peer gave back, float64 [n, horizon, k]."""
    return np.load(folder / "quantiles.npy")


def added_up(days: np.ndarray, levels: np.ndarray, seed: int) -> np.ndarray:
    """Quantiles of daily moves [n, horizon, k] as those of the moves so far [n, horizon, k].

    Draws are linear in the normal quantile between two levels, and go on beyond the outer ones as
    from the median to there, so that normal days add up as normal days do.
    """
    normal = np.array([NormalDist().inv_cdf(level) for level in levels])
    draws = np.random.default_rng(seed).standard_normal((PATHS, days.shape[1]))
    out = np.empty_like(days)
    for row, day in enumerate(days):
        moves = np.stack([_drawn(z, normal, each) for z, each in zip(draws.T, day, strict=True)])
        out[row] = np.quantile(np.cumsum(moves, axis=0), levels, axis=1).T
    return out


def _drawn(z: np.ndarray, normal: np.ndarray, day: np.ndarray) -> np.ndarray:
    middle = day[len(day) // 2]
    low, high = (middle + (day[end] - middle) * FAR / abs(normal[end]) for end in (0, -1))
    return np.interp(z, [-FAR, *normal, FAR], [low, *day, high])
