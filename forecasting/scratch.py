"""Folders between the steps of a run, and what runs that were killed have left there.

Only what is ours is ever removed, by the name that this module gave it or by a file of its maker.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import psutil

KEPT_SECONDS = 30 * 24 * 3600
"""How long a folder that a killed run may go on from waits for it."""
_PREFIX = "scratch-"


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """An empty folder in `folder`, gone once it is left.

    Of those that killed processes left there, what was not written to for `KEPT_SECONDS` goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(each for each in folder.glob(f"{_PREFIX}*") if not _is_owned(each))
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-", dir=folder) as name:
        yield Path(name)


def come_back(folder: Path, mark: str) -> None:
    """Make the folder, or take it up again however old it is.

    Those beside it that nobody came back to for `KEPT_SECONDS` go.

    Args:
        folder: that a run may go on from.
        mark: name of the file by which such folders are told from others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    _sweep(each.parent for each in folder.parent.glob(f"*/{mark}"))


def _sweep(folders: Iterable[Path]) -> None:
    oldest = time.time() - KEPT_SECONDS
    for each in folders:
        if not each.is_symlink() and not _in_use(each, oldest):
            shutil.rmtree(each, ignore_errors=True)


def _is_owned(folder: Path) -> bool:
    """Whether the process that made it lives: a run may wait for a person for long."""
    owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
    return not owner.isdigit() or psutil.pid_exists(int(owner))


def _in_use(folder: Path, oldest: float) -> bool:
    """Whether something was written in it since `oldest`, in seconds of the epoch."""
    try:
        return any(path.lstat().st_mtime >= oldest for path in chain([folder], folder.rglob("*")))
    except OSError:  # somebody is at work there, or we may not look
        return True
