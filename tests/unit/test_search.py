"""A real search with real Ray workers, kept tiny."""

import os
import signal
import socket
from dataclasses import asdict, fields
from pathlib import Path

import psutil
import pytest
import ray

from forecasting.errors import RegistryError, ServiceError, TrainingError
from forecasting.model import ModelConfig
from forecasting.settings import Settings, load_settings
from forecasting.windows import Splits, make_windows, split
from tasks.search import METRIC, SearchResult, run_search
from tests.market import market


def _settings(home: Path, **changes: object) -> Settings:
    return load_settings(home=home, **{"trials": 3, "epochs": 4, "concurrency": 1} | changes)


@pytest.fixture(scope="module")
def splits() -> Splits:
    return split(make_windows(market(320), 32, 5), 30, 30)


def _ray_left_over() -> list[str]:
    names = [child.name() for child in psutil.Process().children(recursive=True)]
    scratch = [str(path) for path in Path("/dev/shm").glob("search-*")]
    return [name for name in names if "ray" in name or "gcs" in name] + scratch


def _search(splits: Splits, home: Path) -> tuple[SearchResult, list[tuple]]:
    told: list[tuple] = []
    result = run_search(splits, _settings(home), on_trial=lambda *trial: told.append(trial))
    return result, told


def test_a_search_is_told_ranked_repeatable_and_leaves_nothing(splits, tmp_path):
    handler, environment = signal.getsignal(signal.SIGTERM), dict(os.environ)
    result, told = _search(splits, tmp_path)

    assert [number for number, *_ in told] == [0, 1, 2]
    assert {status for *_, status in told} <= {"FINISHED", "KILLED"}
    first = ModelConfig(seed=_settings(tmp_path).seed)
    assert told[0][1] == asdict(first)
    rows = {row["trial"]: row for row in result.leaderboard}
    for number, config, history, status in told:
        row = rows[number]
        assert row["epochs"] == len(history) == (4 if status == "FINISHED" else 3)
        assert row[METRIC] == min(history)
        assert row["status"] == status
        assert {field.name: row[field.name] for field in fields(ModelConfig)} == config
    scores = [row[METRIC] for row in result.leaderboard]
    assert scores == sorted(scores)
    assert asdict(result.config) == told[result.leaderboard[0]["trial"]][1]

    assert signal.getsignal(signal.SIGTERM) == handler
    assert dict(os.environ) == environment
    assert _ray_left_over() == []

    assert _search(splits, tmp_path) == (result, told)


def test_trials_that_fail_do_not_end_the_search_unless_all_do(tmp_path):
    bad = split(make_windows(market(320), 32, 5), 30, 30)
    bad.validation.returns[:] = float("nan")
    told: list[tuple] = []
    with pytest.raises(TrainingError, match=r"All 2 trials .* Validation CRPS is nan"):
        run_search(
            bad,
            _settings(tmp_path, trials=2, concurrency=2),
            on_trial=lambda *trial: told.append(trial),
        )
    assert sorted((number, status) for number, *_, status in told) == [
        (0, "FAILED"),
        (1, "FAILED"),
    ]
    assert _ray_left_over() == []


def test_what_the_caller_raises_ends_the_search(splits, tmp_path):
    def full_disk(*_trial: object) -> None:
        raise RegistryError("disk is full")

    with pytest.raises(RegistryError, match="disk is full"):
        run_search(splits, _settings(tmp_path), on_trial=full_disk)
    assert _ray_left_over() == []


def test_a_cluster_that_is_away_is_named(splits, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServiceError, match=f"No Ray cluster answers at {address}"):
            run_search(splits, _settings(tmp_path, ray_address=address))
    assert not ray.is_initialized()
