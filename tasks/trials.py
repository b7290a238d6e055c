"""One trial of a search, in a worker of Ray.

The network is imported in the worker alone: the driver of a search needs no torch.
"""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray import tune

from forecasting.hyperparameters import ModelConfig
from forecasting.settings import Settings
from forecasting.study import METRIC
from forecasting.windows import Splits, folds


class _State(msgspec.Struct):
    """What a trial goes on from: best scores of the folds behind it, and its fit in mid-fold."""

    scores: list[float]
    best: float
    fit: bytes


def run_trial(config: dict[str, Any], splits: Splits, count: int, settings: Settings) -> None:
    """One trial: a fit a fold, that reports after each epoch.

    What goes wrong in it is reported as well: Tune would try again, which is for lost workers.
    """
    chosen = ModelConfig(**config["params"], seed=settings.seed)
    state = _state_of(config)
    try:
        for fold, parts in enumerate(folds(splits, count)):
            if fold >= len(state.scores):
                state = _fit_fold(parts, chosen, settings, state)
    except Exception as error:  # noqa: BLE001  (whatever it is, the trial has failed and says why)
        tune.report({METRIC: math.inf, "error": f"{type(error).__name__}: {error}"})


def _state_of(config: dict[str, Any]) -> _State:
    kept = config["checkpoint"]
    if kept is None:
        return _State([], math.inf, b"")
    return msgspec.msgpack.decode(ray.get(kept), type=_State)


def _fit_fold(splits: Splits, chosen: ModelConfig, settings: Settings, state: _State) -> _State:
    """One fold, from where `state` left it; the state in which the next one starts."""
    from forecasting import model

    sent, best, epochs = time.monotonic(), state.best, settings.epochs
    with tempfile.TemporaryDirectory() as name:
        last, resume = Path(name) / "last.ckpt", None
        if state.fit:
            resume = Path(name) / "resume.ckpt"
            resume.write_bytes(state.fit)

        def report(epoch: int, score: float) -> None:
            nonlocal sent, best
            told: dict[str, Any] = {}
            if last.is_file() and time.monotonic() - sent >= settings.checkpoint_seconds:
                told["state"] = msgspec.msgpack.encode(
                    _State(state.scores, best, last.read_bytes())
                )
                sent = time.monotonic()
            best = min(best, score)
            mean = sum([*state.scores, best]) / (len(state.scores) + 1)
            tune.report({METRIC: mean, "step": len(state.scores) * epochs + epoch, **told})

        model.fit(
            splits,
            chosen,
            epochs,
            folder=Path(name),
            patience=epochs,
            report=report,
            resume=resume,
        )
    return _State([*state.scores, best], math.inf, b"")
