"""What a search costs beside the training in it: `make bench-search`.

16 and 64 trials of 10 epochs with 32 units, none stopped early, of about 1.2 s of training each:
by our search, and by Ray Tune as its first page shows it, each from the start of its process to
its end. Beside them two warm processes that do nothing but train as many trials at the same time:
their seconds are the ideal. Ratios are of the same round, their medians over the rounds. The last
line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from functools import cache
from pathlib import Path

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from rich.console import Console
from rich.table import Table

from benchmarks.bars import judge
from deployments.stack import ALLOCATOR
from forecasting import prices, sources
from forecasting.settings import load_settings
from forecasting.study import SPACE as WHOLE
from forecasting.windows import Splits, Windows, join, make_windows

SEED, EPOCHS, CORES = 7, 10, 2
CONTEXT, HORIZON = 64, 5
LAST_DAY, YEAR_END = date(2012, 1, 31), np.datetime64("2012-01-01")
SPACE: dict[str, BaseDistribution] = {
    **{name: WHOLE[name] for name in ("dropout", "reach", "lr", "weight_decay")},
    "hidden": CategoricalDistribution([32]),
}
BARS = {
    "vs_ray_default": (">=", 3.5),
    "efficiency_16": (">=", 0.5),
    "efficiency_64": (">=", 0.7),
}


@cache
def parts(windows: int) -> Splits:
    """As many training windows of four symbols to 2010, the last ones; validated on 2011."""
    every = join([_windows(symbol) for symbol in ("AAPL", "GOOG", "IBM", "MSFT")])
    past = every.take(every.origins < np.datetime64("2010-12-20"))
    chosen = np.sort(np.argsort(past.origins, kind="stable")[-windows:])
    year = (every.origins >= np.datetime64("2011-01-01")) & (every.origins < YEAR_END)
    validation = every.take(year)
    return Splits(past.take(chosen), validation, validation)


def _windows(symbol: str) -> Windows:
    with tempfile.TemporaryDirectory() as home:
        settings = load_settings(home=Path(home), source="sample")
        frame = prices.adjusted(sources.fetch(settings, symbol, LAST_DAY), LAST_DAY)
    return make_windows(frame, CONTEXT, HORIZON)


def pure(trials: int, windows: int, processes: int = CORES) -> float:
    """Sum of the seconds that processes trained which share `trials`, one a core."""
    command = [sys.executable, "-m", "benchmarks.peers.search_pure"]
    arguments = [str(trials // processes), str(EPOCHS), str(windows)]
    crew = [
        subprocess.Popen(
            [*command, *arguments],
            env=os.environ | ALLOCATOR | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    for each in crew:
        assert each.stdout is not None
        each.stdout.readline()
    told = []
    for each in crew:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    for each in crew:
        out, _ = each.communicate(timeout=600)
        told.append(json.loads(out.strip().splitlines()[-1])["seconds"])
    return float(sum(told))


def search(name: str, trials: int, windows: int) -> float:
    """Seconds of one search from the start of its process to its end, in a home of its own."""
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-m", f"benchmarks.peers.{name}"]
        # what our entry points set before Python starts, others have to know of
        own = {"HOME": home, "RAY_ADDRESS": "local"}
        if name == "search_ours":
            own = ALLOCATOR | {"HOME": home}
        began = time.perf_counter()
        done = subprocess.run(
            [*command, str(trials), str(EPOCHS), str(windows)],
            env=os.environ | own,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{name} failed ({done.returncode}): {done.stderr[-800:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if found["trials"] != trials:
        raise SystemExit(f"{name} should have run {trials} trials to their end; it ran {found}")
    return seconds


def calibrated(seconds: float) -> int:
    """How many windows make a trial last that long on this machine, one a core."""
    probe, trials = 2000, 4 * CORES
    each = pure(trials, probe) / trials
    return int(probe * seconds / each)


def main() -> int:
    """Run, and print table and figures; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="What a search costs beside its training.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trial-seconds", type=float, default=1.2)
    options = parser.parse_args()
    runs: dict[str, list[float]] = {}

    def told(name: str, seconds: float) -> None:
        runs.setdefault(name, []).append(seconds)
        print(f"{name}: {seconds:.1f} s", file=sys.stderr)

    for _ in range(options.rounds):
        windows = calibrated(options.trial_seconds)  # anew: a shared machine changes its speed
        told("training alone, 16", pure(16, windows) / CORES)
        told("perennial, 16", search("search_ours", 16, windows))
        told("Ray Tune, its defaults, 16", search("search_defaults", 16, windows))
        told("training alone, 64", pure(64, windows) / CORES)
        told("perennial, 64", search("search_ours", 64, windows))
    table = Table(title=f"A search of trials of {options.trial_seconds} s")
    table.add_column("")
    table.add_column("seconds, median", justify="right")
    for name, seconds in runs.items():
        table.add_row(name, f"{statistics.median(seconds):.1f}")
    Console().print(table)

    def ratio(above: str, below: str) -> float:
        pairs = zip(runs[above], runs[below], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    figures = {
        "vs_ray_default": ratio("Ray Tune, its defaults, 16", "perennial, 16"),
        "efficiency_16": ratio("training alone, 16", "perennial, 16"),
        "efficiency_64": ratio("training alone, 64", "perennial, 64"),
    }
    met = judge(figures, BARS)
    print(json.dumps(figures))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
