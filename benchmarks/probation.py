"""How often a probation rolls back what is worse, and what is not: `make bench-probation`.

GARCH markets (`degraded.Markets`), in which a version of the true width stood before. The new one's
intervals are of another width; or both are off by chance, in the mean by as much, which is "as
good". Pairs are made and weighed by the functions that `monitor` calls. The last line is one JSON
object.
"""

import argparse
import json
import sys
from datetime import date

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks.degraded import HORIZON, LEVELS, WIDTHS, Markets
from forecasting import metrics, probation
from forecasting.metrics import BASIS_POINTS, Array
from forecasting.probation import Probation
from forecasting.sessions import sessions_after
from forecasting.settings import Settings

SEED, SERIES = 2027, 200
DAYS = (20, int(Settings.model_fields["probation_days"].default))
AS_GOOD, BY_CHANCE = "as good", 0.1
"""Standard deviation of the log of a width, from day to day."""
STARTED, CLOSE = date(2001, 1, 2), 100.0
NEW, BEFORE = 2, 1


def pairs(markets: Markets, series: int, new: Array, before: Array) -> pd.DataFrame:
    """What `probation.weigh` is given of one market.

    Args:
        markets: with as many origins as the probation has days.
        series: which market.
        new: widths of the new version, 1 is right [days].
        before: of the version before it [days].
    """
    days = len(new)
    watched = Probation("", "", NEW, BEFORE, STARTED, days, "watching", {})
    calendar = pd.to_datetime([STARTED, *sessions_after(STARTED, days + HORIZON)])
    versions = [
        _scored(markets, series, calendar, version, widths)
        for version, widths in ((NEW, new), (BEFORE, before))
    ]
    return probation.pair(pd.concat(versions, ignore_index=True), watched)


def _scored(
    markets: Markets, series: int, calendar: pd.DatetimeIndex, version: int, widths: Array
) -> pd.DataFrame:
    """As `outcomes.scored` reads forecasts whose actual is known."""
    made = markets.forecasts(series, widths)
    crps = BASIS_POINTS * metrics.crps(made.returns, made.quantiles, LEVELS)
    prices = CLOSE * np.exp(made.quantiles)
    every = [(day, step) for day in range(len(widths)) for step in range(HORIZON)]
    return pd.DataFrame(
        {
            "symbol": "GOOG",
            "forecaster": "",
            "model_version": version,
            "prices_md5": "ours",
            "origin": [calendar[day] for day, _ in every],
            "target": [calendar[day + step + 1] for day, step in every],
            "horizon": [step + 1 for _, step in every],
            "origin_close": CLOSE,
            "crps_bp": [crps[each] for each in every],
            "levels": [LEVELS] * len(every),
            "quantiles": [prices[each] for each in every],
        }
    )


def rolled_back(markets: Markets, width: float | None, alpha: float, seed: int) -> float:
    """Share of the markets in which the new version is condemned.

    Args:
        markets: with as many origins as the probation has days.
        width: of the new version's intervals; None: both are off by chance.
        alpha: of the probation.
        seed: of that chance.
    """
    rng, days = np.random.default_rng(seed), len(markets.origins)
    condemned = 0
    for series in range(len(markets.logs)):
        if width is None:
            new, before = np.exp(BY_CHANCE * rng.standard_normal((2, days)))
        else:
            new, before = np.full(days, width), np.ones(days)
        found = probation.weigh(pairs(markets, series, new, before), HORIZON, alpha)
        condemned += found.worse
    return condemned / len(markets.logs)


def main(argv: list[str] | None = None) -> int:
    """Measure, show a table, print the JSON line; 1 if a version that is as good is rolled back
    more often than `PERENNIAL_PROBATION_ALPHA` says."""
    parser = argparse.ArgumentParser(prog="benchmarks.probation", description=__doc__)
    parser.add_argument("--series", type=int, default=SERIES)
    parser.add_argument("--seed", type=int, default=SEED)
    asked = parser.parse_args(argv)
    alpha = float(Settings.model_fields["probation_alpha"].default)
    table = Table("the new version's intervals", *(f"in {days} days" for days in DAYS))
    markets = [Markets(asked.series, asked.seed, days) for days in DAYS]
    found: dict[str, list[float]] = {}
    for name, width in {AS_GOOD: None, **WIDTHS}.items():
        found[name] = [rolled_back(each, width, alpha, asked.seed) for each in markets]
        table.add_row(name, *(f"{share:.1%}" for share in found[name]))
    Console(stderr=True).print(table)
    false = max(found[AS_GOOD])
    print(json.dumps({"rolled_back_as_good": false, "alpha": alpha, "rolled_back": found}))
    return int(false > alpha)


if __name__ == "__main__":
    sys.exit(main())
