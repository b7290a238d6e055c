"""What the benchmarks of searches and fleets are made of."""

import numpy as np

from benchmarks.fleet import REAL, frames
from benchmarks.search import HORIZON, parts
from forecasting.settings import load_settings


def test_as_many_windows_as_asked_for_and_none_sees_validation():
    splits = parts(300)
    assert len(splits.train) == 300
    assert len(splits.validation) == 4 * 252
    days = np.busday_count(splits.train.origins.max(), splits.validation.origins.min())
    assert days > HORIZON


def test_synthetic_prices_are_prices_and_each_is_its_own(tmp_path):
    made = frames(len(REAL) + 3, load_settings(home=tmp_path))
    assert list(made)[: len(REAL)] == list(REAL)
    synthetic = [made[name] for name in list(made)[len(REAL) :]]
    for frame in synthetic:
        assert (frame["low"] > 0).all()
        assert (frame["high"] >= frame[["open", "close", "low"]].max(axis=1) * (1 - 1e-9)).all()
        assert (frame["low"] <= frame[["open", "close", "high"]].min(axis=1) * (1 + 1e-9)).all()
        assert frame.index.equals(made["AAPL"].index)
        spread = np.diff(np.log(frame["close"])).std()
        assert 0.5 < spread / np.diff(np.log(made["AAPL"]["close"])).std() < 2
    assert not np.allclose(synthetic[0]["close"], synthetic[1]["close"])
