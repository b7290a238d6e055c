"""What a version was trained with, read back from MLflow, and whether it has aged."""

from dataclasses import asdict
from pathlib import Path

import pytest

from forecasting.hyperparameters import ModelConfig
from forecasting.registry import Registry
from tasks.training import Past, past_of

FOUND = ModelConfig(hidden=24, layers=2, dropout=0.2, lr=1e-3, seed=1)


def scores(trained: float, volatility: float) -> dict[str, float]:
    return {"validation_crps_trained": trained, "validation_crps_volatility": volatility}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "artifacts")


def test_the_past_is_read_back_with_the_seed_of_today(registry):
    search = registry.start_run("search", {})
    registry.log_params(search, asdict(FOUND))
    trained = registry.start_run("a training", {})
    registry.log_params(trained, {"search_run": search, "trials": 16})
    registry.log_metrics(trained, [(name, value, 0) for name, value in scores(98, 100).items()])
    past = past_of(registry, trained, seed=7)
    assert past == Past(ModelConfig(**asdict(FOUND) | {"seed": 7}), search, 0.98)


def test_a_past_that_is_not_known_is_none(registry):
    planted = registry.start_run("planted", {})
    lost = registry.start_run("its search was deleted", {})
    registry.log_params(lost, {"search_run": "f" * 32})
    for run_id in (planted, lost, "0" * 32):
        assert past_of(registry, run_id, seed=7) is None


@pytest.mark.parametrize(
    ("today", "aged"),
    [
        (scores(98.0, 100.0), False),
        (scores(196.0, 200.0), False),  # a market twice as wild
        (scores(98.9, 100.0), False),
        (scores(99.1, 100.0), True),
        (scores(150.0, 100.0), True),  # off, so as good as the volatility forecast
        ({}, False),
    ],
)
def test_a_past_has_aged_where_it_does_worse_by_the_margin(today, aged):
    assert Past(FOUND, "", 0.98).has_aged(today, margin=0.01) == aged


def test_one_whose_skill_is_not_known_or_was_none_has_not_aged():
    assert not Past(FOUND, "", None).has_aged(scores(150.0, 100.0), margin=0.0)
    assert not Past(FOUND, "", 1.0).has_aged(scores(150.0, 100.0), margin=0.0)
