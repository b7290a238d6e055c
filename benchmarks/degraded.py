"""How soon forecasts that went bad are found, and how often good ones are: `make bench-degraded`.

100 GARCH markets (`Markets`) of four years, forecast by one who knows the variance of each day, and
looked at every session; then the same forecasts with intervals of another width, from the first day
on or after two good years (None: not found in the two that are left). The last line is one JSON
object.
"""

import argparse
import json
import math
import sys
from statistics import NormalDist

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from rich.console import Console
from rich.table import Table

from benchmarks.markets import ALPHA, BETA, YEARLY
from forecasting.metrics import Array
from forecasting.performance import WALK_RESIDUALS, Logged, place_bets
from forecasting.settings import Settings

SEED, SERIES, ORIGINS, HORIZON = 2026, 100, 1000, 5
LEVELS = (0.025, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.975)
"""Fewer than a version has, so that the run takes a minute."""
_WARM, _HISTORY = 200, WALK_RESIDUALS + HORIZON
WIDTHS = {
    "half as wide": 0.5,
    "three quarters": 0.75,
    "twice as wide": 2.0,
    "3.2 times, CRPS half as large again": 3.2,
}


class Markets:
    """GARCH(1,1) markets of normal days, and the forecast of one who knows their variance.

    Attributes:
        logs: log prices [series, days].
        origins: rows from which forecasts start [origins].
        sigma: standard deviation of the next `HORIZON` cumulative returns as known at each origin
            [series, origins, HORIZON].
    """

    def __init__(self, series: int, seed: int, origins: int = ORIGINS) -> None:
        rng, long_run = np.random.default_rng(seed), YEARLY**2 / 252
        days, variance = _HISTORY + origins + HORIZON, np.full(series, long_run)
        moves, known = np.empty((days, series)), np.empty((days, series))
        for day in range(-_WARM, days):
            move = np.sqrt(variance) * rng.standard_normal(series)
            if day >= 0:
                known[day], moves[day] = variance, move
            variance = (1 - ALPHA - BETA) * long_run + BETA * variance + ALPHA * move**2
        self.logs = np.vstack([np.zeros(series), np.cumsum(moves, axis=0)]).T
        self.origins = np.arange(_HISTORY, _HISTORY + origins)
        excess = known[self.origins].T - long_run
        daily = [long_run + (ALPHA + BETA) ** ahead * excess for ahead in range(HORIZON)]
        self.sigma = np.sqrt(np.cumsum(np.stack(daily, axis=2), axis=2))

    def forecasts(self, series: int, widths: Array) -> Logged:
        """As the prediction log has them, each origin's intervals `widths` times as wide as right.

        Args:
            series: whose.
            widths: 1 is right [origins].
        """
        logs, origins = self.logs[series], self.origins
        steps = range(1, HORIZON + 1)
        z = np.array([NormalDist().inv_cdf(level) for level in LEVELS])
        days = np.datetime64("2001-01-01") + np.arange(len(logs))
        return Logged(
            origins=days[origins],
            targets=np.stack([days[origins + step] for step in steps], axis=1),
            levels=LEVELS,
            quantiles=(widths[:, None] * self.sigma[series])[:, :, None] * z,
            walk=np.stack([self._walk(logs, step) for step in steps], axis=1),
            returns=np.stack([logs[origins + step] - logs[origins] for step in steps], axis=1),
        )

    def _walk(self, logs: Array, step: int) -> Array:
        """Quantiles of the last returns that are known at each origin [origins, k]."""
        windows = sliding_window_view(logs[step:] - logs[:-step], WALK_RESIDUALS)
        newest = np.sort(windows[self.origins - step + 1 - WALK_RESIDUALS], axis=1)
        quantiles: Array = np.quantile(newest, LEVELS, axis=1).T
        return quantiles


def days_until_found(markets: Markets, widths: Array, alpha: float) -> Array:
    """Looks, one a day, until the forecasts of each series are called degraded; infinite: never."""
    found = []
    for series in range(len(markets.logs)):
        _, _, wealth = place_bets(markets.forecasts(series, widths))
        reached = np.flatnonzero(wealth >= 1 / alpha)
        found.append(float(reached[0]) + 1 if len(reached) else math.inf)
    return np.array(found)


def main(argv: list[str] | None = None) -> int:
    """Measure, show a table, print the JSON line; 1 if the true forecaster is called degraded more
    often than `PERENNIAL_PERFORMANCE_ALPHA` says."""
    parser = argparse.ArgumentParser(prog="benchmarks.degraded", description=__doc__)
    parser.add_argument("--series", type=int, default=SERIES)
    parser.add_argument("--seed", type=int, default=SEED)
    asked = parser.parse_args(argv)
    alpha = float(Settings.model_fields["performance_alpha"].default)
    markets = Markets(asked.series, asked.seed)
    false = float(np.isfinite(days_until_found(markets, np.ones(ORIGINS), alpha)).mean())
    table = Table("intervals", "days until half / 90 % are found", "after two good years")
    found: dict[str, list[float]] = {}
    for name, width in WIDTHS.items():
        late = np.where(np.arange(ORIGINS) < ORIGINS // 2, 1.0, width)
        waits = (
            days_until_found(markets, np.full(ORIGINS, width), alpha),
            days_until_found(markets, late, alpha) - ORIGINS // 2,
        )
        found[name] = [
            float(np.quantile(wait, q, method="higher")) for wait in waits for q in (0.5, 0.9)
        ]
        first, second, third, fourth = found[name]
        table.add_row(name, f"{first:g} / {second:g}", f"{third:g} / {fourth:g}")
    Console(stderr=True).print(table)
    days = {
        name: [wait if math.isfinite(wait) else None for wait in waits]
        for name, waits in found.items()
    }
    print(json.dumps({"false_alarms": false, "alpha": alpha, "days": days}))
    return int(false > alpha)


if __name__ == "__main__":
    sys.exit(main())
