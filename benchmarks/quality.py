"""How good the forecasts are, on honest splits: `make bench-quality`.

Everybody forecasts the log return of 1 to 5 days from the same origins of GOOG, as 39 quantiles,
and is scored by CRPS in basis points. Two splits: fixed (trained to 2010, validated on 2011, tested
on 2012 and 2013) and walk-forward (a new start at each year of 2008 to 2012, validated on the year
before it). The network learns from AAPL, GOOG, IBM and MSFT, of each only what was known before the
test year; no epoch, weight or width is chosen on a test day. How its design was compared, and what
of it was decided with this table in sight, is said in the README.

The network's figures are means over seeds, with the range of the seeds beside; its peers have one
seed. They run in `.venv-peers/forecasting`, which is made on first use (`--without-peers` leaves
them out), and their settings are told in `peers/`. The last line is one JSON object.

`--reserved` scores AAPL, IBM and MSFT instead, on the same days. Their test years choose nothing:
it is for when everything is fixed, once.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks.environments import PEERS, PeerError, python_of
from benchmarks.peers.exchange import Task, answered
from forecasting import baselines, metrics, model, prices, sources
from forecasting.contract import QUANTILE_LEVELS as LEVELS
from forecasting.garch import garch_quantiles
from forecasting.hyperparameters import ModelConfig
from forecasting.metrics import BASIS_POINTS, Array
from forecasting.network import Network
from forecasting.settings import load_settings
from forecasting.windows import Splits, Windows, join, make_windows

SYMBOL, SYMBOLS = "GOOG", ("AAPL", "GOOG", "IBM", "MSFT")
RESERVED = ("AAPL", "IBM", "MSFT")
LAST_DAY = date(2013, 3, 1)
CONTEXT, HORIZON, VALIDATION, EPOCHS = 64, 5, 250, 40
LAG = 2 * HORIZON
SHOWN = (0, HORIZON - 1)
"""Horizons of the table: one and five days."""
SPLITS: dict[str, tuple[tuple[str, str], ...]] = {
    "fixed": (("2012-01-01", "2013-03-31"),),
    "walk-forward": tuple((f"{year}-01-01", f"{year}-12-31") for year in range(2008, 2013)),
}
RW, GARCH = "random walk, all residuals", "GARCH(1,1), filtered history"
RW250 = "random walk, last 250"
OURS, OFF = "perennial", "perennial, LSTM off"
UNTRAINED, SHUFFLED = "perennial, LSTM untrained", "perennial, targets shuffled"
UNSEEN = "perennial, symbol never seen"
LEARNED = (UNTRAINED, SHUFFLED, UNSEEN, OURS)
"""Those with a seed."""
BARS: dict[str, tuple[str, tuple[float, float]]] = {
    "crps_wf_vs_rw": ("<=", (0.973, 0.980)),
    "crps_wf_vs_garch": ("<=", (0.998, 0.996)),
    "dm_t_vs_garch": ("<=", (-2.0, -2.0)),
    "price_mae_vs_rw": ("<=", (1.0, 1.0)),
    "cover80_wf": ("within 2 s.e. of", (80.0, 80.0)),
    "cover95_wf": ("within 2 s.e. of", (95.0, 95.0)),
    "cover80_2008": (">=", (76.0, 76.0)),
    "cover95_2008": (">=", (92.0, 92.0)),
    "tail_wf_vs_rw": ("<=", (0.84, 0.87)),
    "crps_fixed_vs_rw250": ("<=", (1.005, 0.985)),
}

Forecast = Callable[[pd.DataFrame, Array], Array]
CLASSICAL: dict[str, Forecast] = {
    RW: lambda f, o: baselines.random_walk_quantiles(f, o, HORIZON, LEVELS),
    RW250: lambda f, o: baselines.random_walk_quantiles(f, o, HORIZON, LEVELS, 250),
    "random walk, last 60": lambda f, o: baselines.random_walk_quantiles(f, o, HORIZON, LEVELS, 60),
    "random walk with drift": lambda f, o: baselines.drift_quantiles(f, o, HORIZON, LEVELS),
    "HAR, filtered history": lambda f, o: baselines.har_quantiles(f, o, HORIZON, LEVELS),
    "GARCH(1,1)-t": partial(garch_quantiles, horizon=HORIZON, levels=LEVELS, innovations="t"),
    GARCH: partial(garch_quantiles, horizon=HORIZON, levels=LEVELS),
}
SCRIPTS: dict[str, tuple[str, ...]] = {
    "AutoARIMA": ("statistical.py", "AutoARIMA"),
    "AutoTheta": ("statistical.py", "AutoTheta"),
    "NeuralForecast LSTM": ("neural_lstm.py",),
    "tutorial LSTM on scaled prices": ("tutorial_lstm.py",),
}
"""Peers, and what `peers/` runs for them; settings are said there."""


@dataclass(frozen=True)
class Part:
    """A stretch of test days."""

    split: str
    first: str
    last: str


@dataclass(frozen=True)
class Job:
    """One contestant on one stretch of a symbol; seed 0 for those that have one forecast only."""

    name: str
    part: Part
    seed: int
    symbol: str = SYMBOL


PARTS = [Part(split, *days) for split, parts in SPLITS.items() for days in parts]


def _parts(split: str) -> list[Part]:
    return [part for part in PARTS if part.split == split]


# data ---------------------------------------------------------------------------------------------
@cache
def frame(symbol: str) -> pd.DataFrame:
    """All rows of a symbol, adjusted."""
    with tempfile.TemporaryDirectory() as home:
        settings = load_settings(home=Path(home), source="sample")
        return prices.adjusted(sources.fetch(settings, symbol, LAST_DAY), LAST_DAY)


@cache
def windows(symbol: str) -> Windows:
    """All windows of a symbol whose outcome is known."""
    every = make_windows(frame(symbol), CONTEXT, HORIZON, SYMBOLS.index(symbol))
    return every.take(every.known)


def held_out(part: Part, symbol: str = SYMBOL) -> Windows:
    """Windows of the test days."""
    every = windows(symbol)
    first, last = np.datetime64(part.first), np.datetime64(part.last)
    return every.take((every.origins >= first) & (every.origins <= last))


def splits(part: Part, symbol: str = SYMBOL, teachers: Sequence[str] = SYMBOLS) -> Splits:
    """What may be learned from before the test days, and those; no target reaches a later part."""
    every = join([windows(each) for each in teachers])
    days = np.unique(every.origins)
    past = days[days < np.datetime64(part.first)]
    validation = every.origins >= past[-VALIDATION - HORIZON]
    return Splits(
        train=every.take(every.origins < past[-VALIDATION - 2 * HORIZON]),
        validation=every.take(validation & (every.origins < past[-HORIZON])),
        gate=held_out(part, symbol),
    )


def task(part: Part, symbol: str) -> Task:
    """The same for a peer: the closes of all symbols up to the last outcome of the test days."""
    closes = pd.DataFrame({each: frame(each)["close"] for each in SYMBOLS})
    names = [symbol, *(each for each in SYMBOLS if each != symbol)]
    origins = held_out(part, symbol).origins
    first, last = baselines.positions(closes, origins[[0, -1]])
    return Task(
        symbols=np.array(names),
        prices=closes[names].to_numpy().T[:, : last + HORIZON + 1],
        first=int(first),
        horizon=HORIZON,
        levels=np.array(LEVELS),
        validation=VALIDATION,
        seed=1,
    )


# contestants --------------------------------------------------------------------------------------
def forecast(job: Job) -> Array:
    """Quantiles of log returns [n, horizon, levels]."""
    warnings.filterwarnings("ignore")
    if job.name in CLASSICAL:
        return CLASSICAL[job.name](frame(job.symbol), held_out(job.part, job.symbol).origins)
    if job.name in SCRIPTS:
        return ask(python_of("forecasting"), SCRIPTS[job.name], task(job.part, job.symbol))
    learner = {OFF: _off, UNTRAINED: _untrained, SHUFFLED: _shuffled}.get(job.name, _fitted)
    others = [each for each in SYMBOLS if each != job.symbol]
    parts = splits(job.part, job.symbol, others if job.name == UNSEEN else SYMBOLS)
    return model.quantiles_of_returns(learner(parts, ModelConfig(seed=job.seed)), parts.gate)


def ask(python: Path, script: Sequence[str], asked: Task) -> Array:
    """Have a script of `peers/` forecast: its name, then its arguments but for the folder.

    Raises:
        PeerError: it failed, or forecast something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked.write(Path(folder))
        command = [str(python), str(PEERS / script[0]), *script[1:], folder]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PeerError(f"{' '.join(script)} failed: {done.stderr.strip()[-800:]}")
        found: Array = answered(Path(folder))
    expected = (len(asked.origins), asked.horizon, len(asked.levels))
    if found.shape != expected or not np.isfinite(found).all():
        raise PeerError(f"{' '.join(script)}: {expected} finite quantiles expected: {found.shape}")
    return found


def _fitted(parts: Splits, config: ModelConfig) -> Network:
    with tempfile.TemporaryDirectory() as folder:
        return model.fit(parts, config, EPOCHS, folder=Path(folder)).network


def _untrained(parts: Splits, config: ModelConfig) -> Network:
    network = model.untrained(parts, config).eval()
    model.calibrate(network, parts)
    return network


def _off(parts: Splits, config: ModelConfig) -> Network:
    network = model.untrained(parts, config).eval()
    network.switch.zero_()
    model.calibrate(network, parts)
    return network


def _shuffled(parts: Splits, config: ModelConfig) -> Network:
    """The outcomes of the training windows, in units of what was expected, handed round."""
    expected = model.untrained(parts, config).eval()
    expected.switch.zero_()
    width = model.quantiles_of_returns(expected, parts.train)[..., -1]
    order = np.random.default_rng(config.seed).permutation(len(parts.train))
    returns = (parts.train.returns / width)[order] * width
    network = _fitted(replace(parts, train=replace(parts.train, returns=returns)), config)
    network.switch.fill_(1)
    network.volatility.estimate(parts.train)
    model.calibrate(network, parts)
    return network


# scores -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Scores:
    """One contestant on one split; losses are means over its seeds.

    Attributes:
        crps, tails: basis points [n, horizon]; tails is the mean of the 2.5 % and 97.5 % pinball.
        seeds: mean CRPS of each seed [seeds, horizon].
        inside: [seeds, masses, n, horizon], whether outcomes lay within 80 % and 95 %.
        mae: mean absolute error of the median in log returns over that of no change [horizon].
    """

    crps: Array
    tails: Array
    seeds: Array
    inside: Array
    mae: Array

    @classmethod
    def of(cls, runs: Sequence[Array], returns: Array, close: Array) -> "Scores":
        """From the quantiles of each seed [n, horizon, levels]."""
        crps = np.stack([metrics.crps(returns, q, LEVELS) for q in runs]) * BASIS_POINTS
        pinball = np.stack([metrics.pinball(returns, q, LEVELS) for q in runs]) * BASIS_POINTS
        actual = close[:, None] * np.exp(returns)
        still = np.abs(actual - close[:, None]).mean(axis=0)
        middle = np.mean([q[..., LEVELS.index(0.5)] for q in runs], axis=0)
        missed = np.abs(actual - close[:, None] * np.exp(middle)).mean(axis=0)
        return cls(
            crps=crps.mean(axis=0),
            tails=(pinball[..., 0] + pinball[..., -1]).mean(axis=0) / 2,
            seeds=crps.mean(axis=1),
            inside=np.stack([[_inside(returns, q, mass) for mass in (0.8, 0.95)] for q in runs]),
            mae=missed / still,
        )

    def coverage(self, mass: int, days: Array | slice = slice(None)) -> Array:
        """Per cent inside [horizon], mean over the seeds."""
        share: Array = 100 * self.inside[:, mass][:, days].mean(axis=(0, 1))
        return share

    def coverage_error(self, mass: int, horizon: int) -> float:
        """Standard error of that, in per cent (HAC: five-day outcomes overlap)."""
        series = self.inside[:, mass, :, horizon].mean(axis=0)
        return 100 * float(np.sqrt(metrics.hac_variance(series, LAG)))


def _inside(returns: Array, quantiles: Array, mass: float) -> Array:
    one_by_one = [
        metrics.coverage(r[None], q[None], LEVELS, mass)
        for r, q in zip(returns, quantiles, strict=True)
    ]
    return np.array(one_by_one, dtype=np.float64)


def figures(scores: dict[tuple[str, str], Scores], symbol: str = SYMBOL) -> dict[str, list[float]]:
    """What the bars are held to: pairs of one and five days."""
    ours, walk, garch = (scores["walk-forward", name] for name in (OURS, RW, GARCH))
    fixed, walk250 = scores["fixed", OURS], scores["fixed", RW250]
    crash = np.arange(len(ours.crps)) < len(held_out(_parts("walk-forward")[0], symbol).origins)

    def ratio(mine: Array, other: Array) -> Array:
        return mine.mean(axis=0) / other.mean(axis=0)

    found = {
        "crps_wf_vs_rw": ratio(ours.crps, walk.crps),
        "crps_wf_vs_garch": ratio(ours.crps, garch.crps),
        "dm_t_vs_garch": np.array(
            [metrics.diebold_mariano(d, LAG)[0] for d in (ours.crps - garch.crps).T]
        ),
        "price_mae_vs_rw": np.maximum(ours.mae, fixed.mae),
        "cover80_wf": ours.coverage(0),
        "cover95_wf": ours.coverage(1),
        "cover80_2008": ours.coverage(0, crash),
        "cover95_2008": ours.coverage(1, crash),
        "tail_wf_vs_rw": ratio(ours.tails, walk.tails),
        "crps_fixed_vs_rw250": ratio(fixed.crps, walk250.crps),
    }
    return {name: [float(values[h]) for h in SHOWN] for name, values in found.items()}


def is_met(name: str, pair: Sequence[float], ours: Scores) -> bool:
    """Whether both figures of a pair reach their bars."""
    sense, bars = BARS[name]
    if sense == "<=":
        return all(value <= bar for value, bar in zip(pair, bars, strict=True))
    if sense == ">=":
        return all(value >= bar for value, bar in zip(pair, bars, strict=True))
    mass = int(name.startswith("cover95"))
    return all(
        abs(value - bar) <= 2 * ours.coverage_error(mass, h)
        for value, bar, h in zip(pair, bars, SHOWN, strict=True)
    )


# showing ------------------------------------------------------------------------------------------
def table(title: str, split: str, scores: dict[tuple[str, str], Scores]) -> Table:
    """One row a contestant; pairs are one day / five days."""
    shown = Table(title=f"{title}, {split}: 1 day / 5 days", title_style="bold")
    columns = ("CRPS bp", "over the walk", "price MAE", "t, GARCH", "80 %", "95 %", "tails bp")
    for column in ("", *columns):
        shown.add_column(column, justify="right" if column else "left", no_wrap=True)
    walk, garch = scores[split, RW], scores[split, GARCH]
    for name in [name for where, name in scores if where == split]:
        each = scores[split, name]
        t = [metrics.diebold_mariano(d, LAG)[0] for d in (each.crps - garch.crps).T]
        shown.add_row(
            name,
            _pair(each.crps.mean(axis=0), ".1f"),
            _pair(each.crps.mean(axis=0) / walk.crps.mean(axis=0), ".4f"),
            _pair(each.mae, ".3f"),
            "" if name == GARCH else _pair(t, ".1f"),
            _pair(each.coverage(0), ".1f"),
            _pair(each.coverage(1), ".1f"),
            _pair(each.tails.mean(axis=0), ".1f"),
        )
    return shown


def _pair(values: Sequence[float] | Array, form: str) -> str:
    return " / ".join(format(float(values[h]), form) for h in SHOWN)


def contribution(scores: dict[tuple[str, str], Scores]) -> Iterator[str]:
    """What the LSTM adds to the baseline, and how much the seeds differ."""
    for split in SPLITS:
        ours, off = scores[split, OURS], scores[split, OFF]
        for h in SHOWN:
            middle, low, high = metrics.relative_ci(ours.crps[:, h], off.crps[:, h], LAG)
            seeds = ours.seeds[:, h]
            yield (
                f"{split}, {h + 1} day{'s' if h else ''}: the LSTM changes the baseline's CRPS by "
                f"{middle:+.2%} (95 % interval {low:+.2%} to {high:+.2%}); seeds {seeds.min():.2f} "
                f"to {seeds.max():.2f} bp, standard deviation {seeds.std():.2f}"
            )


def margins(ours: Scores) -> str:
    """How far a coverage may be from its nominal share by chance."""
    told = []
    for mass, share in enumerate((80, 95)):
        errors = " / ".join(f"{ours.coverage_error(mass, h):.2f}" for h in SHOWN)
        told.append(f"{share} %: {errors}")
    return "standard errors of the walk-forward coverage, 1 day / 5 days, " + ", ".join(told)


def run(jobs: Sequence[Job]) -> dict[Job, Array]:
    """The quantiles of every job, one process a core."""
    made: dict[Job, Array] = {}
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers: there is one a core
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for job, quantiles in zip(jobs, pool.map(forecast, jobs), strict=True):
            made[job] = quantiles
            told = f"{len(made):4d}/{len(jobs)}  {job.symbol}, {job.name}, {job.part.first}"
            print(told, file=sys.stderr)
    return made


def compare(
    symbol: str, names: Sequence[str], seeds: Sequence[int]
) -> dict[tuple[str, str], Scores]:
    """Scores by split and name."""
    each = {name: seeds if name in LEARNED else (0,) for name in names}
    jobs = [
        Job(name, part, seed, symbol) for name in names for part in PARTS for seed in each[name]
    ]
    made = run(jobs)
    scores = {}
    for split in SPLITS:
        parts = _parts(split)
        test = join([held_out(part, symbol) for part in parts])
        for name in names:
            runs = [
                np.concatenate([made[Job(name, part, seed, symbol)] for part in parts])
                for seed in each[name]
            ]
            scores[split, name] = Scores.of(runs, test.returns, test.last_close)
    return scores


def tell(symbol: str, scores: dict[tuple[str, str], Scores]) -> tuple[dict[str, list[float]], bool]:
    """Print tables and lines; the figures, rounded, and whether they reach every bar unrounded."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    for split in SPLITS:
        console.print(table(symbol, split, scores))
    for line in contribution(scores):
        print(line)
    found, ours = figures(scores, symbol), scores["walk-forward", OURS]
    print(margins(ours))
    met = {name: is_met(name, pair, ours) for name, pair in found.items()}
    rounded = {name: [round(value, 4) for value in pair] for name, pair in found.items()}
    for name, pair in rounded.items():
        sense, bars = BARS[name]
        told = f"{pair[0]} / {pair[1]}, {sense} {bars[0]} / {bars[1]}"
        print(f"{name:22} {told} {'ok' if met[name] else 'MISSED'}")
    return rounded, all(met.values())


def main() -> int:
    """Run, and print tables and figures; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="Quality of the forecasts on honest splits.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--without-peers", action="store_true", help="no environment but ours")
    parser.add_argument("--reserved", action="store_true", help="AAPL, IBM and MSFT instead; once")
    options = parser.parse_args()
    began, seeds = time.monotonic(), range(1, options.seeds + 1)
    names = (*CLASSICAL, *LEARNED[:-1], OFF, OURS)
    if not options.without_peers:
        python_of("forecasting")  # before the workers, who would all make it
        names = (*SCRIPTS, *names)
    symbols = RESERVED if options.reserved else (SYMBOL,)
    told = {symbol: tell(symbol, compare(symbol, names, seeds)) for symbol in symbols}
    print(f"{time.monotonic() - began:.0f} s, {options.seeds} seeds")
    every = {symbol: found for symbol, (found, _) in told.items()}
    print(json.dumps(every if options.reserved else every[SYMBOL]))
    return 0 if all(met for _, met in told.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
