"""What a worker does for one of many symbols: windows, search, fit, and everybody's scores.

Nothing here talks to Prefect, MLflow or a database: a worker is handed prices and numbers, and
hands back a candidate with the evidence on it.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from forecasting.contract import Contract
from forecasting.gate import Evidence
from forecasting.settings import Settings
from forecasting.study import Told, open_study
from forecasting.windows import make_windows, split, with_peers
from tasks.candidate import Candidate, Found, fit_candidate, write_candidate
from tasks.search import search_here

WARM = ("tasks.fleet", "forecasting.contest")
"""What a worker imports as it starts."""


@dataclass(frozen=True, eq=False)
class Job:
    """One symbol's training.

    Attributes:
        settings: numbers; see `Settings.for_workers`.
        frames: prices of the symbol, and after it of its peers, as known on the day.
        facts: for the contract.
        first: parameters to try before any are drawn.
        production: files of the version in production by name, if there is one.
    """

    settings: Settings
    frames: Mapping[str, pd.DataFrame]
    facts: Mapping[str, Any]
    first: list[dict[str, Any]]
    production: Mapping[str, bytes] | None


@dataclass(frozen=True, eq=False)
class Made:
    """What came of it: the search with its trials, the candidate, and the evidence on it."""

    found: Found
    trials: list[Told]
    candidate: Candidate
    contract: Contract
    evidence: Evidence


def make(job: Job) -> Made:
    """Train for one symbol, in this process alone.

    Raises:
        HistoryError: its prices are too short.
        TrainingError: no trial came to an end, or the fit did not.
    """
    from forecasting.contest import gather

    # others have the other cores
    settings = job.settings.model_copy(update={"fit_workers": 1, "fit_threads": 1})
    (symbol, *_) = job.frames
    own, *peers = (
        make_windows(frame, settings.context, settings.horizon) for frame in job.frames.values()
    )
    splits = with_peers(split(own, settings.validation_days, settings.gate_days), peers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        grace = settings.grace_epochs
        with open_study(folder / "study", seed=settings.seed, grace=grace) as study:
            study.suggest_first(job.first)
            result = search_here(splits, settings, study)
            trials = study.trials
        candidate = fit_candidate(settings, splits, result.config, folder / "fit")
        contract = write_candidate(candidate, folder / "candidate", dict(job.facts))
        evidence = gather(
            {symbol: job.frames[symbol]},
            folder / "candidate",
            _laid(job.production, folder / "production"),
            horizon=settings.horizon,
            validation_days=settings.validation_days,
            gate_days=settings.gate_days,
        )
    found = Found(config=result.config, leaderboard=result.leaderboard, run_id="")
    return Made(found, trials, candidate, contract, evidence)


def _laid(files: Mapping[str, bytes] | None, folder: Path) -> Path | None:
    if files is None:
        return None
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
