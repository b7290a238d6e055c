"""The gate's task on real model folders and prices: what cannot be scored is refused in words."""

from datetime import date
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger

from forecasting import datasets
from forecasting.gate import GateVerdict
from forecasting.settings import Settings, load_settings
from tasks.training import judge
from tests.models import write_model_folder

DAY = date(2007, 12, 31)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    made = load_settings(home=tmp_path_factory.mktemp("home"), gate_days=60)
    datasets.ingest(made, ["GOOG"], DAY)
    return made


def verdict(settings: Settings, candidate: Path, production: Path | None) -> GateVerdict:
    md5 = datasets.find(settings).md5
    with disable_run_logger():
        return judge.fn(settings, "GOOG", DAY, md5, candidate, production)


def test_a_usable_model_passes_and_one_that_is_off_does_not(settings, tmp_path):
    write_model_folder(tmp_path / "good")
    write_model_folder(tmp_path / "off", scale=1.1)
    lenient = settings.model_copy(update={"gate_tolerance": 0.5})
    assert verdict(lenient, tmp_path / "good", tmp_path / "off").promote
    refused = verdict(lenient, tmp_path / "off", tmp_path / "good")
    assert not refused.promote
    assert "Not shown to be as good as the random walk" in refused.reasons[0]
    assert "No better than the model in production" in refused.reasons[1]


@pytest.mark.parametrize("broken", ["candidate", "production"])
def test_a_model_that_does_not_answer_is_a_refusal_not_a_failure(settings, tmp_path, broken):
    folders = {"candidate": tmp_path / "candidate", "production": tmp_path / "production"}
    for name, folder in folders.items():
        write_model_folder(folder, horizon=4 if name == broken else 5)
    refused = verdict(settings, folders["candidate"], folders["production"])
    assert not refused.promote
    assert f"scores of the {broken} are not finite numbers" in refused.reasons[0]
