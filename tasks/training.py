"""Steps of training: windows, search, fit. Results are cached on data, code and parameters.

The search and the network are imported inside the tasks that need them: a run whose results are
cached never pays for Ray, torch and Lightning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, Any

from prefect.context import TaskRunContext

from forecasting import datasets
from forecasting.errors import RegistryError
from forecasting.hyperparameters import ModelConfig
from forecasting.registry import Registry, open_registry
from forecasting.scratch import come_back
from forecasting.settings import Settings
from forecasting.windows import Splits, join, make_windows, split, with_peers
from tasks.candidate import Candidate, Found, fit_candidate
from tasks.steps import create_table_artifact, is_plain, task

if TYPE_CHECKING:
    from forecasting.study import Told

PAST_SEARCHES = 3
"""Past searches of a symbol whose best parameters a new one tries first."""


def _key(_context: TaskRunContext, parameters: dict[str, Any]) -> str:
    return str(parameters["key"])


@task(name="windows", cache_key_fn=_key, persist_result=True, timeout_seconds=300)
def prepare_windows(
    settings: Settings, symbols: Sequence[str], as_of: date, md5: str, key: str
) -> Splits:
    """Cut the dataset version into training, validation and gate windows.

    Those of `settings.peers` are learned from as well.
    """
    every = [
        make_windows(
            datasets.load_frame(settings, each, as_of, md5), settings.context, settings.horizon, i
        )
        for i, each in enumerate(with_peers_of(settings, symbols))
    ]
    own = join(every[: len(symbols)])
    splits = split(own, settings.validation_days, settings.gate_days)
    return with_peers(splits, every[len(symbols) :])


def with_peers_of(settings: Settings, symbols: Sequence[str]) -> list[str]:
    """Symbols, and after them those that their training learns from as well."""
    return list(dict.fromkeys((*symbols, *settings.peers)))


@task(name="search", cache_key_fn=_key, persist_result=True, timeout_seconds=3600)
def search(
    settings: Settings,
    splits: Splits,
    parent_run: str,
    tags: dict[str, str],
    key: str,
) -> Found:
    """Search the hyperparameters with Ray Tune; every trial is a nested MLflow run.

    A search that was killed goes on where it was, in the MLflow run that it had begun.

    Args:
        settings: as `run_search` reads them.
        splits: windows.
        parent_run: MLflow run of the training.
        tags: `symbol`, `as_of` and `dataset_md5`, for the search's run and its trials.
        key: names the result in the cache, and the study on disk.
    """
    from tasks import cluster

    if is_plain():
        return _searched(settings, splits, parent_run, tags, key)
    with cluster.short_lived() as scratch, cluster.running(settings, scratch, ("tasks.progress",)):
        return _searched(settings, splits, parent_run, tags, key)


def _searched(
    settings: Settings, splits: Splits, parent_run: str, tags: dict[str, str], key: str
) -> Found:
    from forecasting.study import open_study
    from tasks.progress import shown
    from tasks.search import run_search, search_here

    registry, folder = open_registry(settings), settings.work_dir / "search" / key
    with open_study(folder, seed=settings.seed, grace=settings.grace_epochs) as study:
        if not (study.run_id and registry.take_up_run(study.run_id, parent_run)):
            own = {**tags, "cache_key": key, "perennial.kind": "search"}
            study.run_id = registry.start_run("search", own, parent=parent_run)
        run_id = study.run_id
        study.suggest_first(first_parameters(registry, tags))
        on_trial = registry.trial_logger(run_id, tags)
        logged = registry.logged_trials(run_id)
        try:
            for told in study.trials:  # what a dead process ended and did not live to log
                if told.ended is not None and told.number not in logged:
                    config = asdict(ModelConfig(**told.params, seed=settings.seed))
                    on_trial(told.number, config, told.scores, told.status)
            if is_plain():  # Ray's start takes longer than the trials of many a retrain
                result = search_here(splits, settings, study, on_trial=on_trial)
            else:
                with shown() as on_progress:
                    result = run_search(
                        splits, settings, study, on_trial=on_trial, on_progress=on_progress
                    )
        except BaseException:
            registry.finish(run_id, "FAILED")
            raise
        registry.log_params(run_id, asdict(result.config))
        shares = study.importances()
        registry.log_metrics(run_id, [(f"importance_{k}", v, 0) for k, v in shares.items()])
        if page := study.page():
            registry.log_text(run_id, page, "search.html")
        registry.finish(run_id, "FINISHED")
    return Found(config=result.config, leaderboard=result.leaderboard, run_id=run_id)


def log_search(
    registry: Registry, parent: str, tags: dict[str, str], found: Found, trials: Sequence["Told"]
) -> Found:
    """Log a search that was made elsewhere, with its trials; it with the run that they lie in."""
    run_id = registry.start_run("search", {**tags, "perennial.kind": "search"}, parent=parent)
    on_trial = registry.trial_logger(run_id, tags)
    for told in trials:
        config = asdict(ModelConfig(**told.params, seed=found.config.seed))
        on_trial(told.number, config, told.scores, told.status)
    registry.log_params(run_id, asdict(found.config))
    registry.finish(run_id, "FINISHED")
    return replace(found, run_id=run_id)


def first_parameters(registry: Registry, tags: dict[str, str]) -> list[dict[str, Any]]:
    """What a search tries before it draws: the defaults, and what was best for the symbol before.

    Only of searches as of earlier days: the past must not know of what came after it, and the
    same day searched again must find the same.
    """
    past = registry.past_searches(
        tags["symbol"], date.fromisoformat(tags["as_of"]), limit=PAST_SEARCHES
    )
    return [asdict(ModelConfig()), *map(_parameters, past)]


def _parameters(logged: Mapping[str, str]) -> dict[str, Any]:
    """Hyperparameters among what a run logged, as what they are."""
    kinds = {name: type(value) for name, value in asdict(ModelConfig()).items()}
    return {name: kinds[name](value) for name, value in logged.items() if name in kinds}


@dataclass(frozen=True)
class Past:
    """What a version was trained with, and how well that did.

    Attributes:
        search_run: MLflow run of the search that found the parameters.
        skill: validation CRPS over that of the volatility forecast alone; None if not known.
    """

    config: ModelConfig
    search_run: str
    skill: float | None

    def has_aged(self, scores: Mapping[str, float], margin: float) -> bool:
        """Whether the parameters do worse on today's validation than they did on their own.

        Both are told over the volatility forecast on the same days, so that a wilder market is no
        worse model.

        Args:
            scores: of a candidate.
            margin: how much worse is let pass, relative.
        """
        today = _skill(scores)
        if self.skill is None or today is None:
            return False
        return today > self.skill * (1 + margin)


def past_of(registry: Registry, run_id: str, seed: int) -> Past | None:
    """What the training of that MLflow run settled on; None where its search is not known."""
    try:
        run = registry.run(run_id)
        search_run = run.params.get("search_run", "")
        found = registry.run(search_run) if search_run else None
    except RegistryError:  # deleted; one that is away is met again by the next call
        return None
    if found is None:
        return None
    known = _parameters(found.params)
    if not known:
        return None
    return Past(ModelConfig(**known | {"seed": seed}), search_run, _skill(run.metrics))


def _skill(scores: Mapping[str, float]) -> float | None:
    trained = scores.get("validation_crps_trained")
    volatility = scores.get("validation_crps_volatility")
    if trained is None or not volatility:
        return None
    return min(trained, volatility) / volatility  # where the LSTM does not help it is off


@task(name="fit", cache_key_fn=_key, persist_result=True, timeout_seconds=3600)
def fit(settings: Settings, splits: Splits, config: ModelConfig, key: str) -> Candidate:
    """Fit the best configuration with Lightning and export it to ONNX.

    Its checkpoint lies in a folder named by the key: a fit that was killed goes on when it is run
    again, and comes to the same weights.
    """
    from forecasting.model import CHECKPOINT

    folder = settings.work_dir / "fit" / key
    come_back(folder, f"{CHECKPOINT}*")
    return fit_candidate(settings, splits, config, folder)


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
