"""What a killed stack left running: a file in its home tells the mark of all that it started.

The mark is a variable of their environment, which their children have as well, flow runs too, whose
parent may be gone.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from forecasting.errors import ConfigError

FILE = "stack.json"
MARK = "STARTED_BY_STACK"
SAME_SECONDS = 2.0
"""How far apart two readings of a process's start may lie; a number is not given again so soon."""
PATIENCE = 15.0
"""Seconds between asking to end and ending."""


def record(home: Path, mark: str) -> None:
    """Write down this process, and the mark of those that it starts."""
    part = home / f"{FILE}.part"
    part.write_text(json.dumps({"owner": _told(psutil.Process()), "mark": mark}))
    part.replace(home / FILE)


def forget(home: Path) -> None:
    """Everything was stopped."""
    (home / FILE).unlink(missing_ok=True)


def end(home: Path) -> int:
    """End what a dead stack of this home left, with all children; how many processes it was.

    Raises:
        ConfigError: the stack that started them is alive.
    """
    try:
        told = json.loads((home / FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return 0
    owner = _found(told["owner"])
    if owner is not None:
        if owner.pid == psutil.Process().pid:
            return 0
        raise ConfigError(
            f"A stack of {home} runs already, as process {owner.pid}. Stop that one (Ctrl-C), or "
            "give another PERENNIAL_HOME."
        )
    if not (mark := told.get("mark")):  # of a version that wrote down other things
        return 0
    family = _marked(mark)
    for process in family:
        with suppress(psutil.Error):
            if process.parent() not in family:  # the others are ended by theirs
                process.terminate()
    _, left = psutil.wait_procs(family, timeout=PATIENCE)
    alive = {*left, *_marked(mark)}
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=PATIENCE)
    forget(home)
    return len(family | alive)


def _marked(mark: str) -> set[psutil.Process]:
    """All that have the mark, and their children: one that sets its title loses its environment."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # somebody else's, or gone by now
            if process.environ().get(MARK) == mark:
                found.update({process, *process.children(recursive=True)})
    return found


def _told(process: psutil.Process) -> dict[str, Any]:
    return {"pid": process.pid, "began": process.create_time()}


def _found(told: dict[str, Any]) -> psutil.Process | None:
    """The process, unless it is gone and its number another's."""
    try:
        process = psutil.Process(told["pid"])
        gone = process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    same = abs(process.create_time() - told["began"]) < SAME_SECONDS
    return process if same and not gone else None
