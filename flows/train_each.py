"""Train a forecaster of its own for each of many symbols, on Ray."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import flow, get_run_logger
from sqlalchemy import Engine

from flows.ingest import today_or
from flows.train import Held, Training, TrainResult
from forecasting import datasets, promotion
from forecasting.assignment import forecaster_name
from forecasting.datasets import DatasetVersion
from forecasting.errors import DataError, PerennialError
from forecasting.registry import Registry, open_registry
from forecasting.scratch import scratch
from forecasting.settings import Settings, load_settings
from forecasting.store import engine_of
from tasks.accounting import accounted
from tasks.approval import require_approvable
from tasks.candidate import write_candidate
from tasks.events import telling
from tasks.gate import weigh
from tasks.ingest import ingest_prices
from tasks.training import first_parameters, log_search, with_peers_of

if TYPE_CHECKING:
    from tasks.fleet import Job, Made


@flow(name="train-each")
@accounted
def train_each(symbols: list[str], as_of: date | None = None) -> list[TrainResult]:
    """Train an own forecaster for each symbol on what is known on `as_of`; the gate judges each.

    Windows, search, fit and scores of a symbol are one piece of work on Ray, as many at a time as
    `PERENNIAL_CONCURRENCY` says; verdicts and promotions are written down as they come in. A
    symbol whose training fails keeps no other from being trained: it is refused, with the reason.

    Args:
        symbols: tickers of the source.
        as_of: the day it pretends to be; today if absent.

    Returns:
        One result a symbol, in the order given.

    Raises:
        DataError: there is no symbol to train.
    """
    settings, day = load_settings(), today_or(as_of)
    require_approvable(settings)
    wanted = list(dict.fromkeys(symbols))
    if not wanted:
        raise DataError("No symbol to train; at least one is expected, such as GOOG.")
    registry = open_registry(settings)
    with (
        telling(settings),
        engine_of(settings.sql_url) as engine,
        scratch(settings.work_dir) as folder,
    ):
        dataset = ingest_prices(settings, with_peers_of(settings, wanted), day)
        fleet = _Fleet(settings, registry, engine, day, dataset, folder)
        results = fleet.run(wanted)
    return [results[symbol] for symbol in wanted]


@dataclass(frozen=True)
class _Fleet:
    """Trainings in flight, by symbol, and results of those that have ended."""

    settings: Settings
    registry: Registry
    engine: Engine
    as_of: date
    dataset: DatasetVersion
    scratch: Path
    flying: dict[str, tuple[Training, Held | None]] = field(default_factory=dict)
    results: dict[str, TrainResult] = field(default_factory=dict)

    def run(self, symbols: list[str]) -> dict[str, TrainResult]:
        """Results by symbol."""
        from tasks.cluster import spread
        from tasks.fleet import WARM, Job, Made, make

        def jobs() -> Iterator[Job]:
            for symbol in symbols:
                held = self.begin(symbol)
                if symbol in self.flying:
                    yield self.job(symbol, held)

        try:
            for job, made in spread(self.settings, make, jobs(), WARM):
                symbol = next(iter(job.frames))
                training, held = self.flying[symbol]
                if isinstance(made, Made):
                    result = self.settle(training, held, made)
                elif isinstance(made, PerennialError):
                    result = training.result("refused", [f"It could not be trained: {made}"])
                else:
                    raise made
                self.results[symbol] = training.end(result)
                del self.flying[symbol]
                get_run_logger().info("%d of %d symbols", len(self.results), len(symbols))
        finally:
            for training, _ in self.flying.values():
                training.fail()
        return self.results

    def begin(self, symbol: str) -> Held | None:
        """Start the training of a symbol, unless it is known already how it ends."""
        name = forecaster_name([symbol])
        for line in promotion.reconcile(self.settings, self.registry, self.engine, name):
            get_run_logger().warning("An interrupted promotion was settled: %s", line)
        training = Training.start(
            *(self.settings, self.registry, self.engine, (symbol,)),
            *(self.as_of, self.dataset, "train-each"),
        )
        self.flying[symbol] = training, None
        held = training.production(self.scratch / symbol / "production")
        self.flying[symbol] = training, held
        if held is not None and held.contract.as_of > self.as_of:
            self.results[symbol] = training.end(training.too_old(held))
            del self.flying[symbol]
        return held

    def job(self, symbol: str, held: Held | None) -> "Job":
        """What a worker is handed."""
        from tasks.fleet import Job

        training, _ = self.flying[symbol]
        return Job(
            settings=self.settings.for_workers(),
            frames={
                each: datasets.load_frame(self.settings, each, self.as_of, self.dataset.md5)
                for each in with_peers_of(self.settings, [symbol])
            },
            facts=training.facts(),
            first=first_parameters(self.registry, training.search_tags),
            production=None if held is None else _files(held.folder),
        )

    def settle(self, training: Training, held: Held | None, made: "Made") -> TrainResult:
        """Write down what a worker made, and the gate's verdict on it."""
        tags = training.search_tags
        found = log_search(self.registry, training.run_id, tags, made.found, made.trials)
        chosen = {"config": asdict(found.config), "search_run": found.run_id}
        training.log_fit(made.candidate, training.picked("seed", "trials", "epochs") | chosen)
        known = training.known(held, made.contract)
        if known is not None:
            return known
        folder = self.scratch / training.symbols[0] / "candidate"
        contract = write_candidate(made.candidate, folder, training.facts())
        judged = weigh(self.settings, self.engine, contract, self.dataset.md5, made.evidence)
        return training.settle(made.candidate, contract, folder, held, judged)


def _files(folder: Path) -> dict[str, bytes]:
    """Those of a model version; the notes beside them are left where they are."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
