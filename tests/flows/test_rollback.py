"""Promotion as a transaction and the rollback flow, in a real Prefect with a real registry."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL
from prefect.transactions import transaction
from sqlalchemy import Engine

from flows.rollback import rollback
from forecasting import promotion
from forecasting.errors import RegistryError, ServiceError
from forecasting.promotion import PromotionResult
from forecasting.registry import PREVIOUS, PRODUCTION, Registry, open_registry
from forecasting.settings import Settings, load_settings
from forecasting.store import open_engine
from tasks.promote import promote_version
from tests.models import write_model_folder
from tests.services import InferenceServer

NAME = "perennial-goog"

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(scope="module")
def server() -> Iterator[InferenceServer]:
    with InferenceServer() as running:
        yield running


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, server: InferenceServer) -> Settings:
    home = tmp_path_factory.mktemp("home")
    return load_settings(home=home, server_url=server.url, confirm_seconds=1.0)


@pytest.fixture(scope="module")
def registry(settings: Settings) -> Registry:
    """A registry with three versions of two forecasters."""
    made = open_registry(settings)
    for name in (NAME, "perennial-ibm"):
        for number, scale in enumerate((1.0, 1.1, 1.2), start=1):
            folder = settings.home / name / str(number)
            run_id = made.start_run("a run", {})
            write_model_folder(folder, forecaster=name, scale=scale, run_id=run_id)
            assert made.register(folder, name, run_id) == number
    return made


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    made = open_engine(settings.sql_url)
    yield made
    made.dispose()


@pytest.fixture
def two_versions(
    settings: Settings, registry: Registry, engine: Engine, server: InferenceServer
) -> None:
    """Version 1 was in production, version 2 is; the server follows the alias."""
    server.refused = []
    server.on_ask = lambda: server.models.update(
        {
            name: aliases[PRODUCTION]
            for name, aliases in registry.served_versions().items()
            if PRODUCTION in aliases
        }
    )
    for version in (1, 2):
        promotion.promote(settings, registry, engine, NAME, version, "me", "to begin with")
    registry.set_alias(NAME, PREVIOUS, 1)


@pytest.fixture
def from_environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings as a deployment gets them."""
    monkeypatch.setenv("PERENNIAL_HOME", str(settings.home))
    monkeypatch.setenv("PERENNIAL_SERVER_URL", settings.server_url)
    monkeypatch.setenv("PERENNIAL_CONFIRM_SECONDS", "1.0")


class LaterStepError(Exception):
    """What a later step of a transaction raises."""


@task
def break_down() -> None:
    """A later step that fails."""
    raise LaterStepError


@flow
def promote_and(
    settings: Settings, registry: Registry, engine: Engine, version: int, *, fail: bool
) -> PromotionResult:
    """Promote, then a later step in the same transaction."""
    with transaction():
        result = promote_version(settings, registry, engine, NAME, version, "the gate agreed")
        if fail:
            break_down()
    return result


def test_tests_have_a_prefect_of_their_own() -> None:
    assert PREFECT_API_URL.value().startswith("http://127.0.0.1:")


@pytest.mark.usefixtures("two_versions")
def test_promotion_in_a_flow_is_recorded(
    settings: Settings, registry: Registry, engine: Engine
) -> None:
    result = promote_and(settings, registry, engine, 3, fail=False)
    assert (result.version, result.previous, result.confirmed) == (3, 2, True)
    assert registry.aliases(NAME) == {PRODUCTION: 3, PREVIOUS: 2}
    line = promotion.history(engine, NAME)[0]
    assert (line.state, line.why) == ("confirmed", "the gate agreed")
    assert "through promote-and/" in line.who
    tags = registry.version(NAME, 3).tags
    assert tags["promoted_because"] == "the gate agreed"
    assert tags["promoted_by"] == line.who
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts()
    assert {"promotions-perennial-goog"} <= {each.key for each in artifacts}


@pytest.mark.usefixtures("two_versions")
def test_a_later_step_that_fails_puts_the_aliases_back(
    settings: Settings, registry: Registry, engine: Engine
) -> None:
    with pytest.raises(LaterStepError):
        promote_and(settings, registry, engine, 3, fail=True)
    assert registry.aliases(NAME) == {PRODUCTION: 2, PREVIOUS: 1}
    line = promotion.history(engine, NAME)[0]
    assert (line.version, line.state) == (3, "undone")
    assert line.served == "a later step of its transaction failed."


@pytest.mark.usefixtures("two_versions")
def test_a_refused_version_fails_the_flow(
    settings: Settings, registry: Registry, engine: Engine, server: InferenceServer
) -> None:
    server.refused = [{"name": NAME, "version": 3, "reason": "altered"}]
    with pytest.raises(ServiceError, match="refused"):
        promote_and(settings, registry, engine, 3, fail=False)
    assert registry.aliases(NAME) == {PRODUCTION: 2, PREVIOUS: 1}
    assert promotion.history(engine, NAME)[0].state == "undone"


@pytest.mark.usefixtures("two_versions", "from_environment")
def test_rollback_goes_to_previous_and_back(registry: Registry, engine: Engine) -> None:
    result = rollback(NAME, why="version 2 looks wrong")
    assert isinstance(result, PromotionResult)
    assert (result.forecaster, result.version, result.previous) == (NAME, 1, 2)
    assert result.confirmed
    assert registry.aliases(NAME) == {PRODUCTION: 1, PREVIOUS: 2}
    line = promotion.history(engine, NAME)[0]
    assert line.why == "version 2 looks wrong"
    assert "through rollback/" in line.who
    assert rollback(NAME).version == 2
    assert rollback(NAME, version=3).previous == 2
    assert registry.aliases(NAME) == {PRODUCTION: 3, PREVIOUS: 2}


@pytest.mark.usefixtures("from_environment", "registry")
def test_rollback_without_anything_to_go_back_to() -> None:
    with pytest.raises(RegistryError, match=r"no version with the alias 'previous'.*3, 2, 1"):
        rollback("perennial-ibm")
    with pytest.raises(RegistryError, match="no version 8 of perennial-ibm"):
        rollback("perennial-ibm", version=8)
    with pytest.raises(RegistryError, match="none"):
        rollback("perennial-nobody")


@pytest.mark.usefixtures("two_versions", "from_environment")
def test_rollback_reconciles_what_was_killed(
    registry: Registry, engine: Engine, tmp_path: Path
) -> None:
    line = promotion._intend(engine, NAME, 3, registry.aliases(NAME), "killed", "to be killed")
    registry.set_alias(NAME, PREVIOUS, 2)
    registry.set_alias(NAME, PRODUCTION, 3)
    assert rollback(NAME).version == 2
    states = {each.id: each.state for each in promotion.history(engine, NAME)}
    assert states[line.id] == "confirmed"
