"""Numbers are written once, exactly, and the same in answer and log."""

import json
from datetime import date

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from forecasting.contract import read_contract
from forecasting.predictions import Computed, computed_line
from serving.answers import (
    body_of,
    forecast,
    medians,
    numbers,
    stacked,
    windows_of_rows,
    windows_of_tensors,
)
from serving.intake import EPOCH_ORDINAL, fit
from serving.windows import Rows
from tests.models import price_rows, write_model_folder

PRICES = st.floats(2**-10, 2**20, width=32)


@pytest.fixture(scope="module")
def contract(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model_folder(folder, symbols=("GOOG", "AAPL"))
    return read_contract(folder)


def rows(symbol: str = "GOOG", close: float = 806.19) -> Rows:
    days, values = price_rows(70, date(2008, 1, 2), close)
    return Rows(
        symbol,
        np.array([day.toordinal() - EPOCH_ORDINAL for day in days]),
        np.array(values, dtype=np.float64),
    )


@given(arrays(np.float32, (3, 2, 4), elements=PRICES))
def test_every_part_is_the_same_float32(quantiles):
    whole, parts = numbers(quantiles, (0.1, 0.5, 0.6, 0.9))
    np.testing.assert_array_equal(np.array(json.loads(whole), np.float32), quantiles)
    texts = [[json.loads(b"[" + text + b"]") for text in part.texts] for part in parts]
    np.testing.assert_array_equal(np.array(texts, np.float32), quantiles)
    np.testing.assert_array_equal(stacked(parts), quantiles)
    assert [part.medians.tolist() for part in parts] == quantiles[..., 1].tolist()


@given(arrays(np.float32, (2, 3, 4), elements=PRICES))
def test_a_median_that_is_no_level_is_interpolated(quantiles):
    levels = (0.1, 0.4, 0.7, 0.9)
    slow = [[np.interp(0.5, levels, row) for row in window] for window in quantiles]
    np.testing.assert_allclose(medians(quantiles, levels), slow, rtol=1e-6)


def test_answer_and_log_say_the_same(contract):
    windows = windows_of_rows([rows(), rows("AAPL", 20.5)], contract, "post")
    quantiles = np.linspace(700, 900, 2 * 5 * 39, dtype=np.float32).reshape(2, 5, 39)
    whole, parts = numbers(quantiles, contract.quantile_levels)
    line = msgspec.json.decode(computed_line(contract, 4, windows, whole), type=Computed)
    logged = line.predictions()
    for window, part, record in zip(windows, parts, logged, strict=True):
        answer = json.loads(body_of(forecast(window, contract, 4, part)))
        assert answer["id"] == record.id
        assert answer["origin_close"] == record.origin_close
        assert answer["levels"] == record.levels
        assert [step["quantiles"] for step in answer["forecast"]] == record.quantiles
        assert [step["target"] for step in answer["forecast"]] == [
            day.isoformat() for day in record.targets
        ]
        medians_told = [step["median"] for step in answer["forecast"]]
        assert medians_told == [row[19] for row in record.quantiles]
    assert [record.symbol for record in logged] == ["GOOG", "AAPL"]


def test_windows_are_told_alike_from_rows_and_from_tensors(contract):
    sent = [rows("AAPL", 20.1), rows("GOOG", 806.19)]
    of_rows = windows_of_rows(sent, contract, "post")
    of_tensors = windows_of_tensors(fit(sent, contract, 100), contract, "post")
    for one, other in zip(of_rows, of_tensors, strict=True):
        assert msgspec.structs.replace(one, id="") == msgspec.structs.replace(other, id="")
