"""The two engines of a replay come to the same on the same days."""

import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from sqlalchemy import Table, select

from deployments.replay import ENGINES, FULL
from forecasting.replay import DAY
from forecasting.sessions import sessions_between
from forecasting.store import checks, costs, engine_of, predictions, retrains
from tests.flows.support import QUICK
from tests.serving.running import until

DAYS = sessions_between(pd.Timestamp("2008-08-29").date(), pd.Timestamp("2008-11-21").date())
SETTINGS = QUICK | {"trials": 1, "epochs": 1, "fit_epochs": 1, "folds": 1, "gate_tolerance": 0.05}


def asked_for(
    home: Path, engine: str, policy: str, first: date, last: date
) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a replay."""
    command = [sys.executable, "-m", "deployments.replay", "--policy", policy, "--name", "crash"]
    command += ["--first", str(first), "--last", str(last), "--engine", engine]
    named = {f"PERENNIAL_{name.upper()}": str(value) for name, value in SETTINGS.items()}
    return command, os.environ | named | {"PERENNIAL_HOME": str(home)}


def played(home: Path, engine: str) -> dict[str, pd.DataFrame]:
    """What sixty days into the crash of 2008 came to."""
    command, environment = asked_for(home, engine, "both", DAYS[0], DAYS[-1])
    subprocess.run(command, env=environment, check=True, timeout=1500)
    root = home / "replay" / "crash" / ("both-full" if engine == FULL else "both")
    with engine_of(f"sqlite:///{root / 'perennial.db'}") as opened, opened.connect() as connection:
        asked = select(retrains.c.as_of, retrains.c.state).order_by(
            retrains.c.as_of, retrains.c.created_at
        )
        checked = select(checks.c.as_of, checks.c.version, checks.c.drifted, checks.c.share)
        forecast = select(predictions).order_by(predictions.c.origin, predictions.c.horizon)
        return {
            "retrains": pd.read_sql(asked, connection),
            "checks": pd.read_sql(checked.order_by(checks.c.as_of), connection),
            "forecasts": pd.read_sql(forecast, connection),
        }


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(3000)
def test_both_engines_decide_alike(tmp_path):
    """Decisions to the letter; forecasts too, of which the server logs one origin once a day."""
    assert len(DAYS) == 60
    fast, full = (played(tmp_path, engine) for engine in ENGINES)
    assert "promoted" in set(fast["retrains"]["state"])
    for name in ("retrains", "checks"):
        pd.testing.assert_frame_equal(full[name], fast[name], obj=name)
    columns = ["origin", "horizon", "model_version", "quantiles", "actual"]
    served = full["forecasts"].drop_duplicates(["origin", "horizon", "model_version"])
    paired = served[columns].merge(fast["forecasts"][columns], on=columns[:3], suffixes=("", "_2"))
    assert len(paired) == len(fast["forecasts"])
    assert (paired["quantiles"] == paired["quantiles_2"]).all()
    known = paired["actual"].notna()
    assert (paired["actual"][known] == paired["actual_2"][known]).all()


def lines_of(database: Path, table: Table) -> list[dict[str, Any]]:
    """Rows of a home that a replay writes to; none before it is there."""
    if not database.exists():
        return []
    with engine_of(f"sqlite:///{database}") as engine, engine.connect() as connection:
        return [dict(row) for row in connection.execute(select(table)).mappings()]


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(1200)
def test_a_full_replay_that_is_killed_in_a_retrain_goes_on(tmp_path):
    """The whole of it at once, as where a machine is lost; the retrain is done once."""
    first, last = DAYS[0], DAYS[23]
    command, environment = asked_for(tmp_path, FULL, "monthly", first, last)
    database = tmp_path / "replay" / "crash" / "monthly-full" / "perennial.db"

    def states() -> list[str]:
        return [row["state"] for row in lines_of(database, retrains)]

    with subprocess.Popen(command, env=environment) as killed:
        until(lambda: "running" in states(), "a retrain to run", 600)
        family = psutil.Process(killed.pid).children(recursive=True)
        for process in (killed, *family):
            process.kill()
    subprocess.run(command, env=environment, check=True, timeout=600)
    ended = states()
    assert ended.count("failed") == 1
    assert len(ended) == 2
    assert {"promoted", "refused", "unchanged"} & set(ended)
    assert len({row["flow_run_id"] for row in lines_of(database, retrains)}) == 1
    days = [row["as_of"] for row in lines_of(database, costs) if row["flow"] == DAY]
    assert sorted(days) == DAYS[:24]
