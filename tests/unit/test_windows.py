"""Windows and their split by time."""

from datetime import date
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forecasting.errors import HistoryError
from forecasting.windows import MIN_TRAIN, folds, join, make_windows, split, with_peers
from tests.market import market


def test_windows_agree_with_a_slow_loop():
    frame, context, horizon = market(50), 32, 3
    windows = make_windows(frame, context, horizon, symbol_index=2)
    assert len(windows) == 19
    assert windows.ohlcv.dtype == np.float32
    for i in range(len(windows)):
        t = i + context - 1
        rows = frame.iloc[i : t + 1]
        np.testing.assert_array_equal(windows.ohlcv[i], rows.to_numpy(np.float32))
        assert windows.origins[i] == np.datetime64(frame.index[t], "D")
        assert windows.dates[i, -1] == windows.origins[i].astype(int)
        assert windows.last_close[i] == frame["close"].iloc[t]
        assert windows.symbol[i] == 2
        for h in range(1, horizon + 1):
            if t + h >= len(frame):
                assert np.isnan(windows.returns[i, h - 1])
                assert np.isnan(windows.ranges[i, h - 1])
                continue
            after = frame.iloc[t + 1 : t + h + 1]
            moved = np.log(frame["close"].iloc[t + h] / frame["close"].iloc[t])
            assert windows.returns[i, h - 1] == pytest.approx(moved)
            spread = np.log(after["high"] / after["low"]) ** 2
            assert windows.ranges[i, h - 1] == pytest.approx(spread.mean())


@settings(max_examples=40, deadline=None)
@given(
    extra=st.integers(0, 60),
    horizon=st.integers(1, 12),
    validation=st.integers(20, 60),
    gate=st.integers(20, 60),
)
def test_no_target_reaches_a_later_part(extra, horizon, validation, gate):
    rows = 32 - 1 + MIN_TRAIN + validation + gate + 3 * horizon + extra
    windows = make_windows(market(rows), 32, horizon)
    parts = split(windows, validation, gate)
    order = [parts.train, parts.validation, parts.gate]
    assert [len(part) for part in order] == [MIN_TRAIN + extra, validation, gate]
    position = {day: i for i, day in enumerate(windows.origins)}
    for earlier, later in pairwise(order):
        last_target = position[earlier.origins[-1]] + horizon
        assert last_target < position[later.origins[0]]
    assert all(part.known.all() for part in order)
    # the gate ends with the newest window whose whole horizon is known
    assert position[parts.gate.origins[-1]] + horizon == len(windows) - 1


@given(
    extra=st.integers(0, 300),
    horizon=st.integers(1, 6),
    validation=st.integers(20, 60),
    count=st.integers(1, 5),
)
@settings(max_examples=25, deadline=None)
def test_folds_are_earlier_blocks_that_see_nothing_later(extra, horizon, validation, count):
    rows = 31 + horizon + MIN_TRAIN + validation + 20 + 2 * horizon + extra
    frame = market(rows)
    whole = split(make_windows(frame, 32, horizon), validation, 20)
    found = folds(whole, count)
    assert 1 <= len(found) <= count
    assert found[-1] is whole
    if len(found) < count:
        shorter = len(whole.train) - (len(found) - 1) * (validation + horizon)
        assert shorter - validation - horizon < MIN_TRAIN
    for fold in found:
        days = fold.validation.origins
        assert len(days) == validation
        assert len(fold.train) >= MIN_TRAIN
        last = frame.index.get_loc(fold.train.origins[-1])
        assert last + horizon < frame.index.get_loc(days[0])
    for earlier, later in pairwise(found):
        gap = frame.index.get_loc(later.validation.origins[0])
        assert frame.index.get_loc(earlier.validation.origins[-1]) + horizon < gap


def test_folds_keep_symbols_together_by_day():
    whole = split(make_windows(market(400), 32, 5), 40, 30)
    peer = make_windows(market(400, seed=9), 32, 5, symbol_index=1)
    earlier, _ = folds(with_peers(whole, [peer]), 2)
    for part in (earlier.train, earlier.validation):
        own, others = (set(part.origins[part.symbol == symbol]) for symbol in (0, 1))
        assert own == others


def test_too_short_a_history_says_what_is_needed():
    needed = 32 - 1 + MIN_TRAIN + 20 + 30 + 3 * 5
    with pytest.raises(HistoryError, match=rf"{needed} rows .* {needed - 1} found"):
        split(make_windows(market(needed - 1), 32, 5), 20, 30)
    split(make_windows(market(needed), 32, 5), 20, 30)
    with pytest.raises(HistoryError, match=r"32 rows .* 31 found"):
        make_windows(market(31), 32, 5)


def test_symbols_are_joined_and_split_on_the_same_days():
    both = join([make_windows(market(260, seed), 32, 5, seed) for seed in (0, 1)])
    parts = split(both, 20, 20)
    for part in (parts.train, parts.validation, parts.gate):
        assert set(part.symbol) == {0, 1}
        np.testing.assert_array_equal(
            part.origins[part.symbol == 0], part.origins[part.symbol == 1]
        )
    assert parts.train.first_day == date(2005, 2, 15)


def test_windows_at_chosen_origins():
    windows = make_windows(market(80), 40, 5)
    chosen = windows.at(windows.origins[5:9])
    np.testing.assert_array_equal(chosen.origins, windows.origins[5:9])
    with pytest.raises(HistoryError, match="1 have none"):
        windows.at(np.array(["1999-01-04"], dtype="datetime64[D]"))


def test_peers_are_learned_from_up_to_the_same_days_and_never_judged_on():
    frame = market(700)
    own = make_windows(frame.iloc[300:], 32, 5)
    parts = split(own, 40, 40)
    older = make_windows(frame, 32, 5)  # a longer history of the same days
    found = with_peers(parts, [older])
    assert found.gate is parts.gate
    added = found.train.take(np.arange(len(parts.train), len(found.train)))
    assert added.first_day < parts.train.first_day
    assert added.last_day == parts.train.last_day
    days = np.array([parts.train.origins[-1], parts.validation.origins[0]])
    assert np.diff(frame.index.get_indexer(days.astype("datetime64[ns]"))) > 5
    validation = found.validation.take(np.arange(40, len(found.validation)))
    np.testing.assert_array_equal(validation.origins, parts.validation.origins)
    assert found.train.known.all()
    alone = with_peers(parts, [])
    np.testing.assert_array_equal(alone.train.ohlcv, parts.train.ohlcv)
