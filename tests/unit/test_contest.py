"""The contest on real prices and model folders: the same windows for everybody."""

from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bokeh_sampledata.stocks import AAPL

from forecasting import backtest, baselines
from forecasting.contest import CLASSICAL, after_earnings, gather
from forecasting.contract import COLUMNS, QUANTILE_LEVELS
from forecasting.errors import HistoryError
from forecasting.gate import CANDIDATE, INTERVALS, PRODUCTION, WALK, Evidence, Rule, judge
from forecasting.inference import Forecaster
from forecasting.metrics import coverage, inside
from forecasting.windows import make_windows, split
from tests.market import goog
from tests.models import write_model_folder

AS_OF = "2007-06-29"
EARLY, LATE = date(2006, 3, 31), date(2006, 6, 30)
BOTH = ("GOOG", "AAPL")


def aapl() -> pd.DataFrame:
    frame = pd.DataFrame(AAPL)
    frame.index = pd.DatetimeIndex(frame.pop("date"), name="date")
    return frame.loc["2005-03-01":AS_OF, list(COLUMNS)].astype(float)


FRAMES = {"GOOG": goog(AS_OF), "AAPL": aapl()}


def contest(
    candidate: Path, production: Path | None = None, symbols: tuple[str, ...] = BOTH, days: int = 60
) -> Evidence:
    frames = {symbol: FRAMES[symbol] for symbol in symbols}
    return gather(frames, candidate, production, horizon=5, validation_days=60, gate_days=days)


@pytest.fixture(scope="module")
def candidate(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("candidate")
    write_model_folder(folder, symbols=BOTH, train_end=LATE)
    return folder


def test_everybody_is_scored_on_the_gates_windows_of_every_symbol(candidate):
    found = contest(candidate)
    assert found.problems == ()
    assert len(found.days) == 60
    forecaster = Forecaster.load(candidate, version=0)
    for index, symbol in enumerate(BOTH):
        windows = make_windows(FRAMES[symbol], 64, 5, index)
        gate = split(windows, 60, 60).gate
        rows = found.symbols == symbol
        np.testing.assert_array_equal(found.origins[rows], gate.origins)
        np.testing.assert_array_equal(found.returns[rows], gate.returns)
        expected = {
            CANDIDATE: backtest.score(
                gate.returns, backtest.return_quantiles(forecaster, gate), QUANTILE_LEVELS
            ),
            WALK: backtest.score_random_walk(FRAMES[symbol], gate),
            "HAR": backtest.score(
                gate.returns,
                baselines.har_quantiles(FRAMES[symbol], gate.origins, 5, found.levels),
                found.levels,
            ),
        }
        for name, scores in expected.items():
            np.testing.assert_allclose(np.asarray(found.crps[name])[rows], scores)
    held = coverage(found.returns, found.quantiles, found.levels, 0.8).mean()
    verdict = judge(found, Rule(1.0, 1.0, 60))
    assert (verdict.windows, verdict.days) == (120, 60)
    assert verdict.intervals[0].share == pytest.approx(held)


def test_the_classical_baseline_is_chosen_on_the_days_before(candidate):
    """Slow check: their scores on the validation days, of both symbols."""
    found = contest(candidate)
    earlier = {}
    for name, baseline in CLASSICAL.items():
        scores = []
        for frame in FRAMES.values():
            before = split(make_windows(frame, 64, 5), 60, 60).validation
            quantiles = baseline(frame, before.origins, 5, found.levels)
            scores.append(backtest.score(before.returns, quantiles, found.levels))
        earlier[name] = np.concatenate(scores).mean()
    assert found.classical == min(earlier, key=earlier.__getitem__)
    assert set(CLASSICAL) < set(found.crps)


def test_prices_after_the_validation_days_do_not_choose_it(candidate):
    shocked = FRAMES["GOOG"].copy()
    gate = split(make_windows(shocked, 64, 5), 60, 60).gate
    late = shocked.index > pd.Timestamp(str(gate.first_day))
    shocked.loc[late, "close"] *= np.exp(np.random.default_rng(0).normal(0, 0.1, late.sum()))
    shocked["high"] = shocked[["open", "high", "close"]].max(axis=1)
    shocked["low"] = shocked[["open", "low", "close"]].min(axis=1)
    calm = contest(candidate, symbols=("GOOG",))
    wild = gather({"GOOG": shocked}, candidate, None, horizon=5, validation_days=60, gate_days=60)
    assert wild.classical == calm.classical
    assert not np.allclose(np.asarray(wild.crps["HAR"]), np.asarray(calm.crps["HAR"]))


def test_a_history_too_short_for_garch_leaves_har(candidate):
    frames = {"GOOG": FRAMES["GOOG"].iloc[-330:]}
    found = gather(frames, candidate, None, horizon=5, validation_days=60, gate_days=60)
    assert found.classical == "HAR"
    assert "GARCH" not in found.crps
    with pytest.raises(HistoryError, match="rows of prices are needed"):
        gather(frames, candidate, None, horizon=5, validation_days=120, gate_days=120)


def test_production_is_asked_about_the_symbols_that_it_serves(candidate, tmp_path):
    write_model_folder(tmp_path, train_end=EARLY)
    found = contest(candidate, tmp_path)
    assert found.fresher
    np.testing.assert_array_equal(found.served, found.symbols == "GOOG")
    np.testing.assert_array_equal(
        np.isfinite(np.asarray(found.crps[PRODUCTION])).all(axis=1), found.served
    )
    for mass, held in found.held.items():
        theirs = inside(found.returns, found.quantiles, found.levels, mass)
        np.testing.assert_array_equal(held, theirs & found.served[:, None])
    assert set(found.held) == set(INTERVALS)
    # the tiny models are all the same, whatever the symbol
    np.testing.assert_allclose(
        np.asarray(found.crps[PRODUCTION])[found.served],
        np.asarray(found.crps[CANDIDATE])[found.served],
    )
    assert found.problems == ()


def test_production_that_learned_from_as_late_days_leaves_nothing_fresher(candidate, tmp_path):
    write_model_folder(tmp_path, symbols=BOTH, train_end=LATE)
    found = contest(candidate, tmp_path)
    assert not found.fresher
    assert found.served.all()


def test_a_candidate_that_does_not_know_a_symbol_is_refused(tmp_path):
    write_model_folder(tmp_path, train_end=LATE)
    (problem,) = contest(tmp_path).problems
    assert "cannot be loaded" in problem
    assert "got symbol 'AAPL'" in problem


def test_calm_and_volatile_are_halves_of_each_symbols_days(candidate):
    found = contest(candidate)
    for symbol in BOTH:
        rows = found.symbols == symbol
        assert found.slices["calm"][rows].sum() == found.slices["volatile"][rows].sum() == 30
        variance = pd.Series(baselines.range_variance(FRAMES[symbol])).rolling(22).mean()
        variance.index = FRAMES[symbol].index
        known = variance.loc[pd.DatetimeIndex(found.origins[rows])].to_numpy()
        assert known[found.slices["calm"][rows]].max() < known[found.slices["volatile"][rows]].min()


@pytest.mark.parametrize(
    ("day", "expected"),
    [
        ("2007-01-14", False),
        ("2007-01-15", True),
        ("2007-02-14", True),
        ("2007-02-15", False),
        ("2007-04-19", True),
        ("2007-06-29", False),
        ("2007-07-20", True),
        ("2007-10-31", True),
        ("2007-12-31", False),
    ],
)
def test_companies_report_in_the_weeks_after_a_quarter(day, expected):
    assert after_earnings(np.array([day], dtype="datetime64[D]")).tolist() == [expected]
