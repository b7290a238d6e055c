"""Probation in the flow `monitor`: both versions forecast, and one that is worse gives way.

The versions are tiny graphs that multiply the last close; a planted one is a tenth off the price.
"""

from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from sqlalchemy import Engine

from flows.monitor import monitor
from flows.retrain import retrain
from flows.rollback import _after_approval, rollback
from forecasting import audit, datasets, probation, promotion
from forecasting.errors import ConfigError, RegistryError
from forecasting.events import ModelCondemned
from forecasting.probation import Probation
from forecasting.registry import PREVIOUS, PRODUCTION, Registry, open_registry
from forecasting.sessions import sessions_after
from forecasting.settings import Settings
from forecasting.store import open_engine, outbox, predictions
from tasks.probation import Scene, is_giving_way, watch
from tests.flows.support import answer, configured, meanwhile, paused, rows_of
from tests.models import write_model_folder

NAME = "perennial-goog"
TRAINED = date(2006, 12, 29)
SESSIONS = sessions_after(TRAINED, 40)

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(scope="module")
def prices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with nothing but prices."""
    made = tmp_path_factory.mktemp("prices")
    with configured(made) as settings:
        datasets.ingest(settings, ["GOOG"], TRAINED)
        datasets.ingest(settings, ["GOOG"], SESSIONS[-1])
    return made


@pytest.fixture
def settings(prices: Path, tmp_path: Path) -> Iterator[Settings]:
    """A home of the test's own, with the prices of all."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "data").symlink_to(prices / "data")
    with configured(home, probation_days=20) as made:
        yield made


@pytest.fixture
def registry(settings: Settings) -> Registry:
    """A good version, and one that is a tenth off and is in production now."""
    made = open_registry(settings)
    md5 = datasets.versions(settings)[-1].md5
    for number, scale in ((1, 1.0), (2, 1.1)):
        folder, run_id = settings.home / str(number), made.start_run("a run", {})
        write_model_folder(folder, scale=scale, run_id=run_id, dataset_md5=md5, as_of=TRAINED)
        assert made.register(folder, NAME, run_id) == number
    return made


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    made = open_engine(settings.sql_url)
    yield made
    made.dispose()


def promote(settings: Settings, registry: Registry, engine: Engine, *versions: int) -> None:
    for version in versions:
        promotion.promote(settings, registry, engine, NAME, version, "me", "to begin with")


@flow
def look_at(settings: Settings, registry: Registry, engine: Engine, day: date) -> str:
    """A monitor that does nothing else."""
    md5 = datasets.find(settings).md5
    return watch(Scene(settings, registry, engine, NAME, ("GOOG",), day, day, md5))


def test_a_worse_version_is_rolled_back_with_its_evidence(settings, registry, engine):
    promote(settings, registry, engine, 1, 2)
    early = monitor(symbol="GOOG", as_of=SESSIONS[2])
    assert early.version == 2
    assert "watching. " in early.probation
    assert "on 3 days" in early.probation
    assert registry.alias(NAME, PRODUCTION) == 2

    seen = monitor(symbol="GOOG", as_of=SESSIONS[12])
    assert "rolled-back. Worse than version 1 on 13 days" in seen.probation
    assert registry.aliases(NAME) == {PRODUCTION: 1, PREVIOUS: 2}
    (watched,) = probation.history(engine, NAME)
    assert (watched.state, watched.version, watched.previous) == ("rolled-back", 2, 1)
    assert watched.started == TRAINED
    assert watched.evidence["peak"] >= 20
    assert watched.evidence["as_of"] == SESSIONS[12].isoformat()
    line = promotion.history(engine, NAME)[0]
    assert (line.version, line.previous) == (1, 2)
    assert line.why == f"probation: {watched.summary}"
    assert "through monitor/" in line.who
    tags = registry.version(NAME, 2).tags
    assert (tags["probation"], tags["probation_evidence"]) == ("rolled-back", watched.summary)
    with get_client(sync_client=True) as client:
        shown = [each for each in client.read_artifacts() if each.key == "probation"]
    assert any("rolled-back" in str(each.data) for each in shown)

    held_back = retrain(symbol="GOOG", as_of=SESSIONS[14], trigger="drift")
    assert held_back.outcome == "skipped"
    assert "rolled-back" in held_back.reasons[0]
    assert monitor(symbol="GOOG", as_of=SESSIONS[14]).probation == ""
    assert registry.alias(NAME, PRODUCTION) == 1


def test_a_better_version_passes_and_every_forecast_is_made_once(settings, registry, engine):
    registry.set_alias(NAME, PRODUCTION, 2)
    promote(settings, registry, engine, 1)  # goes back: it is not watched
    assert look_at(settings, registry, engine, SESSIONS[0]) == ""
    folder, run_id = settings.home / "3", registry.start_run("a run", {})
    write_model_folder(folder, scale=1.001, run_id=run_id, as_of=TRAINED)
    promote(settings, registry, engine, 2, registry.register(folder, NAME, run_id))
    for day in (SESSIONS[4], SESSIONS[4], SESSIONS[18]):
        assert "watching. Not shown to be worse" in look_at(settings, registry, engine, day)
    assert "passed. Not shown to be worse" in look_at(settings, registry, engine, SESSIONS[25])
    assert look_at(settings, registry, engine, SESSIONS[30]) == ""
    rows = rows_of(settings, predictions)
    assert {row["source"] for row in rows} == {"shadow"}
    made = [(row["model_version"], row["origin"], row["horizon"]) for row in rows]
    assert len(made) == len(set(made)) == 2 * settings.probation_days * 5
    assert {row["origin"] for row in rows} == {TRAINED, *SESSIONS[:19]}


def test_a_rollback_whose_process_died_is_finished_by_the_next_look(settings, registry, engine):
    promote(settings, registry, engine, 1, 2)
    look_at(settings, registry, engine, SESSIONS[2])
    (watched,) = probation.watching(engine, NAME)
    probation.record(
        engine, watched, "watching", "me", {"worse": True, "summary": "Worse beyond doubt."}
    )
    # killed before anything moved: the next look rolls back, without another one's evidence
    assert "rolled-back. Worse beyond doubt." in look_at(settings, registry, engine, SESSIONS[3])
    assert registry.alias(NAME, PRODUCTION) == 1

    promote(settings, registry, engine, 2)
    look_at(settings, registry, engine, SESSIONS[4])
    (watched,) = probation.watching(engine, NAME)
    assert watched.started == SESSIONS[4]  # watched before: anew from today
    probation.record(engine, watched, "watching", "me", {"worse": True, "summary": "Worse again."})
    promote(settings, registry, engine, 1)  # killed after the move, before it was recorded
    assert look_at(settings, registry, engine, SESSIONS[5]) == ""
    assert [each.state for each in probation.history(engine, NAME)] == ["rolled-back"] * 2
    assert len(promotion.history(engine, NAME)) == 5


def asked_to_roll_back(settings: Settings, watched: Probation, **form: object) -> object:
    """The run that the automation starts, answered by a person; what it came to."""
    name = f"rollback, approved: {form['approve']}"
    asking = rollback.with_options(flow_run_name=name)
    with meanwhile(lambda: answer(paused(name), **form)) as said:
        result = asking(NAME, watched.previous, watched.summary, watched=watched.id)
    assert said == ["ACCEPT"]
    return result


def test_a_person_decides_on_a_rollback_where_one_has_to_approve(settings, registry, engine):
    promote(settings, registry, engine, 1, 2)
    with configured(settings.home, probation_days=20, approval=True) as asked:
        made_up = monitor(symbol="GOOG", as_of=SESSIONS[12], alarms=False)
        assert "The day is made up for; a later one asks a person." in made_up.probation
        assert rows_of(asked, outbox)[-1]["name"] != ModelCondemned.name
        for _ in range(2):
            told = look_at(asked, registry, engine, SESSIONS[12])
            assert "A person is asked whether to roll it back." in told
        assert registry.alias(NAME, PRODUCTION) == 2, "nothing moves before"
        (watched,) = probation.watching(engine, NAME)
        rows = rows_of(asked, outbox, "occurred_at")
        (event,) = (row for row in rows if row["name"] == ModelCondemned.name)
        assert event["payload"]["probation"] == watched.id
        assert event["payload"]["evidence"] >= 20
        look_at(asked, registry, engine, SESSIONS[13])  # not decided: asked again
        names = [row["name"] for row in rows_of(asked, outbox)]
        assert names.count(ModelCondemned.name) == 2
        decided = {"approve": True, "who": "Ada", "reason": "it is"}
        assert asked_to_roll_back(asked, watched, **decided).version == 1
        assert registry.alias(NAME, PRODUCTION) == 1
        assert "Approved by Ada: it is" in promotion.history(engine, NAME)[0].why
        assert look_at(asked, registry, engine, SESSIONS[14]) == ""
    assert [each.state for each in probation.history(engine, NAME)] == ["rolled-back"]
    assert registry.version(NAME, 2).tags["probation"] == "rolled-back"


@pytest.mark.parametrize("who", ["Ada", "nobody"])
def test_a_version_that_a_person_keeps_stays_and_nobody_is_asked_again(
    settings, registry, engine, who
):
    promote(settings, registry, engine, 1, 2)
    with configured(settings.home, probation_days=20, approval=True) as asked:
        look_at(asked, registry, engine, SESSIONS[12])
        (watched,) = probation.watching(engine, NAME)
        decided = {"approve": False, "who": who, "reason": "the market is odd"}
        assert asked_to_roll_back(asked, watched, **decided) is None
        assert look_at(asked, registry, engine, SESSIONS[13]) == ""
        assert rollback(NAME, watched=watched.id) is None, "decided: nobody is asked"
    assert registry.alias(NAME, PRODUCTION) == 2
    assert [each.state for each in probation.history(engine, NAME)] == ["kept"]
    lines = {line.kind: line for line in audit.read(engine)}
    assert (lines["approval"].who, lines["approval"].reason) == (who, "the market is odd")
    assert (lines["probation"].who, lines["probation"].details["state"]) == (who, "kept")
    with pytest.raises(RegistryError, match="no probation nothing"):
        rollback(NAME, version=1, watched="nothing")


def test_a_rollback_that_nobody_answers_leaves_the_probation_open(settings, registry, engine):
    promote(settings, registry, engine, 1, 2)
    with configured(
        settings.home, probation_days=20, approval=True, approval_hours=0.0001
    ) as asked:
        look_at(asked, registry, engine, SESSIONS[12])
        (watched,) = probation.watching(engine, NAME)
        assert rollback(NAME, watched=watched.id) is None
    assert registry.alias(NAME, PRODUCTION) == 2
    assert [each.state for each in probation.history(engine, NAME)] == ["watching"]
    (line,) = [each for each in audit.read(engine) if each.kind == "approval"]
    assert (line.who, line.details["approve"]) == ("nobody", False)


def test_a_yes_to_an_older_question_does_not_overrule_a_no(settings, registry, engine):
    promote(settings, registry, engine, 1, 2)
    with configured(settings.home, probation_days=20, approval=True) as asked:
        look_at(asked, registry, engine, SESSIONS[12])
        (watched,) = probation.watching(engine, NAME)

        def answers() -> str:
            run_id = paused("an older question")
            probation.record(engine, watched, "kept", "Bob")  # who answered the newer one
            return answer(run_id, approve=True, who="Ada", reason="it is worse")

        with meanwhile(answers) as said:
            older = rollback.with_options(flow_run_name="an older question")
            assert older(NAME, watched=watched.id) is None
    assert said == ["ACCEPT"]
    assert registry.alias(NAME, PRODUCTION) == 2
    assert [each.state for each in probation.history(engine, NAME)] == ["kept"]


def test_nothing_alarms_while_a_version_gives_way(settings, registry, engine):
    """A retrain would start from what is condemned; a cooldown follows once it is rolled back."""
    promote(settings, registry, engine, 1, 2)
    assert not is_giving_way(engine, NAME, 2)
    with configured(settings.home, probation_days=20, approval=True) as asked:
        look_at(asked, registry, engine, SESSIONS[12])
        assert [is_giving_way(engine, NAME, version) for version in (1, 2, 3)] == [
            True,
            True,
            False,
        ]
        seen = monitor(symbol="GOOG", as_of=SESSIONS[24])  # a cooldown after the training, of age
        assert (seen.version, seen.aged_event_id) == (2, None)
        (watched,) = probation.watching(engine, NAME)
        probation.record(engine, watched, "kept", "Bob")
        after = monitor(symbol="GOOG", as_of=SESSIONS[25])
        assert after.aged_event_id is not None


def test_without_a_server_no_rollback_waits_for_a_person(settings, registry, engine):
    promote(settings, registry, engine, 1, 2)
    with configured(settings.home, probation_days=20, approval=True) as asked:
        look_at(asked, registry, engine, SESSIONS[12])
        (watched,) = probation.watching(engine, NAME)
        with (
            temporary_settings({PREFECT_API_URL: None}),
            pytest.raises(ConfigError, match="no Prefect server is named"),
        ):
            _after_approval(asked, registry, engine, watched)


def test_another_promotion_ends_a_probation(settings, registry, engine):
    promote(settings, registry, engine, 1, 2)
    look_at(settings, registry, engine, SESSIONS[2])
    promote(settings, registry, engine, 1)  # a person goes back
    assert look_at(settings, registry, engine, SESSIONS[3]) == ""
    assert [each.state for each in probation.history(engine, NAME)] == ["superseded"]
    assert registry.alias(NAME, PRODUCTION) == 1


def test_an_alias_that_was_moved_by_hand_is_left_alone(settings, registry, engine):
    promote(settings, registry, engine, 1, 2)
    look_at(settings, registry, engine, SESSIONS[2])
    registry.set_alias(NAME, PRODUCTION, 1)
    assert look_at(settings, registry, engine, SESSIONS[15]) == ""
    assert len(promotion.history(engine, NAME)) == 2


def test_without_probation_days_nobody_is_watched(settings, registry, engine):
    promote(settings, registry, engine, 1, 2)
    with configured(settings.home, probation_days=0) as without:
        assert look_at(without, registry, engine, SESSIONS[15]) == ""
    assert probation.history(engine, NAME) == []


def test_a_version_before_that_does_not_load_is_said_and_judges_nobody(settings, registry, engine):
    promote(settings, registry, engine, 1, 2)
    own = (registry.download(NAME, 1, settings.home / "look") / "model.onnx").read_bytes()
    stored = [
        path
        for path in settings.home.glob("mlflow/artifacts/**/model.onnx")
        if path.read_bytes() == own
    ]
    assert len(stored) == 1
    stored[0].write_bytes(own[:100])
    told = look_at(settings, registry, engine, SESSIONS[25])
    assert "passed. No day was scored beside version 1 yet." in told
