"""`make demo`: the whole loop on Google's real prices, from an empty home to the crash of 2008.

Everything is done by the product's own parts: flows run as deployments in the worker, drift
starts `retrain` through a Prefect automation, forecasts are asked over HTTP. This module only plays
the market (new prices, day after day) and the client, and writes down what happened.
"""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from deployments.prefect_api import PrefectApi, Run
from deployments.report import Facts, Happening, collect, write_report
from deployments.stack import Stack
from forecasting import datasets, outcomes
from forecasting.errors import PerennialError, ServiceError
from forecasting.events import DriftDetected, PerformanceDegraded
from forecasting.sessions import sessions_between
from forecasting.settings import Settings, load_settings
from forecasting.store import open_engine

SYMBOL = "GOOG"
FORECASTER = "perennial-goog"
TRAINED = date(2007, 1, 31)
CALM_UNTIL = date(2007, 12, 31)
CRASH_UNTIL = date(2008, 12, 31)
MONITORED = (3, 6, 9, 10, 11, 12)
"""Months at whose end the monitor runs; each run makes up for every weekly check since the last."""
SETTINGS = {
    "PERENNIAL_TRIALS": "8",
    "PERENNIAL_POLL_SECONDS": "0.1",
    "PERENNIAL_CLOCK": "market",
    "PERENNIAL_RETRAIN_AFTER_DAYS": "0",  # the story ends in drift, not in age
}


@dataclass
class Demo:
    """One demonstration; `facts` is what the report is written from."""

    stack: Stack
    settings: Settings
    console: Console
    began: float = field(default_factory=time.monotonic)
    facts: Facts = field(default_factory=Facts)
    monitors: list[str] = field(default_factory=list)
    seen_retrains: set[str] = field(default_factory=set)
    served: int = 0

    def run(self) -> Facts:
        """The demonstration from start to end."""
        self.step("stack started", self.start)
        self.step("deployments and automations applied", self.stack.deploy)
        with PrefectApi(self.stack.prefect_url) as api, httpx.Client(timeout=10) as client:
            self.step("trained, gated, promoted", lambda: self.train(api))
            self.served = self.wait_served(client)
            self.happened(TRAINED, "served", self.served, "first forecast over HTTP")
            self.step("calm year watched", lambda: self.calm_year(api))
            self.step("crash replayed", lambda: self.replay(api, client))
            self.step("last monitor settled", lambda: self.settle(api))
            self.say(f"  {self.join(CRASH_UNTIL)} more actuals joined")
            self.facts.seconds = time.monotonic() - self.began
            collect(self.facts, self.settings, api)
        return self.facts

    def start(self) -> None:
        """The stack, with a line for each part that is ready."""
        self.stack.start(lambda line: self.say(f"  {line}"))

    def train(self, api: PrefectApi) -> None:
        """The deployment `train`, as of a day in 2007."""
        run_id = api.start("train/train", {"symbol": SYMBOL, "as_of": TRAINED.isoformat()})
        shown: set[str] = set()

        def tick(_: Run) -> None:
            for name, state in api.tasks(run_id):
                if state in ("Completed", "Cached") and name not in shown:
                    shown.add(name)
                    self.say(f"  task {name}: {state}")

        api.wait(run_id, 300, tick)
        self.facts.train_run = run_id

    def wait_served(self, client: httpx.Client, seconds: float = 20) -> int:
        """The version that answers a forecast.

        Raises:
            ServiceError: none does, for instance because the gate refused the first model.
        """
        deadline = time.monotonic() + seconds
        while True:
            answer = client.get(f"{self.stack.server_url}/v1/forecast/{SYMBOL}")
            if answer.is_success:
                return int(answer.json()["model_version"])
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"No forecast after training: {answer.status_code} {answer.text}"
                )
            time.sleep(0.05)

    def calm_year(self, api: PrefectApi) -> None:
        """A year at once: prices arrive, and one monitor run makes every weekly check of it."""
        datasets.ingest(self.settings, [SYMBOL], CALM_UNTIL)
        self.start_monitor(api, CALM_UNTIL, since=TRAINED)
        self.settle(api)

    def replay(self, api: PrefectApi, client: httpx.Client) -> None:
        """Day after day: prices arrive, a forecast is asked over HTTP, actuals are joined."""
        days = sessions_between(CALM_UNTIL, CRASH_UNTIL)[1:]
        checked = CALM_UNTIL
        for index, day in enumerate(days):
            datasets.ingest(self.settings, [SYMBOL], day)
            self.ask(client, day)
            if index + 1 < len(days) and days[index + 1].month == day.month:
                continue
            joined = self.join(day)
            self.say(f"  {day}: version {self.served} serving, {joined} actuals joined")
            if day.month in MONITORED:
                self.settle(api)
                self.start_monitor(api, day, since=checked)
                checked = day

    def ask(self, client: httpx.Client, day: date) -> None:
        """One forecast from that day's prices; every failed request is counted."""
        deadline = time.monotonic() + 20
        while True:
            answer = client.get(f"{self.stack.server_url}/v1/forecast/{SYMBOL}")
            self.facts.requests += 1
            if not answer.is_success:
                self.facts.failed_requests += 1
                raise ServiceError(f"{day}: forecast {answer.status_code}: {answer.text}")
            body = answer.json()
            if body["model_version"] != self.served:
                self.served = int(body["model_version"])
                self.happened(day, "hot reload", self.served, "first answer of the new version")
            if body["origin"] == day.isoformat():
                return
            if time.monotonic() > deadline:
                raise ServiceError(f"The server still forecasts from {body['origin']}, not {day}.")
            time.sleep(0.03)

    def start_monitor(self, api: PrefectApi, day: date, since: date) -> None:
        """The deployment `monitor`, which catches up on every weekly check after `since`."""
        parameters = {"symbol": SYMBOL, "as_of": day.isoformat(), "since": since.isoformat()}
        self.monitors.append(api.start("monitor/monitor", parameters))

    def settle(self, api: PrefectApi) -> None:
        """Wait for the last monitor and for the retrain that its event may have started."""
        if not self.monitors:
            return
        api.wait(self.monitors[-1], 180)
        # Every event that was delivered starts one retrain through the automation.
        kinds = (DriftDetected, PerformanceDegraded)
        expected = sum(len(api.events(kind.name)) for kind in kinds)
        deadline = time.monotonic() + 60
        while len(runs := api.runs("retrain")) < expected:
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"{expected} events but {len(runs)} retrain runs: look at the "
                    f"automations at {self.stack.prefect_url}/automations"
                )
            time.sleep(0.25)
        for run in runs:
            if run.id not in self.seen_retrains:
                self.say(f"  retrain {run.name} was started by {run.creator.lower()}")
                ended = api.wait(run.id, 300)
                self.seen_retrains.add(run.id)
                self.say(f"  retrain {run.name}: {ended.state.lower()} in {ended.seconds:.0f} s")

    def join(self, day: date) -> int:
        """Late labels: actuals that are known by `day`."""
        engine = open_engine(self.settings.sql_url)
        try:
            frame = datasets.load_frame(self.settings, SYMBOL, day)
            return outcomes.join_actuals(engine, SYMBOL, frame, day)
        finally:
            engine.dispose()

    def step(self, name: str, work: object) -> None:
        """Do one part and note its seconds."""
        began = time.monotonic()
        assert callable(work)
        work()
        self.facts.steps[name] = time.monotonic() - began
        self.say(f"[bold]{name}[/bold] in {self.facts.steps[name]:.1f} s")

    def happened(self, day: date, what: str, version: int | None, detail: str) -> None:
        """Note something that the client saw."""
        self.facts.happenings.append(Happening(day, what, version, detail))

    def say(self, line: str) -> None:
        """One line of progress."""
        self.console.print(f"[dim]{time.monotonic() - self.began:6.1f} s[/dim]  {line}")


def main() -> int:
    """Run the demonstration; exit code 0 only if all of it happened."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # also where a shell ignores it
        signal.signal(number, _interrupt)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    root = Path(".perennial").resolve()
    home = root / "demo"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    stack = Stack(home, extra=SETTINGS)
    environment = stack.environment()
    os.environ.clear()
    os.environ.update(environment)
    try:
        facts = Demo(stack, load_settings(), console).run()
        pages = write_report(facts, root / "reports")
        for table in _tables(facts):
            console.print(table)
        console.print(
            f"{facts.requests} forecasts asked over HTTP, {facts.failed_requests} failed\n"
        )
        console.print(f"Prefect   {stack.prefect_url}\nMLflow    {stack.mlflow_url}")
        console.print(f"server    {stack.server_url}/v1/forecast/{SYMBOL}")
        for page in pages:
            console.print(f"report    {page}")
        if sys.stdin.isatty() and sys.stdout.isatty():
            console.print("Look around; [bold]Ctrl-C[/bold] stops everything.")
            with suppress(KeyboardInterrupt):
                stack.watch()
    except PerennialError as error:
        console.print(f"[red]error:[/red] {error}\nlogs: {home / 'logs'}", markup=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    finally:
        with suppress(OSError):  # the terminal may be closed
            console.print("stopping ...")
        stack.stop()
    return 0


def _tables(facts: Facts) -> list[Table]:
    told = facts.to_json()
    happened = Table(title="What happened")
    for name in ("date", "what", "version", "detail"):
        happened.add_column(name, overflow="fold", no_wrap=name in ("date", "what"))
    for each in told["happenings"]:
        version = "" if each["version"] is None else str(each["version"])
        happened.add_row(each["day"], each["what"], version, each["detail"])
    scores = Table(title="CRPS of what was served, basis points (lower is better)")
    for name in ("version", "forecasts", "CRPS", "random walk", "ratio"):
        scores.add_column(name, justify="right")
    for each in told["scores"]:
        figures = [f"{each[key]:.1f}" for key in ("crps_bp", "random_walk_bp")]
        number, asked = str(each["model_version"]), str(each["forecasts"])
        scores.add_row(number, asked, *figures, f"{each['relative']:.3f}")
    seconds = Table(title="Seconds")
    seconds.add_column("step")
    seconds.add_column("seconds", justify="right")
    for name, value in facts.steps.items():
        seconds.add_row(name, f"{value:.1f}")
    seconds.add_row("in all", f"{facts.seconds:.1f}", style="bold")
    return [happened, scores, seconds]


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
