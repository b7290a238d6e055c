"""Lineage over a real dataset, a real registry and a real ledger."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pytest
from sqlalchemy import Engine

from deployments import record
from forecasting import datasets, lineage, outcomes, promotion
from forecasting.datasets import DatasetVersion
from forecasting.errors import DataError, RegistryError
from forecasting.predictions import Prediction, Spool
from forecasting.registry import Registry, open_registry
from forecasting.settings import Settings, load_settings
from forecasting.store import engine_of
from tests.models import write_model_folder
from tests.predictions import make_prediction

NAME = "perennial-goog"
TRAINED, ASKED = date(2007, 1, 31), date(2007, 2, 6)
REASON = "better than the <random> walk"


@dataclass(frozen=True)
class World:
    """One version that was trained, promoted and asked for a forecast."""

    settings: Settings
    registry: Registry
    engine: Engine
    learnt: DatasetVersion
    asked: DatasetVersion
    logged: Prediction

    @property
    def answer(self) -> dict[str, object]:
        """As the server says it, with what lineage has no use for."""
        return {
            "symbol": "GOOG",
            "forecaster": NAME,
            "model_version": 1,
            "run_id": self.logged.run_id,
            "dataset_md5": self.learnt.md5,
            "prices_md5": self.asked.md5,
            "origin": ASKED.isoformat(),
            "origin_close": 471.48,
            "forecast": [],
        }

    def trace(self, **changes: object) -> lineage.Lineage:
        answer = lineage.parse(json.dumps(self.answer | changes))
        return lineage.trace(self.settings, self.registry, self.engine, answer)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("home")
    settings = load_settings(home=home, server_url="", confirm_seconds=0)
    learnt = datasets.ingest(settings, ["GOOG"], TRAINED)
    asked = datasets.ingest(settings, ["GOOG"], ASKED)
    registry = open_registry(settings)
    run_id = registry.start_run("goog", {"trigger": "train", "as_of": TRAINED.isoformat()})
    registry.log_params(run_id, {"hidden": 32})
    registry.set_tags(run_id, {"outcome": "promoted", "reasons": REASON})
    folder = home / "model"
    write_model_folder(folder, run_id=run_id, dataset_md5=learnt.md5, as_of=TRAINED)
    assert registry.register(folder, NAME, run_id) == 1
    registry.finish(run_id)
    logged = make_prediction(
        ASKED, run_id=run_id, dataset_md5=learnt.md5, prices_md5=asked.md5, forecaster=NAME
    )
    with engine_of(settings.sql_url) as engine:
        promotion.promote(settings, registry, engine, NAME, 1, "anna", REASON)
        spool = Spool(settings.spool_dir, "web")
        spool.append(logged)
        spool.close()
        assert outcomes.drain(engine, settings.spool_dir) == 1
        yield World(settings, registry, engine, learnt, asked, logged)


def test_an_answer_leads_back_to_rows_of_a_file(world):
    found = world.trace()
    assert found.missing == ()
    assert found.trained_on is not None
    assert found.asked_about is not None
    assert (found.trained_on.dataset_md5, found.asked_about.dataset_md5) == (
        world.learnt.md5,
        world.asked.md5,
    )
    assert (found.trained_on.first_row, found.trained_on.last) == (0, TRAINED)
    assert found.asked_about.last == ASKED
    assert found.asked_about.last_row - found.asked_about.first_row == 63  # the context is 64
    for rows in (found.trained_on, found.asked_about):
        table = datasets.load_raw(world.settings, "GOOG", rows.dataset_md5).rows
        assert table["date"][rows.first_row].date() == rows.first
        assert table["date"][rows.last_row].date() == rows.last
        assert rows.source == "sample bokeh_sampledata"


def test_it_says_which_run_verdict_and_person_stand_behind_it(world):
    found = world.trace()
    assert found.run_params["hidden"] == "32"
    assert (found.run_tags["outcome"], found.run_tags["reasons"]) == ("promoted", REASON)
    assert found.aliases == ("production",)
    assert [(line.who, line.why) for line in found.promotions] == [("anna", REASON)]
    assert found.contract is not None
    assert found.contract.files["model.onnx"] == found.model_sha256
    assert (found.logged, found.first_made_at) == (1, world.logged.made_at)


def test_an_answer_to_a_clients_own_rows_has_no_rows_of_ours(world):
    found = world.trace(prices_md5=None)
    assert found.asked_about is None
    assert ("prices asked about", "rows", "sent by the client; not kept") in found.table()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run_id": "1" * 32}, "1" * 32),
        ({"dataset_md5": "2" * 32}, "dataset of the contract"),
        ({"prices_md5": "3" * 32}, "3" * 32),
    ],
)
def test_what_does_not_fit_is_said(world, changes, said):
    found = world.trace(**changes)
    assert any(said in each for each in found.missing)
    assert any(section == "missing" and said in text for section, _, text in found.table())
    assert "sent by the client" not in str(found.table())


def test_a_version_that_is_none_is_an_error(world):
    with pytest.raises(RegistryError, match="no version 9"):
        world.trace(model_version=9)


@pytest.mark.parametrize("raw", ["", "[]", '{"symbol": "GOOG"}', '{"detail": "no model"}'])
def test_what_is_no_answer_is_refused_with_what_was_expected(raw):
    with pytest.raises(DataError, match="answer of /v1/forecast was expected"):
        lineage.parse(raw)


def test_the_command_takes_an_answer_or_an_id_and_writes_a_page(
    world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PERENNIAL_HOME", str(world.settings.home))
    (tmp_path / "answer.json").write_text(json.dumps(world.answer))
    page = tmp_path / "lineage.html"
    assert record.main(["lineage", str(tmp_path / "answer.json"), "--html", str(page)]) == 0
    by_file = capsys.readouterr().out
    assert record.main(["lineage", "--id", world.logged.id]) == 0
    assert capsys.readouterr().out == by_file
    for part in (world.logged.run_id, world.learnt.md5, "anna", "rows.parquet"):
        assert part in by_file.replace("\n", "")
        assert part in page.read_text()
    assert "&lt;random&gt;" in page.read_text()
    assert record.main(["lineage", "--id", "none"]) == 1
    assert "no answer 'none'" in capsys.readouterr().err
    assert record.main(["lineage", str(tmp_path / "nothing.json")]) == 1
    assert "file with an answer" in capsys.readouterr().err


def test_the_command_reads_an_answer_from_a_pipe(world):
    root = Path(record.__file__).parent.parent
    shown = subprocess.run(
        [sys.executable, "-m", "deployments.record", "lineage"],
        input=json.dumps(world.answer),
        env=os.environ | {"PERENNIAL_HOME": str(world.settings.home)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert world.logged.run_id in shown.stdout


def test_the_command_exports_the_audit_as_json_lines(world, monkeypatch, capsys):
    monkeypatch.setenv("PERENNIAL_HOME", str(world.settings.home))
    assert record.main(["audit", "--subject", NAME]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["details"]["state"] for each in lines] == ["intended", "moved", "moved"]
    assert {each["who"] for each in lines} == {"anna"}
    assert record.main(["audit", "--since", "2999-01-01"]) == 0
    assert capsys.readouterr().out == ""
