"""`python -m deployments.rollback` against a small real HTTP server."""

import re

import pytest

from deployments.rollback import main
from tests.services import free_port
from tests.unit.test_prefect_api import Answering

RUN = {"id": "run-1", "name": "a run", "state": {"message": "All states completed."}}


class Prefect(Answering):
    """Prefect as far as it is asked: a deployment, a run that is made, and how it ended."""

    def __init__(self, state: str) -> None:
        super().__init__((201, RUN), (200, []))
        self.found = {**RUN, "id": "deployment-1", "state_type": state}


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch):
    """A server whose run ended as asked."""

    def name(server: Prefect) -> None:
        monkeypatch.setenv("PREFECT_API_URL", f"{server.url}/api")

    return name


def test_it_starts_the_deployment_and_waits_for_its_end(named, capsys):
    with Prefect("COMPLETED") as server:
        named(server)
        assert main(["perennial-goog", "--version", "3", "--why", "it is off"]) == 0
    (body,) = server.bodies
    asked = {"forecaster": "perennial-goog", "version": 3, "why": "it is off"}
    assert body["parameters"] == asked
    told = r"perennial-goog is back at version 3 after \d+ s: http://127.0.0.1:\d+/runs/flow-run/"
    assert re.match(told, capsys.readouterr().out)


def test_a_protected_server_is_told_who_asks(named, monkeypatch):
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "anna:secret")
    with Prefect("COMPLETED") as server:
        named(server)
        assert main(["perennial-goog"]) == 0
    assert server.authorized == {"Basic YW5uYTpzZWNyZXQ="}


def test_without_a_version_it_is_the_one_before(named, capsys):
    with Prefect("COMPLETED") as server:
        named(server)
        assert main(["perennial-goog"]) == 0
    asked = {"forecaster": "perennial-goog", "why": "rolled back by hand"}
    assert server.bodies[0]["parameters"] == asked
    assert "is back at the version before" in capsys.readouterr().out


def test_a_failed_rollback_says_so(named, capsys):
    with Prefect("FAILED") as server:
        named(server)
        assert main(["perennial-goog"]) == 1
    assert "ended FAILED" in capsys.readouterr().err


def test_without_a_server_it_says_where_it_asked(monkeypatch, capsys):
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    assert main(["perennial-goog"]) == 1
    assert "did not answer" in capsys.readouterr().err
