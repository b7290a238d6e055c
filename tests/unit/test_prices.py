"""Types, as_of view, adjustment maths, factors from an adjusted close, checks, revisions."""

from dataclasses import replace
from datetime import date, timedelta

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forecasting.errors import BadPricesError, HistoryError
from forecasting.prices import (
    RawPrices,
    adjusted,
    check_as_of,
    factors_frame,
    factors_from_adjusted,
    rows_frame,
    scale_before,
    validate,
    visible_rows,
)
from forecasting.revisions import merge
from tests import series

PRICES = ["open", "high", "low", "close"]
FAST = settings(max_examples=60, deadline=None)


def days(raw: RawPrices) -> list[date]:
    return [day.date() for day in raw.rows["date"]]


def with_factors(raw: RawPrices, *events: tuple[date, float]) -> RawPrices:
    return replace(raw, factors=factors_frame((np.datetime64(day), f) for day, f in events))


def cell(raw: RawPrices, position: int, **values: float) -> RawPrices:
    rows = raw.rows.copy()
    for name, value in values.items():
        rows.loc[position, name] = value
    return replace(raw, rows=rows)


# --- adjustment ------------------------------------------------------------------------------


@FAST
@given(
    st.lists(st.floats(0.05, 20), max_size=6),
    st.data(),
)
def test_scale_is_the_product_of_later_factors(values, data):
    ex_dates = sorted(
        data.draw(st.lists(st.integers(0, 30), min_size=len(values), max_size=len(values)))
    )
    dates = np.arange(31).astype("datetime64[D]")
    got = scale_before(np.array(ex_dates).astype("datetime64[D]"), np.array(values), dates)
    for day in range(31):
        expected = 1.0
        for ex_date, value in zip(ex_dates, values, strict=True):
            if ex_date > day:
                expected *= value
        assert got[day] == pytest.approx(expected, rel=1e-12)


def test_the_last_row_is_as_traded_and_a_split_scales_prices_and_volume():
    raw = series.raw(10)
    ex_date = days(raw)[6]
    frame = adjusted(with_factors(raw, (ex_date, 0.5)), days(raw)[-1])
    assert frame[PRICES].to_numpy()[:6] == pytest.approx(raw.rows[PRICES].to_numpy()[:6] * 0.5)
    assert frame["volume"].to_numpy()[:6] == pytest.approx(raw.rows["volume"].to_numpy()[:6] * 2)
    assert frame.iloc[6:].to_numpy() == pytest.approx(raw.rows[[*PRICES, "volume"]].to_numpy()[6:])


def test_a_dividend_scales_prices_only():
    raw = series.raw(10)
    frame = adjusted(with_factors(raw, (days(raw)[6], 0.99)), days(raw)[-1])
    assert frame["close"].iloc[0] == pytest.approx(raw.rows["close"].iloc[0] * 0.99)
    assert frame["volume"].tolist() == raw.rows["volume"].tolist()


def test_a_frame_has_the_promised_form():
    frame = adjusted(series.raw(5), date(2010, 1, 1))
    assert frame.index.name == "date"
    assert frame.index.is_monotonic_increasing
    assert list(frame) == [*PRICES, "volume"]
    assert set(frame.dtypes.astype("str")) == {"float64"}


def test_a_factor_waits_for_the_row_of_its_day():
    raw = series.raw(10)
    early = with_factors(raw, (days(raw)[6], 0.5))
    before = adjusted(early, days(raw)[5])
    assert before["close"].tolist() == raw.rows["close"].tolist()[:6]
    announced = replace(early, factors=early.factors.assign(known_on=raw.rows["date"][0]))
    assert adjusted(announced, days(raw)[5]).equals(before)


@FAST
@given(st.integers(1, 39), st.integers(0, 39))
def test_what_comes_later_changes_nothing_seen_before(split_at, seen):
    raw = with_factors(series.raw(40), (days(series.raw(40))[split_at], 0.5))
    as_of = days(raw)[seen]
    late = np.datetime64(as_of)
    rows, factors = raw.rows, raw.factors
    known = RawPrices("TEST", rows[rows["date"] <= late], factors[factors["ex_date"] <= late])
    other = rows.copy()
    other.loc[rows["date"] > late, PRICES] *= 7
    revision = rows.iloc[[0]].assign(close=1.0, known_on=late + np.timedelta64(1, "D"))
    changed = replace(raw, rows=pd.concat([other, revision]))
    assert adjusted(changed, as_of).equals(adjusted(known, as_of))


def test_a_revision_is_seen_from_the_day_it_was_known():
    raw = series.raw(5)
    known_on = np.datetime64("2006-02-01")
    revision = raw.rows.iloc[[2]].assign(close=99.0, known_on=known_on)
    both = replace(raw, rows=pd.concat([raw.rows, revision]))
    assert adjusted(both, date(2006, 1, 31))["close"].iloc[2] == raw.rows["close"].iloc[2]
    assert adjusted(both, date(2006, 2, 1))["close"].iloc[2] == 99.0
    assert len(visible_rows(both, date(2006, 2, 1))) == 5


def test_before_the_first_row_the_error_names_it():
    with pytest.raises(HistoryError, match="the first known day is 2006-01-03"):
        adjusted(series.raw(5), date(2006, 1, 2))


def test_the_future_is_refused():
    check_as_of(date.today())
    with pytest.raises(HistoryError, match="is in the future"):
        check_as_of(date.today() + timedelta(days=1))


# --- factors from an adjusted close ----------------------------------------------------------


@st.composite
def histories(draw):
    """(dates, close, events): events are (position, factor), a split or a dividend."""
    count = draw(st.integers(3, 60))
    start = draw(st.floats(5, 500))
    moves = draw(st.lists(st.floats(-0.05, 0.05), min_size=count, max_size=count))
    close = np.round(start * np.exp(np.cumsum(moves)), 2)
    factor = st.one_of(
        st.sampled_from([0.5, 1 / 3, 2 / 3, 0.25, 0.1, 2.0, 10.0]), st.floats(0.95, 0.995)
    )
    positions = draw(st.lists(st.integers(1, count - 1), max_size=3, unique=True))
    events = [(position, draw(factor)) for position in sorted(positions)]
    return np.datetime64("2006-01-01") + np.arange(count), close, events


def adjusted_close(close, events):
    out = close.copy()
    for position, factor in events:
        out[:position] *= factor
    return out


@FAST
@given(histories(), st.floats(0.1, 1.0))
def test_events_are_found_from_exact_adjusted_closes(history, later):
    dates, close, events = history
    found = factors_from_adjusted(dates, close, adjusted_close(close, events) * later)
    assert found["ex_date"].tolist() == [pd.Timestamp(dates[p]) for p, _ in events]
    assert found["factor"].tolist() == pytest.approx([f for _, f in events], rel=1e-7)


@FAST
@given(histories())
def test_events_are_found_from_rounded_adjusted_closes(history):
    dates, close, events = history
    rounded = np.round(adjusted_close(close, events), 6)
    found = factors_from_adjusted(dates, close, rounded)
    assert found["ex_date"].tolist() == [pd.Timestamp(dates[p]) for p, _ in events]
    coarse = 1e-6 / rounded.min()
    assert found["factor"].tolist() == pytest.approx([f for _, f in events], rel=4 * coarse)


@FAST
@given(histories())
def test_rounding_to_cents_invents_no_event(history):
    dates, close, _ = history
    assert factors_from_adjusted(dates, close, np.round(close * 0.37, 2)).empty


@FAST
@given(histories(), st.data())
def test_later_rows_never_change_a_factor(history, data):
    dates, close, events = history
    told = adjusted_close(close, events)
    whole = factors_from_adjusted(dates, close, told)
    cut = data.draw(st.integers(1, len(close)))
    part = factors_from_adjusted(dates[:cut], close[:cut], told[:cut])
    expected = whole[whole["ex_date"] <= dates[cut - 1]].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, expected)


def test_a_plain_split_ratio_is_exact():
    close = np.array([90.0, 91.0, 30.5, 31.0])
    found = factors_from_adjusted(
        np.datetime64("2006-01-03") + np.arange(4), close, np.round(close * [1 / 3, 1 / 3, 1, 1], 2)
    )
    assert found["factor"].tolist() == [1 / 3]


# --- checks ----------------------------------------------------------------------------------


def test_good_prices_pass():
    raw = series.raw(250)
    assert validate(raw) is raw


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"close": np.nan}, "close is nan, a finite number is expected"),
        ({"open": np.inf}, "open is inf, a finite number is expected"),
        ({"low": -1.0}, "low is -1.0, a positive number is expected"),
        ({"volume": 0.0}, "volume is 0.0, a positive number is expected"),
        ({"high": 1.0}, "high is below low"),
        ({"close": 150.0}, "high is below open or close"),
        ({"low": 102.0, "high": 160.0}, "low is above open or close"),
    ],
)
def test_an_impossible_row_is_named(values, says):
    with pytest.raises(BadPricesError) as caught:
        validate(cell(series.raw(10), 3, **values))
    assert "row 4 (2006-01-06)" in str(caught.value)
    assert says in str(caught.value)
    assert "1 row breaks the rules" in str(caught.value)


def test_a_missing_session_is_named():
    raw = series.raw(10)
    with pytest.raises(BadPricesError, match="2006-01-06: session missing before row 4"):
        validate(replace(raw, rows=raw.rows.drop(index=3).reset_index(drop=True)))


def test_a_closure_that_the_calendar_does_not_know_can_be_told():
    raw = series.raw(10)
    gap = replace(raw, rows=raw.rows.drop(index=3).reset_index(drop=True))
    assert validate(gap, [date(2006, 1, 6)]) is gap
    with pytest.raises(BadPricesError, match=r"row 4 \(2006-01-06\): the exchange was closed"):
        validate(raw, [date(2006, 1, 6)])


def test_a_day_without_trading_is_named():
    raw = series.raw(10)
    holiday = raw.rows.iloc[[8]].assign(date=np.datetime64("2006-01-16"))  # Martin Luther King
    rows = pd.concat([raw.rows, holiday]).sort_values("date", ignore_index=True)
    with pytest.raises(BadPricesError, match=r"2006-01-16\): the exchange was closed"):
        validate(replace(raw, rows=rows))


def test_history_before_the_calendar_is_checked_for_weekends_only():
    raw = series.raw(3)
    old = [np.datetime64(day) for day in ("1970-01-02", "1970-01-06", "1970-01-07")]
    assert validate(replace(raw, rows=raw.rows.assign(date=np.array(old, "datetime64[us]"))))
    old[1] = np.datetime64("1970-01-03")
    with pytest.raises(BadPricesError, match=r"row 2 .1970-01-03.: the exchange was closed"):
        validate(replace(raw, rows=raw.rows.assign(date=np.array(old, "datetime64[us]"))))


def test_duplicates_and_wrong_order_are_named():
    raw = series.raw(10)
    twice = raw.rows.iloc[[0, 1, 2, 2, 3, 4, 5]].reset_index(drop=True)
    with pytest.raises(BadPricesError, match=r"row 4 \(2006-01-05\): duplicate"):
        validate(replace(raw, rows=twice))
    swapped = raw.rows.iloc[[0, 2, 1, 3]].reset_index(drop=True)
    with pytest.raises(BadPricesError, match=r"row 3 \(2006-01-04\): out of order"):
        validate(replace(raw, rows=swapped))


def test_an_unreadable_date_is_named():
    raw = cell(series.raw(5), 2, date=pd.NaT)
    with pytest.raises(BadPricesError, match="row 3: the date is missing or cannot be read"):
        validate(raw)


def test_a_wrong_column_is_named():
    raw = series.raw(5)
    with pytest.raises(BadPricesError, match="close"):
        validate(replace(raw, rows=raw.rows.drop(columns="close")))


def test_twenty_rows_are_named_and_all_are_counted():
    raw = series.raw(60)
    rows = raw.rows.copy()
    rows.loc[5:40, "close"] = np.nan
    with pytest.raises(BadPricesError) as caught:
        validate(replace(raw, rows=rows))
    text = str(caught.value)
    assert "36 rows break the rules" in text
    assert text.count("close is nan") == 20
    assert "... and 16 more" in text


def scaled(raw: RawPrices, start: int, stop: int, factor: float, volume: float = 1.0) -> RawPrices:
    rows = raw.rows.copy()
    rows.loc[start : stop - 1, PRICES] *= factor
    rows.loc[start : stop - 1, "volume"] *= volume
    return replace(raw, rows=rows)


@FAST
@given(
    st.sampled_from([1 / 2, 1 / 3, 2 / 3, 1 / 4, 1 / 10, 1 / 20, 3 / 2, 2.0, 3.0, 10.0]),
    st.integers(1, 58),
    st.booleans(),
)
def test_an_unadjusted_split_is_refused_unless_a_factor_explains_it(ratio, position, restated):
    raw = scaled(series.raw(60), position, 60, ratio, 1 / ratio if restated else 1.0)
    with pytest.raises(
        BadPricesError, match=f"row {position + 1} .*looks like an unadjusted split"
    ):
        validate(raw)
    explained = with_factors(raw, (days(raw)[position], ratio))
    assert validate(explained) is explained


def test_a_split_factor_without_a_split_is_refused():
    raw = series.raw(60)
    with pytest.raises(BadPricesError, match="looks like an unadjusted split"):
        validate(with_factors(raw, (days(raw)[30], 0.5)))


@pytest.mark.parametrize("factor", [0.8, 0.85, 1.2, 1.25])
def test_a_big_move_is_no_split(factor):
    assert validate(scaled(series.raw(60), 30, 60, factor))


def test_a_crash_to_half_on_many_times_the_usual_volume_is_believed():
    raw = scaled(series.raw(60), 30, 60, 0.5)
    rows = raw.rows.copy()
    rows.loc[30, "volume"] *= 20
    assert validate(replace(raw, rows=rows))


# --- revisions -------------------------------------------------------------------------------


def until(raw: RawPrices, position: int) -> RawPrices:
    last = raw.rows["date"][position]
    factors = raw.factors[raw.factors["ex_date"] <= last]
    return replace(raw, rows=raw.rows[: position + 1], factors=factors.reset_index(drop=True))


@FAST
@given(st.lists(st.integers(0, 59), min_size=1, max_size=6), st.integers(1, 59))
def test_in_steps_or_at_once_the_same_is_stored(steps, split):
    """Also when an earlier date is ingested after a later one."""
    whole = with_factors(scaled(series.raw(60), split, 60, 0.5), (days(series.raw(60))[split], 0.5))
    stored = None
    for step in [*steps, 59]:
        stored = merge(stored, until(whole, step), days(whole)[step]).raw
    pd.testing.assert_frame_equal(stored.rows, whole.rows)
    pd.testing.assert_frame_equal(stored.factors, whole.factors)


def test_nothing_new_changes_nothing():
    raw = series.raw(20)
    again = merge(raw, raw, date(2006, 12, 1))
    assert not again.changed
    assert again.raw.rows.equals(raw.rows)


def test_a_vendor_revision_is_added_and_the_earlier_view_stays():
    raw = series.raw(20)
    now = date(2006, 6, 1)
    result = merge(raw, cell(raw, 4, close=raw.rows["close"][4] + 0.5), now)
    assert (result.new_rows, result.revised_rows, result.new_factors) == (0, 1, 0)
    assert adjusted(result.raw, date(2006, 5, 31)).equals(adjusted(raw, date(2006, 5, 31)))
    assert adjusted(result.raw, now)["close"].iloc[4] == raw.rows["close"][4] + 0.5
    assert not merge(result.raw, cell(raw, 4, close=raw.rows["close"][4] + 0.5), now).changed


def test_a_revision_is_not_dated_back():
    raw = series.raw(20)
    result = merge(raw, until(cell(raw, 4, close=1.0), 9), days(raw)[9])
    assert not result.changed


def test_a_late_factor_is_known_from_the_ingest_on():
    raw = series.raw(20)
    told = with_factors(raw, (days(raw)[10], 0.98))
    result = merge(raw, told, date(2006, 6, 1))
    assert result.new_factors == 1
    assert adjusted(result.raw, date(2006, 5, 31)).equals(adjusted(raw, date(2006, 5, 31)))
    assert adjusted(result.raw, date(2006, 6, 1)).equals(adjusted(told, date(2006, 6, 1)))


def test_a_withdrawn_factor_ends_on_the_day_of_the_ingest():
    raw = series.raw(20)
    told = with_factors(raw, (days(raw)[10], 0.98))
    result = merge(told, raw, date(2006, 6, 1))
    assert adjusted(result.raw, date(2006, 5, 31)).equals(adjusted(told, date(2006, 5, 31)))
    assert adjusted(result.raw, date(2006, 6, 1)).equals(adjusted(raw, date(2006, 6, 1)))
    assert not merge(result.raw, raw, date(2006, 6, 2)).changed


def test_a_source_that_tells_of_no_actions_withdraws_none():
    told = with_factors(series.raw(20), (days(series.raw(20))[10], 0.98))
    silent = replace(series.raw(20), tells_actions=False)
    assert not merge(told, silent, date(2006, 6, 1)).changed


@pytest.mark.parametrize("ratio", [0.5, 1 / 3, 0.05, 10.0])
def test_a_source_that_restates_its_history_becomes_one_factor(ratio):
    """Split-adjusted files change every row at a split; what was stored stays as traded."""
    whole = series.raw(30)
    stored = until(whole, 19)
    rows = whole.rows.copy()
    rows[PRICES] = (rows[PRICES] * ratio).round(4)
    rows["volume"] /= ratio
    fetched = replace(whole, rows=rows, tells_actions=False)
    as_of = days(whole)[-1]
    result = merge(stored, fetched, as_of)
    assert (result.new_rows, result.revised_rows, result.new_factors) == (10, 0, 1)
    assert result.raw.factors["factor"].tolist() == [pytest.approx(ratio, rel=1e-12)]
    assert result.raw.factors["reason"].tolist() == ["rescaled"]
    assert result.raw.rows[:20].equals(stored.rows)
    got = adjusted(result.raw, as_of)["close"].to_numpy()
    assert got == pytest.approx(rows["close"].to_numpy(), rel=1e-3)
    assert not merge(result.raw, fetched, as_of).changed
    assert adjusted(result.raw, days(whole)[19]).equals(adjusted(stored, days(whole)[19]))


def test_rows_frame_keeps_types_and_known_on():
    frame = rows_frame(series.raw(3).rows.drop(columns="known_on"))
    assert frame["known_on"].equals(frame["date"])
