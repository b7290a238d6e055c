"""Scratch folders go with their run; what killed runs left a month later, and nothing else."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forecasting.scratch import KEPT_SECONDS, come_back, scratch

MARK = "last.ckpt"


def gone_process() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def aged(folder: Path, seconds: float, file: str = MARK) -> Path:
    """A folder whose newest file was written so long ago."""
    path = folder / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    then = time.time() - seconds
    for each in (path, *path.parents[: len(Path(file).parts)]):
        os.utime(each, (then, then))
    return folder


def test_a_scratch_folder_is_empty_and_gone_afterwards(tmp_path):
    with scratch(tmp_path / "work") as folder:
        assert folder.parent == tmp_path / "work"
        assert list(folder.iterdir()) == []
        (folder / "file").touch()
    with pytest.raises(KeyError), scratch(tmp_path / "work") as other:
        raise KeyError
    assert (folder.exists(), other.exists()) == (False, False)


def test_what_killed_processes_left_goes_after_a_month(tmp_path):
    owner = gone_process()
    forgotten = aged(tmp_path / f"scratch-{owner}-a", KEPT_SECONDS + 60, "deep/file")
    fresh = aged(tmp_path / f"scratch-{owner}-b", KEPT_SECONDS - 60)
    written = aged(tmp_path / f"scratch-{owner}-c", KEPT_SECONDS + 60, "deep/file")
    (written / "deep" / "new").touch()  # old above, new below
    os.utime(written, (0, 0))
    waiting = aged(tmp_path / f"scratch-{os.getpid()}-d", KEPT_SECONDS + 60)
    theirs = aged(tmp_path / "my thesis", KEPT_SECONDS + 60)
    with scratch(tmp_path):
        assert not forgotten.exists()
    assert all(each.exists() for each in (fresh, written, waiting, theirs))


def test_what_is_in_the_way_goes_at_once_but_not_of_a_living_process(tmp_path):
    dead = aged(tmp_path / f"search-{gone_process()}-a", 1)
    alive = aged(tmp_path / f"search-{os.getpid()}-b", 1)
    notes, another = (aged(tmp_path / name, 1) for name in ("search-notes", "scratch-1-c"))
    with scratch(tmp_path, "search-", kept_seconds=0) as folder:
        assert folder.name.startswith(f"search-{os.getpid()}-")
    assert not dead.exists()
    assert all(each.exists() for each in (alive, notes, another))


def test_what_nobody_came_back_to_goes_and_what_is_come_back_to_stays(tmp_path):
    old, again = (aged(tmp_path / "fit" / name, KEPT_SECONDS + 60) for name in ("old", "again"))
    theirs = aged(tmp_path / "fit" / "theirs", KEPT_SECONDS + 60, "thesis.tex")
    with scratch(tmp_path):  # as a flow does first
        come_back(again, MARK)
    assert (again / MARK).read_bytes() == b"weights"
    assert theirs.exists()
    assert not old.exists()
    come_back(tmp_path / "fit" / "new", MARK)
    assert (tmp_path / "fit" / "new").is_dir()


def test_what_a_link_points_to_is_not_ours(tmp_path):
    theirs = aged(tmp_path / "theirs", KEPT_SECONDS + 60)
    work = tmp_path / "work"
    work.mkdir()
    (work / f"scratch-{gone_process()}-e").symlink_to(theirs)
    (work / "key").symlink_to(theirs)
    with scratch(work):
        come_back(work / "other", MARK)
    assert (theirs / MARK).exists()
