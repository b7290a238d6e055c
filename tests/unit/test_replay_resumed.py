"""A replay that is killed goes on where it was, and comes to what an undisturbed one comes to."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from sqlalchemy import select

from forecasting.replay import DAY
from forecasting.store import costs, engine_of, predictions, retrains
from tests.replays import POLICY, SPAN


def start(root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.replays", str(root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def until_days(process: subprocess.Popen[str], count: int) -> None:
    assert process.stdout is not None
    for _ in range(count):
        assert process.stdout.readline() != "", "it ended before its time"


def decided(root: Path) -> dict[str, pd.DataFrame]:
    """What the replay did, without what is by chance another each time."""
    url = f"sqlite:///{root / POLICY.name / 'perennial.db'}"
    with engine_of(url) as engine, engine.connect() as connection:
        ledger = pd.read_sql(
            select(retrains.c.as_of, retrains.c.state, retrains.c.trigger).order_by(
                retrains.c.created_at
            ),
            connection,
        )
        columns = ("origin", "horizon", "model_version", "quantiles", "crps_bp")
        forecast = pd.read_sql(
            select(*(predictions.c[name] for name in columns)).order_by("origin", "horizon"),
            connection,
        )
        days = pd.read_sql(
            select(costs.c.as_of).where(costs.c.flow == DAY).order_by(costs.c.as_of), connection
        )
    ended = ledger[~ledger["state"].isin(["failed", "running"])].reset_index(drop=True)
    return {"retrains": ended, "forecasts": forecast, "days": days}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_dash_nine_changes_nothing(tmp_path):
    """Killed in the middle of a retrain: the third day is done, the fourth retrains."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with start(killed) as process:
        until_days(process, 3)
        os.killpg(process.pid, signal.SIGKILL)
    for root in (killed, whole):
        with start(root) as process:
            assert process.wait(timeout=400) == 0
    found, expected = decided(killed), decided(whole)
    assert list(expected["days"]["as_of"]) == SPAN.days
    assert len(expected["retrains"]) == 2
    for name, table in expected.items():
        pd.testing.assert_frame_equal(found[name], table, obj=name)
