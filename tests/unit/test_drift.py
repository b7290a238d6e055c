import time
from datetime import date

import numpy as np
import pandas as pd
import pytest
from bokeh_sampledata.stocks import AAPL, GOOG, IBM, MSFT

from forecasting import drift
from forecasting.errors import DataError, HistoryError
from forecasting.settings import Settings

SETTINGS = Settings()
ROWS, THRESHOLD, SHARE = (
    SETTINGS.drift_window,
    SETTINGS.drift_threshold,
    SETTINGS.drift_share,
)


def frame_of(columns) -> pd.DataFrame:
    """Prices adjusted for splits and dividends, as the model sees them."""
    frame = pd.DataFrame(columns)
    frame.index = pd.DatetimeIndex(pd.to_datetime(frame.pop("date")), name="date")
    frame = frame.astype("float64")
    ratio = frame.pop("adj_close") / frame["close"]
    prices = ["open", "high", "low", "close"]
    frame[prices] = frame[prices].mul(ratio, axis=0)
    return frame


@pytest.fixture(scope="module")
def goog() -> pd.DataFrame:
    return drift.features(frame_of(GOOG))


def weekly(table: pd.DataFrame, first: date, last: date) -> list[date]:
    days = table.loc[pd.Timestamp(first) : pd.Timestamp(last)].index[::5]
    return [day.date() for day in days]


def checks(table, train_end: date, days: list[date]) -> list[drift.DriftVerdict]:
    first_origin = table.index[SETTINGS.context].date()
    reference = drift.reference_rows(table, first_origin, train_end, ROWS)
    return drift.compare_dates(table, reference, days, THRESHOLD, SHARE)


def rows_before(table: pd.DataFrame, as_of: date, rows: int) -> date:
    return table.loc[: pd.Timestamp(as_of)].index[-1 - rows].date()


# A training span ends some time before the day of training: validation and gate lie between.
HELD_OUT = [0, 120, 245]


@pytest.mark.parametrize("held_out", HELD_OUT)
@pytest.mark.parametrize("year", [2006, 2007, 2010, 2012])
def test_silent_through_a_calm_year_of_google(goog, year, held_out):
    as_of = date(year - 1, 12, 31)
    if year == 2006:  # the sample starts in August 2004
        held_out //= 2
    days = weekly(goog, date(year, 1, 1), date(year, 12, 31))
    verdicts = checks(goog, rows_before(goog, as_of, held_out), days)
    assert len(verdicts) >= 50
    assert [v.summary() for v in verdicts if v.drifted] == []


@pytest.mark.parametrize("held_out", HELD_OUT)
@pytest.mark.parametrize("as_of", [date(2007, 9, 28), date(2007, 12, 31), date(2008, 6, 30)])
def test_fires_in_the_crash_of_2008(goog, as_of, held_out):
    days = weekly(goog, date(2008, 9, 1), date(2008, 11, 28))
    verdicts = checks(goog, rows_before(goog, as_of, held_out), days)
    fired = [v.recent_end for v in verdicts if v.drifted]
    assert fired
    assert fired[0] <= date(2008, 10, 31)
    assert verdicts[-1].share >= 4 / 6


@pytest.mark.parametrize("columns", [AAPL, IBM, MSFT], ids=["AAPL", "IBM", "MSFT"])
def test_the_same_thresholds_hold_for_symbols_they_were_not_chosen_on(columns):
    table = drift.features(frame_of(columns))
    calm = weekly(table, date(2003, 1, 1), date(2007, 12, 31))
    assert not any(v.drifted for v in checks(table, date(2002, 12, 31), calm))
    crash = weekly(table, date(2008, 9, 1), date(2008, 11, 28))
    assert any(v.drifted for v in checks(table, date(2007, 6, 29), crash))


def test_the_full_report_says_the_same_as_the_quick_comparison(goog):
    reference = drift.reference_rows(goog, date(2004, 8, 20), date(2007, 9, 28), ROWS)
    for day in (date(2007, 6, 29), date(2008, 10, 31)):
        recent = drift.recent_rows(goog, day, ROWS)
        quick = drift.compare(reference, recent, THRESHOLD, SHARE)
        full, html = drift.drift_report(reference, recent, THRESHOLD, SHARE)
        assert full == quick
        assert "<html" in html[:2000]
        assert all(name in html for name in drift.FEATURES)


def test_score_is_the_mean_distance_of_sorted_rows(goog):
    """For equal lengths the Wasserstein distance is a mean over order statistics."""
    reference = drift.reference_rows(goog, date(2004, 8, 20), date(2007, 9, 28), ROWS)
    recent = drift.recent_rows(goog, date(2008, 10, 31), ROWS)
    verdict = drift.compare(reference, recent, THRESHOLD, SHARE)
    for entry in verdict.features:
        a, b = np.sort(reference.table[entry.feature]), np.sort(recent[entry.feature])
        assert entry.score == pytest.approx(np.abs(a - b).mean() / a.std(), rel=1e-9)
    assert verdict.share == sum(e.score >= THRESHOLD for e in verdict.features) / 6
    assert verdict.drifted
    assert "Drift on 2008-10-31" in verdict.summary()
    assert len(verdict.table()) == 6


def test_a_year_of_checks_is_cheap(goog):
    days = weekly(goog, date(2007, 1, 1), date(2007, 12, 31))
    start = time.process_time()
    checks(goog, date(2006, 12, 29), days)
    assert time.process_time() - start < 5.0


def test_features_are_free_of_the_price_level():
    frame = frame_of(AAPL).iloc[-300:]
    scaled = frame * [0.5, 0.5, 0.5, 0.5, 2.0]
    pd.testing.assert_frame_equal(drift.features(frame), drift.features(scaled), atol=1e-12)
    one = drift.features(frame).iloc[0]
    assert one["log_return"] == pytest.approx(one["overnight_return"] + one["intraday_return"])


def test_verdict_does_not_depend_on_rows_after_the_check(goog):
    day = date(2007, 6, 29)
    before = checks(goog, date(2006, 12, 29), [day])
    changed = goog.copy()
    changed.loc[pd.Timestamp("2007-07-01") :] *= 7.0
    assert checks(changed, date(2006, 12, 29), [day]) == before


def test_reference_has_the_distribution_of_the_training_span(goog):
    reference = drift.reference_rows(goog, date(2005, 1, 3), date(2006, 12, 29), ROWS)
    span = goog.loc["2005-01-03":"2006-12-29"]
    assert reference.span_rows == len(span) == 503
    assert len(reference.table) == ROWS
    for name in drift.FEATURES:
        assert reference.table[name].mean() == pytest.approx(span[name].mean(), abs=3e-3)
        assert reference.table[name].median() == pytest.approx(span[name].median(), abs=1e-2)
        assert span[name].min() < reference.table[name].min()
    # only the span counts
    changed = goog.copy()
    changed.loc["2007-01-01":] *= 7.0
    again = drift.reference_rows(changed, date(2005, 1, 3), date(2006, 12, 29), ROWS)
    pd.testing.assert_frame_equal(again.table, reference.table)


def test_too_little_history_is_named(goog):
    with pytest.raises(HistoryError, match="needs at least 40"):
        drift.reference_rows(goog, date(2004, 8, 20), date(2004, 9, 30), ROWS)
    with pytest.raises(HistoryError, match="a comparison needs 40"):
        drift.recent_rows(goog, date(2004, 9, 30), ROWS)


def test_unequal_windows_and_bad_values_are_refused(goog):
    window = goog.iloc[-ROWS:]
    reference = drift.reference_rows(goog, date(2005, 1, 3), date(2006, 12, 29), ROWS)
    with pytest.raises(DataError, match="equal length"):
        drift.compare(reference, window.iloc[1:], THRESHOLD, SHARE)
    empty = drift.Reference(goog.iloc[:0], date(2005, 1, 3), date(2006, 12, 29), 0)
    with pytest.raises(DataError, match="equal length"):
        drift.compare(empty, goog.iloc[:0], THRESHOLD, SHARE)
    with pytest.raises(DataError, match="lacks log_range"):
        drift.compare(reference, window.drop(columns="log_range"), THRESHOLD, SHARE)
    holed = window.copy()
    holed.iloc[3, 2] = np.nan
    with pytest.raises(DataError, match="not finite"):
        drift.drift_report(reference, holed, THRESHOLD, SHARE)
    frame = frame_of(GOOG).iloc[:100]
    frame.iloc[5, 0] = np.nan
    with pytest.raises(DataError, match="not finite"):
        drift.features(frame)


def test_regression_report_against_plain_loops():
    rng = np.random.default_rng(1)
    actual = 500 + np.cumsum(rng.normal(0, 8, 120))
    joined = pd.DataFrame(
        {"actual": actual, "median": actual + rng.normal(2, 5, 120), "symbol": "GOOG"}
    )
    scores, html = drift.regression_report(joined)
    error = joined["median"] - joined["actual"]
    assert scores.rows == 120
    assert scores.mean_error == pytest.approx(error.mean())
    assert scores.mae == pytest.approx(error.abs().mean())
    assert scores.mape == pytest.approx(100 * (error.abs() / joined["actual"]).mean())
    assert scores.rmse == pytest.approx(np.sqrt((error**2).mean()))
    assert scores.abs_max_error == pytest.approx(error.abs().max())
    spread = ((actual - actual.mean()) ** 2).sum()
    assert scores.r2 == pytest.approx(1 - (error**2).sum() / spread)
    assert "<html" in html[:2000]


def test_regression_report_of_very_few_forecasts_warns_of_nothing():
    joined = pd.DataFrame({"actual": [1.0, 2.0, 4.0], "median": [1.0, 2.5, 3.0]})
    scores, _ = drift.regression_report(joined)
    assert scores.rows == 3


def test_regression_report_names_what_is_wrong():
    with pytest.raises(DataError, match="at least 2 rows"):
        drift.regression_report(pd.DataFrame({"actual": [1.0], "median": [1.0]}))
    with pytest.raises(DataError, match="columns"):
        drift.regression_report(pd.DataFrame({"actual": [1.0, 2.0]}))
    with pytest.raises(DataError, match="not finite"):
        drift.regression_report(pd.DataFrame({"actual": [1.0, None], "median": [1.0, 2.0]}))
