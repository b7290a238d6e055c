"""What the monitor finds, and what it makes up: `make bench-drift`.

200 stationary GARCH markets of ten years and a quarter each (`benchmarks.markets`), the last
quarters watched every session by both of the monitor's eyes, Evidently's distances and the shift of
volatility; then the same markets with all moves twice as large from a day of the second quarter on.
Once more with five years of training, and with Student-t days. The last line is one JSON object.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date

import numpy as np
import pandas as pd
from numpy.lib.stride_tricks import sliding_window_view
from rich.console import Console
from rich.table import Table

from benchmarks.bars import judge
from benchmarks.markets import garch, louder
from forecasting import breaks, drift
from forecasting.settings import Settings

SEED = 2026
QUARTERS, DAYS = 4, (1, 3, 5, 10, 15)
BARS = {"false_alarms_per_quarter": ("<=", 0.05), "detected_within_15_days": (">=", 0.90)}
ROWS = {
    "ten years learned": (2520, math.inf),
    "five years learned": (1260, math.inf),
    "ten years, Student-t days (8)": (2520, 8.0),
}


@dataclass
class Told:
    """Of each market: quarters with an alarm, by eye and by either; sessions until one."""

    distances: list[bool] = field(default_factory=list)
    shifts: list[bool] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)

    def add(self, frame: pd.DataFrame, trained: int, day: int) -> None:
        """Watch a market, and again with all moves twice as large from row `day` on."""
        days = slice(trained, trained + QUARTERS * breaks.QUARTER)
        far, shifted = watch(frame, trained)
        for found, alarms in ((self.distances, far), (self.shifts, shifted)):
            found += alarms[days].reshape(QUARTERS, -1).any(axis=1).tolist()
        alarmed = np.flatnonzero(np.logical_or(*watch(louder(frame, day), trained))[day:])
        self.waited.append(float(alarmed[0]) + 1 if len(alarmed) else math.inf)

    def figures(self) -> dict[str, float]:
        """As the table shows them."""
        either = np.logical_or(self.distances, self.shifts)
        waited = np.array(self.waited)
        return {
            "false_alarms_per_quarter": round(float(either.mean()), 4),
            "by_distances": round(float(np.mean(self.distances)), 4),
            "by_shifts": round(float(np.mean(self.shifts)), 4),
            **{f"detected_within_{n}_days": round(float((waited <= n).mean()), 4) for n in DAYS},
        }


def watch(frame: pd.DataFrame, trained: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether distances, and whether a shift, would alarm on each session."""
    settings = Settings()
    first, last = frame.index[settings.context].date(), frame.index[trained - 1].date()
    expectation = breaks.learn(frame, first, last)
    return _far(frame, first, last, settings), breaks.alarms(expectation, frame)


def _far(frame: pd.DataFrame, first: date, last: date, settings: Settings) -> np.ndarray:
    """Verdicts by distances of all sessions at once: what `drift.compare` says, a thousand times
    as fast (tests/unit/test_drift.py holds Evidently's distance to this formula)."""
    table = drift.features(frame)
    reference = drift.reference_rows(table, first, last, settings.drift_window).table.to_numpy()
    windows = sliding_window_view(table.to_numpy(), settings.drift_window, axis=0)
    moved = np.abs(np.sort(windows, axis=2) - np.sort(reference, axis=0).T).mean(axis=2)
    share = (moved / reference.std(axis=0) >= settings.drift_threshold).mean(axis=1)
    return np.concatenate([np.zeros(settings.drift_window, bool), share >= settings.drift_share])


def markets(series: int, trained: int, tails: float) -> Iterator[pd.DataFrame]:
    """Stationary ones, a year longer than what is learned from."""
    return garch(series, trained + QUARTERS * breaks.QUARTER, SEED, tails)


def main() -> int:
    """Run, and print table and figures; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="False alarms and planted shifts of volatility.")
    parser.add_argument("--series", type=int, default=200)
    options = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    for name, (trained, tails) in ROWS.items():
        found = Told()
        for number, frame in enumerate(markets(options.series, trained, tails)):
            found.add(frame, trained, trained + breaks.QUARTER + number % breaks.QUARTER)
            if number % 20 == 19:
                print(f"{name}: {number + 1}/{options.series}", file=sys.stderr)
        rows[name] = found.figures()
    table = Table(title=f"{options.series} markets: share of quarters, and of shifts found")
    table.add_column("")
    for column in next(iter(rows.values())):
        table.add_column(
            column.replace("_per_quarter", "").replace("detected_", "").replace("_", " "),
            justify="right",
        )
    for name, figures in rows.items():
        table.add_row(name, *(f"{100 * value:.1f} %" for value in figures.values()))
    Console(width=130).print(table)
    figures = next(iter(rows.values()))
    met = judge(figures, BARS)
    print(json.dumps(figures))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
