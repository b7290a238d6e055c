"""The trials of one search: an Optuna study in a file, so that a killed search goes on.

The only room that knows Optuna. Every proposal, every score and every end is written before the
search goes on; what was in flight when a process died is proposed again, with its own number and
its last checkpoint. TPE proposes (multivariate, with a penalty near what is still running), and
asynchronous successive halving (ASHA, Li et al. 2018) stops what falls behind.
"""

import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from forecasting.scratch import come_back

if TYPE_CHECKING:
    import plotly.graph_objects as go

SPACE: Mapping[str, BaseDistribution] = {
    "hidden": CategoricalDistribution([8, 16, 32]),
    "dropout": FloatDistribution(0.0, 0.4),
    "reach": FloatDistribution(0.1, 0.4),
    "lr": FloatDistribution(5e-4, 1e-2, log=True),
    "weight_decay": FloatDistribution(1e-3, 0.3, log=True),
    "batch_size": CategoricalDistribution([32, 64, 128]),
}
"""Where to look; fields of `ModelConfig` that are not here keep their default."""
STARTUP = 8
"""Trials drawn at random before TPE is asked."""
REDUCTION = 2
"""At each rung of the halving the better 1 / REDUCTION goes on."""

Status = Literal["RUNNING", "FINISHED", "KILLED", "FAILED"]
"""Of a trial; KILLED means stopped early, because it fell behind or the budget was spent."""

_STATUS: dict[TrialState, Status] = {
    TrialState.RUNNING: "RUNNING",
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "KILLED",
    TrialState.FAIL: "FAILED",
}
_STATE = {status: state for state, status in _STATUS.items()}
_RUN, _ERROR, _JOURNAL = "run_id", "error", "study.journal"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Proposal:
    """A trial to run: its number, its parameters, and the checkpoint it goes on from, if any."""

    number: int
    params: dict[str, Any]
    checkpoint: bytes | None


@dataclass(frozen=True)
class Told:
    """What is known of a trial.

    Attributes:
        number: from 0, as proposed.
        params: as proposed.
        scores: `hyperparameters.METRIC` after each step, from step 1 (lower is better).
        status: see `Status`.
        error: why it failed.
        ended: when; None while it runs.
    """

    number: int
    params: dict[str, Any]
    scores: tuple[float, ...]
    status: Status
    error: str
    ended: datetime | None

    @property
    def score(self) -> float:
        """Last score, infinite if there is none."""
        return self.scores[-1] if self.scores else math.inf


class Study:
    """Trials of one search in `folder`; made by `open_study`, which keeps other processes out."""

    def __init__(
        self,
        folder: Path,
        *,
        seed: int,
        grace: int,
        space: Mapping[str, BaseDistribution] = SPACE,
    ) -> None:
        self.folder, self.space, self._seed = folder, dict(space), seed
        storage = JournalStorage(JournalFileBackend(str(folder / _JOURNAL)))
        self._study = optuna.create_study(
            storage=storage,
            study_name="search",
            pruner=SuccessiveHalvingPruner(min_resource=grace, reduction_factor=REDUCTION),
            load_if_exists=True,
        )
        self._live: dict[int, Trial] = {}
        self._lost = [told.number for told in self.trials if told.status == "RUNNING"]

    # proposals ----------------------------------------------------------------------------------
    def suggest_first(self, candidates: Sequence[Mapping[str, Any]]) -> None:
        """Parameters to try before any are drawn; only a study without trials takes them."""
        if self._study.trials:
            return
        for params in candidates:
            if self._fits(params):
                chosen = {name: params[name] for name in self.space}
                self._study.enqueue_trial(chosen, skip_if_exists=True)

    def propose(self) -> Proposal:
        """The next trial: what a dead process left in flight, then what is drawn anew."""
        # drawn from the seed and the number alone: a search that goes on draws as one that
        # was never interrupted, whatever order its trials end in
        if self._lost:
            number = self._lost.pop(0)
            self._study.sampler = _sampler(self._seed + number)
            trial = Trial(self._study, self._frozen(number)._trial_id)
            for name, distribution in self.space.items():
                # as `ask` does: Optuna writes a trial's parameters one by one, and the process
                # may have died between two of them
                trial._suggest(name, distribution)
        else:
            self._study.sampler = _sampler(self._seed + len(self.trials))
            trial = self._study.ask(fixed_distributions=self.space)
        self._live[trial.number] = trial
        return Proposal(trial.number, dict(trial.params), self.checkpoint(trial.number))

    def in_flight(self) -> bool:
        """Whether a dead process left trials that have not been proposed again."""
        return bool(self._lost)

    def _fits(self, params: Mapping[str, Any]) -> bool:
        """Whether parameters from elsewhere are all there and within the space."""
        chosen = {name: params[name] for name in self.space if name in params}
        try:
            optuna.trial.create_trial(params=chosen, distributions=self.space, value=0.0)
        except ValueError:
            return False
        return True

    # results ------------------------------------------------------------------------------------
    def report(self, number: int, step: int, score: float) -> bool:
        """Write down a score; True if the trial has fallen behind and should stop."""
        if step <= len(self.told(number).scores):
            return False  # a step that was done again after the last checkpoint
        trial = self._live[number]
        trial.report(score, step)
        return bool(trial.should_prune())

    def close(self, number: int, status: Status, error: str = "") -> Told:
        """Write down how a trial ended."""
        trial, told = self._live.pop(number), self.told(number)
        if error:
            trial.set_user_attr(_ERROR, error)
        value = told.score if status == "FINISHED" else None
        self._study.tell(trial, value, state=_STATE[status])
        self._state_file(number).unlink(missing_ok=True)
        return self.told(number)

    def keep(self, number: int, checkpoint: bytes) -> None:
        """Keep the checkpoint that a trial goes on from if this process dies."""
        path = self._state_file(number)
        path.parent.mkdir(exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_bytes(checkpoint)
        draft.replace(path)

    def checkpoint(self, number: int) -> bytes | None:
        """The last checkpoint of a running trial."""
        path = self._state_file(number)
        return path.read_bytes() if path.is_file() else None

    def _state_file(self, number: int) -> Path:
        return self.folder / "checkpoints" / f"{number}.state"

    # reading ------------------------------------------------------------------------------------
    @property
    def trials(self) -> list[Told]:
        """All trials that have started, by number."""
        found = self._study.get_trials(deepcopy=False)
        return [_told(each) for each in found if each.state in _STATUS]

    def told(self, number: int) -> Told:
        """What is known of one trial."""
        return _told(self._frozen(number))

    def ranked(self) -> list[Told]:
        """Best first: those that ran to their end, then those stopped, by steps and score."""
        order = {"FINISHED": 0, "KILLED": 1, "RUNNING": 2, "FAILED": 3}
        return sorted(
            self.trials,
            key=lambda told: (order[told.status], -len(told.scores), told.score, told.number),
        )

    def without_gain(self) -> int:
        """Trials that have ended since the best one did; 0 before any finished."""
        ended = sorted((told.ended, told.number, told) for told in self.trials if told.ended)
        scores = [told.score if told.status == "FINISHED" else math.inf for *_, told in ended]
        best = min(scores, default=math.inf)
        return len(scores) - 1 - scores.index(best) if math.isfinite(best) else 0

    def _frozen(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    # the run that logs it -----------------------------------------------------------------------
    @property
    def run_id(self) -> str:
        """The MLflow run of this search; empty before there is one."""
        return str(self._study.user_attrs.get(_RUN, ""))

    @run_id.setter
    def run_id(self, run_id: str) -> None:
        self._study.set_user_attr(_RUN, run_id)

    def importances(self) -> dict[str, float]:
        """What each parameter matters, adding up to 1 (fANOVA, Hutter et al. 2014).

        Optuna's default, PED-ANOVA, names the wrong one with a dozen trials. Empty where no two
        trials came to different scores.
        """
        if not self._can_compare():
            return {}
        found = optuna.importance.get_param_importances(self._study, evaluator=_fanova())
        return {name: float(value) for name, value in found.items()}

    def figures(self) -> "tuple[go.Figure, ...]":
        """Parallel coordinates and importances; none where there is nothing to compare."""
        # a search that has only begun needs neither
        from optuna.visualization import plot_parallel_coordinate, plot_param_importances

        if not self._can_compare():
            return ()
        coordinates = plot_parallel_coordinate(
            self._study, [*self.space], target_name="validation CRPS, bp"
        )
        coordinates.update_layout(title="Trials that ran to their end; the darker the better")
        importances = plot_param_importances(self._study, _fanova())
        importances.update_layout(title="What each parameter matters (fANOVA)")
        return coordinates, importances

    def page(self) -> str:
        """Both plots as one HTML page that needs no network; empty where there are none."""
        return "".join(
            figure.update_layout(height=480).to_html(full_html=False, include_plotlyjs=number == 0)
            for number, figure in enumerate(self.figures())
        )

    def _can_compare(self) -> bool:
        return len({told.score for told in self.trials if told.status == "FINISHED"}) > 1


@contextmanager
def open_study(
    folder: Path,
    *,
    seed: int,
    grace: int,
    space: Mapping[str, BaseDistribution] = SPACE,
) -> Iterator[Study]:
    """The study in `folder`, new or as a search left it; a second process waits for the first.

    Args:
        folder: of this search alone; studies beside it that nobody came back to are swept.
        seed: of what is drawn.
        grace: steps that every trial gets before it may be stopped.
        space: where to look.
    """
    come_back(folder, _JOURNAL)
    with FileLock(folder / "lock"), _quiet():
        _mend(folder)
        yield Study(folder, seed=seed, grace=grace, space=space)


def _mend(folder: Path) -> None:
    """Take away what a process that died while it wrote has left: a lock, and half a line.

    A journal that cannot be read for another reason is put aside, and the search starts anew.
    """
    journal = folder / _JOURNAL
    journal.with_name(f"{_JOURNAL}.lock").unlink(missing_ok=True)  # ours keeps others out
    if not journal.is_file():
        return
    whole, _, half = journal.read_bytes().rpartition(b"\n")
    if half:
        journal.write_bytes(whole + b"\n" if whole else b"")
    try:
        for line in whole.splitlines():
            json.loads(line)
    except ValueError as error:
        aside = journal.with_name(f"{_JOURNAL}.damaged")
        journal.replace(aside)
        _log.warning("The search starts anew: its journal %s cannot be read: %s", aside, error)


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        logger.setLevel(level)


def _sampler(seed: int) -> TPESampler:
    return TPESampler(multivariate=True, constant_liar=True, n_startup_trials=STARTUP, seed=seed)


def _fanova() -> FanovaImportanceEvaluator:
    return FanovaImportanceEvaluator(seed=0)


def _told(trial: FrozenTrial) -> Told:
    values = trial.intermediate_values
    return Told(
        number=trial.number,
        params=dict(trial.params),
        scores=tuple(values[step] for step in sorted(values)),
        status=_STATUS[trial.state],
        error=str(trial.user_attrs.get(_ERROR, "")),
        ended=trial.datetime_complete,
    )
