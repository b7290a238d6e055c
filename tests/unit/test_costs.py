import subprocess
import sys
import time
from datetime import UTC, date, datetime, timedelta

import pytest
from sqlalchemy import create_engine

from forecasting import costs

DAY = date(2008, 10, 31)
BURN = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass\n"


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_run_costs_what_it_and_its_children_used(engine, tmp_path):
    with costs.measured(engine, tmp_path, "train", "GOOG", DAY, policy="drift") as spent:
        burn(0.3)
        subprocess.run([sys.executable, "-c", BURN], check=True, timeout=60)
        (tmp_path / "model.onnx").write_bytes(b"x" * 5000)
        spent.outcome = "promoted"
    (row,) = costs.read(engine).to_dict("records")
    assert (row["flow"], row["symbol"], row["as_of"]) == ("train", "GOOG", DAY)
    assert (row["policy"], row["outcome"], row["bytes"]) == ("drift", "promoted", 5000)
    assert 0.7 <= row["cpu_seconds"] <= 5
    assert row["wall_seconds"] >= 0.7
    assert spent.cpu_seconds == row["cpu_seconds"]


def test_a_child_that_still_runs_counts_too(engine, tmp_path):
    with costs.measured(engine, tmp_path, "train", "GOOG", DAY):
        code = BURN + "print('burnt', flush=True)\nimport sys; sys.stdin.read()"
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"burnt\n"
    child.communicate(timeout=30)
    assert costs.read(engine)["cpu_seconds"][0] >= 0.4


def test_a_run_that_fails_is_written_down_as_failed(engine, tmp_path):
    with (
        pytest.raises(RuntimeError, match="broke"),
        costs.measured(engine, tmp_path, "train", "GOOG", DAY),
    ):
        raise RuntimeError("broke")
    assert list(costs.read(engine)["outcome"]) == ["failed"]


def test_what_runs_inside_has_its_own_line_and_lines_add_up(engine, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    with costs.measured(engine, home, "daily", "GOOG", DAY) as outer:
        burn(0.2)
        with costs.measured(engine, home, "monitor", "GOOG", DAY) as inner:
            burn(0.4)
            (home / "page.html").write_bytes(b"x" * 700)
    assert 0.4 <= inner.cpu_seconds < 0.6
    assert 0.2 <= outer.cpu_seconds < 0.4
    assert outer.wall_seconds < inner.wall_seconds
    found = costs.summary(costs.read(engine))
    assert found["cpu_minutes"]["all"] * 60 == pytest.approx(0.6, abs=0.1)
    assert found["megabytes"]["all"] == pytest.approx(700e-6)


def test_what_cannot_be_written_down_stops_nobody(tmp_path, caplog):
    nowhere = create_engine(f"sqlite:///{tmp_path}/empty.db")
    with costs.measured(nowhere, tmp_path, "retrain", "GOOG", DAY):
        pass
    nowhere.dispose()
    assert "What retrain cost is not written down: " in caplog.text


def test_the_size_of_a_folder_is_that_of_its_files(tmp_path):
    assert costs.size(tmp_path / "none") == 0
    (tmp_path / "deep" / "folder").mkdir(parents=True)
    (tmp_path / "deep" / "folder" / "file").write_bytes(b"x" * 10)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert costs.size(tmp_path / "deep") == 10


def test_the_summary_adds_up_by_flow(engine, tmp_path):
    for flow, outcome in (("train", "promoted"), ("train", "failed"), ("monitor", "done")):
        with costs.measured(engine, tmp_path, flow, "GOOG", DAY) as spent:
            spent.outcome = outcome
    runs = costs.read(engine)
    found = costs.summary(runs)
    assert list(found.index) == ["monitor", "train", "all"]
    assert list(found["runs"]) == [1, 2, 3]
    assert list(found["failed"]) == [0, 1, 1]
    total = runs["cpu_seconds"].sum() / 60
    assert found["cpu_minutes"]["all"] == pytest.approx(total)
    assert found["cpu_minutes"].iloc[:2].sum() == pytest.approx(total)
    with costs.measured(engine, tmp_path, costs.WHOLE, "GOOG", DAY):
        pass
    assert costs.summary(costs.read(engine))["runs"]["all"] == 3
    later = datetime.now(UTC) + timedelta(hours=1)
    assert costs.read(engine, later).empty
