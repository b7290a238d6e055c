"""How many symbols are trained a second: `make bench-fleet`.

50 symbols, four real ones and synthetic ones beside them, each with a forecaster of its own:
windows, search, fit, export and everybody's scores for the gate, as the flow `train-each` spreads
them on Ray, by one worker and by two. Each round is a process from start to end of the work, Ray's
start included. The last line is one JSON object; `linear` is the speed-up of two workers over two.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from deployments.stack import ALLOCATOR
from forecasting import prices, sources
from forecasting.settings import Settings, load_settings
from tasks.cluster import spread
from tasks.fleet import WARM, Job, make

REAL = ("AAPL", "GOOG", "IBM", "MSFT")
DAY = date(2008, 12, 31)
SEARCH = {"trials": 2, "epochs": 5, "fit_epochs": 10, "folds": 1}
BAR = 0.8


def frames(symbols: int, settings: Settings) -> dict[str, pd.DataFrame]:
    """Prices by symbol: the real ones, then walks through the days of the real ones, drawn anew."""
    found = {
        symbol: prices.adjusted(sources.fetch(settings, symbol, DAY), DAY).iloc[-1100:]
        for symbol in REAL[:symbols]
    }
    for number in range(symbols - len(found)):
        pattern = found[REAL[number % len(REAL)]]
        found[f"SYN{number:02d}"] = _redrawn(pattern, np.random.default_rng(number))
    return found


def _redrawn(frame: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """The same days' shapes in stretches of a month, in another order."""
    starts = rng.integers(1, len(frame) - 22, size=len(frame) // 22 + 1)
    rows = np.concatenate([np.arange(start, start + 22) for start in starts])[: len(frame)]
    close = frame["close"].to_numpy()
    moves = np.log(close[rows] / close[rows - 1])
    path = close[0] * np.exp(np.cumsum(moves))
    columns = ("open", "high", "low")
    shapes = {name: frame[name].to_numpy()[rows] / close[rows] * path for name in columns}
    redrawn = pd.DataFrame({**shapes, "close": path}, index=frame.index)
    redrawn["volume"] = frame["volume"].to_numpy()[rows]
    return redrawn


def jobs(symbols: int, settings: Settings) -> Iterator[Job]:
    """What `train-each` would hand to the workers."""
    nobody = dict.fromkeys(("dataset_md5", "dataset_rev", "run_id", "git_commit"), "benchmark")
    for symbol, frame in frames(symbols, settings).items():
        facts = {
            **nobody,
            "forecaster": f"perennial-{symbol.lower()}",
            "symbols": (symbol,),
            "context": settings.context,
            "horizon": settings.horizon,
            "as_of": DAY,
        }
        yield Job(settings.for_workers(), {symbol: frame}, facts, [], None)


def work(symbols: int, workers: int) -> None:
    """One round, in this process; prints its seconds."""
    began = time.perf_counter()
    with TemporaryDirectory() as home:
        settings = load_settings(home=Path(home), concurrency=workers, **SEARCH)
        made = dict(spread(settings, make, jobs(symbols, settings), WARM))
    failed = [each for each in made.values() if isinstance(each, Exception)]
    if failed or len(made) != symbols:
        raise SystemExit(f"{len(failed)} of {symbols} symbols failed: {failed[:1]}")
    print(json.dumps({"seconds": time.perf_counter() - began}))


def one(symbols: int, workers: int) -> float:
    """Seconds of a round in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.fleet", "--symbols", str(symbols)]
    done = subprocess.run(
        [*command, "--work", str(workers)],
        env=os.environ | ALLOCATOR,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{workers} workers failed ({done.returncode}): {done.stderr[-800:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["seconds"])


def main() -> int:
    """Run, and print table and figures; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="Symbols trained a second, by one worker and two.")
    parser.add_argument("--symbols", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--work", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.symbols, options.work)
        return 0
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(options.rounds):
        for workers, found in seconds.items():
            found.append(one(options.symbols, workers))
            print(f"{workers} workers: {found[-1]:.1f} s", file=sys.stderr)
    rates = {workers: options.symbols / statistics.median(s) for workers, s in seconds.items()}
    table = Table(title=f"{options.symbols} symbols, a forecaster each")
    for column in ("workers", "seconds", "symbols a second"):
        table.add_column(column, justify="right")
    for workers, rate in rates.items():
        table.add_row(str(workers), f"{options.symbols / rate:.1f}", f"{rate:.2f}")
    Console().print(table)
    figures = {
        "symbols_a_second_1": round(rates[1], 3),
        "symbols_a_second_2": round(rates[2], 3),
        "linear": round(rates[2] / rates[1] / 2, 3),
    }
    print(f"linear {figures['linear']}, >= {BAR} {'ok' if figures['linear'] >= BAR else 'MISSED'}")
    print(json.dumps(figures))
    return 0 if figures["linear"] >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
