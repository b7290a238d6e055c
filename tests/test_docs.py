"""The documents name what there is, links lead somewhere, and importing the packages does nothing.

What is told of the project is read from the project, so that neither can move on alone.
"""

import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import SecretStr

from deployments.stack import PREFECT_FILE
from forecasting.events import Event
from forecasting.settings import PREFIX, Settings
from serving.app import HANDLERS

ROOT = PREFECT_FILE.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
TEST_SETTINGS = {"PERENNIAL_TEST_POSTGRES"}
PACKAGES = ("forecasting", "serving", "deployments", "tasks", "flows")
LIGHT = ("forecasting", "serving", "deployments")
HEAVY = {"forecasting.drift", "forecasting.model", "forecasting.network"}
"""Evidently, torch and Lightning: seconds of import each."""

TARGETS = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
DEPLOYMENTS = [each["name"] for each in yaml.safe_load(PREFECT_FILE.read_text())["deployments"]]
ROUTES = sorted({re.sub(r":\w+}", "}", path) for each in HANDLERS for path in each.paths})


def tracked() -> list[Path]:
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name]


def rooms() -> list[str]:
    names = {path.relative_to(ROOT).parts for path in tracked()}
    return sorted({parts[0] for parts in names if len(parts) > 1 and parts[0][0] != "."})


def missing(names: list[str], pattern: str) -> list[str]:
    """Those that the README does not hold; `pattern` has `{}` in the place of the name."""
    text = README.read_text()
    return [name for name in names if not re.search(pattern.format(re.escape(name)), text)]


def test_readme_names_every_setting():
    settings = [f"{PREFIX}{name.upper()}" for name in Settings.model_fields]
    assert missing(settings, r"{}(?!\w)") == []


def test_readme_tells_default_and_meaning_of_every_setting_as_the_code_does():
    text = README.read_text()
    for name, field in Settings.model_fields.items():
        default = "" if field.default in ("", (), SecretStr("")) else f"`{field.default}`"
        row = f"| `{PREFIX}{name.upper()}` | {default} | {field.description} |"
        assert row in text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_names_no_setting_that_there_is_not(document):
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | TEST_SETTINGS
    named = set(re.findall(rf"{PREFIX}[A-Z][A-Z_]*", document.read_text()))
    assert named <= known


def test_readme_names_every_route():
    """`/v1/forecast/{symbol}` may be told as `/v1/forecast/GOOG`, but not as `/v1/forecast`."""
    assert "/v1/forecast/{symbol}" in ROUTES
    text = README.read_text()
    told = {path: re.sub(r"\\{\w+\\}", r"(?:\\{\\w+}|[A-Z]+)", re.escape(path)) for path in ROUTES}
    assert [path for path in ROUTES if not re.search(rf"{told[path]}(?![\w/{{])", text)] == []


def test_readme_names_every_make_target():
    assert len(TARGETS) > 5
    assert missing(TARGETS, r"make {}(?![\w-])") == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_names_no_make_target_that_there_is_not(document):
    code = re.findall(r"```.*?```|`[^`\n]+`", document.read_text(), re.DOTALL)
    named = {name for each in code for name in re.findall(r"\bmake ([a-z][a-z-]*)", each)}
    assert named <= set(TARGETS)


def test_readme_names_every_deployment():
    assert len(DEPLOYMENTS) > 3
    assert missing(DEPLOYMENTS, r"`(?:\w+/)?{}`") == []


def test_readme_tells_the_payload_of_every_event():
    assert len(get_args(Event)) > 5
    text = README.read_text()
    for event in get_args(Event):
        fields = " ".join(f"`{name}`" for name in event.__struct_fields__ if name != "schema")
        assert f"| `{event.name}` | {fields} |" in text


def test_readme_names_every_room():
    assert {"forecasting", "tasks", "flows", "serving"} < set(rooms())
    assert missing(rooms(), r"(?<![\w/]){}/") == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_to_a_file(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(<?([^)\s>]+)", text)
    links += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)
    links += re.findall(r"(?:src|href)=[\"']([^\"']+)", text)
    own = [link for link in links if not re.match(r"[a-z]+:|#", link)]
    paths = {link: ROOT / link.partition("#")[0] for link in own}
    assert [link for link, path in paths.items() if not path.exists()] == []


def test_changelog_names_the_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    heading = rf"^#+ .*(?<![\w.]){re.escape(project['version'])}(?![\w.])"
    assert re.search(heading, (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_no_tracked_file_is_bigger_than_a_megabyte():
    files = [path for path in tracked() if path.is_file()]
    assert len(files) > 50
    assert [path.name for path in files if path.stat().st_size > 1_000_000] == []


def modules(packages: tuple[str, ...]) -> list[str]:
    """Every module of the packages, the heavy rooms last."""
    found = list(packages)
    for package in packages:
        found += [f"{package}.{each.name}" for each in pkgutil.iter_modules([str(ROOT / package)])]
    return sorted((name for name in found if not name.endswith("__main__")), key=HEAVY.__contains__)


IMPORT_ALL = """
import importlib, sys, threading
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(name, *(each.name for each in threading.enumerate()), sep="\\t")
import psutil
print("children", *(each.name() for each in psutil.Process().children()), sep="\\t")
"""


def require_no_effect_of_importing(names: list[str], folder: Path) -> None:
    """No file in the working directory, no thread, no process, and no setting is looked at."""
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *names],
        cwd=folder,
        env=os.environ | {"PERENNIAL_NO_SUCH_SETTING": "1", "PERENNIAL_HOME": "made-by-import"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    expected = [[name, "MainThread"] for name in names] + [["children"]]
    assert [line.split("\t") for line in run.stdout.splitlines()] == expected
    assert list(folder.iterdir()) == []


def test_importing_a_light_module_has_no_effect(tmp_path):
    names = [name for name in modules(LIGHT) if name not in HEAVY]
    assert {"forecasting.settings", "serving.app", "deployments.stack"} < set(names)
    require_no_effect_of_importing(names, tmp_path)


@pytest.mark.slow
def test_importing_any_module_has_no_effect(tmp_path):
    names = modules(PACKAGES)
    assert {"tasks.search", "flows.train"} | HEAVY < set(names)
    require_no_effect_of_importing(names, tmp_path)
