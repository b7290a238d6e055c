"""Train a forecaster: prices to dataset version to search to fit to gate to alias `production`.

Of one symbol, or of several that one version serves.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, TypeGuard

from prefect import flow, get_run_logger
from pydantic import BaseModel
from sqlalchemy import Engine

from flows.ingest import today_or
from forecasting import promotion
from forecasting.assignment import forecaster_name
from forecasting.contract import MODEL_FILE, Contract, read_contract
from forecasting.datasets import DatasetVersion
from forecasting.errors import OvertakenError
from forecasting.events import ModelRefused, put_once
from forecasting.hyperparameters import ModelConfig
from forecasting.registry import (
    MODEL_TAG,
    PRODUCTION,
    PROVISIONAL_TAG,
    Registry,
    open_registry,
)
from forecasting.scratch import scratch
from forecasting.settings import Settings, load_settings
from forecasting.store import engine_of
from forecasting.windows import Splits
from tasks.accounting import accounted
from tasks.approval import ask, require_approvable
from tasks.cache import cache_key, code_commit
from tasks.candidate import Candidate, Found, write_candidate
from tasks.events import telling
from tasks.gate import CARD, Judged, gate_scores, judge, show_verdict
from tasks.ingest import ingest_prices
from tasks.promote import promote_version
from tasks.steps import flow_run_id
from tasks.training import fit, past_of, prepare_windows, search, show_search, with_peers_of

Outcome = Literal["promoted", "refused", "unchanged", "skipped"]
Widen = Literal["if-needed", "always", "never"]
"""Whether a training searches, or starts from the parameters of the version in production."""


class TrainResult(BaseModel):
    """What one training came to.

    `symbol` is the one that was asked for, `symbols` are all that the forecaster serves; `version`
    is the version that serves afterwards for `promoted` and `unchanged`, else None; `scores` are
    CRPS in bp of log return (lower is better) and relative differences.
    """

    outcome: Outcome
    symbol: str
    symbols: list[str]
    as_of: date
    forecaster: str
    version: int | None = None
    reasons: list[str] = []
    run_id: str = ""
    dataset_md5: str = ""
    scores: dict[str, float] = {}


@flow(name="train")
@accounted
def train(
    symbol: str = "GOOG", as_of: date | None = None, symbols: list[str] | None = None
) -> TrainResult:
    """Train a forecaster on what is known on `as_of`; promote it if the gate agrees.

    Args:
        symbol: ticker of the source.
        as_of: the day it pretends to be; today if absent.
        symbols: several tickers instead, for which one global forecaster is trained and judged.

    Returns:
        The promoted version, or a refusal with reasons. A refusal is a completed run.
    """
    return run_training(load_settings(), symbols or [symbol], today_or(as_of), trigger="train")


def run_training(
    settings: Settings,
    symbols: Sequence[str],
    as_of: date,
    trigger: str,
    widen: Widen = "always",
) -> TrainResult:
    """The order of one training, shared by `train` and `retrain`; call it inside a flow.

    Args:
        settings: as `load_settings` reads them.
        symbols: all that the forecaster serves.
        as_of: the day it pretends to be.
        trigger: what asked for it.
        widen: whether it searches, or takes the parameters of the version in production.
    """
    require_approvable(settings)
    symbols = tuple(dict.fromkeys(symbols))
    forecaster = forecaster_name(symbols)
    registry = open_registry(settings)
    with telling(settings), engine_of(settings.sql_url) as engine:
        for line in promotion.reconcile(settings, registry, engine, forecaster):
            get_run_logger().warning("An interrupted promotion was settled: %s", line)
        dataset = ingest_prices(settings, with_peers_of(settings, symbols), as_of)
        training = Training.start(settings, registry, engine, symbols, as_of, dataset, trigger)
        try:
            return training.end(training.run(widen))
        except BaseException:
            training.fail()
            raise


@dataclass(frozen=True)
class Held:
    """The version in production and where its files lie."""

    version: int
    folder: Path
    contract: Contract


@dataclass(frozen=True)
class Fit:
    """A candidate, its hyperparameters, and everything that it depended on."""

    candidate: Candidate
    config: ModelConfig
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Attempt:
    """A fit laid into a folder: judged by the gate, or `known` already."""

    fit: Fit
    folder: Path
    contract: Contract
    judged: Judged | None = None
    known: TrainResult | None = None

    @property
    def refused(self) -> bool:
        """Whether the gate spoke against it."""
        return self.judged is not None and not self.judged.verdict.promote


@dataclass(frozen=True)
class Training:
    """One training inside its MLflow run."""

    settings: Settings
    registry: Registry
    engine: Engine
    symbols: tuple[str, ...]
    as_of: date
    dataset: DatasetVersion
    run_id: str

    @classmethod
    def start(
        cls,
        settings: Settings,
        registry: Registry,
        engine: Engine,
        symbols: tuple[str, ...],
        as_of: date,
        dataset: DatasetVersion,
        trigger: str,
    ) -> "Training":
        """Start its MLflow run."""
        tags = {
            "symbol": ",".join(symbols),
            "as_of": as_of.isoformat(),
            "dataset_md5": dataset.md5,
            "flow_run_id": flow_run_id(),
            "trigger": trigger,
        }
        name = forecaster_name(symbols).removeprefix("perennial-")
        run_id = registry.start_run(f"{name} {as_of}", tags)
        return cls(settings, registry, engine, symbols, as_of, dataset, run_id)

    def end(self, result: TrainResult) -> TrainResult:
        """Write down what it came to, tell a refusal, and end its MLflow run."""
        reasons = " ".join(result.reasons)
        if result.outcome == "refused":
            told = ModelRefused(
                forecaster=self.forecaster,
                as_of=self.as_of,
                run_id=self.run_id,
                reasons=tuple(result.reasons),
            )
            put_once(self.engine, told, same=self.run_id)
        ended = {"outcome": result.outcome, "reasons": reasons, "version": result.version or ""}
        self.registry.set_tags(self.run_id, ended)
        self.registry.finish(self.run_id, "FINISHED")
        get_run_logger().info("%s %s: %s", self.forecaster, result.outcome, reasons)
        return result

    def fail(self) -> None:
        """End its MLflow run without a result."""
        self.registry.finish(self.run_id, "FAILED")

    @property
    def forecaster(self) -> str:
        """The registered model that it is for."""
        return forecaster_name(self.symbols)

    @property
    def search_tags(self) -> dict[str, str]:
        """What a search and its trials are found by."""
        return {
            "symbol": ",".join(self.symbols),
            "as_of": self.as_of.isoformat(),
            "dataset_md5": self.dataset.md5,
        }

    def run(self, widen: Widen) -> TrainResult:
        """Every step in this process, with the search on Ray."""
        with scratch(self.settings.work_dir) as folder:
            held = self.production(folder / "production")
            if held is not None and held.contract.as_of > self.as_of:
                return self.too_old(held)
            splits = self.splits()
            warm = self.warm(splits, held, widen) if widen != "always" else None
            first = self.attempt(warm, folder / "warm", held) if warm else None
            if first is not None and not (first.refused and widen == "if-needed"):
                return self.conclude(first, held)
            found = self.searched(splits)
            if first is not None and found.config == first.fit.config:
                return self.conclude(first, held)  # judged already
            return self.conclude(self.attempt(found, folder / "searched", held), held, first)

    def production(self, folder: Path) -> Held | None:
        """The version in production, downloaded."""
        version = self.registry.alias(self.forecaster, PRODUCTION)
        if version is None:
            return None
        self.registry.download(self.forecaster, version, folder)
        return Held(version, folder, read_contract(folder))

    def splits(self) -> Splits:
        """Windows for training, validation and gate."""
        key = cache_key("windows", self.dataset.md5, self.cut)
        rows = self.settings, self.symbols, self.as_of, self.dataset.md5
        windows: Splits = _step(prepare_windows, *rows, key=key)
        return windows

    def warm(self, splits: Splits, held: Held | None, widen: Widen) -> Fit | None:
        """A fit with the parameters of the version in production; None where it is no good start.

        That is where they are not known any more, or validation shows them to have aged. Where
        nothing may be searched they are taken as they are, and the defaults for unknown ones.
        """
        past = past_of(self.registry, held.contract.run_id, self.settings.seed) if held else None
        if past is None:
            told = "defaults are taken" if widen == "never" else "searching"
            get_run_logger().info("No parameters of a version in production are known: %s", told)
            if widen == "never":
                return self.fitted(splits, ModelConfig(seed=self.settings.seed), "")
            return None
        fit = self.fitted(splits, past.config, past.search_run)
        aged = past.has_aged(fit.candidate.scores, self.settings.retrain_margin)
        if aged and widen == "if-needed":
            get_run_logger().info("Production's parameters have aged: searching")
            return None
        return fit

    def searched(self, splits: Splits) -> Fit:
        """A fit with the best parameters that a search finds."""
        key = cache_key("search", self.dataset.md5, self.tuning)
        found: Found = _step(search, self.settings, splits, self.run_id, self.search_tags, key=key)
        show_search(self.registry, self.run_id, found)
        return self.fitted(splits, found.config, found.run_id)

    def fitted(self, splits: Splits, config: ModelConfig, search_run: str) -> Fit:
        """A fit, re-used when data, code and parameters are the same."""
        fitting = self.tuning | self.picked(
            *("fit_epochs", "fit_workers", "fit_threads", "accelerator")
        )
        fitting |= {"config": asdict(config)}
        key = cache_key("fit", self.dataset.md5, fitting)
        candidate: Candidate = _step(fit, self.settings, splits, config, key=key)
        return Fit(candidate, config, fitting | {"search_run": search_run})

    @property
    def cut(self) -> dict[str, Any]:
        """What windows depend on, beside the data."""
        cut = self.picked("context", "horizon", "validation_days", "gate_days", "peers")
        return cut | {"symbols": ",".join(self.symbols), "as_of": self.as_of}

    @property
    def tuning(self) -> dict[str, Any]:
        """What a search depends on, beside the data."""
        return self.cut | self.picked(
            *("seed", "trials", "epochs", "concurrency", "folds", "grace_epochs"),
            *("search_seconds", "search_patience"),
        )

    def attempt(self, fit: Fit, folder: Path, held: Held | None) -> Attempt:
        """Write a fit down as a candidate, and have the gate judge it if it is a new one."""
        contract = write_candidate(fit.candidate, folder, self.facts())
        known = self.known(held, contract)
        if known is not None:
            return Attempt(fit, folder, contract, known=known)
        judged = judge(
            self.settings,
            self.engine,
            contract,
            self.as_of,
            self.dataset.md5,
            folder,
            held.folder if held is not None else None,
        )
        return Attempt(fit, folder, contract, judged=judged)

    def conclude(
        self, attempt: Attempt, held: Held | None, before: Attempt | None = None
    ) -> TrainResult:
        """What the training comes to, with why an attempt `before` was refused."""
        self.log_fit(attempt.fit.candidate, attempt.fit.parameters)
        if attempt.known is not None or attempt.judged is None:
            return attempt.known or self.result("refused", [])
        rest = attempt.fit.candidate, attempt.contract, attempt.folder, held, attempt.judged
        result = self.settle(*rest)
        if before is not None and before.judged is not None:
            told = " ".join(before.judged.verdict.reasons)
            result.reasons.append(f"Searched, for production's parameters were refused: {told}")
        return result

    def log_fit(self, candidate: Candidate, parameters: dict[str, Any]) -> None:
        """Parameters and scores of a candidate."""
        self.registry.log_params(self.run_id, {**parameters, "kind": candidate.kind})
        scores = [(name, value, 0) for name, value in candidate.scores.items()]
        self.registry.log_metrics(self.run_id, scores + candidate.history)
        self.registry.set_tags(self.run_id, {"kind": candidate.kind})

    def settle(
        self,
        candidate: Candidate,
        contract: Contract,
        folder: Path,
        held: Held | None,
        judged: Judged,
    ) -> TrainResult:
        """Show the verdict and, if it agrees, promote."""
        verdict = judged.verdict
        card = show_verdict(self.registry, self.run_id, contract, candidate.scores, judged)
        scores = candidate.scores | gate_scores(verdict)
        if not verdict.promote:
            return self.result("refused", list(verdict.reasons), scores=scores)
        why = verdict.summary()
        if self.settings.approval:
            question = f"May this version of **{self.forecaster}** go into production?\n\n{card}"
            answer = ask(self.settings, self.engine, self.forecaster, question)
            if not answer.approve:
                return self.result("refused", [str(answer)], scores=scores)
            why = f"{why} {answer}"
        tags = {PROVISIONAL_TAG: "true"} if verdict.provisional else {}
        version = self.registry.register(
            folder, self.forecaster, self.run_id, tags=tags, notes={CARD: card}
        )
        try:
            promoted = promote_version(
                self.settings,
                self.registry,
                self.engine,
                self.forecaster,
                version,
                why,
                judged_against=held.version if held is not None else None,
            )
        except OvertakenError as error:
            return self.result("refused", [str(error)], scores=scores)
        reasons = [why, promoted.served]
        return self.result("promoted", reasons, scores=scores, version=version)

    def too_old(self, held: Held) -> TrainResult:
        """Known before any training: production has seen days that this one must not."""
        reason = (
            f"as of {self.as_of} is before production's {held.contract.as_of} (version "
            f"{held.version}): production has seen those days. Use rollback to serve an older "
            "version."
        )
        return self.result("refused", [reason])

    def known(self, held: Held | None, contract: Contract) -> TrainResult | None:
        """A network that is in production, or gave way to another: there is nothing to compare."""
        if is_same(held, contract):
            reason = f"The model is identical to version {held.version}, which is in production."
            return self.result("unchanged", [reason], version=held.version)
        same = {MODEL_TAG: contract.files[MODEL_FILE]}
        version = self.registry.find(self.forecaster, same)
        line = promotion.replaced_by(self.engine, self.forecaster, version) if version else None
        if line is None:
            return None
        reason = (
            f"The model is identical to version {version}, which gave way to version "
            f"{line.version}: {line.why} Train as of a later day, or use rollback to serve it."
        )
        return self.result("refused", [reason])

    def facts(self) -> dict[str, Any]:
        """What the contract says about where the model came from."""
        return {
            "forecaster": self.forecaster,
            "symbols": self.symbols,
            "context": self.settings.context,
            "horizon": self.settings.horizon,
            "as_of": self.as_of,
            "dataset_md5": self.dataset.md5,
            "dataset_rev": self.dataset.rev,
            "run_id": self.run_id,
            "git_commit": code_commit(),
        }

    def picked(self, *names: str) -> dict[str, Any]:
        """Some settings by name."""
        return {name: getattr(self.settings, name) for name in names}

    def result(
        self,
        outcome: Outcome,
        reasons: list[str],
        version: int | None = None,
        scores: dict[str, float] | None = None,
    ) -> TrainResult:
        """A result of this training."""
        return TrainResult(
            outcome=outcome,
            symbol=self.symbols[0],
            symbols=list(self.symbols),
            as_of=self.as_of,
            forecaster=self.forecaster,
            version=version,
            reasons=reasons,
            run_id=self.run_id,
            dataset_md5=self.dataset.md5,
            scores=scores or {},
        )


def is_same(held: Held | None, contract: Contract) -> TypeGuard[Held]:
    """Whether the very same network is in production."""
    return held is not None and held.contract.files[MODEL_FILE] == contract.files[MODEL_FILE]


def _step(step: Any, *arguments: Any, key: str) -> Any:  # noqa: ANN401  (any Prefect task)
    state = step(*arguments, key=key, return_state=True)
    if state.name == "Cached":
        get_run_logger().info("%s: re-used from an earlier run (%s)", step.name, key)
    return state.result()
