"""Steps without Prefect, and what a replay's lines and summaries say."""

import importlib
import pkgutil
from datetime import date

import pytest
from prefect import Task, get_run_logger

import tasks
from tasks import steps
from tasks.steps import Step, flow_run_id, is_plain, plain, task

CALLS: list[str] = []


@task(name="double", retries=2)
def double(number: int) -> int:
    CALLS.append("double")
    get_run_logger().info("doubled")
    return 2 * number


@task(name="kept", persist_result=True, cache_key_fn=lambda _, parameters: parameters["key"])
def kept(day: date, key: str) -> dict[str, date]:
    CALLS.append(key)
    return {"day": day}


@task(name="broken", retries=5)
def broken() -> None:
    CALLS.append("broken")
    raise ValueError("no")


@pytest.fixture(autouse=True)
def _no_calls():
    CALLS.clear()


def test_a_step_is_its_function(tmp_path):
    with plain("run 1", tmp_path):
        assert double(21) == 42
        assert double(21, return_state=True).name == "Completed"


def test_a_step_that_fails_is_not_tried_again(tmp_path):
    with plain("run 1", tmp_path), pytest.raises(ValueError, match="no"):
        broken()
    assert CALLS == ["broken"]


def test_a_kept_result_is_found_by_its_key_and_by_no_other(tmp_path):
    day = date(2007, 1, 3)
    for run, key, name in ((1, "a", "Completed"), (2, "a", "Cached"), (3, "b", "Completed")):
        with plain(f"run {run}", tmp_path / "results"):
            state = kept(day, key=key, return_state=True)
        assert (state.name, state.result()) == (name, {"day": day})
    assert CALLS == ["a", "b"]


def test_a_result_that_was_half_written_is_made_again(tmp_path):
    (tmp_path / "a.part").write_bytes(b"half")
    with plain("run 1", tmp_path):
        assert kept(date(2007, 1, 3), "a") == {"day": date(2007, 1, 3)}
    assert [path.name for path in tmp_path.iterdir()] == ["a.pickle"]


def test_artifacts_are_shown_to_nobody(tmp_path):
    with plain("run 1", tmp_path):
        assert steps.create_table_artifact([{"a": 1}], key="table") is None


def test_inside_and_outside(tmp_path):
    assert not is_plain()
    assert flow_run_id() != flow_run_id()
    with plain("run 1", tmp_path):
        assert (is_plain(), flow_run_id()) == (True, "run 1")
    assert not is_plain()


def test_every_task_of_the_project_is_a_step():
    """One made by Prefect's own decorator would look for a server in a replay."""
    found = {}
    for module in pkgutil.iter_modules(tasks.__path__):
        if module.name == "warm":  # for workers of Ray: importing it does something
            continue
        names = vars(importlib.import_module(f"tasks.{module.name}"))
        found |= {name: each for name, each in names.items() if isinstance(each, Task)}
    assert {"find_faults", "promote", "fit"} <= set(found)
    assert [name for name, each in found.items() if not isinstance(each, Step)] == []
