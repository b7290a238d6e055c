"""A trial goes on from its checkpoint, in whichever fold that was written."""

from pathlib import Path

import pytest

from forecasting.settings import load_settings
from forecasting.windows import Splits, folds, make_windows, split
from tasks.trials import run_folds
from tests.market import market

EPOCHS, FOLDS = 3, 2
PARAMS = {"hidden": 8, "lr": 0.3}
"""A rate at which the second fold's first epoch is its best: were it forgotten, it would show."""
Told = list[tuple[int, float]]


class _PowerCut(Exception):  # noqa: N818
    pass


@pytest.fixture(scope="module")
def splits() -> Splits:
    return split(make_windows(market(320), 32, 5), 30, 30)


def _trial(
    splits: Splits,
    home: Path,
    *,
    checkpoint: bytes | None = None,
    cut: int = 0,
    seconds: float = 0.0,
) -> tuple[Told, bytes | None]:
    """A trial, until the power is cut at a step: what it told, and its last checkpoint."""
    told: Told = []
    kept: list[bytes] = []

    def report(step: int, score: float, written: bytes | None) -> None:
        told.append((step, score))
        if written is not None:
            kept.append(written)
        if step == cut:
            raise _PowerCut

    settings = load_settings(home=home, epochs=EPOCHS, folds=FOLDS, checkpoint_seconds=seconds)
    if cut:
        with pytest.raises(_PowerCut):
            run_folds(PARAMS, checkpoint, splits, settings, report)
    else:
        run_folds(PARAMS, checkpoint, splits, settings, report)
    return told, kept[-1] if kept else None


@pytest.fixture(scope="module")
def whole(splits, tmp_path_factory) -> Told:
    """What a trial tells that nothing interrupts."""
    assert len(folds(splits, FOLDS)) == FOLDS
    told, _ = _trial(splits, tmp_path_factory.mktemp("home"))
    assert [step for step, _ in told] == list(range(1, EPOCHS * FOLDS + 1))
    assert len({score for _, score in told[EPOCHS:]}) == 1
    return told


@pytest.mark.parametrize("cut", [2, EPOCHS, EPOCHS + 1, EPOCHS + 2, EPOCHS * FOLDS])
def test_a_trial_goes_on_with_the_epoch_after_its_checkpoint(splits, tmp_path, whole, cut):
    before, checkpoint = _trial(splits, tmp_path, cut=cut)
    assert before == whole[:cut]
    assert checkpoint is not None
    after, _ = _trial(splits, tmp_path, checkpoint=checkpoint)
    assert after == whole[cut:]


def test_no_checkpoint_is_told_before_its_time(splits, tmp_path, whole):
    assert _trial(splits, tmp_path, seconds=3600.0) == (whole, None)
