"""How far a search is, as a run shows it."""

import os
import pty
import re
import select
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
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
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
UP, ERASE = "\x1b[1A", "\x1b[2K"
"""What a terminal is told to do with its cursor, and with a line."""


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


class _Terminal:
    """Where a person looks: the other end of what is written to it."""

    def __init__(self, end: int) -> None:
        self.end, self.seen = end, ""

    def shows(self, text: str) -> None:
        """Look until it is there."""
        while text not in self.seen:
            ready, _, _ = select.select([self.end], [], [], 20)
            assert ready, f"{text!r} was expected: {self.seen!r}"
            self.seen += os.read(self.end, 65536).decode(errors="replace")


@contextmanager
def _terminal() -> Iterator[_Terminal]:
    """A pseudo-terminal as standard error."""
    looks, written = pty.openpty()
    try:
        with open(written, "w") as stream, redirect_stderr(stream):  # noqa: PTH123
            yield _Terminal(looks)
    finally:
        os.close(looks)


@pytest.mark.parametrize("fails", [False, True])
def test_a_terminal_follows_a_search_and_has_its_cursor_back(monkeypatch, fails):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with _terminal() as terminal:

        @flow
        def searching() -> str:
            with suppress(KeyError), shown() as hear:
                terminal.shows("search: starts")
                for progress in TOLD:
                    hear(progress)
                    terminal.shows(f"\r{ERASE}search: {progress}")
                assert SHOW not in terminal.seen
                if fails:
                    raise KeyError("lost")
            return str(flow_run.id)

        run = searching()
        terminal.shows(f"{UP}{ERASE}")
    assert terminal.seen.index(HIDE) < terminal.seen.index("search: starts")
    assert terminal.seen.count(HIDE) == terminal.seen.count(SHOW) == 1
    assert terminal.seen.rindex(UP) > terminal.seen.rindex(LINE)  # nothing of it is left there
    assert flow_artifacts(run)["search-progress"] == 75
