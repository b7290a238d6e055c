"""When is it worth retraining? Policies on the same days: `make replay`.

Each policy is played over GOOG of 2007 to 2013, and over planted markets (`benchmarks.markets`) in
which never retraining is wrong and the right answer is known: trading goes on as before, but news
moves out of trading hours, or into them, so that a day's range no longer means what the model
learned. There an oracle is played too, which retrains as soon as anything can be learned of it.

Two policies at a time, each in a process of its own (`deployments.replay`). Evidently draws its
weekly pages for the first of them, never retraining GOOG, of which the days per minute are; pages
of the others would show the same market. It may be killed: run again, it goes on. Table,
`replay.json`, `replay.svg`; the last line is one JSON object.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks.bars import judge
from benchmarks.drift import ROWS, Told, markets
from benchmarks.markets import garch, overnight
from deployments.replay import ORACLE
from deployments.stack import ALLOCATOR
from forecasting import costs
from forecasting.breaks import QUARTER
from forecasting.model_card import BLUE, GREEN, GREY, INK, ORANGE, RED
from forecasting.replay import POLICIES, Summary, against, summarise
from forecasting.sessions import sessions_between
from forecasting.settings import load_settings
from forecasting.store import engine_of

LEARNED, CALM, CHANGED = 1000, 60, 780
"""Market days of a planted market before its replay, in it before the change, and after."""

PURPLE, TEAL = "#8250df", "#1b7c83"
COLOURS = dict(
    zip([*POLICIES, ORACLE], (GREY, BLUE, GREEN, ORANGE, RED, INK, TEAL, PURPLE), strict=True)
)
PLANTED = {
    "PERENNIAL_GATE_DAYS": "60",
    "PERENNIAL_VALIDATION_DAYS": "60",
    "PERENNIAL_GATE_TOLERANCE": "0.03",
}
"""Of planted markets: a model that is judged on fewer days knows of a change sooner. Fewer days can
show less, so the gate asks for less."""
PAGES = {"PERENNIAL_REPORT_DAYS": "0"}
"""Where the environment does not say, and nobody looks: a page only of drift that begins."""
BARS = {
    "days_per_minute": (">=", 25),
    "false_alarms_per_quarter": ("<=", 0.05),
    "detected_within_15_days": (">=", 0.9),
    "minutes": ("<=", 90),
}
KNOWN = (190, 310, 500)
"""Market days after the change on which the oracle retrains: the windows, validation and gate are
all of the new market, the baseline has learned from a hundred days of it, from three hundred."""


@dataclass(frozen=True)
class Market:
    """What is replayed.

    Attributes:
        name: folder of its replay.
        title: in the table.
        symbol: ticker.
        first, last: market days.
        changed: day from which it is another one; None: nobody knows.
        oracle: days on which the oracle retrains.
        settings: environment beside that of the study.
        chosen: policies that are played; all if empty.
    """

    name: str
    title: str
    symbol: str
    first: date
    last: date
    changed: date | None = None
    oracle: tuple[date, ...] = ()
    settings: dict[str, str] = field(default_factory=dict, hash=False)
    chosen: tuple[str, ...] = ()

    @property
    def policies(self) -> list[str]:
        every = [*POLICIES, *([ORACLE] if self.oracle else [])]
        return [name for name in every if not self.chosen or name in self.chosen]


# --- markets ---------------------------------------------------------------------------------


def planted(folder: Path, name: str, title: str, seed: int, before: float, after: float) -> Market:
    """A market whose moves in trading hours are `before` as large, and `after` from a day on."""
    days = sessions_between(date(2001, 1, 2), date(2012, 12, 31))[: LEARNED + CALM + CHANGED]
    (frame,) = garch(1, len(days), seed)
    frame.index = pd.DatetimeIndex(days, name="date")
    change = LEARNED + CALM
    halves = overnight(frame, 0, before).iloc[:change], overnight(frame, 0, after).iloc[change:]
    table = pd.concat(halves).round({"open": 4, "high": 4, "low": 4, "close": 4})
    table["high"] = table[["open", "high", "close"]].max(axis=1)
    table["low"] = table[["open", "low", "close"]].min(axis=1)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name.upper()}.csv")
    source = str(folder / "{symbol}.csv")
    return Market(
        *(name, title, name.upper(), days[LEARNED], days[-1], days[change]),
        oracle=tuple(days[change + wait] for wait in KNOWN),
        settings=PLANTED | {"PERENNIAL_SOURCE": "file", "PERENNIAL_SOURCE_URL": source},
    )


def every_market(folder: Path) -> list[Market]:
    """GOOG, and the planted ones."""
    return [
        Market("goog", "GOOG 2007-2013", "GOOG", date(2007, 1, 3), date(2013, 2, 28)),
        planted(folder, "night", "planted: news moves into the night", 1, 1.0, 0.4),
        planted(folder, "hours", "planted: news moves into trading hours", 3, 0.4, 1.0),
    ]


# --- playing ---------------------------------------------------------------------------------


def play(jobs: list[tuple[Market, str]], at_once: int, logs: Path) -> None:
    """Play every policy, some at a time.

    Raises:
        SystemExit: one failed; its log says why.
    """
    waiting, running = list(jobs), {}
    logs.mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                market, policy = waiting.pop(0)
                running[market.name, policy] = _start(market, policy, logs)
            time.sleep(0.5)
            for (name, policy), process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name, policy]
                print(f"{name} {policy}: done, {len(waiting)} wait", file=sys.stderr)
                if process.returncode:
                    raise SystemExit(f"{name} {policy} failed: {logs / f'{name}-{policy}.log'}")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _start(market: Market, policy: str, logs: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "deployments.replay", "--policy", policy]
    command += ["--symbol", market.symbol, "--name", market.name]
    command += ["--first", str(market.first), "--last", str(market.last)]
    if policy == ORACLE:
        command += ["--on", *map(str, market.oracle)]
    pages = {} if (market.changed, policy) == (None, "never") else PAGES
    environment = pages | os.environ | ALLOCATOR | market.settings
    with (logs / f"{market.name}-{policy}.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def read(market: Market, root: Path) -> dict[str, Summary]:
    """What each policy came to."""
    found = {}
    for policy in market.policies:
        home = root / market.name / policy
        with engine_of(f"sqlite:///{home / 'perennial.db'}") as engine:
            played = summarise(engine, policy, market.symbol)
        found[policy] = replace(played, megabytes=costs.size(home) / 1e6)
    return found


# --- telling ---------------------------------------------------------------------------------


def table_of(market: Market, found: dict[str, Summary]) -> Table:
    """One row a policy."""
    table = Table(title=market.title)
    names = ("policy", "CRPS bp", "over never, % (95 %)", "80 %", "95 %", "retrains", "promoted")
    names += ("refused", "skipped", "rolled back", "CPU min", "watching", "wall min", "MB")
    for name in names:
        table.add_column(name, justify="left" if name == "policy" else "right")
    for policy, each in found.items():
        table.add_row(
            *(policy, f"{each.crps:.2f}", _relative(against(each, found["never"]))),
            *(f"{100 * each.coverage:.1f}", f"{100 * each.coverage95:.1f}"),
            *(str(each.retrains), str(each.promotions), str(each.refusals), str(each.skips)),
            *(str(each.rollbacks), f"{each.cpu_minutes:.1f}", f"{each.watch_cpu_minutes:.1f}"),
            *(f"{each.wall_minutes:.1f}", f"{each.megabytes:.0f}"),
        )
    return table


def _relative(figures: tuple[float, float, float]) -> str:
    middle, low, high = (100 * value for value in figures)
    return f"{middle:+.2f} ({low:+.2f} to {high:+.2f})"


def claim(found: dict[str, Summary], policy: str = "both") -> dict[str, float | str | bool]:
    """Is a policy within 0.5 % of the best one at no more than half of monthly's CPU minutes?

    `never_behind` is what never retraining loses to the best: on a planted market 3 % at least.
    """
    best = min(
        (each for name, each in found.items() if name in POLICIES), key=lambda each: each.crps
    )
    behind, low, high = against(found[policy], best)
    cost = found[policy].cpu_minutes / found["monthly"].cpu_minutes
    return {
        "never_behind": round(against(found["never"], best)[0], 5),
        "best": best.policy,
        "behind": round(behind, 5),
        "lower": round(low, 5),
        "upper": round(high, 5),
        "cpu_over_monthly": round(cost, 3),
        "holds": bool(behind <= 0.005 and cost <= 0.5),
    }


def draw(every: dict[Market, dict[str, Summary]], file: Path) -> None:
    """A row a market: CRPS so far against never retraining, and what the policies cost."""
    mpl.rcParams |= {"svg.hashsalt": "perennial", "font.size": 9, "axes.spines.top": False}
    mpl.rcParams["axes.spines.right"] = False
    figure, axes = plt.subplots(
        len(every), 2, figsize=(11, 3.2 * len(every)), width_ratios=(3, 1.3), squeeze=False
    )
    for (market, found), (left, right) in zip(every.items(), axes, strict=True):
        _draw_course(market, found, left)
        _draw_costs(found, right)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


def _draw_course(market: Market, found: dict[str, Summary], axis: plt.Axes) -> None:
    base = found["never"].losses
    for policy, each in found.items():
        both = pd.concat([each.losses, base], axis=1, join="inner")
        course = 100 * (both.iloc[:, 0].cumsum() / both.iloc[:, 1].cumsum() - 1)
        shown = course.iloc[20:]
        axis.plot(shown.index, shown, color=COLOURS[policy], label=policy, linewidth=1.4)
        days = pd.DatetimeIndex([day for day, state in each.retrained if state == "promoted"])
        days = days.intersection(shown.index)
        axis.scatter(days, shown.loc[days], color=COLOURS[policy], s=12, zorder=3)
    if market.changed:
        axis.axvline(np.datetime64(market.changed), color=INK, linewidth=0.8, linestyle=":")
        axis.annotate(
            "the change",
            (np.datetime64(market.changed), 1),
            (3, -8),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
        )
    axis.set(ylabel="CRPS so far over never's, %", title=f"{market.title} (dots: promotions)")
    axis.legend(ncols=4, fontsize=7, frameon=False)


def _draw_costs(found: dict[str, Summary], axis: plt.Axes) -> None:
    """A dot a policy; names stand beside the plot, no closer than they can be read."""
    axis.set(xlabel="CPU minutes of retraining", ylabel="CRPS, bp", title="what it costs")
    ranked = sorted(found.items(), key=lambda item: item[1].crps)
    crps = [each.crps for _, each in ranked]
    apart, height = 0.09 * (crps[-1] - crps[0]), -np.inf
    for policy, each in ranked:
        height = max(each.crps, height + apart)
        axis.scatter(each.cpu_minutes, each.crps, color=COLOURS[policy], s=30, zorder=3)
        axis.annotate(
            policy,
            (each.cpu_minutes, each.crps),
            (1.04, height),
            textcoords=("axes fraction", "data"),
            color=COLOURS[policy],
            va="center",
            arrowprops={"arrowstyle": "-", "color": COLOURS[policy], "linewidth": 0.5},
        )
    axis.margins(0.1)


def drift_figures(series: int) -> dict[str, float]:
    """The monitor's false alarms and what it finds, as in `benchmarks.drift` on fewer markets."""
    trained, tails = next(iter(ROWS.values()))
    told = Told()
    for number, frame in enumerate(markets(series, trained, tails)):
        told.add(frame, trained, trained + QUARTER + number % QUARTER)
    names = ("false_alarms_per_quarter", "detected_within_15_days")
    return {name: told.figures()[name] for name in names}


def main() -> int:
    """Play what is not played yet, and tell; 1 if a bar is missed, the claim fails on a planted
    market, or never retraining costs too little there to show anything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markets", nargs="+", help="names of some: goog, night, hours")
    parser.add_argument("--policies", nargs="+", help="some; never, monthly and both are needed")
    parser.add_argument("--trials", default="4", help="of a search, where no setting says")
    parser.add_argument("--jobs", type=int, default=2, help="policies at a time")
    parser.add_argument("--series", type=int, default=60, help="markets for the alarm's figures")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ.setdefault("PERENNIAL_TRIALS", options.trials)
    home, began = load_settings().home, time.monotonic()
    root = home / "replay"
    chosen = [
        market
        for market in every_market(root / "markets")
        if not options.markets or market.name in options.markets
    ]
    if options.policies:
        chosen = [replace(each, chosen=tuple(options.policies)) for each in chosen]
    jobs = [(market, policy) for market in chosen for policy in market.policies]
    try:
        play(jobs, options.jobs, root / "logs")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    every = {market.name: read(market, root) for market in chosen}
    console = Console(width=170)
    for market in chosen:
        console.print(table_of(market, every[market.name]))
    reports = home / "reports"
    reports.mkdir(parents=True, exist_ok=True)
    draw({market: every[market.name] for market in chosen}, reports / "replay.svg")
    measured = {
        "days_per_minute": next(iter(every.values()))["never"].days_per_minute,
        **drift_figures(options.series),
        "minutes": (time.monotonic() - began) / 60,  # of this run, if it went on after another
    }
    told = {
        **{name: round(value, 4) for name, value in measured.items()},
        "policies": {policy: each.figures() for policy, each in next(iter(every.values())).items()},
        "claims": {name: claim(found) for name, found in every.items()},
        "loop": {name: claim(found, "loop") for name, found in every.items() if "loop" in found},
        "planted": {
            market.name: {policy: each.figures() for policy, each in every[market.name].items()}
            for market in chosen
            if market.changed
        },
    }
    met = judge(measured, BARS, sys.stderr)
    (reports / "replay.json").write_text(json.dumps(told, indent=1))
    print(f"plots: {reports / 'replay.svg'}", file=sys.stderr)
    print(json.dumps(told))
    for market in chosen:
        if market.changed:
            claimed = told["claims"][market.name]
            sound = claimed["holds"] and claimed["never_behind"] >= 0.03
            print(f"the claim on {market.name}: {'ok' if sound else 'MISSED'}", file=sys.stderr)
            met &= sound
    return 0 if met else 1


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
