"""Folders between the steps of a run, and what runs that were killed have left there."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

KEPT_SECONDS = 30 * 24 * 3600
"""How long a folder that a killed run may go on from waits for it."""


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """An empty folder in `folder`, gone once it is left; what nobody came back to goes as well."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        yield Path(name)


def sweep(folder: Path) -> None:
    """Remove the folders in `folder` in which nothing was written for `KEPT_SECONDS`."""
    oldest = time.time() - KEPT_SECONDS
    for each in folder.iterdir():
        if each.is_dir() and not each.is_symlink() and not _in_use(each, oldest):
            shutil.rmtree(each, ignore_errors=True)


def _in_use(folder: Path, oldest: float) -> bool:
    """Whether something was written in it since `oldest`, in seconds of the epoch."""
    try:
        return any(path.lstat().st_mtime >= oldest for path in chain([folder], folder.rglob("*")))
    except FileNotFoundError:  # somebody is at work there
        return True
