"""With approval: a deployed training waits in its worker for a person, and is served afterwards."""

from collections.abc import Iterator
from datetime import date
from pathlib import Path

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from deployments.prefect_api import PrefectApi
from deployments.stack import Stack
from forecasting.registry import PRODUCTION, Registry, open_registry
from forecasting.settings import load_settings
from tests.e2e.conftest import QUICK
from tests.flows.support import answer, paused
from tests.serving.running import until

NAME = "perennial-goog"
TRAINED, LATER = date(2007, 1, 31), date(2007, 6, 29)
APPROVING = QUICK | {
    "PERENNIAL_APPROVAL": "true",
    "PERENNIAL_GATE_TOLERANCE": "1",
    "PERENNIAL_GATE_CLASSICAL_TOLERANCE": "1",
}

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture
def approving(tmp_path: Path) -> Iterator[Stack]:
    """One of its own: its workers are told to ask."""
    with Stack(tmp_path / "stack", extra=APPROVING) as made:
        made.start()
        made.deploy()
        yield made


def start(api: PrefectApi, day: date) -> str:
    """A training that waits for a person."""
    run_id = api.start("train/train", {"symbol": "GOOG", "as_of": day.isoformat()})
    until(lambda: api.run(run_id).state == "PAUSED", "the run to pause", 240)
    return run_id


def decide(stack: Stack, api: PrefectApi, run_id: str, **form: object) -> None:
    """Fill in the form as the UI does."""
    with temporary_settings({PREFECT_API_URL: f"{stack.prefect_url}/api"}):
        assert answer(paused(api.run(run_id).name), **form) == "ACCEPT"
    api.wait(run_id, 120)


def registry_of(stack: Stack) -> Registry:
    return open_registry(load_settings(home=stack.home, tracking_uri=stack.mlflow_url))


def test_the_worker_waits_for_a_person_and_goes_on(approving: Stack) -> None:
    registry = registry_of(approving)
    with PrefectApi(approving.prefect_url) as api:
        asked = start(api, TRAINED)
        assert registry.alias(NAME, PRODUCTION) is None
        assert httpx.get(f"{approving.server_url}/v1/forecast/GOOG").status_code == 503
        decide(approving, api, asked, approve=True, who="Ada", reason="it looks good")
        assert registry.alias(NAME, PRODUCTION) == 1
        answered = httpx.get(f"{approving.server_url}/v1/forecast/GOOG")
        assert answered.json()["model_version"] == 1

        asked = start(api, LATER)
        decide(approving, api, asked, approve=False, who="Bob", reason="not now")
        assert registry.alias(NAME, PRODUCTION) == 1
        assert len(registry.history(NAME)) == 1
