"""`python -m deployments.replay`: what the loop would have done over a span of market history.

A replay has a home of its own, `PERENNIAL_HOME/replay/NAME`, in which each policy has one:

    first/      prices of the whole span, and the first version, which all policies start from
    POLICY/     a copy of its databases and prices, and what the policy made of them

Files of MLflow's runs stay in `first/`, for its database knows them by their address. Run again, a
replay goes on after the last market day that is done.
"""

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from rich.console import Console

from deployments.replay_full import play_full
from deployments.stack import ALLOCATOR
from forecasting.errors import ConfigError, PerennialError
from forecasting.replay import POLICIES, Policy
from forecasting.settings import PREFIX, load_settings

if TYPE_CHECKING:
    from flows.replay import OnDay, Span

FAST, FULL = ENGINES = ("fast", "full")
"""Flows as plain functions; or Prefect's server, worker and automations, and the HTTP server."""
ORACLE = "oracle"
"""A policy that is told when to retrain."""
SHARED = (
    *("PERENNIAL_TRACKING_URI", "MLFLOW_TRACKING_URI", "PERENNIAL_DATABASE_URL"),
    *("PERENNIAL_DVC_REMOTE", "PERENNIAL_PUBLISHED_URL", "PERENNIAL_RAY_ADDRESS", "RAY_ADDRESS"),
    *("PERENNIAL_SIGNING_KEY", "PERENNIAL_TRUSTED_KEY", "PERENNIAL_WEBHOOK_SECRET"),
    "PERENNIAL_NOTIFY_URL",
)
"""Settings that name what production uses."""
OWN = {
    "PERENNIAL_CLOCK": "market",
    "PERENNIAL_SERVER_URL": "",
    "PERENNIAL_CONFIRM_SECONDS": "0",
    "PERENNIAL_APPROVAL": "false",  # nobody would answer
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "ORT_DISABLE_TELEMETRY": "1",
}
"""What a replay always sets."""
ASIDE = {"PERENNIAL_REPORT_DAYS": "5"}
"""What it sets where the environment does not."""


def environment(home: Path) -> dict[str, str]:
    """Of a replay's process: every setting as it is, but for what would touch production."""
    kept = {key: value for key, value in os.environ.items() if key not in SHARED}
    return ASIDE | kept | OWN | {f"{PREFIX}HOME": str(home)}


def play(root: Path, span: "Span", policy: Policy, on_day: "OnDay", engine: str = FAST) -> None:
    """Play a policy in this process, whose environment becomes that of the replay.

    Args:
        root: folder of the replay.
        span: what is replayed.
        policy: by which.
        on_day: see `flows.replay.replay`.
        engine: one of `ENGINES`.

    Raises:
        ConfigError: the folder holds a replay of another span, or another process plays in it.
    """
    from flows.replay import begin, replay

    home = root / (policy.name if engine == FAST else f"{policy.name}-{FULL}")
    with FileLock(f"{root}.lock"):  # of policies that are played side by side one trains
        _require_same(root, span)
        if not (root / "first" / "begun").exists():
            _use(root / "first")
            begin(span)
            (root / "first" / "begun").touch()
        if not home.exists():
            _copy(root / "first", home)
    with _alone(home):
        if engine == FULL:
            play_full(home, span, policy, on_day, environment(home))
            return
        _use(home)
        replay(span, policy, on_day)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    try:
        with FileLock(f"{home}.lock", timeout=0):
            yield
    except Timeout as error:
        raise ConfigError(
            f"Another process plays in {home}; wait for it, or give another --name."
        ) from error


def _use(home: Path) -> None:
    wanted = environment(home)
    os.environ.clear()
    os.environ.update(wanted)


def _copy(first: Path, home: Path) -> None:
    part = home.with_name(f"{home.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    # what is published are the prices of the last day, which no server may see before
    left = shutil.ignore_patterns("artifacts", "results", "work", "published")
    shutil.copytree(first, part, ignore=left)
    part.rename(home)  # whole or not there


def _require_same(root: Path, span: "Span") -> None:
    root.mkdir(parents=True, exist_ok=True)
    file, told = root / "span", f"{span.symbol} {span.first} {span.last}"
    if not file.exists():
        file.write_text(told)
    if file.read_text() != told:
        raise ConfigError(
            f"{root} holds a replay of {file.read_text()}; {told} was asked for. Give another "
            "--name, or remove the folder."
        )


class Line:
    """How far a replay is: one line that is written over in a terminal, one a quarter elsewhere.

    It ends the replay after the day in which a signal came whose exception was lost: Python drops
    what is raised while it collects garbage.
    """

    def __init__(self, console: Console, policy: str) -> None:
        self.console, self.policy, self.interrupted = console, policy, False

    def interrupt(self, _signal: int, _frame: object) -> None:
        """Handler of signals that end the replay."""
        self.interrupted = True
        raise KeyboardInterrupt

    def __call__(self, position: int, total: int, day: date, told: str) -> None:
        """A day is done.

        Raises:
            KeyboardInterrupt: a signal came.
        """
        if self.interrupted:
            raise KeyboardInterrupt
        line = f"{self.policy}: {day}, {position} of {total} market days"
        if told:
            self.console.print(f"{self.policy}: {day} retrain {told}", markup=False)
        if self.console.is_terminal:
            self.console.print(line, end="\r", markup=False)
        elif position % 63 == 0 or position == total:
            self.console.print(line, markup=False)


def main(arguments: list[str] | None = None) -> int:
    """Play one policy; 130 where it was interrupted."""
    parser = argparse.ArgumentParser(prog="python -m deployments.replay", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--policy", choices=[*POLICIES, ORACLE], default="both")
    parser.add_argument(
        "--on", nargs="+", type=date.fromisoformat, default=[], help="days on which oracle retrains"
    )
    parser.add_argument("--symbol", default="GOOG")
    parser.add_argument("--first", type=date.fromisoformat, default=date(2007, 1, 3))
    parser.add_argument("--last", type=date.fromisoformat, default=date(2013, 2, 28))
    parser.add_argument("--name", default="", help="folder under replay/; the symbol if empty")
    parser.add_argument("--engine", choices=ENGINES, default=FAST)
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    policy = POLICIES.get(options.policy) or Policy(ORACLE, days=frozenset(options.on))
    line = Line(console, policy.name)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):  # also where a shell ignores it
        signal.signal(number, line.interrupt)
    root = load_settings().home / "replay" / (options.name or options.symbol.lower())
    try:
        from flows.replay import Span

        span = Span(options.symbol, options.first, options.last)
        play(root, span, policy, line, options.engine)
    except PerennialError as error:
        console.print(f"error: {error}", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("\ninterrupted; the same command goes on after the last day that is done")
        return 130
    return 0


if __name__ == "__main__":
    if not ALLOCATOR.items() <= os.environ.items():  # the fast engine trains in this process
        command = [sys.executable, "-m", "deployments.replay", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | ALLOCATOR)
    sys.exit(main())
