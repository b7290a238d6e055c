"""The flow `train` for real: DVC, Ray, Lightning, MLflow and Prefect, with one short search.

The search of 31 December 2007 is made once. A strict gate refuses what it found, a lax one then
promotes it: neither tolerance is a parameter of the search.
"""

import json
import socket
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine

from flows.train import TrainResult, train
from forecasting import datasets, promotion
from forecasting.contract import Contract, read_contract, verify_files
from forecasting.errors import HistoryError, ServiceError
from forecasting.registry import PREVIOUS, PRODUCTION, Registry, open_registry
from forecasting.settings import Settings
from forecasting.store import gate_looks, open_engine, outbox
from tasks.cache import code_commit
from tests.flows.support import (
    all_runs,
    children,
    client_of,
    configured,
    flow_artifacts,
    flow_log,
    kept,
    rows_of,
    task_states,
)
from tests.models import write_model_folder

NAME = "perennial-goog"
DAY = date(2007, 12, 31)
STRICT, LAX = (
    {"gate_tolerance": tolerance, "gate_classical_tolerance": 0.1} for tolerance in (0, 0.1)
)

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def refused(prefect_server: None, home: Path) -> TrainResult:
    """The first training: it searches and fits, and the strict gate refuses."""
    with configured(home, **STRICT):
        return train(symbol="GOOG", as_of=DAY)


@pytest.fixture(scope="module")
def promoted(home: Path, refused: TrainResult) -> TrainResult:
    """The same training, and a lax gate."""
    with configured(home, **LAX):
        return train(symbol="GOOG", as_of=DAY)


@pytest.fixture
def settings(home: Path, promoted: TrainResult) -> Iterator[Settings]:
    """Of the deployment after both trainings."""
    with configured(home, **LAX) as made:
        yield made


@pytest.fixture
def registry(settings: Settings) -> Registry:
    return open_registry(settings)


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    made = open_engine(settings.sql_url)
    yield made
    made.dispose()


def flow_run_of(settings: Settings, run_id: str) -> str:
    return str(client_of(settings).get_run(run_id).data.tags["flow_run_id"])


def contract_of(registry: Registry, version: int, folder: Path) -> Contract:
    registry.download(NAME, version, folder)
    contract = read_contract(folder)
    verify_files(folder, contract)
    return contract


# --- refused ---------------------------------------------------------------------------------


def test_a_refusal_is_a_completed_run_with_reasons_and_nothing_registered(refused, settings):
    assert (refused.outcome, refused.version) == ("refused", None)
    (reason,) = refused.reasons
    assert "Not shown to be as good as the random walk" in reason
    assert "at most +0.00% allowed" in reason
    assert refused.scores["gate_upper"] > 0
    run = client_of(settings).get_run(refused.run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.tags["outcome"], run.data.tags["reasons"]) == ("refused", reason)
    verdict = json.loads(kept(settings, refused.run_id, "gate-verdict.json"))
    assert (verdict["promote"], verdict["reasons"]) == (False, [reason])
    states = task_states(flow_run_of(settings, refused.run_id))
    assert set(states.values()) == {"Completed"}
    assert "promote" not in states
    (told,) = [row for row in rows_of(settings, outbox) if row["name"] == "perennial.model.refused"]
    assert told["payload"]["run_id"] == refused.run_id
    assert told["payload"]["reasons"] == [reason]
    assert told["delivered_at"] is not None, "Prefect lists it"


def test_the_search_is_a_run_below_the_training_and_every_trial_one_below_it(refused, settings):
    (search,) = children(settings, refused.run_id)
    trials = children(settings, search.info.run_id)
    assert search.info.run_name == "search"
    assert sorted(each.info.run_name for each in trials) == ["trial-000", "trial-001"]
    assert {each.info.status for each in (search, *trials)} <= {"FINISHED", "KILLED"}
    logged = json.loads(kept(settings, refused.run_id, "search.json"))
    assert logged["search_run"] == search.info.run_id
    best = [row["validation_crps_bp"] for row in logged["trials"]]
    assert best == sorted(best)
    assert best == sorted(each.data.metrics["best_validation_crps_bp"] for each in trials)


def test_a_training_logs_parameters_and_every_score(refused, settings):
    data = client_of(settings).get_run(refused.run_id).data
    assert (data.params["trials"], data.params["seed"]) == ("2", "7")
    assert (data.params["symbols"], data.params["as_of"]) == ("GOOG", "2007-12-31")
    assert data.params["kind"] in ("lstm", "volatility")
    assert "'lr': " in data.params["config"]
    for name in ("trained", "untrained", "volatility"):
        assert data.metrics[f"validation_crps_{name}"] > 0
    assert {k: v for k, v in data.metrics.items() if k in refused.scores} == refused.scores
    history = client_of(settings).get_metric_history(refused.run_id, "fit_validation_crps_bp")
    assert [point.step for point in history] == [1, 2]
    assert min(point.value for point in history) == refused.scores["validation_crps_trained"]
    assert {"gate_candidate", "gate_random_walk", "gate_relative"} <= refused.scores.keys()


def test_a_training_shows_data_leaderboard_and_verdict_in_prefect(refused, settings):
    shown = flow_artifacts(flow_run_of(settings, refused.run_id))
    (data,) = json.loads(shown["data-summary"])
    assert (data["symbol"], data["last day"]) == ("GOOG", "2007-12-31")
    assert len(json.loads(shown["search-leaderboard"])) == 2
    card = kept(settings, refused.run_id, "model-card.md")
    assert shown["gate-verdict"].endswith(card)
    assert "This card with plots: model-card.html of run" in shown["gate-verdict"]
    assert refused.reasons[0] in card
    assert f"{refused.scores['gate_candidate']:.2f}" in card
    for title in ("What it is", "Against others", "Do the intervals hold", "Reserved days"):
        assert f"## {title}" in card
    assert f"<li>{refused.reasons[0]}</li>" in kept(settings, refused.run_id, "model-card.html")


# --- promoted --------------------------------------------------------------------------------


def test_a_promotion_is_typed_and_moves_the_alias(promoted, registry):
    assert isinstance(promoted, TrainResult)
    assert TrainResult.model_validate_json(promoted.model_dump_json()) == promoted
    assert (promoted.outcome, promoted.version) == ("promoted", 1)
    assert (promoted.symbol, promoted.as_of, promoted.forecaster) == ("GOOG", DAY, NAME)
    assert promoted.reasons[0].startswith("Promoted: CRPS ")
    assert registry.alias(NAME, PRODUCTION) == 1
    info = registry.version(NAME, 1)
    assert info.run_id == promoted.run_id
    assert info.tags["promoted_because"] == promoted.reasons[0]


def test_the_contract_says_where_the_version_came_from(promoted, settings, registry, tmp_path):
    contract = contract_of(registry, 1, tmp_path)
    version = datasets.current(settings)
    assert (contract.dataset_md5, contract.dataset_rev) == (version.md5, version.rev)
    assert contract.dataset_md5 == promoted.dataset_md5
    assert contract.run_id == promoted.run_id
    assert contract.git_commit == code_commit()
    assert (contract.symbols, contract.as_of) == (("GOOG",), DAY)
    assert contract.train_start < contract.train_end < DAY
    frame = datasets.load_frame(settings, "GOOG", DAY, contract.dataset_md5)
    held_out = frame.loc[str(contract.train_end + timedelta(days=1)) :]
    # the gate's windows, a horizon before them, and the horizon of the last of them
    assert len(held_out) == settings.gate_days + 2 * settings.horizon


def test_the_model_card_lies_beside_the_version(promoted, settings, registry, tmp_path):
    registry.download(NAME, 1, tmp_path)
    card = (tmp_path / "model-card.md").read_text()
    assert card == kept(settings, promoted.run_id, "model-card.md")
    assert promoted.reasons[0] in card


def test_a_candidate_that_was_judged_twice_used_the_days_once(refused, promoted, settings):
    judged = json.loads(kept(settings, promoted.run_id, "gate-verdict.json"))
    line = rows_of(settings, gate_looks, "created_at")[0]
    assert (line["forecaster"], line["run_id"], line["uses"]) == (NAME, refused.run_id, 0.0)
    assert (line["verdict"], line["dataset_md5"]) == ("passed", promoted.dataset_md5)
    assert (str(line["first_day"]), line["days"]) == (judged["first_day"], 120)


def test_another_tolerance_judges_anew_what_was_found_before(refused, promoted, settings):
    assert promoted.run_id != refused.run_id
    assert promoted.dataset_md5 == refused.dataset_md5
    assert promoted.scores == refused.scores
    states = task_states(flow_run_of(settings, promoted.run_id))
    assert {states[name] for name in ("windows", "search", "fit")} == {"Cached"}
    assert {states[name] for name in ("gate", "promote")} == {"Completed"}
    params = client_of(settings).get_run(promoted.run_id).data.params
    (search,) = children(settings, refused.run_id)
    assert params["search_run"] == search.info.run_id
    assert children(settings, promoted.run_id) == []


# --- again -----------------------------------------------------------------------------------


def test_the_same_data_and_code_are_unchanged_and_nothing_is_computed(promoted, settings, registry):
    again = train(symbol="GOOG", as_of=DAY)
    assert (again.outcome, again.version) == ("unchanged", 1)
    assert again.reasons == ["The model is identical to version 1, which is in production."]
    assert again.dataset_md5 == promoted.dataset_md5
    flow_run = flow_run_of(settings, again.run_id)
    states = task_states(flow_run)
    assert states.keys() & {"gate", "promote"} == set()
    assert {states[name] for name in ("windows", "search", "fit")} == {"Cached"}
    log = flow_log(flow_run, "fit: re-used from an earlier run (fit-")
    for step in ("windows", "search", "fit"):
        assert sum(line.startswith(f"{step}: re-used") for line in log) == 1
    assert [info.version for info in registry.history(NAME)] == [1]


def test_another_length_of_the_fit_searches_nothing_but_fits(settings, home, registry):
    with configured(home, **STRICT, fit_epochs=3):
        result = train(symbol="GOOG", as_of=DAY)
    assert result.outcome in ("refused", "unchanged")
    states = task_states(flow_run_of(settings, result.run_id))
    names = ("windows", "search", "fit")
    assert [states[name] for name in names] == ["Cached", "Cached", "Completed"]
    assert registry.alias(NAME, PRODUCTION) == 1
    if result.outcome == "refused":  # another network: a second look at the same days
        assert rows_of(settings, gate_looks, "created_at")[-1]["uses"] == 1.0


@pytest.fixture
def no_ray() -> Iterator[str]:
    """Address of a cluster that is away: a search that has to run fails at once."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_a_search_that_is_re_used_needs_no_ray(settings, home, no_ray):
    with configured(home, **LAX, ray_address=no_ray):
        assert train(symbol="GOOG", as_of=DAY).outcome == "unchanged"


@pytest.mark.parametrize(
    ("changes", "as_of", "windows"),
    [
        ({"seed": 8}, DAY, "Cached"),
        ({"trials": 3}, DAY, "Cached"),
        ({"epochs": 3}, DAY, "Cached"),
        ({"concurrency": 2}, DAY, "Cached"),
        ({"horizon": 4}, DAY, "Completed"),
        ({"validation_days": 119}, DAY, "Completed"),
        ({}, date(2008, 1, 2), "Completed"),
    ],
    ids=["seed", "trials", "epochs", "concurrency", "horizon", "validation_days", "as_of"],
)
def test_another_parameter_searches_again(settings, home, no_ray, changes, as_of, windows):
    with (
        configured(home, **LAX, ray_address=no_ray, **changes),
        pytest.raises(ServiceError, match="No Ray cluster answers"),
    ):
        train(symbol="GOOG", as_of=as_of)
    failed = all_runs(settings)[-1]
    assert (failed.data.tags["as_of"], failed.info.status) == (str(as_of), "FAILED")
    states = task_states(failed.data.tags["flow_run_id"])
    assert (states["windows"], states["search"]) == (windows, "Failed")


# --- not trained -----------------------------------------------------------------------------


def test_an_older_day_than_productions_is_refused_before_any_training(
    settings, registry, engine, tmp_path
):
    later = date(2008, 6, 30)
    run_id = registry.start_run("trained later", {})
    write_model_folder(tmp_path, run_id=run_id, as_of=later)
    version = registry.register(tmp_path, NAME, run_id)
    promotion.promote(settings, registry, engine, NAME, version, "me", "planted")
    try:
        result = train(symbol="GOOG", as_of=DAY)
        assert (result.outcome, result.version) == ("refused", None)
        (reason,) = result.reasons
        assert "as of 2007-12-31 is before production's 2008-06-30" in reason
        assert "Use rollback to serve an older version." in reason
        steps = task_states(flow_run_of(settings, result.run_id))
        assert sorted(name.split()[0] for name in steps) == ["deliver-events", "ingest"]
        assert registry.aliases(NAME) == {PRODUCTION: version, PREVIOUS: 1}
    finally:
        promotion.promote(settings, registry, engine, NAME, 1, "me", "back to the trained one")


@pytest.mark.parametrize(
    ("symbol", "as_of", "message"),
    [
        ("GOOG", date(2004, 8, 18), "Nothing is known of GOOG as of 2004-08-18.*day is 2004-08-19"),
        ("GOOG", date.today() + timedelta(days=1), r"is in the future; a date up to today \("),
        ("FB", date(2012, 11, 26), r"438 rows of prices are needed .*; \d+ found. Take a later"),
    ],
    ids=["before the data", "in the future", "too short a history"],
)
def test_a_day_that_cannot_be_trained_fails_and_changes_nothing(
    settings, registry, symbol, as_of, message
):
    before = [(info.version, info.aliases) for info in registry.history(NAME)]
    with pytest.raises(HistoryError, match=message):
        train(symbol=symbol, as_of=as_of)
    assert train(symbol=symbol, as_of=as_of, return_state=True).is_failed()
    assert [(info.version, info.aliases) for info in registry.history(NAME)] == before
    assert registry.history("perennial-fb") == []
    assert registry.alias(NAME, PRODUCTION) == 1
    states = [
        run.info.status
        for run in all_runs(settings)
        if run.data.tags.get("as_of") == as_of.isoformat()
    ]
    assert states == (["FAILED", "FAILED"] if symbol == "FB" else [])
