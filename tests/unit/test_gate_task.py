"""The gate's task on real model folders, prices and tables: verdicts, and the days they use up."""

import shutil
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger
from sqlalchemy import Engine

from forecasting import datasets, reserved_days
from forecasting.contract import GOLDEN_FILE, MODEL_FILE, read_contract, sha256_file
from forecasting.gate import GateVerdict
from forecasting.settings import Settings, load_settings
from forecasting.store import engine_of
from tasks.gate import Judged, gate_scores, judge
from tests.models import write_model_folder
from tests.tables import looks

DAY = date(2007, 12, 31)
LEARNED = date(2007, 6, 29)
NAME = "perennial-goog"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    made = load_settings(
        home=tmp_path_factory.mktemp("home"),
        gate_days=60,
        gate_tolerance=0.5,
        gate_classical_tolerance=0.5,
    )
    datasets.ingest(made, ["GOOG"], DAY)
    return made


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with engine_of(f"sqlite:///{tmp_path / 'tables.db'}") as opened:
        yield opened


def judged(
    settings: Settings, engine: Engine, candidate: Path, production: Path | None = None
) -> Judged:
    md5 = datasets.find(settings).md5
    contract = read_contract(candidate)
    with disable_run_logger():
        return judge.fn(settings, engine, contract, DAY, md5, candidate, production)


def verdict(
    settings: Settings, engine: Engine, candidate: Path, production: Path | None = None
) -> GateVerdict:
    return judged(settings, engine, candidate, production).verdict


def model(folder: Path, **changes: object) -> Path:
    write_model_folder(folder, train_end=LEARNED, **changes)
    return folder


def test_a_usable_model_passes_and_one_that_is_off_does_not(settings, engine, tmp_path):
    good, off = model(tmp_path / "good"), model(tmp_path / "off", scale=1.1)
    assert verdict(settings, engine, good, off).promote
    refused = verdict(settings, engine, off, good)
    assert not refused.promote
    assert "Not shown to be as good as the random walk" in refused.reasons[0]
    assert any("model in production" in each for each in refused.reasons)


def test_each_verdict_is_a_line_of_the_ledger(settings, engine, tmp_path):
    good, off = model(tmp_path / "good"), model(tmp_path / "off", scale=1.1)
    passed, refused = verdict(settings, engine, good), verdict(settings, engine, off)
    second, first = looks(engine)
    assert (first["verdict"], first["reasons"], first["uses"]) == ("passed", "", 0.0)
    assert (second["verdict"], second["uses"]) == ("refused", 1.0)
    assert second["reasons"] == " ".join(refused.reasons)
    assert first["model_sha256"] == sha256_file(good / MODEL_FILE)
    assert (str(first["first_day"]), str(first["last_day"])) == (passed.first_day, passed.last_day)
    assert (passed.uses, passed.confidence) == (0.0, 0.95)
    assert (refused.uses, refused.confidence) == (1.0, 0.975)


def test_a_candidate_judged_again_is_told_the_same_and_counts_once(settings, engine, tmp_path):
    good, off = model(tmp_path / "good"), model(tmp_path / "off", scale=1.1)
    verdict(settings, engine, off)
    first = verdict(settings, engine, good)
    verdict(settings, engine, model(tmp_path / "another", scale=1.2))
    assert verdict(settings, engine, good) == first
    assert len(looks(engine)) == 3
    strict = settings.model_copy(update={"gate_tolerance": 0.0, "gate_classical_tolerance": 0.0})
    assert not verdict(strict, engine, good).promote
    lines = {line["model_sha256"]: line for line in looks(engine)}
    assert lines[sha256_file(good / MODEL_FILE)]["verdict"] == "refused"


def test_what_was_killed_between_look_and_verdict_is_taken_up_again(settings, engine, tmp_path):
    good = model(tmp_path / "good")
    days = judged(settings, engine, good).evidence.days
    with engine_of(f"sqlite:///{tmp_path / 'another.db'}") as fresh:
        left = {"model_sha256": sha256_file(good / MODEL_FILE), "run_id": "killed"}
        reserved_days.claim(fresh, forecaster=NAME, days=days, dataset_md5="d" * 32, **left)
        assert verdict(settings, fresh, good).promote
        (line,) = looks(fresh)
    assert (line["verdict"], line["uses"], line["run_id"]) == ("passed", 0.0, "killed")


@pytest.mark.parametrize("broken", ["candidate", "production"])
def test_a_model_that_does_not_answer_is_a_refusal_not_a_failure(
    settings, engine, tmp_path, broken
):
    folders = {"candidate": tmp_path / "candidate", "production": tmp_path / "production"}
    for name, folder in folders.items():
        model(folder, horizon=4 if name == broken else 5)
    refused = verdict(settings, engine, folders["candidate"], folders["production"])
    assert not refused.promote
    assert any(f"scores of the {broken} are not finite" in each for each in refused.reasons)
    assert "gate_upper" not in gate_scores(refused)


@pytest.mark.parametrize("horizon", [4, 5], ids=["does not answer", "cannot be loaded"])
def test_a_broken_candidate_uses_no_days(settings, engine, tmp_path, horizon):
    broken = model(tmp_path / "broken", horizon=horizon)
    if horizon == 5:
        shutil.copy(broken / MODEL_FILE, broken / GOLDEN_FILE)
    refused = verdict(settings, engine, broken)
    assert refused.reasons[0].startswith("The candidate cannot be ")
    assert looks(engine) == []
