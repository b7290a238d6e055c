"""The flow `retrain`: one line of the ledger for each request, and a cooldown between two."""

import socket
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from flows.forecast import forecast
from flows.ingest import ingest
from flows.monitor import monitor
from flows.retrain import retrain
from flows.rollback import rollback
from flows.train import TrainResult
from forecasting.errors import HistoryError, ServiceError
from forecasting.gate import BETTER
from forecasting.registry import PRODUCTION, open_registry
from forecasting.sessions import sessions_between
from forecasting.settings import Settings
from forecasting.store import gate_looks, outbox, retrains
from tests.flows.support import all_runs, children, client_of, configured, rows_of, task_states

NAME = "perennial-goog"
DAY = date(2006, 12, 29)
EVENT = "0f0f9a6a-5a55-4b5b-8c5e-3d4a6f7b8c9d"

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("retrain")


@pytest.fixture(scope="module")
def promoted(prefect_server: None, home: Path) -> TrainResult:
    """A retrain that a drift event asked for."""
    with configured(home):
        return retrain(symbol="GOOG", as_of=DAY, trigger=EVENT)


@pytest.fixture
def settings(home: Path, promoted: TrainResult) -> Iterator[Settings]:
    with configured(home) as made:
        yield made


def ledger_of(settings: Settings) -> list[dict[str, Any]]:
    return rows_of(settings, retrains, "created_at")


def test_a_retrain_trains_and_is_written_down(settings, promoted):
    assert (promoted.outcome, promoted.version, promoted.as_of) == ("promoted", 1, DAY)
    assert open_registry(settings).alias(NAME, PRODUCTION) == 1
    line = ledger_of(settings)[0]
    assert (line["symbol"], line["as_of"], line["trigger"]) == ("GOOG", DAY, EVENT)
    assert (line["state"], line["reason"]) == ("promoted", " ".join(promoted.reasons))
    tags = client_of(settings).get_run(promoted.run_id).data.tags
    assert tags["trigger"] == f"retrain: {EVENT}"
    assert line["flow_run_id"] == tags["flow_run_id"]
    assert task_states(line["flow_run_id"])["promote"] == "Completed"
    assert line["cpu_seconds"] > 1
    (event,) = rows_of(settings, outbox)
    assert (event["name"], event["payload"]["version"]) == ("perennial.model.promoted", 1)
    assert event["delivered_at"] is not None


@pytest.mark.parametrize("trigger", [EVENT, "another event"])
def test_during_the_cooldown_a_request_is_skipped_with_the_reason(settings, promoted, trigger):
    """The same event delivered twice, or the next one: neither trains."""
    runs = len(all_runs(settings))
    result = retrain(symbol="GOOG", as_of=date(2007, 1, 5), trigger=trigger)
    assert (result.outcome, result.version, result.run_id) == ("skipped", None, "")
    (reason,) = result.reasons
    assert "GOOG was retrained (promoted) as of 2006-12-29" in reason
    assert "the cooldown is 20 (PERENNIAL_RETRAIN_COOLDOWN_DAYS)" in reason
    line = ledger_of(settings)[-1]
    assert (line["state"], line["trigger"], line["reason"]) == ("skipped", trigger, reason)
    assert len(all_runs(settings)) == runs
    assert open_registry(settings).alias(NAME, PRODUCTION) == 1


def test_after_the_cooldown_it_trains_again(settings, home):
    """Here nothing is new: what the earlier retrain found is re-used."""
    with configured(home, retrain_cooldown_days=0):
        result = retrain(symbol="GOOG", as_of=DAY, trigger="later")
    assert (result.outcome, result.version) == ("unchanged", 1)
    assert ledger_of(settings)[-1]["state"] == "unchanged"


def test_a_failed_retrain_is_written_down_and_starts_no_cooldown(settings, home):
    day = date(2007, 6, 29)  # long after the one that was promoted
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        nowhere = f"127.0.0.1:{taken.getsockname()[1]}"
        with configured(home, ray_address=nowhere, retrain_search="always"):
            for trigger in ("first", "second"):
                with pytest.raises(ServiceError, match="No Ray cluster answers"):
                    retrain(symbol="GOOG", as_of=day, trigger=trigger)
    first, second = ledger_of(settings)[-2:]
    assert [line["trigger"] for line in (first, second)] == ["first", "second"]
    for line in (first, second):
        assert line["state"] == "failed"
        assert "No Ray cluster answers" in line["reason"]
    statuses = {
        run.data.tags["trigger"]: run.info.status
        for run in all_runs(settings)
        if "trigger" in run.data.tags
    }
    assert statuses["retrain: first"] == statuses["retrain: second"] == "FAILED"
    assert open_registry(settings).alias(NAME, PRODUCTION) == 1


LAX = {"gate_tolerance": 1, "gate_classical_tolerance": 1}


def search_run_of(settings: Settings, result: TrainResult) -> str:
    return client_of(settings).get_run(result.run_id).data.params["search_run"]


def test_a_retrain_starts_from_productions_parameters_and_searches_only_if_these_fail(
    settings, home, promoted
):
    """Ray cannot be reached: what does not search does not notice."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nowhere = {"ray_address": f"127.0.0.1:{taken.getsockname()[1]}"}
        strict = {"gate_tolerance": 0, "gate_classical_tolerance": 0}
        with configured(home, **nowhere, **strict), pytest.raises(ServiceError, match="No Ray"):
            retrain(symbol="GOOG", as_of=date(2007, 3, 30), trigger="refused first")
        with configured(home, **nowhere, **strict, retrain_search="never"):
            refused = retrain(symbol="GOOG", as_of=date(2007, 3, 30), trigger="never searches")
        with configured(home, **nowhere, **LAX):
            result = retrain(symbol="GOOG", as_of=date(2007, 7, 31), trigger="warm")
    assert refused.outcome == "refused"
    assert (result.outcome, result.version) == ("promoted", 2)
    found = search_run_of(settings, promoted)
    assert search_run_of(settings, result) == search_run_of(settings, refused) == found
    assert children(settings, result.run_id) == []


def test_what_was_rolled_back_is_not_promoted_again_by_the_same_training(settings, home):
    with configured(home, **LAX, retrain_cooldown_days=0):
        rollback(NAME, version=1, why="it looks wrong")
        result = retrain(symbol="GOOG", as_of=date(2007, 7, 31), trigger="again")
    assert result.outcome == "refused"
    told = "identical to version 2, which gave way to version 1: it looks wrong"
    assert told in result.reasons[0]
    assert open_registry(settings).alias(NAME, PRODUCTION) == 1


def test_too_short_a_history_is_a_failed_run_and_a_failed_line(settings):
    state = retrain(symbol="FB", as_of=date(2012, 11, 26), return_state=True)
    assert state.is_failed()
    with pytest.raises(HistoryError, match="rows of prices are needed"):
        state.result()
    line = ledger_of(settings)[-1]
    assert (line["state"], line["trigger"]) == ("failed", "manual")
    assert "rows of prices are needed" in line["reason"]


@pytest.mark.slow
def test_parameters_that_have_aged_are_searched_anew_before_the_gate_looks(settings, home):
    """The past of the version in production is made to look better than it was."""
    registry = open_registry(settings)
    run_id = registry.version(NAME, registry.alias(NAME, PRODUCTION)).run_id
    client_of(settings).log_metric(run_id, "validation_crps_trained", 1.0)
    looks = len(rows_of(settings, gate_looks))
    with configured(home, **LAX):
        result = retrain(symbol="GOOG", as_of=date(2007, 10, 31), trigger="aged")
    (searched,) = children(settings, result.run_id)
    assert search_run_of(settings, result) == searched.info.run_id
    assert len(rows_of(settings, gate_looks)) == looks + 1


def test_a_provisional_promotion_is_told_of_until_a_better_one_comes(tmp_path):
    """Better than production beyond doubt, and not shown to be as good as a baseline."""
    strict = {"gate_tolerance": 0, "gate_classical_tolerance": 0}
    day, later = date(2007, 5, 31), date(2007, 6, 28)
    with configured(tmp_path) as settings:
        assert retrain(symbol="GOOG", as_of=DAY, trigger="first").outcome == "promoted"
    with configured(tmp_path, **strict):
        result = retrain(symbol="GOOG", as_of=day, trigger="provisional")
        assert result.outcome == "promoted", result.reasons
        assert BETTER in result.reasons[0]
        assert open_registry(settings).version(NAME, result.version).tags["provisional"] == "true"
        ingest(["GOOG"], as_of=later)
        for origin in (sessions := sessions_between(day, later)):
            forecast(symbols=["GOOG"], as_of=origin)
        soon = monitor(symbol="GOOG", as_of=sessions[19])
        seen = monitor(symbol="GOOG", as_of=later)
    assert len(sessions) == 21, "a cooldown"
    assert (soon.provisional, soon.provisional_event_id) == (True, None)
    told = [row for row in rows_of(settings, outbox) if row["id"] == str(seen.provisional_event_id)]
    assert [(row["name"], row["payload"]["version"]) for row in told] == [
        ("perennial.model.provisional", 2)
    ]
