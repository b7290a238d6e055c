"""What every test gets: an environment that names nobody's servers, and a home of its own.

The environment is cleaned here, before any test module imports Prefect or MLflow.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest

import tests.postgres  # noqa: F401  reads its address before the environment is cleaned
from forecasting.settings import Settings, load_settings

FOREIGN = ("PREFECT_", "MLFLOW_", "RAY_", "DVC_", "PERENNIAL_")
SCRATCH = Path(tempfile.mkdtemp(prefix="perennial-tests-"))
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)

for _key in [key for key in os.environ if key.startswith(FOREIGN)]:
    del os.environ[_key]
os.environ |= {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MPLCONFIGDIR": str(SCRATCH / "matplotlib"),
    "ORT_DISABLE_TELEMETRY": "1",
    "PREFECT_HOME": str(SCRATCH / "prefect"),
    # as of the local stack: an event can be read back within a second
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "0.5",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}

# how long an example takes is the machine's affair
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings with a home of their own, no server, and little patience."""
    return load_settings(home=tmp_path / "home", server_url="", confirm_seconds=2.0)
