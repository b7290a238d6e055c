"""A real search with real Ray workers, kept tiny."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import psutil
import pytest
import ray

from forecasting.errors import ConfigError, RegistryError, ServiceError, TrainingError
from forecasting.hyperparameters import METRIC, ModelConfig
from forecasting.model import fit
from forecasting.settings import Settings, load_settings
from forecasting.study import open_study
from forecasting.windows import Splits, folds, make_windows, split
from tasks.search import Progress, SearchResult, run_search, search_here
from tests.market import market

ROOT = Path(__file__).parents[2]


def _settings(home: Path, **changes: object) -> Settings:
    return load_settings(
        home=home, **{"trials": 3, "epochs": 4, "folds": 1, "concurrency": 1} | changes
    )


@pytest.fixture(scope="module")
def splits() -> Splits:
    return split(make_windows(market(320), 32, 5), 30, 30)


def _ray_left_over() -> list[str]:
    names = [child.name() for child in psutil.Process().children(recursive=True)]
    scratch = [str(path) for path in Path("/dev/shm").glob(f"perennial-search-{os.getpid()}-*")]
    return [name for name in names if "ray" in name or "gcs" in name] + scratch


def _run(splits: Splits, settings: Settings, **told_to: object) -> SearchResult:
    folder = settings.work_dir / "search" / "key"
    with open_study(folder, seed=settings.seed, grace=settings.grace_epochs) as study:
        study.suggest_first([asdict(ModelConfig())])
        return run_search(splits, settings, study, **told_to)


def _search(splits: Splits, home: Path) -> tuple[SearchResult, list[tuple]]:
    told: list[tuple] = []
    return _run(splits, _settings(home), on_trial=lambda *trial: told.append(trial)), told


def test_a_search_is_told_ranked_repeatable_and_leaves_nothing(splits, tmp_path):
    handler, environment = signal.getsignal(signal.SIGTERM), dict(os.environ)
    result, told = _search(splits, tmp_path / "first")

    assert [number for number, *_ in told] == [0, 1, 2]
    assert {status for *_, status in told} <= {"FINISHED", "KILLED"}
    first = ModelConfig(seed=_settings(tmp_path).seed)
    assert told[0][1] == asdict(first)
    rows = {row["trial"]: row for row in result.leaderboard}
    for number, config, history, status in told:
        row = rows[number]
        assert row["epochs"] == len(history) == (4 if status == "FINISHED" else 3)
        assert row[METRIC] == history[-1]
        assert row["status"] == status
        assert {field.name: row[field.name] for field in fields(ModelConfig)} == config
    ended = [row[METRIC] for row in result.leaderboard if row["status"] == "FINISHED"]
    assert ended == sorted(ended)
    assert result.leaderboard[0]["status"] == "FINISHED"
    assert asdict(result.config) == told[result.leaderboard[0]["trial"]][1]

    assert signal.getsignal(signal.SIGTERM) == handler
    assert dict(os.environ) == environment
    assert _ray_left_over() == []

    assert _search_here(splits, tmp_path / "second") == (result.leaderboard, told)


def _search_here(splits: Splits, home: Path) -> tuple[list[dict], list[tuple]]:
    """The same without Ray."""
    settings, told = _settings(home), []
    with open_study(home / "study", seed=settings.seed, grace=settings.grace_epochs) as study:
        study.suggest_first([asdict(ModelConfig())])
        result = search_here(splits, settings, study, on_trial=lambda *trial: told.append(trial))
    return result.leaderboard, told


def test_a_trial_is_scored_on_the_mean_of_its_folds(splits, tmp_path):
    settings = _settings(tmp_path, trials=1, folds=2)
    with open_study(tmp_path / "study", seed=settings.seed, grace=99) as study:
        result = search_here(splits, settings, study)
    expected = []
    for number, parts in enumerate(folds(splits, 2)):
        fitted = fit(parts, result.config, 4, folder=tmp_path / str(number), patience=4)
        expected.append(fitted.trained)
    (row,) = result.leaderboard
    assert row["epochs"] == 8
    assert row[METRIC] == pytest.approx(sum(expected) / 2, rel=1e-9)


def test_trials_that_fail_do_not_end_the_search_unless_all_do(tmp_path):
    bad = split(make_windows(market(320), 32, 5), 30, 30)
    bad.validation.returns[:] = float("nan")
    told: list[tuple] = []
    with pytest.raises(TrainingError, match=r"All 2 trials .* Validation CRPS is nan"):
        _run(
            bad,
            _settings(tmp_path, trials=2, concurrency=2),
            on_trial=lambda *trial: told.append(trial),
        )
    assert sorted((number, status) for number, *_, status in told) == [
        (0, "FAILED"),
        (1, "FAILED"),
    ]
    assert _ray_left_over() == []


def test_a_budget_of_time_ends_a_search_with_what_it_has(splits, tmp_path):
    told: list[Progress] = []
    settings = _settings(tmp_path, trials=10_000, search_seconds=4.0)
    began = time.monotonic()
    result = _run(splits, settings, on_progress=told.append)
    assert time.monotonic() - began < 60
    assert 1 <= len(result.leaderboard) < 10_000
    assert told[-1].done == len(result.leaderboard)
    assert all(each.seconds_left is None or each.seconds_left <= 4.0 for each in told)


def test_a_search_ends_when_nothing_is_gained(splits, tmp_path):
    settings = _settings(tmp_path, trials=50, epochs=1, search_patience=2)
    result = _run(splits, settings)
    best = result.leaderboard[0]["trial"]
    assert len(result.leaderboard) == best + 3 < 50


KILLED = """
import os, signal, sys
from dataclasses import asdict
from pathlib import Path
from forecasting.hyperparameters import METRIC, ModelConfig
from forecasting.settings import load_settings
from forecasting.study import open_study
from forecasting.windows import make_windows, split
from tasks import trials
from tasks.search import run_search
from tests.market import market

settings = load_settings(
    home=Path(sys.argv[1]), trials=4, epochs=60, folds=1, concurrency=1, checkpoint_seconds=0.0
)
with open_study(settings.work_dir / "search" / "key", seed=7, grace=60) as study:
    study.suggest_first([asdict(ModelConfig())])

    def kill_in_the_second(progress):
        if study.checkpoint(1) is not None:
            os.kill(os.getpid(), signal.SIGKILL)

    splits = split(make_windows(market(900), 32, 5), 30, 30)
    run_search(splits, settings, study, on_progress=kill_in_the_second)
"""


@pytest.mark.slow  # tests/flows/test_search_resumed.py kills the whole flow
def test_a_killed_search_goes_on_with_the_trials_it_had(tmp_path):
    (tmp_path / "script.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    died = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert died.returncode == -signal.SIGKILL, died.stderr

    parts = split(make_windows(market(900), 32, 5), 30, 30)
    settings = _settings(tmp_path / "killed", trials=4, epochs=60, grace_epochs=60)
    told: list[tuple] = []
    with open_study(settings.work_dir / "search" / "key", seed=7, grace=60) as study:
        before = study.trials
        assert [each.status for each in before] == ["FINISHED", "RUNNING"]
        assert study.checkpoint(1) is not None
        resumed = run_search(parts, settings, study, on_trial=lambda *trial: told.append(trial))
        assert study.told(0) == before[0]  # not run again
        assert study.told(1).scores[: len(before[1].scores)] == before[1].scores
    assert [number for number, *_ in told] == [1, 2, 3]

    whole = _run(parts, _settings(tmp_path / "whole", trials=4, epochs=60, grace_epochs=60))
    assert resumed.leaderboard == whole.leaderboard
    assert not list((tmp_path / "killed").rglob("*.state"))


def test_what_the_caller_raises_ends_the_search(splits, tmp_path):
    def full_disk(*_trial: object) -> None:
        raise RegistryError("disk is full")

    with pytest.raises(RegistryError, match="disk is full"):
        _run(splits, _settings(tmp_path), on_trial=full_disk)
    assert _ray_left_over() == []


def test_a_client_address_is_refused_with_what_to_write(splits, tmp_path):
    with pytest.raises(ConfigError, match=r"ray://head:10001; host:port .* is expected"):
        _run(splits, _settings(tmp_path, ray_address="ray://head:10001"))


def test_a_cluster_that_is_away_is_named(splits, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServiceError, match=f"No Ray cluster answers at {address}"):
            _run(splits, _settings(tmp_path, ray_address=address))
    assert not ray.is_initialized()
