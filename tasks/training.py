"""Steps of training: windows, search, fit, gate. Results are cached on data, code and parameters.

The search and the network are imported inside the tasks that need them: a run whose results are
cached never pays for Ray, torch and Lightning.
"""

import shutil
import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext

from forecasting import backtest, datasets
from forecasting.contract import QUANTILE_LEVELS, Contract, seal
from forecasting.errors import ModelError
from forecasting.gate import GateVerdict
from forecasting.gate import judge as judge_scores
from forecasting.hyperparameters import ModelConfig
from forecasting.inference import Forecaster
from forecasting.registry import Registry, open_registry
from forecasting.settings import Settings
from forecasting.windows import Splits, Windows, make_windows, split, with_peers


@dataclass(frozen=True)
class Found:
    """What a search found: the best configuration, its leaderboard, and the run that logged it."""

    config: ModelConfig
    leaderboard: list[dict[str, Any]]
    run_id: str


@dataclass(frozen=True)
class Candidate:
    """Files of a fitted forecaster and what its validation said (CRPS in bp, lower is better).

    `history` holds (metric, value, epoch) of the final fit.
    """

    files: dict[str, bytes]
    kind: str
    scores: dict[str, float]
    history: list[tuple[str, float, int]]
    train_start: date
    train_end: date


def _key(_context: TaskRunContext, parameters: dict[str, Any]) -> str:
    return str(parameters["key"])


@task(name="windows", cache_key_fn=_key, persist_result=True, timeout_seconds=300)
def prepare_windows(settings: Settings, symbol: str, as_of: date, md5: str, key: str) -> Splits:
    """Cut the dataset version into training, validation and gate windows.

    Those of `settings.peers` are learned from as well.
    """
    own, *peers = (
        make_windows(
            datasets.load_frame(settings, each, as_of, md5), settings.context, settings.horizon
        )
        for each in with_peers_of(settings, symbol)
    )
    splits = split(own, settings.validation_days, settings.gate_days)
    return with_peers(splits, peers)


def with_peers_of(settings: Settings, symbol: str) -> list[str]:
    """A symbol, and those that its training learns from as well."""
    return list(dict.fromkeys((symbol, *settings.peers)))


@task(name="search", cache_key_fn=_key, persist_result=True, timeout_seconds=3600)
def search(settings: Settings, splits: Splits, parent_run: str, md5: str, key: str) -> Found:
    """Search the hyperparameters with Ray Tune; every trial is a nested MLflow run."""
    from tasks.search import run_search

    registry = open_registry(settings)
    run_id = registry.start_run("search", {"cache_key": key, "dataset_md5": md5}, parent=parent_run)
    try:
        result = run_search(
            splits, settings, on_trial=registry.trial_logger(run_id, {"dataset_md5": md5})
        )
    except BaseException:
        registry.finish(run_id, "FAILED")
        raise
    registry.finish(run_id, "FINISHED")
    return Found(config=result.config, leaderboard=result.leaderboard, run_id=run_id)


@task(name="fit", cache_key_fn=_key, persist_result=True, timeout_seconds=3600)
def fit(settings: Settings, splits: Splits, config: ModelConfig, key: str) -> Candidate:
    """Fit the best configuration with Lightning and export it to ONNX.

    Its checkpoint lies in a folder named by the key: a fit that was killed goes on when it is run
    again, and comes to the same weights.
    """
    from forecasting import model

    folder = settings.work_dir / key
    fitted = model.fit(
        splits,
        config,
        settings.fit_epochs,
        folder=folder,
        resume=folder / model.CHECKPOINT,
        accelerator=settings.accelerator,
        workers=settings.fit_workers,
    )
    with tempfile.TemporaryDirectory(dir=settings.work_dir) as name:
        model.export_onnx(fitted, Path(name))
        files = {path.name: path.read_bytes() for path in sorted(Path(name).iterdir())}
    shutil.rmtree(folder, ignore_errors=True)
    return Candidate(
        files=files,
        kind=fitted.kind,
        scores={
            "validation_crps_trained": fitted.trained,
            "validation_crps_untrained": fitted.untrained,
            "validation_crps_volatility": fitted.volatility,
        },
        history=[
            point
            for each in fitted.history
            for point in (
                ("fit_train_crps_bp", each.train, each.epoch),
                ("fit_validation_crps_bp", each.validation, each.epoch),
            )
        ],
        train_start=fitted.train_start,
        train_end=fitted.train_end,
    )


def write_candidate(candidate: Candidate, folder: Path, facts: dict[str, Any]) -> Contract:
    """Lay the candidate's files and its contract into `folder`."""
    folder.mkdir(parents=True)
    for name, content in candidate.files.items():
        (folder / name).write_bytes(content)
    return seal(
        folder,
        {
            **facts,
            "kind": candidate.kind,
            "train_start": candidate.train_start,
            "train_end": candidate.train_end,
            "quantile_levels": QUANTILE_LEVELS,
        },
    )


@task(name="gate", cache_policy=NO_CACHE, timeout_seconds=600)
def judge(
    settings: Settings, symbol: str, as_of: date, md5: str, candidate: Path, production: Path | None
) -> GateVerdict:
    """Score candidate, production and random walk on the same most recent days and decide."""
    frame = datasets.load_frame(settings, symbol, as_of, md5)
    challenger = Forecaster.load(candidate, version=0)
    windows = make_windows(frame, challenger.contract.context, settings.horizon)
    gate = split(windows, settings.validation_days, settings.gate_days).gate
    held = None
    if production is not None:
        champion = Forecaster.load(production, version=0)
        index = champion.contract.symbol_index(symbol)
        theirs = make_windows(frame, champion.contract.context, settings.horizon, index)
        held = _scores(champion, theirs.at(gate.origins), "model in production")
    return judge_scores(
        candidate=_scores(challenger, gate, "candidate"),
        random_walk=backtest.score_random_walk(frame, gate),
        production=held,
        tolerance=settings.gate_tolerance,
        min_windows=settings.gate_days,
    )


def _scores(forecaster: Forecaster, windows: Windows, name: str) -> NDArray[np.float64]:
    """CRPS of each window; no numbers where it does not answer, which the gate refuses."""
    try:
        return backtest.score_onnx(forecaster, windows)
    except ModelError as error:
        get_run_logger().warning("The %s cannot be scored: %s", name, error)
        return np.full(windows.returns.shape, np.nan)


def gate_scores(verdict: GateVerdict) -> dict[str, float]:
    """The gate's figures that could be computed, by metric name."""
    named = {
        "gate_candidate": verdict.candidate_crps,
        "gate_production": verdict.production_crps,
        "gate_random_walk": verdict.random_walk_crps,
        "gate_relative": verdict.relative_to_random_walk,
        "gate_upper95": verdict.upper95,
    }
    return {name: value for name, value in named.items() if value is not None}


def show_search(registry: Registry, run_id: str, found: Found) -> None:
    """Leaderboard as MLflow and Prefect artifacts."""
    registry.log_dict(
        run_id, {"search_run": found.run_id, "trials": found.leaderboard}, "search.json"
    )
    create_table_artifact(
        found.leaderboard,
        key="search-leaderboard",
        description="Trials by validation CRPS (bp of log return, lower is better)",
    )


def show_verdict(
    registry: Registry, run_id: str, candidate: Candidate, verdict: GateVerdict
) -> None:
    """Verdict as MLflow metrics and as MLflow and Prefect artifacts."""
    scores = gate_scores(verdict)
    registry.log_metrics(run_id, [(key, value, 0) for key, value in scores.items()])
    registry.log_dict(run_id, asdict(verdict), "gate-verdict.json")
    lines = [
        f"**{verdict.summary()}**",
        "",
        "| score | CRPS, bp |",
        "|---|---|",
        *(
            f"| {key.replace('_', ' ')} | {value:.2f} |"
            for key, value in (candidate.scores | scores).items()
            if key not in ("gate_relative", "gate_upper95")
        ),
    ]
    create_markdown_artifact(
        "\n".join([*lines, "", registry.run_link(run_id)]),
        key="gate-verdict",
        description=verdict.summary(),
    )
