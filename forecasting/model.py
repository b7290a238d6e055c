"""Fit the network with Lightning, judge what it learned, export it to ONNX.

A fit is a function of windows, configuration and seed: on one machine the same three give the
same bytes. It runs on one CPU thread, leaves torch's global state as it found it, and keeps all
windows in memory, since they are a few megabytes.
"""

import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from forecasting.contract import (
    COLUMNS,
    GOLDEN_FILE,
    MODEL_FILE,
    QUANTILE_LEVELS,
    Golden,
    encode,
    seal,
)
from forecasting.errors import ModelError, TrainingError
from forecasting.hyperparameters import ModelConfig
from forecasting.inference import Forecaster
from forecasting.network import Network, features
from forecasting.windows import Splits, Windows, join

__all__ = [
    "EpochScore",
    "Fitted",
    "ModelConfig",
    "calibrate",
    "export_onnx",
    "fit",
    "quantiles_of_returns",
    "untrained",
]

PATIENCE = 8
"""Epochs without a better validation score after which a final fit stops."""
EXPORT_TOLERANCE = 1e-4
"""Largest relative difference between the exported graph and torch."""
CLIP_NORM = 1.0
OPSET = 17
_WIDTHS = torch.arange(80, 126) / 100
_INPUTS = ("ohlcv", "dates", "symbol")
_SCORE = "validation_crps_bp"
_BP = 1e4


@dataclass(frozen=True)
class EpochScore:
    """Mean CRPS of one epoch in basis points of log return."""

    epoch: int
    train: float
    validation: float


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted forecaster and what its validation windows said.

    Attributes:
        config: its hyperparameters.
        kind: `lstm` if the trained network beat both others, else `volatility` (LSTM off).
        network: ready to export; its baseline is estimated on training and validation windows.
        trained, untrained, volatility: mean validation CRPS in bp (lower is better) of the best
            epoch, of the initial weights, and with the LSTM off; baseline estimated on the
            training windows alone.
        best_epoch: epoch that was kept; 0 means the initial weights.
        history: one entry an epoch.
        train_start, train_end: first and last origin that the network has learned from.
        sample: real windows that the export is checked on.
    """

    config: ModelConfig
    kind: Literal["lstm", "volatility"]
    network: Network
    trained: float
    untrained: float
    volatility: float
    best_epoch: int
    history: tuple[EpochScore, ...]
    train_start: date
    train_end: date
    sample: Windows


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Windows after the fixed part of the graph, so that no epoch computes it again."""

    features: Tensor
    sigma: Tensor
    returns: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, network: Network, windows: Windows) -> "_Inputs":
        ohlcv = torch.from_numpy(windows.ohlcv)
        returns = torch.from_numpy(windows.returns.astype(np.float32))
        dates = torch.from_numpy(windows.dates)
        return cls(features(ohlcv, dates), network.volatility(ohlcv), returns)

    def crps(self, network: Network, rows: Tensor | slice) -> Tensor:
        """Mean CRPS in bp of the chosen windows."""
        quantiles = network.correct(self.features[rows], self.sigma[rows])
        return crps(self.returns[rows], quantiles).mean() * _BP


def crps(returns: Tensor, quantiles: Tensor) -> Tensor:
    """CRPS from equally spaced quantiles: twice their mean pinball loss.

    Args:
        returns: [n, horizon].
        quantiles: [n, horizon, levels].

    Returns:
        [n, horizon], in the units of `returns`.
    """
    levels = torch.tensor(QUANTILE_LEVELS, dtype=returns.dtype)
    error = returns.unsqueeze(-1) - quantiles
    return 2 * torch.maximum(levels * error, (levels - 1) * error).mean(-1)


class _Training(LightningModule):
    """Minimises the CRPS. The windows are here already, so what Lightning loops over are epochs.

    One of its steps is all batches of an epoch (manual optimization): at two milliseconds a batch
    its own loop over them would cost a fifth of the fit.
    """

    def __init__(
        self,
        network: Network,
        splits: Splits,
        config: ModelConfig,
        report: Callable[[int, float], None] | None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network, self.config, self.report = network, config, report
        self.train_inputs = _Inputs.of(network, splits.train)
        self.validation_inputs = _Inputs.of(network, splits.validation)
        self.windows = len(splits.train)
        self.order = torch.empty(0, dtype=torch.int64)
        self.losses: list[float] = []
        self.history: list[EpochScore] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay
        )

    def on_train_epoch_start(self) -> None:
        # seeded by epoch, so that a resumed fit is the fit that was interrupted
        torch.manual_seed(self.config.seed * 100_003 + self.current_epoch)
        self.order = torch.randperm(self.windows)
        self.losses = []

    def training_step(self, batch: int, batch_idx: int) -> None:
        optimizer, size = self.optimizers(), self.config.batch_size
        assert isinstance(optimizer, LightningOptimizer)
        for first in range(0, self.windows, size):
            optimizer.zero_grad()
            loss = self.train_inputs.crps(self.network, self.order[first : first + size])
            self.manual_backward(loss)
            self.clip_gradients(optimizer.optimizer, CLIP_NORM, "norm")
            optimizer.step()
            self.losses.append(loss.item())

    def on_train_epoch_end(self) -> None:
        score, epoch = self.score(), self.current_epoch + 1
        if not math.isfinite(score):
            raise TrainingError(
                f"Validation CRPS is {score} after epoch {epoch} with {self.config}; "
                "a finite number was expected. Lower lr."
            )
        self.history.append(EpochScore(epoch, float(np.mean(self.losses)), score))
        self.log(_SCORE, score, batch_size=1)
        if self.report is not None:
            self.report(epoch, score)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = [[s.epoch, s.train, s.validation] for s in self.history]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = [EpochScore(*entry) for entry in checkpoint["history"]]

    @torch.no_grad()
    def score(self) -> float:
        """Validation CRPS in bp of the weights as they are."""
        self.network.eval()
        value = self.validation_inputs.crps(self.network, slice(None)).item()
        self.network.train()
        return value


def fit(
    splits: Splits,
    config: ModelConfig,
    epochs: int,
    *,
    folder: Path,
    patience: int = PATIENCE,
    report: Callable[[int, float], None] | None = None,
    resume: Path | None = None,
) -> Fitted:
    """Train on `splits.train`, choose the epoch and the kind on `splits.validation`.

    Args:
        splits: windows; those of the gate are not looked at.
        config: hyperparameters and seed.
        epochs: most epochs.
        folder: where the checkpoints `best.ckpt` and `last.ckpt` are written.
        patience: epochs without a better score after which it stops early.
        report: called after each epoch with its number, from 1, and its validation CRPS in bp.
        resume: a `last.ckpt` of an interrupted fit of the same windows and configuration.

    Raises:
        TrainingError: the loss is no longer a finite number.
    """
    with _one_thread(), _quiet(), torch.random.fork_rng(devices=[]):
        network = untrained(splits, config)
        training = _Training(network, splits, config, report)
        first = training.score()
        volatility = _switched_off(training)
        best = _run(training, epochs, patience, folder, resume)
        trained = min(training.history, key=lambda s: s.validation)
        lstm = trained.validation < min(first, volatility)
        network.load_state_dict(best)
        network.switch.fill_(float(lstm))
        calibrate(network.eval(), splits)
    return Fitted(
        config=config,
        kind="lstm" if lstm else "volatility",
        network=network.eval(),
        trained=trained.validation,
        untrained=first,
        volatility=volatility,
        best_epoch=trained.epoch,
        history=tuple(training.history),
        train_start=splits.train.first_day,
        train_end=splits.validation.last_day,
        sample=splits.validation.take(np.arange(len(splits.validation))[-16:]),
    )


def untrained(splits: Splits, config: ModelConfig) -> Network:
    """A network with its first weights, around the baseline of the training windows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = Network(config, splits.train.context, splits.train.horizon)
    network.volatility.estimate(splits.train)
    return network


def calibrate(network: Network, splits: Splits) -> None:
    """Estimate the baseline anew with the validation windows, as wide as those ask for.

    Args:
        network: ready but for that; its baseline is still that of `splits.train`.
        splits: windows; those of the gate are not looked at.
    """
    widths = _widths(network, _Inputs.of(network, splits.validation))
    network.volatility.estimate(join([splits.train, splits.validation]))
    network.volatility.shape.mul_(widths[:, None])


def quantiles_of_returns(
    network: Network, windows: Windows
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Quantiles of log returns [n, horizon, levels], without the way over prices in float32."""
    inputs = _Inputs.of(network, windows)
    with torch.no_grad():
        return network.correct(inputs.features, inputs.sigma).double().numpy()


@torch.no_grad()
def _widths(network: Network, inputs: _Inputs) -> Tensor:
    """By what factor each horizon's quantiles are widened, from windows not learned from.

    Residuals that a regression was fitted on, and corrections that were learned on them, are
    smaller than those to come. Half the way to the factor with the lowest CRPS: a year says little
    of the next one's.

    Returns:
        [horizon].
    """
    shape, scores = network.volatility.shape.clone(), []
    corrections = network.corrections(inputs.features)
    for width in _WIDTHS:
        network.volatility.shape.copy_(shape * width)
        quantiles = network.spread(inputs.sigma, corrections)
        scores.append(crps(inputs.returns, quantiles).mean(0))
    network.volatility.shape.copy_(shape)
    return (1 + _WIDTHS[torch.stack(scores).argmin(0)]) / 2


def _switched_off(training: _Training) -> float:
    training.network.switch.zero_()
    score = training.score()
    training.network.switch.fill_(1)
    return score


def _run(
    training: _Training, epochs: int, patience: int, folder: Path, resume: Path | None
) -> dict[str, Tensor]:
    """Train, and give back the weights of the best epoch."""
    checkpoint = ModelCheckpoint(
        dirpath=folder,
        filename="best",
        monitor=_SCORE,
        save_last=True,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    stopping = EarlyStopping(_SCORE, patience=patience, check_on_train_epoch_end=True)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=[checkpoint, stopping],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(training, range(1), ckpt_path=resume)
    state = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    return {name.removeprefix("network."): value for name, value in state.items()}


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's greetings, and two of its warnings, out of the run's log."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # about Lightning's own code, and about a folder that a resumed fit shares
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)")
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            yield
    finally:
        logger.setLevel(level)


def export_onnx(fitted: Fitted, folder: Path) -> None:
    """Write `model.onnx` and `golden.json` into `folder` once they agree with torch.

    Raises:
        TrainingError: the graph, loaded as the server loads it, gives other prices than torch.
    """
    with tempfile.TemporaryDirectory() as name:
        draft = Path(name)
        with _one_thread():
            _write_graph(fitted, draft / MODEL_FILE)
            expected = _forecast(fitted.network, fitted.sample)
        golden = Golden(
            ohlcv=fitted.sample.ohlcv[-1:].tolist(),
            dates=fitted.sample.dates[-1:].tolist(),
            symbol=fitted.sample.symbol[-1:].tolist(),
            quantiles=expected[-1:].tolist(),
        )
        (draft / GOLDEN_FILE).write_bytes(encode(golden))
        _check(fitted, draft, expected)
        for file in (MODEL_FILE, GOLDEN_FILE):
            (folder / file).write_bytes((draft / file).read_bytes())


def _arguments(windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.from_numpy(windows.ohlcv),
        torch.from_numpy(windows.dates),
        torch.from_numpy(windows.symbol),
    )


@torch.no_grad()
def _forecast(network: Network, windows: Windows) -> np.ndarray[Any, np.dtype[np.float32]]:
    prices: Tensor = network(*_arguments(windows))
    return prices.numpy()


def _write_graph(fitted: Fitted, path: Path) -> None:
    """The legacy exporter keeps the LSTM one node, which runs faster than what the new one writes.

    It warns of its age, and of shape checks inside the LSTM that tracing leaves out; what it
    writes is checked afterwards.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            fitted.network,
            _arguments(fitted.sample),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=list(_INPUTS),
            output_names=["quantiles"],
            dynamic_axes={n: {0: "batch"} for n in (*_INPUTS, "quantiles")},
        )
    _keep_inputs(path, fitted.sample)


def _keep_inputs(path: Path, windows: Windows) -> None:
    """Name all inputs, also those that nothing is computed from, which the exporter leaves out.

    Who asks a version need not know whether its LSTM is on.
    """
    model = onnx.load(path)
    found = {item.name: item for item in model.graph.input}
    del model.graph.input[:]
    for name in _INPUTS:
        array = getattr(windows, name)
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        unused = onnx.helper.make_tensor_value_info(name, kind, ["batch", *array.shape[1:]])
        model.graph.input.append(found.get(name, unused))
    onnx.save(model, path)


def _check(fitted: Fitted, draft: Path, expected: Sequence[Any] | np.ndarray[Any, Any]) -> None:
    """Load the draft as a server would and compare on every sample window."""
    sample = fitted.sample
    nobody: dict[str, object] = dict.fromkeys(
        ("forecaster", "dataset_md5", "dataset_rev", "run_id", "git_commit"), "draft"
    )
    seal(
        draft,
        nobody
        | {
            "symbols": tuple(map(str, range(int(sample.symbol.max()) + 1))),
            "kind": fitted.kind,
            "context": sample.context,
            "horizon": sample.horizon,
            "columns": COLUMNS,
            "as_of": fitted.train_end,
            "train_start": fitted.train_start,
            "train_end": fitted.train_end,
        },
    )
    try:
        got = Forecaster.load(draft, version=0).predict(sample.ohlcv, sample.dates, sample.symbol)
    except ModelError as error:
        raise TrainingError(f"The exported network cannot be served: {error}") from error
    off = float(np.max(np.abs(got / expected - 1)))
    if not off <= EXPORT_TOLERANCE:
        raise TrainingError(
            f"The exported network differs from torch by {off:.1e} (relative) on real windows; "
            f"at most {EXPORT_TOLERANCE:.0e} expected. Check the versions of torch and onnxruntime."
        )
