"""With approval: a deployed training waits in its worker for a person, and is served afterwards."""

from collections.abc import Iterator
from datetime import date
from pathlib import Path

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from deployments.prefect_api import PrefectApi
from deployments.stack import Stack
from forecasting import audit
from forecasting.events import ModelCondemned
from forecasting.registry import PREVIOUS, PRODUCTION, open_registry
from forecasting.sessions import sessions_after
from forecasting.settings import Settings, load_settings
from forecasting.store import engine_of
from tests.e2e.conftest import QUICK
from tests.e2e.planted import NAME, plant
from tests.flows.support import answer, paused
from tests.serving.running import until

TRAINED, LATER = date(2007, 1, 31), date(2007, 6, 29)
APPROVING = QUICK | {
    "PERENNIAL_APPROVAL": "true",
    "PERENNIAL_PROBATION_DAYS": "20",
    "PERENNIAL_GATE_TOLERANCE": "1",
    "PERENNIAL_GATE_CLASSICAL_TOLERANCE": "1",
}

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def approving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One of its own: its workers are told to ask."""
    with Stack(tmp_path_factory.mktemp("approving"), extra=APPROVING) as made:
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


def settings_of(stack: Stack) -> Settings:
    return load_settings(
        home=stack.home, tracking_uri=stack.mlflow_url, server_url=stack.server_url
    )


def test_the_worker_waits_for_a_person_and_goes_on(approving: Stack) -> None:
    registry = open_registry(settings_of(approving))
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


def test_a_condemned_version_goes_when_a_person_says_so(approving: Stack, tmp_path: Path) -> None:
    """The monitor tells, the automation starts `rollback`, which waits in its worker."""
    settings = settings_of(approving)
    registry, days = open_registry(settings), sessions_after(LATER, 20)
    with PrefectApi(approving.prefect_url) as api, engine_of(settings.sql_url) as engine:
        assert plant(settings, registry, engine, tmp_path / "weak", LATER) == 2
        api.wait(api.start("daily/daily", {"symbols": ["GOOG"], "as_of": str(days[0])}), 120)
        api.wait(api.start("daily/daily", {"symbols": ["GOOG"], "as_of": str(days[14])}), 300)
        (run,) = until(lambda: api.runs("rollback"), "the automation to start rollback", 60)
        assert run.creator == "AUTOMATION"
        (event,) = api.events(ModelCondemned.name)
        assert run.parameters["watched"] == event["payload"]["probation"]
        until(lambda: api.run(run.id).state == "PAUSED", "the run to pause", 120)
        assert registry.alias(NAME, PRODUCTION) == 2
        decide(approving, api, run.id, approve=True, who="Ada", reason="it is worse")
        assert registry.aliases(NAME) == {PRODUCTION: 1, PREVIOUS: 2}
        answered = httpx.get(f"{approving.server_url}/v1/forecast/GOOG")
        assert answered.json()["model_version"] == 1
        said = [line for line in audit.read(engine) if line.kind == "approval"]
    assert [(line.who, line.reason) for line in said] == [
        ("Ada", "it looks good"),
        ("Bob", "not now"),
        ("Ada", "it is worse"),
    ]
