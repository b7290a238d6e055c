"""How far a search is, as a run shows it."""

import re
from io import StringIO

import pytest
from prefect import flow
from prefect.runtime import flow_run
from rich.console import Console

from tasks.progress import _Board, shown
from tasks.search import Progress
from tests.flows.support import flow_artifacts, flow_log

pytestmark = pytest.mark.usefixtures("prefect_server")
TOLD = [
    Progress(done=0, total=4, running=2, best=None, seconds_left=None),
    Progress(done=3, total=4, running=1, best=98.765, seconds_left=12.3),
]
LINE = "3 of 4 trials, 1 running, best 98.77 bp, about 12 s left"


def test_the_log_and_the_artifact_show_the_latest():
    @flow
    def searching() -> str:
        with shown() as hear:
            for progress in TOLD:
                hear(progress)
        return str(flow_run.id)

    run = searching()
    assert flow_artifacts(run)["search-progress"] == 75
    assert f"Search: {LINE}" in flow_log(run, "3 of 4 trials")


def test_a_terminal_shows_one_line():
    @flow
    def searching() -> str:
        board = _Board()
        board.hear(TOLD[1])
        console = Console(width=100, file=StringIO())
        console.print(board.line())
        return console.file.getvalue()

    assert re.sub(r"\s+", " ", searching()).strip() == f"search: {LINE}"
