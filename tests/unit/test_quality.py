"""The quality benchmark's splits look at nothing ahead, and its scores are those of the metrics."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.special import ndtri

from benchmarks.environments import ENVIRONMENTS, PeerError, is_installed
from benchmarks.peers.exchange import Task, added_up, answer, answered
from benchmarks.quality import (
    GARCH,
    HORIZON,
    OFF,
    OURS,
    PARTS,
    RW,
    RW250,
    SCRIPTS,
    SPLITS,
    SYMBOLS,
    Scores,
    ask,
    figures,
    held_out,
    splits,
    task,
    tell,
)
from forecasting import metrics
from forecasting.contract import QUANTILE_LEVELS

SHORT = {"neural_lstm.py": "2", "tutorial_lstm.py": "1"}
"""Steps and epochs that are enough to see what is looked at."""


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.split} {part.first}")
def test_nothing_learned_from_reaches_into_what_is_tested(part):
    cut = splits(part)
    days = np.unique(np.concatenate([cut.train.origins, cut.validation.origins, cut.gate.origins]))
    first, last = np.datetime64(part.first), np.datetime64(part.last)
    assert first <= cut.gate.origins.min()
    assert cut.gate.origins.max() <= last
    assert np.unique(cut.gate.symbol).tolist() == [SYMBOLS.index("GOOG")]
    for earlier, later in ((cut.train, cut.validation), (cut.validation, cut.gate)):
        gap = np.searchsorted(days, later.origins.min()) - np.searchsorted(
            days, earlier.origins.max()
        )
        told = np.busday_count(earlier.origins.max(), later.origins.min())
        assert gap >= 1
        assert told > HORIZON  # five sessions and more lie between
    assert set(np.unique(cut.train.symbol)) == set(range(len(SYMBOLS)))


def test_scores_are_means_over_seeds_of_the_metrics():
    test = held_out(PARTS[0])
    rng = np.random.default_rng(0)
    shape = (*test.returns.shape, len(QUANTILE_LEVELS))
    runs = [np.sort(rng.normal(0, 0.02, shape), axis=-1) for _ in range(3)]
    scores = Scores.of(runs, test.returns, test.last_close)
    expected = [metrics.crps(test.returns, q, QUANTILE_LEVELS).mean(axis=0) * 1e4 for q in runs]
    np.testing.assert_allclose(scores.seeds, expected)
    np.testing.assert_allclose(scores.crps.mean(axis=0), np.mean(expected, axis=0))
    inside = [metrics.coverage(test.returns, q, QUANTILE_LEVELS, 0.8) * 100 for q in runs]
    np.testing.assert_allclose(scores.coverage(0), np.mean(inside, axis=0))
    still = Scores.of([np.zeros(shape)], test.returns, test.last_close)
    np.testing.assert_array_equal(still.mae, 1.0)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.split} {part.first}")
def test_a_peer_is_asked_of_the_same_days(part):
    asked, test = task(part, "GOOG"), held_out(part)
    assert asked.symbols.tolist() == ["GOOG", "AAPL", "IBM", "MSFT"]
    np.testing.assert_allclose(asked.prices[0, asked.origins], test.last_close)
    steps = np.arange(1, HORIZON + 1)
    ahead = np.log(asked.prices[0, asked.origins[:, None] + steps])
    np.testing.assert_allclose(ahead - asked.last_logs[..., 0], test.returns, atol=1e-12)
    assert asked.prices.shape[1] == asked.origins[-1] + HORIZON + 1
    assert np.isfinite(asked.prices[:, asked.first :]).all()


def test_a_symbol_that_was_never_seen_is_tested_and_not_learned_from():
    whole, cut = splits(PARTS[1]), splits(PARTS[1], "GOOG", ("AAPL", "IBM", "MSFT"))
    goog = SYMBOLS.index("GOOG")
    for part in (cut.train, cut.validation):
        assert goog not in part.symbol
        assert set(part.symbol) == set(range(len(SYMBOLS))) - {goog}
    np.testing.assert_array_equal(cut.gate.returns, whole.gate.returns)
    assert cut.validation.first_day == whole.validation.first_day


def short_task(after: float) -> Task:
    """Three symbols with momentum, the first one young; prices after the first origin scaled."""
    shocks = np.random.default_rng(3).normal(0, 0.02, (3, 420))
    moves = lfilter([1], [1, -0.5], shocks, axis=1)
    prices = 100 * np.exp(np.cumsum(moves, axis=1))
    prices[0, :40] = np.nan
    prices[:, 401:] *= after
    levels = np.array(QUANTILE_LEVELS)
    return Task(np.array(["A", "B", "C"]), prices, 400, HORIZON, levels, validation=100, seed=1)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_peer_looks_at_nothing_ahead(name):
    script, *arguments = SCRIPTS[name]
    python = Path(sys.executable)
    if script != "tutorial_lstm.py":  # which needs nothing that we do not have
        if not is_installed("forecasting"):
            pytest.skip("no .venv-peers/forecasting; `make bench-quality` makes it")
        python = ENVIRONMENTS / "forecasting" / "bin" / "python"
    command = [script, *arguments, *([SHORT[script]] if script in SHORT else [])]
    told, otherwise = (ask(python, command, short_task(after)) for after in (1.0, 3.0))
    assert told.shape == (15, HORIZON, len(QUANTILE_LEVELS))
    assert (np.diff(told, axis=-1) >= 0).all()
    np.testing.assert_allclose(told[0], otherwise[0], rtol=1e-6, atol=1e-9)
    assert not np.allclose(told[1], otherwise[1])


def test_a_peer_that_fails_or_answers_something_else_is_an_error(tmp_path):
    with pytest.raises(PeerError, match=r"no\.py failed.*No such file"):
        ask(Path(sys.executable), ["no.py"], short_task(1.0))
    other = tmp_path / "other.py"
    other.write_text("import numpy, sys; numpy.save(sys.argv[1] + '/quantiles.npy', [0.0])")
    with pytest.raises(PeerError, match=r"\(15, 5, 39\) finite quantiles expected"):
        ask(Path(sys.executable), [str(other)], short_task(1.0))


def test_a_task_and_its_answer_come_through_the_files(tmp_path):
    sent = short_task(1.0)
    sent.write(tmp_path)
    got = Task.read(tmp_path)
    np.testing.assert_array_equal(got.prices, sent.prices)
    assert replace(got, prices=0, symbols=0, levels=0) == replace(
        sent, prices=0, symbols=0, levels=0
    )
    answer(tmp_path, np.array([[[2.0, 1.0]]]))
    np.testing.assert_array_equal(answered(tmp_path), [[[1.0, 2.0]]])


def test_independent_days_add_up_as_variances_do():
    levels = np.array(QUANTILE_LEVELS)
    day = 0.01 * ndtri(levels)
    total = added_up(np.tile(day, (2, HORIZON, 1)), levels, seed=0)
    expected = day * np.sqrt(np.arange(1, HORIZON + 1))[:, None]
    np.testing.assert_allclose(total, np.tile(expected, (2, 1, 1)), atol=0.0015)


def flat(name: str) -> dict[tuple[str, str], Scores]:
    """The same even quantiles, every day."""
    spread = np.linspace(-0.05, 0.05, len(QUANTILE_LEVELS))
    found = {}
    for split in SPLITS:
        parts = [held_out(part) for part in PARTS if part.split == split]
        returns = np.concatenate([part.returns for part in parts])
        close = np.concatenate([part.last_close for part in parts])
        found[split, name] = Scores.of([np.tile(spread, (*returns.shape, 1))], returns, close)
    return found


def test_a_contestant_against_itself_is_as_good():
    same = {}
    for name in (OURS, RW, RW250, GARCH):
        same |= flat(name)
    found = figures(same)
    assert found["crps_wf_vs_rw"] == found["crps_fixed_vs_rw250"] == [1.0, 1.0]
    assert found["dm_t_vs_garch"] == [0.0, 0.0]
    assert found["price_mae_vs_rw"] == [1.0, 1.0]


def test_what_is_told_names_symbol_contestants_and_missed_bars(capsys):
    same = {}
    for name in (RW, RW250, GARCH, OFF, OURS):
        same |= flat(name)
    found, met = tell("GOOG", same)
    told = capsys.readouterr().out
    assert found == figures(same)
    assert not met
    assert "GOOG, fixed" in told
    assert "GOOG, walk-forward" in told
    assert all(told.count(name) >= 2 for name in (RW, RW250, GARCH, OFF, OURS))
    assert "crps_wf_vs_rw          1.0 / 1.0, <= 0.973 / 0.98 MISSED" in told
