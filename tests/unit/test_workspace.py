import json
import os
from datetime import date

import pandas as pd
import pytest
from evidently.ui.workspace import Workspace

from forecasting import drift, workspace
from tests.market import market


@pytest.fixture(scope="module")
def snapshot() -> drift.Snapshot:
    table = drift.features(market(400))
    reference = drift.reference_rows(table, date(2005, 1, 4), date(2006, 3, 1), 40)
    recent = drift.recent_rows(table, date(2006, 6, 30), 40)
    return drift.drift_snapshot(reference, recent, 1.0, 0.5)[1]


def test_evidently_reads_what_was_added(tmp_path, snapshot):
    day = date(2006, 6, 30)
    first = workspace.add(tmp_path / "evidently", "GOOG", day, 3, snapshot)
    assert workspace.add(tmp_path / "evidently", "GOOG", day, 3, snapshot) == first
    workspace.add(tmp_path / "evidently", "GOOG", day, 4, snapshot)
    workspace.add(tmp_path / "evidently", "MSFT", day, 3, snapshot)
    opened = Workspace(str(tmp_path / "evidently"))
    assert sorted(project.name for project in opened.list_projects()) == ["GOOG", "MSFT"]
    (project,) = opened.search_project("GOOG")
    assert len(opened.list_runs(project.id)) == 2
    kept = opened.get_run(project.id, first)
    assert pd.Timestamp(kept.timestamp).date() == day
    assert kept.name == "2006-06-30 version 3"


def test_earlier_snapshots_are_not_read(tmp_path, snapshot):
    """They take Evidently seconds, and a damaged one would stop the monitor."""
    first = workspace.add(tmp_path, "GOOG", date(2006, 6, 1), 1, snapshot)
    (path,) = tmp_path.rglob(f"{first}.json")
    path.write_text("{")
    workspace.add(tmp_path, "GOOG", date(2006, 6, 2), 1, snapshot)
    assert len(list(tmp_path.rglob("snapshots/*.json"))) == 2


def test_what_was_written_first_goes_when_there_is_too_much(tmp_path, snapshot, monkeypatch):
    monkeypatch.setattr(workspace, "MOST_SNAPSHOTS", 2)
    ids = []
    for number, day in enumerate((date(2006, 6, 1), date(2006, 6, 2), date(2006, 6, 5))):
        ids.append(workspace.add(tmp_path, "GOOG", day, 1, snapshot))
        for path in tmp_path.rglob(f"{ids[-1]}.json"):
            os.utime(path, (number, number))
    left = {path.stem for path in tmp_path.rglob("snapshots/*.json")}
    assert left == {str(each) for each in ids[1:]}


def test_a_dashboard_that_somebody_made_stays(tmp_path, snapshot):
    workspace.add(tmp_path, "GOOG", date(2006, 6, 1), 1, snapshot)
    (path,) = tmp_path.rglob("metadata.json")
    changed = json.loads(path.read_text()) | {"description": "mine"}
    path.write_text(json.dumps(changed))
    workspace.add(tmp_path, "GOOG", date(2006, 6, 2), 1, snapshot)
    assert json.loads(path.read_text())["description"] == "mine"
