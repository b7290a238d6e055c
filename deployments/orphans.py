"""What a killed stack left running: a file in its home names it, and the next stack ends it."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from forecasting.errors import ConfigError

FILE = "stack.json"
SAME_SECONDS = 2.0
"""How far apart two readings of a process's start may lie; a number is not given again so soon."""
PATIENCE = 15.0
"""Seconds between asking to end and ending."""


def record(home: Path, numbers: Iterable[int]) -> None:
    """Write down this process and those that it started; the last word counts."""
    started = []
    for number in numbers:
        with suppress(psutil.NoSuchProcess):
            started.append(_told(psutil.Process(number)))
    part = home / f"{FILE}.part"
    part.write_text(json.dumps({"owner": _told(psutil.Process()), "started": started}))
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
    parents = [each for each in map(_found, told["started"]) if each is not None]
    parents += _left_alone(told["started"])
    family = set(parents)
    for parent in parents:
        with suppress(psutil.NoSuchProcess):
            family.update(parent.children(recursive=True))
    for parent in parents:
        with suppress(psutil.NoSuchProcess):
            parent.terminate()
    _, alive = psutil.wait_procs(list(family), timeout=PATIENCE)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=PATIENCE)
    forget(home)
    return len(family)


def _left_alone(started: Iterable[dict[str, Any]]) -> list[psutil.Process]:
    """What is left of sessions whose first process, a recorded one, is gone.

    A stack gives each process a session, which bears its number; no other process is given that
    one while there is anybody in the session.
    """
    gone = {told["pid"]: told["began"] for told in started if not psutil.pid_exists(told["pid"])}
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            began = gone.get(os.getsid(process.pid))
            if began is not None and process.create_time() > began - SAME_SECONDS:
                found.append(process)
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
