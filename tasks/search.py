"""Search the hyperparameters: the study proposes and stops, Ray Tune runs the trials.

One trial is one short fit a validation fold on one CPU thread. The driver writes every score into
the study and keeps what a trial in flight goes on from; nothing of a trial travels over a file
system, so that the nodes of a cluster need none in common.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.air._internal import usage
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from forecasting.errors import TrainingError
from forecasting.hyperparameters import METRIC, ModelConfig
from forecasting.settings import Settings
from forecasting.study import Proposal, Status, Study, Told
from forecasting.windows import Splits, folds
from tasks import cluster
from tasks.trials import run_folds, run_trial

OnTrial = Callable[[int, Mapping[str, object], Sequence[float], Status], object]
"""Called with number, configuration, score in bp after each epoch, and status as a trial ends."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        config: of the trial with the lowest score among those that ran to their end.
        leaderboard: one row a trial, best first, failed ones last: `trial`, the fields of
            `ModelConfig`, `epochs` run over all folds, `validation_crps_bp` (None if there is
            none) and `status`.
        seconds: what this process spent on it.
    """

    config: ModelConfig
    leaderboard: list[dict[str, Any]]
    seconds: float


@dataclass(frozen=True)
class Progress:
    """How far a search is.

    Attributes:
        done, total: trials ended, and the most there will be.
        running: trials in flight.
        best: lowest score so far in bp; None before there is one.
        seconds_left: estimate from this run's pace and the budget; None before there is one.
    """

    done: int
    total: int
    running: int
    best: float | None
    seconds_left: float | None

    @property
    def share(self) -> float:
        """Of the trials, those that have ended, 0 to 1."""
        return min(self.done / self.total, 1.0)

    def __str__(self) -> str:
        best = "none yet" if self.best is None else f"{self.best:.2f} bp"
        left = "" if self.seconds_left is None else f", about {self.seconds_left:.0f} s left"
        return f"{self.done} of {self.total} trials, {self.running} running, best {best}{left}"


OnProgress = Callable[[Progress], object]


def run_search(
    splits: Splits,
    settings: Settings,
    study: Study,
    *,
    on_trial: OnTrial | None = None,
    on_progress: OnProgress | None = None,
) -> SearchResult:
    """Run the trials that `study` has room for, `settings.concurrency` at a time.

    A trial's score is its mean over the folds of the best epoch's validation CRPS in each. A
    search that was killed goes on where it was: ended trials are not run again, those in flight
    go on from their last checkpoint. With a concurrency of 1 the same windows and seed give the
    same result; beyond that the order in which trials end steers what TPE proposes.

    Args:
        splits: windows; those of the gate are not looked at.
        settings: trials, search_seconds, search_patience, folds, concurrency, epochs, seed,
            ray_address.
        study: from `open_study`, empty or as a search of the same windows and settings left it.
        on_trial: called in this process as each trial ends; what it raises ends the search.
        on_progress: called in this process as scores come in.

    Raises:
        TrainingError: every trial failed.
        ConfigError: `ray_address` is of a Ray Client (ray://).
        ServiceError: the Ray cluster of `ray_address` cannot be reached.
    """
    began = time.monotonic()
    board = _Board(study, settings, splits, on_trial, on_progress)
    if board.has_room():
        with cluster.short_lived() as folder, cluster.running(settings, folder), _lean():
            tune.Tuner(
                tune.with_parameters(run_trial, splits=splits, settings=settings.for_workers()),
                tune_config=tune.TuneConfig(
                    num_samples=-1,
                    max_concurrent_trials=settings.concurrency,
                    search_alg=_Proposals(board),
                    scheduler=_Halving(board),
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=str(folder / "tune"),
                    callbacks=[_Listener(board)],
                    stop=_StopOnError(board),
                    failure_config=tune.FailureConfig(max_failures=cluster.RETRIES),
                    progress_reporter=_Silence(),
                    verbose=0,
                ),
            ).fit()
    if board.raised is not None:
        raise board.raised
    return _result(study, settings, time.monotonic() - began)


def search_here(
    splits: Splits, settings: Settings, study: Study, *, on_trial: OnTrial | None = None
) -> SearchResult:
    """The same search without Ray: one trial after the other in this process.

    For a process that is itself one of many. Arguments and errors as of `run_search`, without
    those of Ray.
    """
    began = time.monotonic()
    board = _Board(study, settings, splits, on_trial, None)
    while board.has_room():
        proposal = board.start("here")

        def report(step: int, score: float, checkpoint: bytes | None) -> None:
            if checkpoint is not None:
                study.keep(board.numbers["here"], checkpoint)
            if board.hear("here", step, score):
                raise _Stopped

        error = ""
        try:
            run_folds(proposal.params, proposal.checkpoint, splits, settings, report)
        except _Stopped:
            pass
        except TrainingError as failed:
            error = str(failed)
        board.finish("here", error)
    if board.raised is not None:
        raise board.raised
    return _result(study, settings, time.monotonic() - began)


class _Stopped(Exception):  # noqa: N818  (no error: the study has stopped a trial)
    """A trial need not go on."""


@contextmanager
def _lean() -> Iterator[None]:
    """Take two things out of Tune that cost as much as a few trials.

    Its actors get a variable of their own, for which Ray would start new processes beside those
    that have imported torch already; all of our workers have that variable. And it counts
    callbacks for its makers' statistics, which are off, and imports MLflow for that.
    """
    own = dict(class_cache.DEFAULT_ENV_VARS)
    count = usage._count_callbacks
    class_cache.DEFAULT_ENV_VARS.clear()
    usage._count_callbacks = lambda callbacks: {}
    try:
        yield
    finally:
        class_cache.DEFAULT_ENV_VARS.update(own)
        usage._count_callbacks = count


class _Board:
    """Between Tune and the study: which trial is which, and when it is enough."""

    def __init__(
        self,
        study: Study,
        settings: Settings,
        splits: Splits,
        on_trial: OnTrial | None,
        on_progress: OnProgress | None,
    ) -> None:
        self.study, self.settings = study, settings
        self.steps = len(folds(splits, settings.folds)) * settings.epochs
        self.on_trial, self.on_progress = on_trial, on_progress
        self.numbers: dict[str, int] = {}
        self.failed: dict[str, str] = {}  # by Tune's id, what went wrong
        self.raised: Exception | None = None
        self.began: float | None = None
        self.stepped = 0

    def has_room(self) -> bool:
        """Whether another trial may start."""
        patience = self.settings.search_patience
        return (
            self.raised is None
            and self._spent() < self._budget
            and (self.study.in_flight() or len(self.study.trials) < self.settings.trials)
            and not (patience and self.study.without_gain() >= patience)
        )

    def start(self, trial_id: str) -> Proposal:
        """The next trial, known by Tune's id from now on."""
        if self.began is None:
            self.began = time.monotonic()  # Ray is up
        proposal = self.study.propose()
        self.numbers[trial_id] = proposal.number
        return proposal

    def hear(self, trial_id: str, step: int, score: float) -> bool:
        """Write down a score; True if the trial is to stop."""
        self.stepped += 1
        behind = self.study.report(self.numbers[trial_id], step, score)
        self.show()
        return self.raised is not None or behind or self._spent() >= self._budget

    def finish(self, trial_id: str, error: str = "") -> None:
        """A trial has come to its end, or was stopped, or has failed with an error."""
        steps = len(self.study.told(self.numbers[trial_id]).scores)
        if error:
            self.end(trial_id, "FAILED", error)
        else:
            self.end(trial_id, "FINISHED" if steps == self.steps else "KILLED")

    def end(self, trial_id: str, status: Status, error: str = "") -> None:
        """Write down how a trial ended, and tell the caller."""
        if error:
            number = self.numbers[trial_id]
            _log.warning(
                "Trial %d failed with %s: %s", number, self.study.told(number).params, error
            )
        told = self.study.close(self.numbers[trial_id], status, error)
        if self.on_trial is not None and self.raised is None:
            config = asdict(ModelConfig(**told.params, seed=self.settings.seed))
            try:
                self.on_trial(told.number, config, told.scores, status)
            except Exception as raised:  # noqa: BLE001  (raised again after Tune, which would log it only)
                self.raised = raised
        self.show()

    def show(self) -> None:
        """Tell the caller how far it is."""
        if self.on_progress is not None:
            self.on_progress(self.progress())

    def progress(self) -> Progress:
        """How far it is; what a trial needs is taken from all that have ended."""
        trials, total = self.study.trials, self.settings.trials
        ended = [told for told in trials if told.status != "RUNNING"]
        scores = [told.score for told in ended if told.status == "FINISHED"]
        return Progress(
            done=len(ended),
            total=total,
            running=len(trials) - len(ended),
            best=min(scores, default=None),
            seconds_left=self._seconds_left(trials),
        )

    def _seconds_left(self, trials: list[Told]) -> float | None:
        ended = [len(told.scores) for told in trials if told.status in ("FINISHED", "KILLED")]
        if not ended:
            return None
        each = sum(ended) / len(ended)
        running = sum(len(told.scores) for told in trials if told.status == "RUNNING")
        steps = max(each * (self.settings.trials - len(ended)) - running, 0.0)
        spent = self._spent()
        return min(steps * spent / self.stepped, self._budget - spent) if self.stepped else None

    @property
    def _budget(self) -> float:
        return self.settings.search_seconds or math.inf

    def _spent(self) -> float:
        """Seconds since the first trial of this process."""
        return 0.0 if self.began is None else time.monotonic() - self.began


class _Proposals(Searcher):
    """Hands the study's proposals to Tune."""

    def __init__(self, board: _Board) -> None:
        super().__init__(metric=METRIC, mode="min")
        self.board = board

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **_: object
    ) -> bool:
        """The space is the study's own."""
        return True

    def suggest(self, trial_id: str) -> Any:  # noqa: ANN401  (dict, or Searcher.FINISHED)
        """The next trial, if there is room for one."""
        if not self.board.has_room():
            return Searcher.FINISHED
        proposal = self.board.start(trial_id)
        kept = proposal.checkpoint
        return {
            "params": proposal.params,
            "checkpoint": None if kept is None else ray.put(kept),
        }

    def on_trial_complete(self, trial_id: str, result: object = None, error: bool = False) -> None:
        """Told by the listener."""

    def save(self, checkpoint_path: str) -> None:
        """The study is on disk already."""

    def restore(self, checkpoint_path: str) -> None:
        """A search goes on as a new experiment over the same study."""


class _Halving(FIFOScheduler):
    """Stops what the study says has fallen behind."""

    def __init__(self, board: _Board) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.board = board

    def on_trial_result(self, tune_controller: object, trial: Trial, result: dict[str, Any]) -> str:
        """One score, written down before Tune goes on."""
        if "error" in result:
            self.board.failed[trial.trial_id] = result["error"]
            return TrialScheduler.STOP
        stop = self.board.hear(trial.trial_id, int(result["step"]), float(result[METRIC]))
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE


class _Listener(tune.Callback):
    """Keeps checkpoints, and hears how trials end."""

    def __init__(self, board: _Board) -> None:
        self.board = board

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        result: dict[str, Any],
        **_: object,
    ) -> None:
        kept = result.pop("checkpoint", None)  # not for Tune's own records
        if kept is not None:
            self.board.study.keep(self.board.numbers[trial.trial_id], kept)

    def on_trial_recover(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: object
    ) -> None:
        kept = self.board.study.checkpoint(self.board.numbers[trial.trial_id])
        if kept is not None:
            trial.config["checkpoint"] = ray.put(kept)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: object
    ) -> None:
        self.board.finish(trial.trial_id, self.board.failed.get(trial.trial_id, ""))

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: object
    ) -> None:
        self.board.end(trial.trial_id, "FAILED", _last_line(trial.error_file))


class _StopOnError(tune.Stopper):
    """Ends the search once the caller's `on_trial` has raised."""

    def __init__(self, board: _Board) -> None:
        self.board = board

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.board.raised is not None


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


def _result(study: Study, settings: Settings, seconds: float) -> SearchResult:
    ranked = study.ranked()
    if not ranked or ranked[0].status == "FAILED":
        reason = ranked[0].error if ranked else "no trial started"
        raise TrainingError(
            f"All {settings.trials} trials of the search failed; at least one result was "
            f"expected. The first says: {reason}"
        )
    configs = {told.number: ModelConfig(**told.params, seed=settings.seed) for told in ranked}
    return SearchResult(
        config=configs[ranked[0].number],
        leaderboard=[_row(told, configs[told.number]) for told in ranked],
        seconds=seconds,
    )


def _row(told: Told, config: ModelConfig) -> dict[str, Any]:
    return {
        "trial": told.number,
        **asdict(config),
        "epochs": len(told.scores),
        METRIC: told.score if told.scores else None,
        "status": told.status,
    }
