"""The two engines of a replay come to the same on the same days."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from sqlalchemy import select

from deployments.replay import ENGINES, FULL
from forecasting.sessions import sessions_between
from forecasting.store import checks, engine_of, predictions, retrains
from tests.flows.support import QUICK

DAYS = sessions_between(pd.Timestamp("2008-08-29").date(), pd.Timestamp("2008-11-21").date())
SETTINGS = QUICK | {"trials": 1, "epochs": 1, "fit_epochs": 1, "folds": 1, "gate_tolerance": 0.05}


def played(home: Path, engine: str) -> dict[str, pd.DataFrame]:
    """What sixty days into the crash of 2008 came to."""
    command = [sys.executable, "-m", "deployments.replay", "--policy", "both", "--name", "crash"]
    command += ["--first", str(DAYS[0]), "--last", str(DAYS[-1]), "--engine", engine]
    named = {f"PERENNIAL_{name.upper()}": str(value) for name, value in SETTINGS.items()}
    environment = os.environ | named | {"PERENNIAL_HOME": str(home)}
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
