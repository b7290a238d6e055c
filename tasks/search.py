"""Search the hyperparameters with Ray Tune: Optuna proposes, ASHA stops what falls behind.

The only room that knows Ray. One trial is one short fit on one CPU thread; the driver hears of
every trial as it ends, so that the caller can log it.
"""

import logging
import math
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil
import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from forecasting import model
from forecasting.errors import ConfigError, ServiceError, TrainingError
from forecasting.hyperparameters import ModelConfig
from forecasting.settings import Settings
from forecasting.windows import Splits

METRIC = "validation_crps_bp"
GRACE_EPOCHS = 3
"""Epochs that every trial gets before ASHA may stop it."""

Status = Literal["FINISHED", "KILLED", "FAILED"]
"""Of a trial; KILLED means stopped early by ASHA."""
OnTrial = Callable[[int, Mapping[str, object], Sequence[float], Status], object]
"""Called with number, configuration, validation CRPS in bp after each epoch, and status."""

_log = logging.getLogger(__name__)
_OBJECT_STORE = 128 * 1024**2
_SCRATCH = "perennial-search-"
_WORKER_ENVIRONMENT = {
    # one thread a trial; malloc that keeps its memory makes the same LSTM 1.3-1.8x faster
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(8 * 1024**3),
}
_ENVIRONMENT = {
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a banner even when told to be silent
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the run, not only the experiment
}

_SET_BY_RAY = ("PYTHONBREAKPOINT", "RAY_AUTH_MODE")


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        config: the configuration with the lowest validation CRPS in any epoch.
        leaderboard: one row a trial, best first, failed ones last: `trial`, the fields of
            `ModelConfig`, `epochs` run, best `validation_crps_bp` (None if there is none) and
            `status`.
    """

    config: ModelConfig
    leaderboard: list[dict[str, Any]]


def run_search(
    splits: Splits, settings: Settings, *, on_trial: OnTrial | None = None
) -> SearchResult:
    """Run `settings.trials` trials, `settings.concurrency` at a time.

    The first trial is the default configuration. With a concurrency of 1 the same windows and
    seed give the same result; beyond that the order in which trials end steers the search.

    Args:
        splits: windows; those of the gate are not looked at.
        settings: trials, concurrency, epochs, seed, ray_address.
        on_trial: called in this process as each trial ends; what it raises ends the search.

    Raises:
        TrainingError: every trial failed.
        ConfigError: `ray_address` is of a Ray Client (ray://).
        ServiceError: the Ray cluster of `ray_address` cannot be reached.
    """
    listener = _Listener(settings, on_trial)
    with _scratch() as folder, _quiet_optuna(), _ray(settings, folder):
        tune.Tuner(
            tune.with_parameters(_trial, splits=splits, epochs=settings.epochs, seed=settings.seed),
            param_space=_space(),
            tune_config=_plan(settings),
            run_config=tune.RunConfig(
                name="search",
                storage_path=str(folder / "tune"),
                callbacks=[listener],
                stop=_StopOnError(listener),
                progress_reporter=_Silence(),
                verbose=0,
            ),
        ).fit()
    if listener.raised is not None:
        raise listener.raised
    return _result(listener)


def _trial(config: dict[str, Any], splits: Splits, epochs: int, seed: int) -> None:
    """One trial, in a worker: a fit that reports after each epoch."""

    def report(epoch: int, score: float) -> None:
        tune.report({METRIC: score, "epoch": epoch})

    chosen = ModelConfig(**config, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        model.fit(splits, chosen, epochs, folder=Path(folder), patience=epochs, report=report)


def _plan(settings: Settings) -> tune.TuneConfig:
    defaults = ModelConfig()
    first = {name: getattr(defaults, name) for name in _space()}
    return tune.TuneConfig(
        metric=METRIC,
        mode="min",
        num_samples=settings.trials,
        max_concurrent_trials=settings.concurrency,
        search_alg=OptunaSearch(
            metric=METRIC, mode="min", seed=settings.seed, points_to_evaluate=[first]
        ),
        scheduler=ASHAScheduler(
            time_attr="training_iteration",
            max_t=settings.epochs,
            grace_period=min(GRACE_EPOCHS, settings.epochs),
            reduction_factor=2,
        ),
        reuse_actors=True,
    )


def _space() -> dict[str, Any]:
    """Where to look; fields of `ModelConfig` that are not here keep their default."""
    return {
        "hidden": tune.choice([8, 16, 32]),
        "dropout": tune.uniform(0.0, 0.4),
        "reach": tune.uniform(0.1, 0.4),
        "lr": tune.loguniform(5e-4, 1e-2),
        "weight_decay": tune.loguniform(1e-3, 0.3),
        "batch_size": tune.choice([32, 64, 128]),
    }


@dataclass
class _Heard:
    """What the driver has heard of one trial."""

    number: int
    config: ModelConfig
    scores: dict[int, float]
    status: Status = "FAILED"
    error: str = ""

    @property
    def best(self) -> float:
        return min(self.scores.values(), default=math.inf)

    @property
    def history(self) -> list[float]:
        return [self.scores[epoch] for epoch in sorted(self.scores)]

    def row(self) -> dict[str, Any]:
        best = self.best if math.isfinite(self.best) else None
        return {
            "trial": self.number,
            **asdict(self.config),
            "epochs": len(self.scores),
            METRIC: best,
            "status": self.status,
        }


class _Listener(tune.Callback):
    """Follows the trials in the driver, numbered as they were proposed."""

    def __init__(self, settings: Settings, on_trial: OnTrial | None) -> None:
        self.settings, self.on_trial = settings, on_trial
        self.heard: dict[str, _Heard] = {}
        self.raised: Exception | None = None

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: object
    ) -> None:
        self._of(trials, trial)

    def _of(self, trials: list[Trial], trial: Trial) -> _Heard:
        """What is known of a trial; one whose worker never came up was never started either."""
        config = ModelConfig(**trial.config, seed=self.settings.seed)
        return self.heard.setdefault(trial.trial_id, _Heard(trials.index(trial), config, {}))

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        result: dict[str, Any],
        **_: object,
    ) -> None:
        self._of(trials, trial).scores[int(result["epoch"])] = float(result[METRIC])

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: object
    ) -> None:
        heard = self._of(trials, trial)
        early = len(heard.scores) < self.settings.epochs
        self._end(heard, "KILLED" if early else "FINISHED")

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: object
    ) -> None:
        heard = self._of(trials, trial)
        heard.error = _last_line(trial.error_file)
        _log.warning("Trial %d failed with %s: %s", heard.number, heard.config, heard.error)
        self._end(heard, "FAILED")

    def _end(self, heard: _Heard, status: Status) -> None:
        heard.status = status
        if self.on_trial is None or self.raised is not None:
            return
        try:
            self.on_trial(heard.number, asdict(heard.config), heard.history, status)
        except Exception as error:  # noqa: BLE001  (raised again after Tune, which would log it only)
            self.raised = error


class _StopOnError(tune.Stopper):
    """Ends the search once the caller's `on_trial` has raised."""

    def __init__(self, listener: _Listener) -> None:
        self.listener = listener

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.listener.raised is not None


class _Silence(tune.ProgressReporter):
    """Prints nothing: the caller hears of each trial through `on_trial`."""

    def should_report(self, trials: list[Trial], done: bool = False) -> bool:
        return False

    def report(self, trials: list[Trial], done: bool, *sys_info: str) -> None:
        """Nothing."""


def _last_line(error_file: str | None) -> str:
    if error_file is None or not Path(error_file).is_file():
        return "its worker was lost"
    return Path(error_file).read_text().strip().splitlines()[-1]


def _result(listener: _Listener) -> SearchResult:
    trials = sorted(listener.heard.values(), key=lambda t: (t.status == "FAILED", t.best, t.number))
    if not trials or trials[0].status == "FAILED":
        reason = trials[0].error if trials else "no trial started"
        raise TrainingError(
            f"All {listener.settings.trials} trials of the search failed; at least one result was "
            f"expected. The first says: {reason}"
        )
    return SearchResult(trials[0].config, [trial.row() for trial in trials])


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A short-lived folder in memory where there is one, since Ray and Tune write a lot."""
    memory = Path("/dev/shm")
    _sweep(memory)
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 4 * _OBJECT_STORE
    prefix = f"{_SCRATCH}{os.getpid()}-"
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=memory if roomy else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(memory: Path) -> None:
    """Give back the memory of searches that were killed: a folder's name holds its owner's id."""
    for folder in memory.glob(f"{_SCRATCH}*"):
        owner = folder.name.removeprefix(_SCRATCH).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _ray(settings: Settings, folder: Path) -> Iterator[None]:
    """Ray for the time of a search: the cluster of `ray_address`, else one in this process.

    A Ray that the caller has started already is used and left running.
    """
    own = {} if settings.ray_address else _private(folder)
    with _environment(_ENVIRONMENT | _WORKER_ENVIRONMENT | own), _signals_kept():
        if ray.is_initialized():
            yield
            return
        _start_ray(settings, folder)
        try:
            yield
        finally:
            ray.shutdown()


def _private(folder: Path) -> dict[str, str]:
    """What keeps an own Ray to itself: a killed trial's files, and the token of its ports.

    Without a token in the environment, Ray would write one into the user's home.
    """
    return {"TMPDIR": str(folder), "RAY_AUTH_TOKEN": _token()}


@cache
def _token() -> str:
    """One a process, since Ray reads it once."""
    return secrets.token_hex(32)


def _start_ray(settings: Settings, folder: Path) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not settings.ray_address:
        ray.init(
            address="local",
            num_cpus=settings.concurrency,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE,
            _temp_dir=str(folder / "ray"),
            **quiet,
        )
        return
    if settings.ray_address.startswith("ray://"):
        raise ConfigError(
            f"PERENNIAL_RAY_ADDRESS or RAY_ADDRESS is {settings.ray_address}; host:port of the "
            "cluster's head is expected, such as head.example:6379, from a machine of the cluster. "
            "Ray Tune does not tell a Ray Client of its trials."
        )
    try:
        _knock(settings.ray_address)
        ray.init(
            address=settings.ray_address,
            runtime_env={
                "env_vars": _WORKER_ENVIRONMENT,
                "worker_process_setup_hook": "tasks.search.warm_up",
            },
            **quiet,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ServiceError(
            f"No Ray cluster answers at {settings.ray_address}: {error}. "
            "Check PERENNIAL_RAY_ADDRESS or RAY_ADDRESS; empty means Ray in this process."
        ) from error


def _knock(address: str) -> None:
    """Fail within seconds where Ray would wait for minutes and then end the process."""
    where = urlsplit(address if "://" in address else f"ray://{address}")
    if where.hostname and where.port:
        socket.create_connection((where.hostname, where.port), timeout=5).close()


def warm_up() -> None:
    """Run in each new worker: importing this module has loaded what a trial needs."""


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables that Ray and its workers read when they start, put back with what Ray sets."""
    before = {name: os.environ.get(name) for name in (*values, *_SET_BY_RAY)}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes over SIGTERM and keeps it; give it back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
