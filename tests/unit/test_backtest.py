from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
from bokeh_sampledata.stocks import GOOG

from forecasting import backtest
from forecasting.contract import QUANTILE_LEVELS
from forecasting.errors import ModelError
from forecasting.inference import Forecaster
from forecasting.metrics import crps
from forecasting.windows import make_windows
from tests.models import ratios, write_model_folder


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    table = pd.DataFrame(GOOG).iloc[:600]
    table.index = pd.DatetimeIndex(pd.to_datetime(table.pop("date")), name="date")
    return table.drop(columns="adj_close").astype("float64")


@pytest.fixture(scope="module")
def windows(frame):
    every = make_windows(frame, 64, 5)
    return every.take(every.known).take(np.arange(300, 420))


@dataclass(frozen=True)
class Levels:
    quantile_levels: tuple[float, ...] = QUANTILE_LEVELS


@dataclass
class Scripted:
    """A forecaster whose quantiles are a function of the last close."""

    answer: object
    contract: Levels = field(default_factory=Levels)
    batches: list[int] = field(default_factory=list)

    def predict(self, ohlcv, dates, symbol):
        assert len(ohlcv) == len(dates) == len(symbol)
        self.batches.append(len(ohlcv))
        return self.answer(ohlcv[:, -1, 3])


def scored(forecaster, windows, batch=backtest.BATCH):
    """CRPS of what it answers."""
    quantiles = backtest.return_quantiles(forecaster, windows, batch)
    return backtest.score(windows.returns, quantiles, forecaster.contract.quantile_levels)


def test_a_real_model_is_scored_as_a_loop_would(tmp_path, windows):
    write_model_folder(tmp_path / "model")
    forecaster = Forecaster.load(tmp_path / "model", version=1)
    got = scored(forecaster, windows)
    assert got.shape == (120, 5)
    expected = np.log(ratios(5).astype(np.float64))
    for i in (0, 57, 119):
        for h in range(5):
            one = crps(windows.returns[i, h], expected[h], QUANTILE_LEVELS)
            assert got[i, h] == pytest.approx(1e4 * one, rel=1e-3)


def test_batches_do_not_change_the_scores(tmp_path, windows):
    write_model_folder(tmp_path / "model")
    forecaster = Forecaster.load(tmp_path / "model", version=1)
    whole = scored(forecaster, windows)
    np.testing.assert_allclose(scored(forecaster, windows, batch=7), whole, rtol=1e-6)
    scripted = Scripted(lambda close: close[:, None, None] * ratios(5))
    backtest.return_quantiles(scripted, windows, batch=50)
    assert scripted.batches == [50, 50, 20]


def test_prices_that_are_no_prices_score_as_not_a_number(windows):
    def broken(close):
        prices = np.repeat((close[:, None, None] * ratios(5)), 1, axis=0)
        prices[3, 2, 0] = -1.0
        prices[4, 0, 7] = np.inf
        return prices

    got = scored(Scripted(broken), windows)
    assert np.argwhere(np.isnan(got)).tolist() == [[3, 2], [4, 0]]


def test_an_unknown_outcome_scores_as_not_a_number(frame):
    newest = make_windows(frame, 64, 5).take(np.arange(530, 537))
    got = scored(Scripted(lambda close: close[:, None, None] * ratios(5)), newest)
    assert np.isnan(got).sum() == 1 + 2 + 3 + 4 + 5


def test_a_wrong_shape_is_named(windows):
    short = Scripted(lambda close: np.ones((len(close), 4, 39)))
    with pytest.raises(ModelError, match=r"\(120, 4, 39\); \(120, 5, 39\) expected"):
        backtest.return_quantiles(short, windows)


def test_random_walk_is_scored_on_the_same_windows(frame, windows):
    got = backtest.score_random_walk(frame, windows)
    assert got.shape == (120, 5)
    logs = np.log(frame["close"].to_numpy())
    row = frame.index.get_loc(pd.Timestamp(windows.origins[80]))
    for h in (1, 5):
        q = np.quantile([logs[s] - logs[s - h] for s in range(h, row + 1)], QUANTILE_LEVELS)
        expected = crps(logs[row + h] - logs[row], q, QUANTILE_LEVELS)
        assert got[80, h - 1] == pytest.approx(1e4 * expected)
