"""What the benchmark of a fit makes of its rounds."""

import json

import pytest

from benchmarks.training import ALONE, CONTESTANTS, OURS, PLAIN, RAW, tell

FAST = {OURS: [10.0, 21.0, 29.0], PLAIN: [20.0, 40.0, 60.0]}
"""Seconds of three rounds: 2.0, 1.9 and 2.1 times as long."""


def rounds(
    seconds: dict[str, list[float]], bp: dict[str, list[float]]
) -> dict[str, list[dict[str, float]]]:
    """Everybody else takes as long as everybody else and comes to 140 bp."""
    return {
        name: [
            {"seconds": taken, "validation": score}
            for taken, score in zip(
                seconds.get(name, [13.0] * 3), bp.get(name, [140.0] * 3), strict=True
            )
        ]
        for name in CONTESTANTS
    }


@pytest.mark.parametrize(
    ("ours", "met"),
    [
        ([139.0, 139.0, 139.0], True),
        ([140.5, 150.0, 140.5], True),
        ([140.6, 130.0, 140.6], False),
        ([float("nan")] * 3, False),
    ],
)
def test_speed_counts_at_a_validation_loss_as_good_as_lightnings(capsys, ours, met):
    assert tell(rounds(FAST, {OURS: ours}), 10) == met
    told = capsys.readouterr().out
    assert ("at most 0.5 bp above default Lightning's" in told) == (not met)
    assert f"{sorted(ours)[1]:.3f}" in told
    assert "MISSED" not in told


def test_a_loop_that_learns_something_else_is_none_to_be_measured_by(capsys):
    assert not tell(rounds(FAST, {RAW: [140.0, 140.0, 141.0]}), 10)
    assert "they came to [140.0, 141.0] bp" in capsys.readouterr().out


def test_a_ratio_is_the_median_of_those_of_each_round(capsys):
    assert tell(rounds(FAST, {}), 10)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures == {"vs_raw_loop": 1.0, "vs_default_lightning": 2.0}
    assert not tell(rounds(FAST | {OURS: [10.0, 21.0, 31.0]}, {}), 10)
    assert "1.935, >= 2 MISSED" in capsys.readouterr().out
    assert not tell(rounds(FAST | {ALONE: [14.0, 14.0, 14.0]}, {}), 10)
    assert "1.077, <= 1.05 MISSED" in capsys.readouterr().out
