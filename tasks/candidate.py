"""A search's result and a fitted candidate, and how the one is made of the other.

Prefect is not needed here: workers of Ray that train for one of many symbols do without it.
"""

import shutil
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from forecasting.contract import QUANTILE_LEVELS, Contract, seal
from forecasting.hyperparameters import ModelConfig
from forecasting.settings import Settings
from forecasting.windows import Splits


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


def fit_candidate(
    settings: Settings, splits: Splits, config: ModelConfig, folder: Path
) -> Candidate:
    """Fit and export, with the checkpoint in `folder` as long as it takes."""
    from forecasting import model

    fitted = model.fit(
        splits,
        config,
        settings.fit_epochs,
        folder=folder,
        resume=folder / model.CHECKPOINT,
        accelerator=settings.accelerator,
        workers=settings.fit_workers,
        threads=settings.fit_threads,
    )
    with tempfile.TemporaryDirectory(dir=folder) as name:
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
