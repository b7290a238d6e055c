"""What serving costs, side by side with its peers: `make bench-serving`.

One model (the one that `make demo` promotes first) behind this project's server, `mlflow models
serve`, BentoML, Ray Serve and MLServer, one server at a time, in an order that turns from round to
round. Each must give the expected quantiles before it is loaded; ours logs every forecast and
checks an API key meanwhile, as always. Then the same with the network of an earlier comparison
(60 x 8, 2 x 64 LSTM), what the prediction log costs, and hostile requests (`benchmarks.fuzz`).

Medians over the rounds; ratios are of the same round. The last line is one JSON object.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import clients, servers, windows
from benchmarks.clients import Load, LoadError, Target
from benchmarks.fuzz import fuzz, show
from benchmarks.servers import OURS, RECIPES, PeerError, Recipe, Server, running

SLICES, SLICE = 5, 0.4
"""Turns a round in which the log's cost is measured, and the part of `--seconds` of each."""
STAGES = ("demo", "sixty", "log", "fuzz")
BARS: dict[str, tuple[str, float]] = {
    "vs_mlflow": (">=", 8.0),
    "vs_bentoml": (">=", 12.0),
    "vs_ray_serve": (">=", 35.0),
    "vs_mlserver_64": (">=", 1.5),
    "p50_ms_c1": ("<=", 0.6),
    "p99_ms_c16": ("<=", 8.0),
    "p99_ms_c64": ("<=", 20.0),
    "get_rps": (">=", 10_000.0),
    "errors": ("<=", 0.0),
    "rss_mb": ("<=", 150.0),
    "ready_s": ("<=", 2.0),
    "log_cost": ("<=", 0.10),
    "fuzz_requests": (">=", 50_000.0),
    "fuzz_failures": ("<=", 0.0),
}


@dataclass(frozen=True)
class Scenario:
    """A kind of request (see `windows.cases`; `get` has no body) and a number of connections."""

    kind: str
    connections: int

    @property
    def shown(self) -> str:
        """For people."""
        return {
            "one": "POST 1 window",
            "many": f"POST {windows.MANY} windows",
            "get": "GET latest",
        }[self.kind]


ONE, SIXTEEN, SIXTY_FOUR = (Scenario("one", count) for count in (1, 16, 64))
MANY, GET = Scenario("many", 8), Scenario("get", 16)
SCENARIOS = {"demo": (ONE, SIXTEEN, SIXTY_FOUR, MANY, GET), "sixty": (ONE, SIXTEEN, SIXTY_FOUR)}
Key = tuple[str, str, Scenario]
"""Network, server, scenario."""


@dataclass
class Results:
    """What was measured: lists hold one entry a round."""

    loads: dict[Key, dict[int, Load]] = field(default_factory=lambda: defaultdict(dict))
    ready: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    memory: dict[tuple[str, str], list[tuple[float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    missing: dict[str, str] = field(default_factory=dict)
    values: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(BARS))

    def median(self, key: Key, what: str) -> float | None:
        """Median over the rounds of one figure of `clients.Load`."""
        taken = [getattr(load, what) for load in self.loads[key].values()]
        return _median(taken)

    def ratio(self, network: str, peer: str, scenario: Scenario) -> float | None:
        """Median over the rounds of our requests a second to the peer's."""
        ours, other = (self.loads[network, name, scenario] for name in (OURS.name, peer))
        shared = [ours[n].rps / other[n].rps for n in ours if n in other and other[n].rps]
        return _median(shared)


@dataclass
class Bench:
    """One run of the benchmark in a scratch folder."""

    options: argparse.Namespace
    root: Path
    console: Console
    results: Results = field(default_factory=Results)
    _count: int = 0

    def run(self) -> None:
        """Every stage that was asked for."""
        stages = self.options.stages
        model = self.demo_model() if set(stages) - {"sixty"} else None
        if model is not None and "demo" in stages:
            self.compare("demo", model)
        if "sixty" in stages:
            folder = self.root / "sixty"
            folder.mkdir()
            command = [sys.executable, "-m", "benchmarks.peers.sixty", str(folder)]
            servers.run(command, servers.clean_environment(self.scratch("export")))
            self.compare("sixty", folder)
        if model is not None and OURS.name in self.options.only:
            if "log" in stages:
                self.log_cost(model)
            if "fuzz" in stages:
                self.fuzz(model)

    # the model ----------------------------------------------------------------------------------
    def demo_model(self) -> Path:
        """Folder of the version that `make demo` promotes first."""
        home: Path | None = self.options.model_home
        if home is not None:
            return _first_version(home)
        self.say("training the model of `make demo`")
        folder, scratch = self.root / "demo", self.scratch("train")
        environment = servers.clean_environment(scratch) | {
            "DVC_NO_ANALYTICS": "true",
            "PERENNIAL_CONFIRM_SECONDS": "0",  # there is no server yet
            "PERENNIAL_HOME": str(scratch / "perennial"),
            "PREFECT_HOME": str(scratch / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        }
        servers.run([sys.executable, "-m", "benchmarks.demo_model", str(folder)], environment)
        shutil.rmtree(scratch)
        return folder

    # side by side -------------------------------------------------------------------------------
    def compare(self, network: str, model: Path) -> None:
        """Load every server with every scenario that it knows, round after round."""
        cases = windows.cases(model)
        for number in range(self.options.rounds):
            chosen = [RECIPES[name] for name in self.options.only]
            for recipe in chosen if number % 2 == 0 else reversed(chosen):
                if recipe.name in self.results.missing:
                    continue
                try:
                    self.measure(network, number, recipe, model, cases)
                except (PeerError, LoadError) as error:
                    self.results.missing[recipe.name] = str(error)
                    self.say(f"{recipe.name} is missing: {error}")

    def measure(
        self,
        network: str,
        number: int,
        recipe: Recipe,
        model: Path,
        cases: dict[str, windows.Case],
    ) -> None:
        """One server in one round."""
        with self.server(recipe, model) as server:
            for scenario in SCENARIOS[network]:
                endpoint = recipe.endpoints.get(scenario.kind)
                if endpoint is None:
                    continue
                if endpoint.body is not None:
                    server.check(scenario.kind, cases["golden"])
                    server.check(scenario.kind, cases[scenario.kind])
                load = self.load(server, scenario, cases)
                self.results.loads[network, recipe.name, scenario][number] = load
                self.say(
                    f"{network} {number + 1}  {recipe.name:10} {scenario.shown:15} "
                    f"x {scenario.connections:2}  {load.rps:8.0f}/s  p50 {load.p50_ms:8.3f} ms  "
                    f"p99 {load.p99_ms:8.3f} ms  errors {load.failed}"
                )
            self.results.ready[network, recipe.name].append(server.ready_s)
            self.results.memory[network, recipe.name].append(server.memory_mb())

    def load(self, server: Server, scenario: Scenario, cases: dict[str, windows.Case]) -> Load:
        """Warm up, then measure; what failed meanwhile counts in both."""
        target = self.target(server, scenario, cases)
        before = clients.load(target, scenario.connections, self.options.warm_up)
        load = clients.load(target, scenario.connections, self.options.seconds)
        return replace(load, errors=Counter(before.errors) + Counter(load.errors))

    def slice(self, server: Server, scenario: Scenario, cases: dict[str, windows.Case]) -> Load:
        """Measure for a short time what is warm already."""
        target = self.target(server, scenario, cases)
        return clients.load(target, scenario.connections, self.options.seconds * SLICE)

    def target(self, server: Server, scenario: Scenario, cases: dict[str, windows.Case]) -> Target:
        """What is asked, as a load client wants it."""
        endpoint, headers, body = server.recipe.endpoints[scenario.kind], server.headers, None
        if endpoint.body is not None:
            body = self.root / "body"
            body.write_bytes(endpoint.body(cases[scenario.kind].windows))
            headers = headers | {"Content-Type": "application/json"}
        return Target(server.url + endpoint.path, endpoint.method, body, headers)

    # ours alone ---------------------------------------------------------------------------------
    def log_cost(self, model: Path) -> None:
        """Share of the throughput at 16 connections that the prediction log takes.

        Two servers stand side by side and are loaded in turn, for short times and often, so that
        whatever else the machine does meets both alike.
        """
        cases, costs = windows.cases(model), list[float]()
        with self.server(OURS, model) as logs, self.server(OURS, model, log=False) as silent:
            pair = {"with": logs, "without": silent}
            for server in pair.values():
                server.check("one", cases["one"])
                self.load(server, SIXTEEN, cases)
            for number in range(SLICES * self.options.rounds):
                order = list(pair) if number % 2 == 0 else list(reversed(pair))
                rates = {name: self.slice(pair[name], SIXTEEN, cases).rps for name in order}
                costs.append(1 - rates["with"] / rates["without"])
            low, high = min(costs), max(costs)
            self.say(f"log  costs {statistics.median(costs):.1%} ({low:.1%} to {high:.1%})")
            sizes = [_logged_bytes(server) for server in (logs, silent)]
            if not sizes[0] or sizes[1]:
                raise PeerError(f"bytes logged with and without a log: {sizes}")
        self.results.values["log_cost"] = statistics.median(costs)

    def fuzz(self, model: Path) -> None:
        """Hostile requests against a fresh server."""
        with self.server(OURS, model) as server:
            began = time.monotonic()
            report = fuzz(
                server.url,
                self.options.fuzz,
                key=server.headers["Authorization"].removeprefix("Bearer "),
                seed=self.options.seed,
                context=len(windows.cases(model)["one"].windows[0].dates),
                processes=servers.CPUS,
                server=server.popen.pid,
            )
            self.say(f"fuzz {report.requests} requests in {time.monotonic() - began:.0f} s")
            show(report)
        self.results.values["fuzz_requests"] = report.requests
        self.results.values["fuzz_failures"] = len(report.failures)

    # the end ------------------------------------------------------------------------------------
    def figures(self) -> None:
        """Fill `results.values` from what was measured."""
        found, values = self.results, self.results.values
        for peer in ("mlflow", "bentoml", "ray-serve"):
            name = f"vs_{peer.replace('-', '_')}"
            values[name] = found.ratio("demo", peer, SIXTEEN)
            values[f"sixty_{name}"] = found.ratio("sixty", peer, SIXTEEN)
        values["vs_mlserver_64"] = found.ratio("demo", "mlserver", MANY)
        for name, scenario, what in (
            ("p50_ms_c1", ONE, "p50_ms"),
            ("p99_ms_c16", SIXTEEN, "p99_ms"),
            ("p99_ms_c64", SIXTY_FOUR, "p99_ms"),
            ("get_rps", GET, "rps"),
            ("rps_c16", SIXTEEN, "rps"),
        ):
            values[name] = found.median(("demo", OURS.name, scenario), what)
        values["sixty_rps_c16"] = found.median(("sixty", OURS.name, SIXTEEN), "rps")
        own = [
            load
            for (_, name, _), loads in found.loads.items()
            if name == OURS.name
            for load in loads.values()
        ]
        values["errors"] = sum(load.failed for load in own) if own else None
        memory = found.memory["demo", OURS.name]
        values["rss_mb"] = max((largest for _, largest in memory), default=None)
        values["ready_s"] = _median(found.ready["demo", OURS.name])

    def tables(self) -> Iterator[Table]:
        """What was measured, then each figure with its bar."""
        table = Table(title=f"Serving on {servers.CPUS} cores, client {clients.tool()} beside it")
        for name in ("network", "request", "connections", "server"):
            table.add_column(name, no_wrap=True)
        for name in ("requests/s", "p50 ms", "p99 ms", "errors", "RSS MB", "start s"):
            table.add_column(name, justify="right")
        for network, scenarios in SCENARIOS.items():
            for scenario in scenarios:
                for name in self.options.only:
                    if self.results.loads.get((network, name, scenario)):
                        table.add_row(*self._row(network, name, scenario))
                table.add_section()
        yield table
        bars = Table(title="Figures and bars")
        for name in ("figure", "measured", "bar", ""):
            bars.add_column(name, justify="right" if name == "measured" else "left")
        for name, value in self.results.values.items():
            bars.add_row(name, _number(value), *_verdict(name, value))
        yield bars

    def _row(self, network: str, name: str, scenario: Scenario) -> list[str]:
        key, found = (network, name, scenario), self.results
        figures = [found.median(key, what) for what in ("rps", "p50_ms", "p99_ms")]
        errors = sum(load.failed for load in found.loads[key].values())
        memory = _median([total for total, _ in found.memory[network, name]])
        ready = _median(found.ready[network, name])
        shown = [_number(each) for each in (*figures, errors, memory and round(memory), ready)]
        return [network, scenario.shown, str(scenario.connections), name, *shown]

    @contextmanager
    def server(self, recipe: Recipe, model: Path, **options: bool) -> Iterator[Server]:
        """A running server in a scratch folder of its own, which is gone afterwards."""
        scratch = self.scratch(recipe.name)
        try:
            with running(recipe, model, scratch, **options) as server:
                yield server
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def scratch(self, name: str) -> Path:
        """A fresh folder; its path is short, since sockets are made below it."""
        self._count += 1
        return self.root / f"{name}-{self._count}"

    def say(self, line: str) -> None:
        """One line of progress."""
        self.console.print(line, markup=False)


def _first_version(home: Path) -> Path:
    """Earliest version in a home's model store.

    Raises:
        PeerError: there is none.
    """
    store = home / "store" / "models" / windows.FORECASTER
    versions = [each for each in store.glob("*") if each.name.isdigit()]
    if not versions:
        raise PeerError(f"{store} holds no version; was {home} made by `make demo`?")
    return min(versions, key=lambda each: int(each.name))


def _logged_bytes(server: Server) -> int:
    return sum(each.stat().st_size for each in server.log.parent.rglob("spool/*.jsonl"))


def _median(taken: list[float]) -> float | None:
    return statistics.median(taken) if taken else None


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value == int(value) or value >= 1000 else f"{value:.3f}"


def _verdict(name: str, value: float | None) -> tuple[str, str]:
    if name not in BARS:
        return "", ""
    sign, bar = BARS[name]
    if value is None:
        return f"{sign} {bar:g}", "not measured"
    kept = value >= bar if sign == ">=" else value <= bar
    return f"{sign} {bar:g}", "ok" if kept else "MISSED"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving")
    parser.add_argument("--model-home", type=Path, help="home of a `make demo`; else it is trained")
    parser.add_argument("--only", type=_names(tuple(RECIPES)), default=list(RECIPES))
    parser.add_argument("--stages", type=_names(STAGES), default=list(STAGES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement")
    parser.add_argument("--warm-up", type=float, default=2.0, help="seconds before each")
    parser.add_argument("--fuzz", type=int, default=50_000, help="hostile requests")
    parser.add_argument("--seed", type=int, default=7, help="of the hostile requests")
    parser.add_argument("--quick", action="store_true", help="one short round: does it work?")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.seconds, options.warm_up = 1, 1.0, 1.0
        options.fuzz = min(options.fuzz, 2000)
    return options


def _names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Reads a comma-separated choice of `known`."""

    def parse(text: str) -> list[str]:
        wanted = text.split(",")
        if unknown := set(wanted) - set(known):
            raise argparse.ArgumentTypeError(
                f"{', '.join(sorted(unknown))} unknown; of {', '.join(known)}"
            )
        return [name for name in known if name in wanted]

    return parse


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Measure.

    Returns:
        Exit status: 0, 1 if ours could not be measured or failed under hostile requests.
    """
    options = _options(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    os.environ.update(servers.QUIET)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    with tempfile.TemporaryDirectory(prefix="pb-", ignore_cleanup_errors=True) as scratch:
        bench = Bench(options, Path(scratch), console)
        try:
            bench.run()
        except (PeerError, LoadError) as error:  # what was measured before is shown
            bench.results.missing.setdefault("the rest", str(error))
        except KeyboardInterrupt:
            console.print("interrupted")
            return 130
    bench.figures()
    for table in bench.tables():
        console.print(table)
    found = bench.results
    for name, reason in found.missing.items():
        console.print(f"missing: {name}: {reason}", markup=False)
    rounded = {k: None if v is None else round(v, 3) for k, v in found.values.items()}
    reasons = {name: reason.splitlines()[-1][:200] for name, reason in found.missing.items()}
    print(json.dumps(rounded | {"missing": reasons}))
    failed = {OURS.name, "the rest"} & found.missing.keys()
    return 1 if failed or found.values["fuzz_failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
