"""AutoARIMA or AutoTheta of statsforecast on log prices.

`python statistical.py AutoARIMA FOLDER`. Order and parameters are chosen once, on all rows up to
the first test origin, and rolled forward over the test days (`refit=False`), as the benchmark's
GARCH is. The quantiles are the bounds of its own intervals, made as they are by default.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from exchange import Task, answer
from statsforecast import StatsForecast, models


def main() -> int:
    """Forecast and leave."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    task = Task.read(folder)
    rows, closes = task.history()
    series = pd.DataFrame({"unique_id": task.symbols[0], "ds": rows, "y": np.log(closes)})
    masses = [round(100 * (1 - 2 * level)) for level in task.levels if level < 0.5]
    found = StatsForecast([getattr(models, name)()], freq=1).cross_validation(
        df=series,
        h=task.horizon,
        step_size=1,
        n_windows=len(task.origins),
        level=masses,
        refit=False,
    )
    found = found.sort_values(["cutoff", "ds"])
    low = [f"{name}-lo-{mass}" for mass in masses]
    high = [f"{name}-hi-{mass}" for mass in reversed(masses)]
    shape = (len(task.origins), task.horizon, len(task.levels))
    logs = found[[*low, name, *high]].to_numpy().reshape(shape)
    answer(folder, logs - task.last_logs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
