"""Fit the network with Lightning, judge what it learned, export it to ONNX.

A fit is a function of windows, configuration and seed: on one machine the same three give the
same bytes. It runs on as many CPU threads as it is told to, leaves torch's global state as it found
it, and keeps all windows in memory, since they are a few megabytes.
"""

import hashlib
import logging
import math
import os
import pickle
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException

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
from forecasting.loss import BP, Loss, crps
from forecasting.network import Network, features
from forecasting.shards import Shards, thread_pool
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
CHECKPOINT = "last.ckpt"
"""In the folder of a fit, written whole after each epoch; all that a later fit needs to go on."""
CLIP_NORM = 1.0
OPSET = 17
MASSES = (0.8, 0.95)
"""Of the central intervals that validation calibrates."""
YEARLY = 0.12
"""Standard deviation of the width that is asked for, from year to year."""
_WIDTH_ERROR = 0.89
"""Standard error, times the root of n, of a width from where 80 % of n normal outcomes lie."""
_DOUBT = 2.0
"""Standard errors that intervals must be too wide by before they are made narrower."""
_TINY = 1e-9
_INPUTS = ("ohlcv", "dates", "symbol")
_log = logging.getLogger(__name__)


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

    def take(self, rows: Tensor) -> "_Inputs":
        """The chosen windows."""
        parts = (self.features, self.sigma, self.returns)
        return _Inputs(*(part.index_select(0, rows) for part in parts))

    def to(self, device: torch.device) -> "_Inputs":
        """All of them on a device."""
        return _Inputs(*(part.to(device) for part in (self.features, self.sigma, self.returns)))

    def crps(self, network: Network) -> Tensor:
        """Mean CRPS in bp."""
        return crps(self.returns, network.correct(self.features, self.sigma)).mean() * BP


class _OneStep:
    """What Lightning is given in place of batches."""

    def __iter__(self) -> Iterator[int]:
        return iter((0,))

    def __len__(self) -> int:
        return 1


class _Training(LightningModule):
    """Minimises the CRPS. The windows are here already, so what Lightning loops over are epochs.

    One of its steps is all batches of an epoch (manual optimization): at a few milliseconds a batch
    its own loop over them would cost a fifth of the fit. Of several workers each takes its part of
    every batch, so that they walk the way of one.

    Attributes:
        history: one entry an epoch.
        best: weights of the best epoch.
    """

    def __init__(
        self,
        network: Network,
        splits: Splits,
        config: ModelConfig,
        folder: Path,
        patience: int,
        report: Callable[[int, float], None] | None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network, self.config = network, config
        self.folder, self.patience, self.report = folder, patience, report
        self.train_inputs = _Inputs.of(network, splits.train)
        self.validation_inputs = _Inputs.of(network, splits.validation)
        self.identity = _identity(config, self.train_inputs, self.validation_inputs)
        self.order = torch.empty(0)
        self.threads = 1
        self.pool: ThreadPoolExecutor | None = None
        self.shards: Shards
        self.loss: Loss
        self.losses: list[Tensor] = []
        self.history: list[EpochScore] = []
        self.best: dict[str, Tensor] = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay, fused=True
        )

    def on_fit_start(self) -> None:
        torch.set_num_threads(1)  # in a worker's process too
        self.train_inputs = self.train_inputs.to(self.device)
        self.validation_inputs = self.validation_inputs.to(self.device)

    def on_train_start(self) -> None:
        pool = self.pool if self.device.type == "cpu" else None
        self.shards = Shards(self.network, self.threads, pool)
        self.loss = Loss(self.network)
        self.trainer.should_stop = self._is_over()

    def on_train_epoch_start(self) -> None:
        # seeded by epoch, so that a resumed fit is the fit that was interrupted
        seed = self.config.seed * 100_003 + self.current_epoch
        torch.manual_seed(seed)
        self.order = torch.randperm(len(self.train_inputs.returns)).to(self.device)
        if self.global_rank:
            torch.manual_seed(seed + self.global_rank * 1_000_003)  # dropout of its own
        self.losses = []

    def training_step(self, batch: int, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        gradient = self.shards.gradient
        for rows in torch.split(self.order, self.config.batch_size):
            self.losses.append(self._backward(rows))
            norm = torch.linalg.vector_norm(gradient)
            gradient.mul_((CLIP_NORM / (norm + 1e-6)).clamp(max=1))
            optimizer.step()

    def _backward(self, rows: Tensor) -> Tensor:
        """Set the gradient of a batch; its mean CRPS in bp, or what the workers' mean of it is of.

        Each worker has its part of the batch, and weighs it so that their mean is the batch's.
        """
        mine, share = rows, 1.0
        if (workers := self.trainer.world_size) > 1:
            mine = rows[self.global_rank :: workers]
            share = len(mine) * workers / len(rows)
            # where the last batch has fewer windows than there are workers, one counts for nothing
            mine = mine if share else rows[:1]
        batch = self.train_inputs.take(mine)
        corrections = self.shards.corrections(batch.features)
        loss, slope = self.loss(corrections, batch.sigma, batch.returns, weight=share)
        self.shards.backward(slope)
        if workers > 1:  # by hand: DDP hears of autograd's gradients, and the head's are not
            self.trainer.strategy.reduce(self.shards.gradient, reduce_op="mean")
        return loss

    def on_train_epoch_end(self) -> None:
        score, epoch = self.score(), self.current_epoch + 1
        if not math.isfinite(score):
            raise TrainingError(
                f"Validation CRPS is {score} after epoch {epoch} with {self.config}; "
                "a finite number was expected. Lower lr."
            )
        if not self.history or score < min(each.validation for each in self.history):
            self.best = {k: v.detach().cpu().clone() for k, v in self.network.state_dict().items()}
        mean = torch.stack(self.losses).double().mean()
        mean = self.trainer.strategy.reduce(mean, reduce_op="mean")
        self.history.append(EpochScore(epoch, float(mean), score))
        self._save()
        if self.report is not None:
            self.report(epoch, score)
        self.trainer.should_stop = self._is_over()

    def _is_over(self) -> bool:
        """Whether the last `patience` epochs were no better than one before them."""
        scores = [each.validation for each in self.history]
        return bool(scores) and len(scores) - 1 - scores.index(min(scores)) >= self.patience

    def _save(self) -> None:
        """Write the checkpoint beside the last one, then put it in its place."""
        part = self.folder / f"{CHECKPOINT}.{os.getpid()}"
        self.folder.mkdir(parents=True, exist_ok=True)  # a run of the same fit may have ended
        self.trainer.save_checkpoint(part)
        if self.trainer.is_global_zero:
            part.replace(self.folder / CHECKPOINT)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # where this arrives is a worker's process: as quiet as its parent, and gone with it, which
        # torch sees to with the signal that a shell may have had the parent ignore
        _hush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def get_extra_state(self) -> dict[str, Any]:
        """What checkpoints hold beside the weights, and workers hand back."""
        history = [[each.epoch, each.train, each.validation] for each in self.history]
        return {"identity": self.identity, "history": history, "best": self.best}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from what `get_extra_state` gave."""
        self.history = [EpochScore(*entry) for entry in state["history"]]
        self.best = state["best"]

    @torch.no_grad()
    def score(self) -> float:
        """Validation CRPS in bp of the weights as they are."""
        self.network.eval()
        value = self.validation_inputs.crps(self.network).item()
        self.network.train()
        return value


def _identity(config: ModelConfig, *parts: _Inputs) -> str:
    """Tells a fit's checkpoint from another's."""
    digest = hashlib.sha256(repr(asdict(config)).encode())
    for part in parts:
        digest.update(part.sigma.numpy().tobytes() + part.returns.numpy().tobytes())
    return digest.hexdigest()


def fit(
    splits: Splits,
    config: ModelConfig,
    epochs: int,
    *,
    folder: Path,
    patience: int = PATIENCE,
    report: Callable[[int, float], None] | None = None,
    resume: Path | None = None,
    accelerator: str = "auto",
    workers: int = 1,
    threads: int = 1,
) -> Fitted:
    """Train on `splits.train`, choose the epoch and the kind on `splits.validation`.

    Args:
        splits: windows; those of the gate are not looked at.
        config: hyperparameters and seed.
        epochs: most epochs.
        folder: where the checkpoint `last.ckpt` is written after each epoch.
        patience: epochs without a better score after which it stops early.
        report: called after each epoch, its checkpoint written, with its number, from 1, and its
            validation CRPS in bp; with several workers, for all epochs at the end.
        resume: the `last.ckpt` of an interrupted fit. One that is absent, unreadable or of other
            windows or another configuration is left aside, and the fit starts anew.
        accelerator: as Lightning names it; `auto` is a GPU if there is one, else the CPU.
        workers: processes (on a GPU machine: GPUs) that share each batch.
        threads: of a single worker on a CPU, that share each batch; another number of them rounds
            in another way, and comes to weights as good. Of several workers each has one.

    Raises:
        TrainingError: the loss is no longer a finite number, or a worker was lost.
    """
    with _own_state(accelerator), _quiet():
        network = untrained(splits, config)
        training = _Training(network, splits, config, folder, patience, report)
        first = training.score()
        volatility = _switched_off(training)
        usable = _usable(resume, training.identity)
        _run(training, epochs, usable, accelerator, workers, threads)
        trained = min(training.history, key=lambda s: s.validation)
        lstm = trained.validation < min(first, volatility)
        network.cpu().load_state_dict(training.best)
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
    smaller than those to come. The mean of the factors at which the central intervals of `MASSES`
    hold what they say (split conformal prediction, Papadopoulos et al. 2002). It is believed as far
    as its error is small beside what such factors differ by from year to year; outcomes of h days
    overlap, so n windows are n / h.

    A calm validation promises nothing: narrower they become only where neither that error nor
    another year explains it, by no more than is beyond doubt. That is a market which is no longer
    the one that most of the windows are of.

    Returns:
        [horizon].
    """
    quantiles, returns = network.correct(inputs.features, inputs.sigma), inputs.returns
    factors = []
    for mass in MASSES:
        low, high = (QUANTILE_LEVELS.index(round((1 + s * mass) / 2, 3)) for s in (-1, 1))
        above = returns / quantiles[..., high].clamp(min=_TINY)
        below = returns / quantiles[..., low].clamp(max=-_TINY)
        factors.append(torch.quantile(torch.where(returns > 0, above, below), mass, dim=0))
    wanted = torch.stack(factors).mean(0)
    error = _WIDTH_ERROR**2 * torch.arange(1, returns.shape[1] + 1) / len(returns)
    wider = 1 + (wanted - 1).clamp(min=0) * YEARLY**2 / (YEARLY**2 + error)
    return torch.minimum(wider, wanted * (1 + _DOUBT * (YEARLY**2 + error).sqrt()))


def _switched_off(training: _Training) -> float:
    training.network.switch.zero_()
    score = training.score()
    training.network.switch.fill_(1)
    return score


def _usable(resume: Path | None, identity: str) -> Path | None:
    """The checkpoint, if it is one of this fit."""
    if resume is None or not resume.is_file():
        return None
    try:
        found = torch.load(resume, weights_only=True)["state_dict"]["_extra_state"]
        theirs, epochs = found["identity"], len(found["history"])
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError) as error:
        _log.warning("The checkpoint %s cannot be read (%r); starting anew.", resume, error)
        return None
    except pickle.UnpicklingError as error:
        _log.warning("The checkpoint %s is none of torch's (%s); starting anew.", resume, error)
        return None
    if theirs != identity:
        _log.warning("The checkpoint %s is of another fit; starting anew.", resume)
        return None
    _log.info("Going on after epoch %d from %s.", epochs, resume)
    return resume


def _run(
    training: _Training,
    epochs: int,
    resume: Path | None,
    accelerator: str,
    workers: int,
    threads: int,
) -> None:
    """Train; afterwards `training` holds history and best weights."""
    trainer = Trainer(
        accelerator=accelerator,
        devices=workers,
        strategy="auto" if workers == 1 else "ddp_spawn",
        max_epochs=epochs,
        default_root_dir=training.folder,
        deterministic=_on_gpu(accelerator),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    if workers == 1:
        with thread_pool(threads) as pool:
            training.threads, training.pool = threads, pool
            trainer.fit(training, _OneStep(), ckpt_path=resume)
        return
    report, training.report = training.report, None  # it need not be one that can be sent
    with _workers(trainer):
        trainer.fit(training, _OneStep(), ckpt_path=resume)
    if report is not None:
        for each in training.history:
            report(each.epoch, each.validation)


@contextmanager
def _workers(trainer: Trainer) -> Iterator[None]:
    """No worker outlives the fit, and what one of them raised is raised here."""
    port = os.environ.get("MASTER_PORT")  # Lightning chooses one, and leaves it
    try:
        yield
    except ProcessException as error:
        said = str(error).strip().splitlines()[-1]
        raise TrainingError(
            said.removeprefix(f"{TrainingError.__module__}.TrainingError: ")
        ) from error
    finally:
        for process in getattr(trainer.strategy.launcher, "procs", []):
            process.kill()
            process.join()
        if port is None:
            os.environ.pop("MASTER_PORT", None)


def _on_gpu(accelerator: str) -> bool:
    return accelerator != "cpu" and torch.cuda.is_available()


@contextmanager
def _own_state(accelerator: str) -> Iterator[None]:
    """One thread; random state and choice of algorithms as they were, once it is over."""
    gpus = range(torch.cuda.device_count()) if _on_gpu(accelerator) else ()
    deterministic = torch.are_deterministic_algorithms_enabled()
    with _one_thread(), torch.random.fork_rng(devices=list(gpus)):
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic)


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
    """Keep Lightning's greetings, and a warning, out of the run's log."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    try:
        with warnings.catch_warnings():
            _hush()
            yield
    finally:
        logger.setLevel(level)


def _hush() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # about Lightning's own code
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)")


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
