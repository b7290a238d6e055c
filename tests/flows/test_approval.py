"""A person approves: the run pauses with the verdict, and goes on as its form is answered."""

from datetime import date
from pathlib import Path

import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.retrain import retrain
from flows.train import TrainResult
from forecasting import audit, promotion
from forecasting.errors import ConfigError
from forecasting.registry import PRODUCTION, open_registry
from forecasting.settings import Settings
from forecasting.store import engine_of
from tasks.approval import ask, require_approvable
from tests.flows.support import answer, configured, meanwhile, paused

NAME = "perennial-goog"
DAYS = (date(2006, 12, 29), date(2007, 6, 29))
CHEAP = {"gate_tolerance": 1, "gate_classical_tolerance": 1, "retrain_search": "never"}

pytestmark = pytest.mark.usefixtures("prefect_server")


@flow
def decide(settings: Settings) -> str:
    """A flow that does nothing but ask."""
    with engine_of(settings.sql_url) as engine:
        return str(ask(settings, engine, NAME, "the verdict"))


def test_nobody_answers_in_time(tmp_path):
    with configured(tmp_path, approval=True, approval_hours=0.0001) as settings:
        state = decide(settings, return_state=True)
        with engine_of(settings.sql_url) as engine:
            (line,) = audit.read(engine)
    assert (line.kind, line.subject, line.who) == ("approval", NAME, "nobody")
    assert not line.details["approve"]
    assert state.is_completed()
    assert state.result() == (
        "Not approved by nobody: no answer within 0.0001 hours (PERENNIAL_APPROVAL_HOURS)."
    )


def test_an_answer_without_a_name_or_a_reason_is_none(tmp_path):
    def answers() -> list[str]:
        run_id = paused("asked")
        return [
            answer(run_id),
            answer(run_id, approve=True, who="", reason="good"),
            answer(run_id, approve=True, who="Ada"),
            answer(run_id, approve=True, who="Ada", reason="good"),
        ]

    with configured(tmp_path, approval=True) as settings, meanwhile(answers) as said:
        asked = decide.with_options(flow_run_name="asked")
        assert asked(settings) == "Approved by Ada: good"
    assert said == [["REJECT", "REJECT", "REJECT", "ACCEPT"]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("approval")


def trained(home: Path, day: date, **form: object) -> TrainResult:
    """A retrain that pauses, and goes on with the form; nothing is registered before."""
    name = f"asked {day}"

    with configured(home, approval=True, **CHEAP) as settings:
        registry = open_registry(settings)
        versions = registry.history(NAME)

        def answers() -> tuple[bool, str]:
            run_id = paused(name)
            return registry.history(NAME) == versions, answer(run_id, **form)

        with meanwhile(answers) as said:
            result = retrain.with_options(flow_run_name=name)("GOOG", day, trigger="a test")
    assert said == [(True, "ACCEPT")]
    assert isinstance(result, TrainResult)
    return result


def test_what_is_approved_is_promoted_and_what_is_not_is_refused(home):
    result = trained(home, DAYS[0], approve=True, who="Ada", reason="it looks good")
    assert (result.outcome, result.version) == ("promoted", 1)
    assert "Approved by Ada: it looks good" in result.reasons[0]
    with configured(home) as settings, engine_of(settings.sql_url) as engine:
        (line,) = promotion.history(engine, NAME)
        assert line.why == result.reasons[0]

        result = trained(home, DAYS[1], approve=False, who="Bob", reason="not before the holiday")
        assert (result.outcome, result.version) == ("refused", None)
        assert result.reasons == ["Not approved by Bob: not before the holiday"]
        assert open_registry(settings).alias(NAME, PRODUCTION) == 1
        assert len(open_registry(settings).history(NAME)) == 1
        assert [each.id for each in promotion.history(engine, NAME)] == [line.id]


def test_without_a_server_it_is_said_before_any_work(home):
    with (
        configured(home, approval=True) as settings,
        temporary_settings({PREFECT_API_URL: None}),
        pytest.raises(ConfigError, match=r"no Prefect server is named.*PREFECT_API_URL"),
    ):
        require_approvable(settings)
    with configured(home) as settings, temporary_settings({PREFECT_API_URL: None}):
        require_approvable(settings)
