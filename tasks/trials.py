"""One trial of a search, wherever it runs: a worker of Ray Tune, or this process.

The network is imported in the functions that fit: the driver of a search needs no torch.
"""

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray import tune

from forecasting.hyperparameters import METRIC, ModelConfig
from forecasting.settings import Settings
from forecasting.windows import Splits, folds

Report = Callable[[int, float, bytes | None], object]
"""Called after each epoch with its number over all folds, the score so far in bp, and now and then
a checkpoint; what it raises ends the trial."""


class _State(msgspec.Struct):
    """What a trial goes on from: best scores of the folds behind it, and its fit in mid-fold."""

    scores: list[float]
    best: float
    fit: bytes


def run_folds(
    params: dict[str, Any],
    checkpoint: bytes | None,
    splits: Splits,
    settings: Settings,
    report: Report,
) -> None:
    """A fit a fold; the score is the mean over the folds of the best epoch's validation CRPS.

    Args:
        params: fields of `ModelConfig`.
        checkpoint: as reported before by the same trial, to go on from.
        splits: windows; those of the gate are not looked at.
        settings: folds, epochs, seed, checkpoint_seconds.
        report: hears of each epoch.
    """
    chosen = ModelConfig(**params, seed=settings.seed)
    state = _State([], math.inf, b"")
    if checkpoint is not None:
        state = msgspec.msgpack.decode(checkpoint, type=_State)
    for fold, parts in enumerate(folds(splits, settings.folds)):
        if fold >= len(state.scores):
            state = _fit_fold(parts, chosen, settings, state, report)


def _fit_fold(
    splits: Splits, chosen: ModelConfig, settings: Settings, state: _State, report: Report
) -> _State:
    """One fold, from where `state` left it; the state in which the next one starts."""
    from forecasting import model

    sent, best, epochs = time.monotonic(), state.best, settings.epochs
    with tempfile.TemporaryDirectory() as name:
        checkpoint = Path(name) / model.CHECKPOINT
        if state.fit:
            checkpoint.write_bytes(state.fit)

        def heard(epoch: int, score: float) -> None:
            nonlocal sent, best
            best, kept = min(best, score), None
            if time.monotonic() - sent >= settings.checkpoint_seconds:
                kept = msgspec.msgpack.encode(_State(state.scores, best, checkpoint.read_bytes()))
                sent = time.monotonic()
            mean = sum([*state.scores, best]) / (len(state.scores) + 1)
            report(len(state.scores) * epochs + epoch, mean, kept)

        model.fit(
            splits,
            chosen,
            epochs,
            folder=Path(name),
            patience=epochs,
            report=heard,
            resume=checkpoint,
            accelerator="cpu",
        )
    return _State([*state.scores, best], math.inf, b"")


def run_trial(config: dict[str, Any], splits: Splits, settings: Settings) -> None:
    """A trial in a worker of Tune.

    What goes wrong in it is reported as well: Tune would try again, which is for lost workers.
    """

    def report(step: int, score: float, checkpoint: bytes | None) -> None:
        told: dict[str, Any] = {} if checkpoint is None else {"checkpoint": checkpoint}
        tune.report({METRIC: score, "step": step, **told})

    kept = config["checkpoint"]
    checkpoint = None if kept is None else ray.get(kept)
    try:
        run_folds(config["params"], checkpoint, splits, settings, report)
    except Exception as error:  # noqa: BLE001  (whatever it is, the trial has failed and says why)
        tune.report({METRIC: math.inf, "error": f"{type(error).__name__}: {error}"})
