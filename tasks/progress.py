"""How far a search is: a live line in a terminal, lines in the run's log elsewhere, and Prefect."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from typing import cast
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.exceptions import PrefectException
from rich.console import Console
from rich.live import Live
from rich.text import Text

from tasks.search import Progress
from tasks.steps import create_progress_artifact, update_progress_artifact

ARTIFACT_SECONDS, LOG_SECONDS = 2.0, 15.0


@contextmanager
def shown() -> Iterator[Callable[[Progress], None]]:
    """Show what is told of a search until it ends; the caller is never kept waiting by it."""
    board = _Board()
    console = Console(stderr=True)
    with ExitStack() as stack:
        if console.is_terminal:
            stack.enter_context(
                Live(
                    get_renderable=board.line, console=console, refresh_per_second=2, transient=True
                )
            )
        else:
            stack.enter_context(_every(LOG_SECONDS, board.log))
        stack.enter_context(_every(ARTIFACT_SECONDS, board.publish))
        yield board.hear


class _Board:
    """The latest progress, and who has been told of it."""

    def __init__(self) -> None:
        self.latest: Progress | None = None
        self.logged: Progress | None = None
        self.published: Progress | None = None
        self.artifact = cast(
            UUID,
            create_progress_artifact(0.0, key="search-progress", description="The search starts."),
        )
        self.logger = get_run_logger()

    def hear(self, progress: Progress) -> None:
        """What the search tells, several times a second."""
        self.latest = progress

    def line(self) -> Text:
        """The live line."""
        return Text(f"search: {self.latest or 'starts'}", overflow="ellipsis", no_wrap=True)

    def log(self) -> None:
        """A line of the run's log, if there is news."""
        if self.latest is not None and self.latest != self.logged:
            self.logger.info("Search: %s", self.latest)
        self.logged = self.latest

    def publish(self) -> None:
        """Bring the artifact up to date, if there is news; a server that is away is no error."""
        told = self.latest
        if told is None or told == self.published:
            return
        try:
            update_progress_artifact(self.artifact, 100 * told.share, str(told))
        except (httpx.HTTPError, PrefectException) as error:
            self.logger.warning("The progress artifact is behind: %s", error)
        self.published = told


@contextmanager
def _every(seconds: float, tell: Callable[[], None]) -> Iterator[None]:
    """Call `tell` in a thread of its own, inside the caller's Prefect run, and once at the end."""
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(seconds):
            tell()
        tell()

    thread = threading.Thread(target=copy_context().run, args=(loop,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
