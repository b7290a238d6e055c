"""Keys of cached steps: equal only where data, parameters and code are."""

import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

import forecasting
from tasks.cache import cache_key, code_commit, code_fingerprint

ROOT = Path(forecasting.__path__[0]).parent
PARAMETERS = {"seed": 7, "as_of": date(2007, 12, 31), "config": {"lr": 0.003, "hidden": 16}}
DECISIVE = [
    "forecasting/contract.py",
    "forecasting/datasets.py",
    "forecasting/model.py",
    "forecasting/network.py",
    "forecasting/prices.py",
    "forecasting/study.py",
    "forecasting/windows.py",
    "tasks/search.py",
    "tasks/trials.py",
    "tasks/training.py",
]
"""What reads and adjusts prices, cuts windows, searches, fits and exports."""


def test_results_of_cached_steps_are_read_back_without_torch():
    modules = "import sys, flows.train, forecasting.hyperparameters"
    code = f"{modules}; print({{'torch', 'ray', 'lightning', 'optuna'}} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "set()"


def test_a_key_is_the_same_for_the_same_step_data_and_parameters():
    key = cache_key("fit", "a" * 32, PARAMETERS)
    assert key == cache_key("fit", "a" * 32, dict(reversed(PARAMETERS.items())))
    assert key.startswith("fit-")


@pytest.mark.parametrize(
    ("step", "md5", "parameters"),
    [
        ("search", "a" * 32, PARAMETERS),
        ("fit", "b" * 32, PARAMETERS),
        ("fit", "a" * 32, PARAMETERS | {"seed": 8}),
        ("fit", "a" * 32, PARAMETERS | {"as_of": date(2008, 1, 2)}),
        ("fit", "a" * 32, PARAMETERS | {"config": {"lr": 0.004, "hidden": 16}}),
        ("fit", "a" * 32, PARAMETERS | {"more": None}),
    ],
    ids=["step", "data", "seed", "as_of", "config", "a further parameter"],
)
def test_a_key_changes_with(step, md5, parameters):
    assert (
        cache_key(step, md5, parameters).rpartition("-")[2]
        != (cache_key("fit", "a" * 32, PARAMETERS).rpartition("-")[2])
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the code, to be changed."""
    for package in ("forecasting", "tasks"):
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return tmp_path


def said_by(tree: Path) -> tuple[str, str]:
    """Fingerprint and one key, as a process that runs the code of `tree` computes them."""
    code = (
        "from tasks.cache import *; print(code_fingerprint(), cache_key('fit', 'a', {'seed': 7}))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True)
    fingerprint, key = done.stdout.split()
    return fingerprint, key


def test_a_copy_of_the_code_elsewhere_has_the_same_keys(tree):
    assert said_by(tree) == (code_fingerprint(), cache_key("fit", "a", {"seed": 7}))


@pytest.mark.parametrize("name", DECISIVE)
def test_a_change_of_the_code_changes_the_keys(tree, name):
    with (tree / name).open("a") as source:
        source.write("\n# another line\n")
    fingerprint, key = said_by(tree)
    assert fingerprint != code_fingerprint()
    assert key != cache_key("fit", "a", {"seed": 7})


@pytest.mark.parametrize("name", ["forecasting/drift.py", "forecasting/gate.py", "tasks/events.py"])
def test_code_that_no_cached_step_runs_keeps_the_keys(tree, name):
    with (tree / name).open("a") as source:
        source.write("\n# another line\n")
    assert said_by(tree)[0] == code_fingerprint()


def test_the_commit_names_this_repository_and_says_whether_it_is_changed():
    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if head.returncode != 0:
        pytest.skip("these tests do not run from a git repository")
    changed = subprocess.run(
        ["git", "-C", str(ROOT), "diff", "--quiet", "HEAD"], capture_output=True, check=False
    )
    suffix = "-dirty" if changed.returncode else ""
    assert code_commit() == head.stdout.strip() + suffix
