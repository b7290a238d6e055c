"""A benchmark whose figure misses its bar says so, and fails."""

import io

import pytest

from benchmarks.bars import judge

BARS = {"seconds": ("<=", 2.0), "ratio": (">=", 1.5)}


@pytest.mark.parametrize(
    ("figures", "met"),
    [
        ({"seconds": 2.0, "ratio": 1.5, "other": 9.0}, True),
        ({"seconds": 2.0001, "ratio": 1.5}, False),
        ({"seconds": 1.0, "ratio": 1.4999}, False),
        ({"seconds": float("nan"), "ratio": 2.0}, False),
    ],
)
def test_every_bar_is_told_and_one_that_is_missed_fails(figures, met):
    out = io.StringIO()
    assert judge(figures, BARS, out) == met
    assert len(out.getvalue().splitlines()) == 2
    assert ("MISSED" in out.getvalue()) == (not met)
