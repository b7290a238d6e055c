import numpy as np
import pandas as pd
import pytest
from bokeh_sampledata.stocks import GOOG

from forecasting import baselines, metrics
from forecasting.contract import QUANTILE_LEVELS
from forecasting.errors import HistoryError

LEVELS = (0.1, 0.5, 0.9)
FORECASTS = {
    "random walk": baselines.random_walk_quantiles,
    "random walk, 60": lambda *a: baselines.random_walk_quantiles(*a, 60),
    "drift": baselines.drift_quantiles,
    "har": baselines.har_quantiles,
}


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    table = pd.DataFrame(GOOG)
    table.index = pd.DatetimeIndex(pd.to_datetime(table.pop("date")), name="date")
    return table.drop(columns="adj_close").astype("float64")


def days(frame, *rows):
    return frame.index[list(rows)].to_numpy().astype("datetime64[D]")


@pytest.mark.parametrize("window", [None, 60])
def test_random_walk_against_a_loop(frame, window):
    origins = days(frame, 300, 755)
    got = baselines.random_walk_quantiles(frame, origins, 3, LEVELS, window)
    close = frame["close"].to_numpy()
    for i, row in enumerate((300, 755)):
        for h in (1, 2, 3):
            known = [np.log(close[s] / close[s - h]) for s in range(h, row + 1)]
            known = known if window is None else known[-window:]
            np.testing.assert_allclose(got[i, h - 1], np.quantile(known, LEVELS))


def test_drift_against_a_loop(frame):
    row, skip = 400, 20
    got = baselines.drift_quantiles(frame, days(frame, row), 2, LEVELS)[0]
    close = frame["close"].to_numpy()

    def mean(s):
        return np.log(close[s] / close[0]) / s

    for h in (1, 2):
        errors = [np.log(close[s + h] / close[s]) - h * mean(s) for s in range(skip, row - h + 1)]
        np.testing.assert_allclose(got[h - 1], np.quantile(errors, LEVELS) + h * mean(row))


def test_har_against_a_loop(frame):
    row, h = 400, 3
    got = baselines.har_quantiles(frame, days(frame, row), h, LEVELS)[0, h - 1]
    rows = frame.reset_index().to_dict("records")
    v = []
    for i, r in enumerate(rows):
        gap = 0.0 if i == 0 else np.log(r["open"] / rows[i - 1]["close"])
        v.append(np.log(r["high"] / r["low"]) ** 2 / (4 * np.log(2)) + gap**2)

    def regressors(t):
        return [1.0, *(np.log(np.mean(v[t - n + 1 : t + 1])) for n in (1, 5, 22))]

    past = range(21, row - h + 1)
    x = np.array([regressors(t) for t in past])
    y = np.array([np.log(np.mean(v[t + 1 : t + h + 1])) for t in past])
    beta = np.linalg.solve(x.T @ x, x.T @ y)
    close = frame["close"].to_numpy()
    z = [np.log(close[t + h] / close[t]) / np.exp(0.5 * np.dot(regressors(t), beta)) for t in past]
    sigma = np.exp(0.5 * np.dot(regressors(row), beta))
    np.testing.assert_allclose(got, sigma * np.quantile(z, LEVELS), rtol=1e-8)


@pytest.mark.parametrize("name", FORECASTS)
def test_no_row_after_an_origin_is_used(frame, name):
    origins = days(frame, 250, 400)
    changed = frame.copy()
    changed.iloc[401:] *= 3.0
    before = FORECASTS[name](frame, origins, 5, LEVELS)
    after = FORECASTS[name](changed, origins, 5, LEVELS)
    np.testing.assert_array_equal(before, after)
    assert before.shape == (2, 5, 3)
    assert (np.diff(before, axis=-1) > 0).all()


def test_scores_on_google_are_as_published_by_other_code(frame):
    """Walk-forward CRPS near 111 bp (1 day) and 260 bp (5 days); HAR about 2 % better."""
    rows = range(252, len(frame) - 5)
    origins = days(frame, *rows)
    logs = np.log(frame["close"].to_numpy())
    returns = np.array([[logs[r + h] - logs[r] for h in range(1, 6)] for r in rows])
    score = {}
    for name in ("random walk", "har"):
        q = FORECASTS[name](frame, origins, 5, QUANTILE_LEVELS)
        score[name] = 1e4 * metrics.crps(returns, q, QUANTILE_LEVELS).mean(axis=0)
        inside = metrics.coverage(returns, q, QUANTILE_LEVELS, 0.8)
        assert ((inside > 0.78) & (inside < 0.87)).all()
    np.testing.assert_allclose(score["random walk"][[0, 4]], [111.5, 259.5], rtol=0.04)
    ratio = score["har"] / score["random walk"]
    assert (ratio < 0.995).all()


@pytest.mark.parametrize("name", FORECASTS)
def test_too_early_or_unknown_origins_are_refused(frame, name):
    with pytest.raises(HistoryError, match="at least"):
        FORECASTS[name](frame, days(frame, 15), 5, LEVELS)
    saturday = np.array(["2007-06-30"], dtype="datetime64[D]")
    with pytest.raises(HistoryError, match="no rows of the prices, first 2007-06-30"):
        FORECASTS[name](frame, saturday, 5, LEVELS)
