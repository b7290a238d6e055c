"""Promotion with a real registry (SQLite), a real ledger and a real HTTP server."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, create_engine, text

from forecasting import events, promotion
from forecasting.errors import (
    ConfigError,
    ContractError,
    OvertakenError,
    PerennialError,
    RegistryError,
    ServiceError,
)
from forecasting.registry import PREVIOUS, PRODUCTION, Registry, open_registry
from forecasting.settings import Settings, load_settings
from forecasting.signing import verify
from forecasting.store import now, open_engine
from tests.keys import write_pair
from tests.models import write_model_folder
from tests.services import InferenceServer, free_port

NAME = "perennial-goog"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with three versions, none of them in production; copied by each test."""
    home = tmp_path_factory.mktemp("template")
    registry = open_registry(load_settings(home=home))
    for number, scale in enumerate((1.0, 1.1, 1.2), start=1):
        folder = home / str(number)
        run_id = registry.start_run("a run", {})
        write_model_folder(folder, forecaster=NAME, scale=scale, run_id=run_id)
        assert registry.register(folder, NAME, run_id) == number
    return home / "mlflow"


@pytest.fixture
def registry(settings: Settings, template: Path) -> Registry:
    shutil.copytree(template, settings.home / "mlflow")
    return open_registry(settings)


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    made = open_engine(settings.sql_url)
    yield made
    made.dispose()


@pytest.fixture
def server() -> Iterator[InferenceServer]:
    with InferenceServer() as running:
        yield running


@pytest.fixture
def asking(settings: Settings, server: InferenceServer) -> Settings:
    """Settings that name the server."""
    return settings.model_copy(update={"server_url": server.url})


def promote(
    settings: Settings, registry: Registry, engine: Engine, version: int
) -> promotion.PromotionResult:
    return promotion.promote(settings, registry, engine, NAME, version, "me", f"because {version}")


def states(engine: Engine) -> list[tuple[int, str]]:
    return [(line.version, line.state) for line in reversed(promotion.history(engine, NAME))]


def told(engine: Engine) -> list[tuple[str, object, object]]:
    """Kind of each event of the outbox, the version it tells, and the one before it."""
    return [
        (
            each.name.removeprefix("perennial.model."),
            each.payload["version"],
            each.payload.get("previous", each.payload.get("rolled_back")),
        )
        for each in events.pending(engine)
    ]


def test_a_server_confirms(
    asking: Settings, registry: Registry, engine: Engine, server: InferenceServer
) -> None:
    server.on_ask = lambda: server.models.update(
        {NAME: 1} if server.asked >= 3 else {"perennial-other": 9}
    )
    first = promote(asking, registry, engine, 1)
    assert (first.version, first.previous, first.confirmed) == (1, None, True)
    assert first.served == f"{server.url} serves {NAME} version 1."
    assert registry.aliases(NAME) == {PRODUCTION: 1}
    server.on_ask = lambda: server.models.update({NAME: 2})
    second = promote(asking, registry, engine, 2)
    assert (second.version, second.previous, second.confirmed) == (2, 1, True)
    assert registry.aliases(NAME) == {PRODUCTION: 2, PREVIOUS: 1}
    newest, oldest = promotion.history(engine, NAME)
    assert (newest.who, newest.why, newest.state) == ("me", "because 2", "confirmed")
    assert (newest.previous, newest.fallback, oldest.previous) == (1, None, None)
    assert newest.created_at > oldest.created_at
    assert newest.created_at.tzinfo is not None
    assert told(engine) == [("promoted", 1, None), ("promoted", 2, 1)]
    (_, event) = events.pending(engine)
    assert event.resource == f"perennial.forecaster.{NAME}"
    assert (event.payload["who"], event.payload["why"]) == ("me", "because 2")
    assert event.payload["served"] == second.served


def test_a_promotion_stands_where_no_server_answers(
    settings: Settings, registry: Registry, engine: Engine
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    patient = settings.model_copy(update={"server_url": url, "confirm_seconds": 60.0})
    start = time.monotonic()
    result = promote(patient, registry, engine, 1)
    assert time.monotonic() - start < 10, "a refused connection is not waited for that long"
    assert (result.served, result.confirmed) == (f"No server answered at {url}.", False)
    assert registry.aliases(NAME) == {PRODUCTION: 1}
    assert states(engine) == [(1, "moved")]
    unnamed = promote(settings, registry, engine, 2)
    assert "PERENNIAL_SERVER_URL" in unnamed.served
    assert states(engine) == [(1, "confirmed"), (2, "moved")], "version 1 loads: reconciled"
    assert told(engine) == [("promoted", 1, None), ("promoted", 2, 1)], "each once, as it stands"


def test_an_earlier_version_in_the_place_of_a_later_one_is_told_as_rolled_back(
    settings: Settings, registry: Registry, engine: Engine
) -> None:
    for version in (1, 3, 2, 3):
        promote(settings, registry, engine, version)
    assert told(engine) == [
        ("promoted", 1, None),
        ("promoted", 3, 1),
        ("rolled-back", 2, 3),
        ("promoted", 3, 2),
    ]


@pytest.mark.parametrize(
    ("versions", "last"),
    [
        ((1,), ("rolled-back", None, 1)),
        ((1, 2), ("rolled-back", 1, 2)),
        ((2, 1), ("promoted", 2, 1)),
    ],
)
def test_one_that_was_told_and_is_undone_is_told_again(
    versions: tuple[int, ...],
    last: tuple[str, int | None, int],
    settings: Settings,
    registry: Registry,
    engine: Engine,
) -> None:
    done = [promote(settings, registry, engine, version) for version in versions]
    for _ in range(2):
        promotion.undo(settings, registry, engine, done[-1].promotion, "a later step failed")
    assert len(told(engine)) == len(versions) + 1
    assert told(engine)[-1] == last
    assert events.pending(engine)[-1].payload["why"] == "undone: a later step failed"


def test_a_slow_server_is_named_and_the_promotion_stands(
    asking: Settings, registry: Registry, engine: Engine, server: InferenceServer
) -> None:
    server.models[NAME] = 3
    quick = asking.model_copy(update={"confirm_seconds": 0.3})
    result = promote(quick, registry, engine, 1)
    assert not result.confirmed
    assert result.served.endswith(f"serves version 3 of {NAME}, not yet version 1.")
    assert registry.alias(NAME, PRODUCTION) == 1


def test_a_refusal_puts_every_alias_back(
    asking: Settings, registry: Registry, engine: Engine, server: InferenceServer
) -> None:
    for version in (1, 2):
        server.models[NAME] = version
        promote(asking, registry, engine, version)
    server.refused = [
        {"name": "perennial-other", "version": 3, "reason": "not ours"},
        {"name": NAME, "version": 3, "reason": "model.onnx is altered"},
    ]
    with pytest.raises(ServiceError, match=r"refused .* version 3: model.onnx is altered"):
        promote(asking, registry, engine, 3)
    assert registry.aliases(NAME) == {PRODUCTION: 2, PREVIOUS: 1}
    assert states(engine) == [(1, "confirmed"), (2, "confirmed"), (3, "undone")]


def test_a_first_version_that_is_refused_leaves_no_alias(
    asking: Settings, registry: Registry, engine: Engine, server: InferenceServer
) -> None:
    server.refused = [{"name": NAME, "version": 1, "reason": "no"}]
    with pytest.raises(ServiceError, match="production: none"):
        promote(asking, registry, engine, 1)
    assert registry.aliases(NAME) == {}


def test_promoting_what_is_in_production_writes_nothing(
    asking: Settings, registry: Registry, engine: Engine, server: InferenceServer
) -> None:
    server.models[NAME] = 2
    promote(asking, registry, engine, 2)
    again = promote(asking, registry, engine, 2)
    assert (again.version, again.confirmed, again.promotion) == (2, True, "")
    assert registry.aliases(NAME) == {PRODUCTION: 2}
    assert len(promotion.history(engine, NAME)) == 1


def test_a_version_judged_against_another_one_is_not_promoted(
    settings: Settings, registry: Registry, engine: Engine
) -> None:
    promote(settings, registry, engine, 1)

    def judged(version: int, against: int | None) -> promotion.PromotionResult:
        why = ("me", "better")
        return promotion.promote(settings, registry, engine, NAME, version, *why, against)

    with pytest.raises(OvertakenError, match="against no version, but version 1 is in production"):
        judged(2, None)
    assert judged(2, 1).version == 2
    assert judged(2, 1).promotion == "", "tried again after it was done: it stands"
    with pytest.raises(OvertakenError, match="against version 1, but version 2 is in production"):
        judged(3, 1)
    assert registry.aliases(NAME) == {PRODUCTION: 2, PREVIOUS: 1}
    assert [version for version, _ in states(engine)] == [1, 2]


def test_an_open_line_that_cannot_be_settled_does_not_block_another_promotion(
    settings: Settings, registry: Registry, engine: Engine
) -> None:
    promote(settings, registry, engine, 3)  # no server: the line stays `moved`
    store_at(registry, "gone://nowhere")
    (line,) = promotion.reconcile(settings, registry, engine, NAME)
    assert line.state == "moved"
    assert promote(settings, registry, engine, 1).previous == 3
    assert registry.aliases(NAME) == {PRODUCTION: 1, PREVIOUS: 3}


def test_a_version_that_does_not_exist_moves_nothing(
    settings: Settings, registry: Registry, engine: Engine
) -> None:
    with pytest.raises(RegistryError, match="holds: 3, 2, 1"):
        promote(settings, registry, engine, 9)
    assert promotion.history(engine, NAME) == []


class BreaksAfterOneMove(Registry):
    """A registry that goes away between the two alias moves, and is back for the undoing."""

    moves = 0

    def set_alias(self, forecaster: str, alias: str, version: int) -> None:
        self.moves += 1
        if self.moves == 2:
            raise RegistryError("gone")
        super().set_alias(forecaster, alias, version)


def test_a_registry_that_breaks_half_way_is_put_back(
    settings: Settings, registry: Registry, engine: Engine
) -> None:
    for version in (1, 2):
        promote(settings, registry, engine, version)
    with pytest.raises(RegistryError, match="gone"):
        promote(settings, BreaksAfterOneMove(registry.uri, registry.artifacts), engine, 3)
    assert registry.aliases(NAME) == {PRODUCTION: 2, PREVIOUS: 1}
    assert states(engine)[-1] == (3, "undone")


def test_undo_is_done_once_and_never_against_a_later_promotion(
    settings: Settings, registry: Registry, engine: Engine
) -> None:
    first, second = (promote(settings, registry, engine, version) for version in (1, 2))
    promotion.undo(settings, registry, engine, first.promotion, "too late")
    assert registry.aliases(NAME) == {PRODUCTION: 2, PREVIOUS: 1}
    for _ in range(2):
        line = promotion.undo(settings, registry, engine, second.promotion, "a later step failed")
        assert (line.state, line.served) == ("undone", "a later step failed")
        assert registry.aliases(NAME) == {PRODUCTION: 1}
    third = promote(settings, registry, engine, 3)
    registry.set_alias(NAME, PRODUCTION, 2)  # by hand
    before = told(engine)
    promotion.undo(settings, registry, engine, third.promotion, "failed")
    assert registry.alias(NAME, PRODUCTION) == 2
    assert told(engine) == before, "what is in production is not what was before"
    with pytest.raises(RegistryError, match="no promotion 'nothing'"):
        promotion.undo(settings, registry, engine, "nothing", "")


def test_two_at_once_take_turns(
    asking: Settings, registry: Registry, engine: Engine, server: InferenceServer
) -> None:
    server.on_ask = lambda: server.models.update({NAME: registry.alias(NAME, PRODUCTION) or 0})
    threads = [
        threading.Thread(target=promote, args=(asking, open_registry(asking), engine, version))
        for version in (1, 2, 3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = promotion.history(engine, NAME)
    assert [line.state for line in lines] == ["confirmed"] * 3
    assert [line.previous for line in lines] == [lines[1].version, lines[2].version, None]
    assert registry.aliases(NAME) == {PRODUCTION: lines[0].version, PREVIOUS: lines[1].version}


# the server's key --------------------------------------------------------------------------------


def test_the_server_is_asked_with_the_key(
    asking: Settings, registry: Registry, engine: Engine, server: InferenceServer
) -> None:
    server.models[NAME] = 1
    keyed = asking.model_copy(update={"server_key": SecretStr(" k3y\n")})
    assert promote(keyed, registry, engine, 1).confirmed
    promote(asking, registry, engine, 1)
    assert (server.keys[0], server.keys[-1]) == ("Bearer k3y", None)


@pytest.mark.parametrize(
    ("status", "key", "says"),
    [
        (401, "", "PERENNIAL_SERVER_KEY is not set"),
        (401, "wrong-key", "PERENNIAL_SERVER_KEY is unknown or no longer valid"),
        (403, "wrong-key", "PERENNIAL_SERVER_KEY may not read it"),
    ],
)
def test_a_server_that_denies_the_key_is_not_waited_for_and_the_key_is_never_told(
    status: int,
    key: str,
    says: str,
    asking: Settings,
    registry: Registry,
    engine: Engine,
    server: InferenceServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.status = status
    changes = {"server_key": SecretStr(key), "confirm_seconds": 60.0}
    caplog.set_level("DEBUG")
    start = time.monotonic()
    result = promote(asking.model_copy(update=changes), registry, engine, 1)
    assert time.monotonic() - start < 20
    assert not result.confirmed
    assert says in result.served
    assert states(engine) == [(1, "moved")], "it stands: the server's word is missing, not bad"
    assert "wrong-key" not in result.served + caplog.text


# signatures --------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(tmp_path / "keys")


def signing(settings: Settings, key: Path) -> Settings:
    return settings.model_copy(update={"signing_key": str(key)})


def require_signed(registry: Registry, version: int, public: Path) -> None:
    tags = registry.version(NAME, version).tags
    verify(public, NAME, version, tags["contract_sha256"], tags["signature"])


def test_a_promoted_version_is_signed_before_its_alias_moves(
    asking: Settings,
    registry: Registry,
    engine: Engine,
    server: InferenceServer,
    keys: tuple[Path, Path],
) -> None:
    server.models[NAME] = 1
    promote(asking, registry, engine, 1)
    assert "signature" not in registry.version(NAME, 1).tags, "no key, no signature"
    server.models[NAME] = 2
    signed: list[bool] = []
    server.on_ask = lambda: signed.append("signature" in registry.version(NAME, 2).tags)
    promote(signing(asking, keys[0]), registry, engine, 2)
    assert all(signed)
    require_signed(registry, 2, keys[1])
    server.models[NAME] = 1
    promote(signing(asking, keys[0]), registry, engine, 1)
    require_signed(registry, 1, keys[1])


class CountsTags(Registry):
    """A registry that counts what is tagged."""

    tagged = 0

    def tag_version(self, forecaster: str, version: int, tags: Mapping[str, str]) -> None:
        self.tagged += 1
        super().tag_version(forecaster, version, tags)


def test_a_signature_is_written_once_and_anew_for_another_key(
    settings: Settings, registry: Registry, engine: Engine, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    promote(settings, registry, engine, 1)
    counting = CountsTags(registry.uri, registry.artifacts)
    for _ in range(2):
        promote(signing(settings, keys[0]), counting, engine, 1)
    assert counting.tagged == 1, "also of the version that is in production already"
    other, public = write_pair(tmp_path / "others")
    promote(signing(settings, other), counting, engine, 1)
    assert counting.tagged == 2
    require_signed(registry, 1, public)
    registry.tag_version(NAME, 1, {"signature": "forged"})
    promote(signing(settings, other), registry, engine, 1)
    require_signed(registry, 1, public)


@pytest.mark.parametrize("fault", ["files", "contract", "key"])
def test_what_cannot_be_signed_is_not_promoted(
    fault: str,
    settings: Settings,
    registry: Registry,
    engine: Engine,
    keys: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    key, says = keys[0], "should have a contract.json of sha256"
    error: type[PerennialError] = ContractError
    if fault == "files":
        damage(registry)
        says = r"model\.onnx is altered"
    elif fault == "contract":
        registry.tag_version(NAME, 3, {"contract_sha256": "0" * 64})
    else:
        key, error, says = tmp_path / "gone.pem", ConfigError, "PERENNIAL_SIGNING_KEY"
    with pytest.raises(error, match=says):
        promote(signing(settings, key), registry, engine, 3)
    assert "signature" not in registry.version(NAME, 3).tags
    assert registry.aliases(NAME) == {}
    assert promotion.history(engine, NAME) == []


def test_a_version_refused_as_challenger_is_judged_anew_in_production(
    asking: Settings, registry: Registry, engine: Engine, server: InferenceServer
) -> None:
    reason = {"name": NAME, "version": 1, "reason": "no signature", "alias": "challenger"}
    server.refused = [reason]
    server.on_ask = lambda: server.models.update({NAME: 1} if server.asked > 2 else {})
    assert promote(asking, registry, engine, 1).confirmed


def test_a_refusal_of_an_earlier_attempt_is_no_answer_to_this_one(
    asking: Settings, registry: Registry, engine: Engine, server: InferenceServer
) -> None:
    old = {"name": NAME, "version": 1, "reason": "no signature"}
    server.refused = [old | {"refused_at": (now() - timedelta(seconds=5)).isoformat()}]
    server.on_ask = lambda: server.models.update({NAME: 1} if server.asked > 2 else {})
    assert promote(asking, registry, engine, 1).confirmed
    server.refused = [{**old, "version": 2, "refused_at": (now() + timedelta(5)).isoformat()}]
    with pytest.raises(ServiceError, match="no signature"):
        promote(asking, registry, engine, 2)


# killed on the way -------------------------------------------------------------------------------

DIES = """
import os, signal, sys
from datetime import timedelta
from pathlib import Path
from forecasting import events, promotion
from forecasting.registry import Registry
from forecasting.settings import load_settings
from forecasting.signing import verify
from forecasting.store import now, open_engine
from tests.keys import write_pair

class Dies(Registry):
    moves = 0
    def set_alias(self, forecaster, alias, version):
        if self.moves == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        super().set_alias(forecaster, alias, version)
        self.moves += 1

settings = load_settings(home=Path(sys.argv[1]), server_url=sys.argv[2])
registry = Dies(settings.mlflow_uri, settings.mlflow_artifacts)
engine = open_engine(settings.sql_url)
promotion.promote(settings, registry, engine, "perennial-goog", 3, "killed", "to be killed")
"""


def start_and_lose(
    settings: Settings, moves: int = 99, on_start: Callable[[int], object] = lambda _: None
) -> None:
    """Promote version 3 in another process, which gets SIGKILL before alias move `moves`."""
    command = [sys.executable, "-c", DIES, str(settings.home), settings.server_url, str(moves)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    on_start(process.pid)
    assert process.wait(60) == -signal.SIGKILL


@pytest.mark.parametrize("moves", [0, 1])
def test_killed_between_intent_and_move(
    moves: int, settings: Settings, registry: Registry, engine: Engine
) -> None:
    for version in (1, 2):
        promote(settings, registry, engine, version)
    promotion.reconcile(settings, registry, engine)
    start_and_lose(settings, moves)
    assert states(engine)[-1] == (3, "intended")
    (line,) = promotion.reconcile(settings, registry, engine)
    assert (line.version, line.state, line.who) == (3, "undone", "killed")
    assert registry.aliases(NAME) == {PRODUCTION: 2, PREVIOUS: 1}
    assert promotion.reconcile(settings, registry, engine) == []


def lose_in_confirm(settings: Settings, server: InferenceServer, engine: Engine) -> None:
    """Kill the other process at the moment it asks the server for confirmation."""
    pids: list[int] = []
    server.on_ask = lambda: os.kill(pids[0], signal.SIGKILL)
    start_and_lose(settings, on_start=pids.append)
    server.on_ask = lambda: None
    assert states(engine)[-1] == (3, "moved")


@pytest.mark.parametrize("served", [True, False])
def test_killed_between_move_and_confirm(
    served: bool, asking: Settings, registry: Registry, engine: Engine, server: InferenceServer
) -> None:
    server.models[NAME] = 1
    promote(asking, registry, engine, 1)
    lose_in_confirm(asking, server, engine)
    if served:
        server.models[NAME] = 3
    assert told(engine) == [("promoted", 1, None)]
    (line,) = promotion.reconcile(asking, registry, engine, NAME)
    assert told(engine)[1:] == [("promoted", 3, 1)]
    assert line.state == "confirmed"
    assert "version 3" in line.served
    assert line.served.endswith("The version loads.") != served
    assert registry.aliases(NAME) == {PRODUCTION: 3, PREVIOUS: 1}


@pytest.mark.parametrize("how", ["refused", "damaged"])
def test_killed_with_a_version_that_cannot_serve(
    how: str, asking: Settings, registry: Registry, engine: Engine, server: InferenceServer
) -> None:
    server.models[NAME] = 1
    promote(asking, registry, engine, 1)
    lose_in_confirm(asking, server, engine)
    if how == "refused":
        server.refused = [{"name": NAME, "version": 3, "reason": "it gives another output"}]
    else:
        damage(registry)
    (line,) = promotion.reconcile(asking, registry, engine, NAME)
    assert line.state == "undone"
    assert ("another output" in line.served) == (how == "refused")
    assert told(engine) == [("promoted", 1, None)]
    assert registry.aliases(NAME) == {PRODUCTION: 1}


def damage(registry: Registry) -> None:
    """Point version 3 to a damaged copy of its files."""
    assert registry.artifacts is not None
    folder = registry.artifacts.parent / "damaged"
    registry.download(NAME, 3, folder)
    (folder / "model.onnx").write_bytes(b"damaged")
    store_at(registry, folder.as_uri())


def store_at(registry: Registry, address: str) -> None:
    """Say that the files of version 3 lie elsewhere."""
    database = create_engine(registry.uri)
    with database.begin() as connection:
        connection.execute(
            text("UPDATE model_versions SET storage_location=:at WHERE version=3"), {"at": address}
        )
    database.dispose()


def test_the_next_promotion_reconciles_first(
    settings: Settings, registry: Registry, engine: Engine
) -> None:
    start_and_lose(settings, 0)
    promote(settings, registry, engine, 1)
    assert states(engine) == [(3, "undone"), (1, "moved")]
    assert registry.aliases(NAME) == {PRODUCTION: 1}
