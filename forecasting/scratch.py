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
def scratch(
    folder: Path, prefix: str = _PREFIX, kept_seconds: float = KEPT_SECONDS
) -> Iterator[Path]:
    """An empty folder in `folder`, gone once it is left; first `sweep` there."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder, prefix, kept_seconds)
    with tempfile.TemporaryDirectory(
        prefix=f"{prefix}{os.getpid()}-", dir=folder, ignore_cleanup_errors=True
    ) as name:
        yield Path(name)


def sweep(folder: Path, prefix: str = _PREFIX, kept_seconds: float = KEPT_SECONDS) -> None:
    """Remove what `scratch` made there for processes that were killed.

    Args:
        folder: where it was made.
        prefix: what it was called by.
        kept_seconds: for how long it has to be left alone by everybody.
    """
    _remove(
        (each for each in folder.glob(f"{prefix}*") if not _is_owned(each, prefix)), kept_seconds
    )


def come_back(folder: Path, mark: str) -> None:
    """Make the folder, or take it up again however old it is.

    Those beside it that nobody came back to for `KEPT_SECONDS` go.

    Args:
        folder: that a run may go on from.
        mark: name of the file by which such folders are told from others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    _remove((each.parent for each in folder.parent.glob(f"*/{mark}")), KEPT_SECONDS)


def _remove(folders: Iterable[Path], kept_seconds: float) -> None:
    oldest = time.time() - kept_seconds
    for each in folders:
        if not each.is_symlink() and not _in_use(each, oldest):
            shutil.rmtree(each, ignore_errors=True)


def _is_owned(folder: Path, prefix: str) -> bool:
    """Whether the process that made it lives: a run may wait for a person for long."""
    owner = folder.name.removeprefix(prefix).partition("-")[0]
    return not owner.isdigit() or psutil.pid_exists(int(owner))


def _in_use(folder: Path, oldest: float) -> bool:
    """Whether something was written in it since `oldest`, in seconds of the epoch."""
    try:
        return any(path.lstat().st_mtime >= oldest for path in chain([folder], folder.rglob("*")))
    except OSError:  # somebody is at work there, or we may not look
        return True
