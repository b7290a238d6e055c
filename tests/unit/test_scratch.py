"""Scratch folders go with their run; those of killed runs a month later."""

import os
import time
from pathlib import Path

import pytest

from forecasting.scratch import KEPT_SECONDS, scratch, sweep


def aged(folder: Path, seconds: float, file: str = "deep/last.ckpt") -> Path:
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


def test_what_nobody_came_back_to_goes_after_a_month(tmp_path):
    forgotten = aged(tmp_path / "forgotten", KEPT_SECONDS + 60)
    waiting = aged(tmp_path / "waiting", KEPT_SECONDS - 60)
    in_use = aged(tmp_path / "in use", KEPT_SECONDS + 60)
    (in_use / "deep" / "trial").touch()  # old above, new below
    os.utime(in_use, (0, 0))
    file = tmp_path / "file"
    file.touch()
    os.utime(file, (0, 0))
    with scratch(tmp_path):
        assert not forgotten.exists()
    assert (waiting / "deep" / "last.ckpt").read_bytes() == b"weights"
    assert in_use.exists()
    assert file.exists()


def test_what_a_link_points_to_is_not_ours(tmp_path):
    theirs = aged(tmp_path / "theirs", KEPT_SECONDS + 60)
    work = tmp_path / "work"
    work.mkdir()
    (work / "link").symlink_to(theirs)
    sweep(work)
    assert (theirs / "deep" / "last.ckpt").exists()
