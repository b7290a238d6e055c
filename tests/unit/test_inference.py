import json
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from forecasting.contract import (
    CONTRACT_FILE,
    GOLDEN_FILE,
    MODEL_FILE,
    Contract,
    encode,
    read_contract,
    sha256_file,
)
from forecasting.errors import ContractError, ModelError
from forecasting.inference import Forecaster
from tests.models import ratios, write_model_folder


@dataclass
class Window:
    ohlcv: np.ndarray
    dates: np.ndarray
    symbol: np.ndarray


def window(batch: int, context: int = 64) -> Window:
    close = 100 + np.arange(batch * context, dtype=np.float32).reshape(batch, context)
    ohlcv = np.stack([close, close + 1, close - 1, close, close * 0 + 1e6], axis=-1)
    dates = np.arange(context, dtype=np.int64)[None].repeat(batch, axis=0) + 13_000
    return Window(ohlcv, dates, np.zeros(batch, dtype=np.int64))


def rehash(folder: Path, contract: Contract, name: str) -> None:
    files = {**contract.files, name: sha256_file(folder / name)}
    replaced = msgspec.structs.replace(contract, files=files)
    (folder / CONTRACT_FILE).write_bytes(encode(replaced))


def test_quantiles_are_those_of_the_graph(tmp_path):
    contract = write_model_folder(tmp_path, scale=1.5)
    forecaster = Forecaster.load(tmp_path, version=3)
    given = window(batch=4)
    got = forecaster.predict(given.ohlcv, given.dates, given.symbol)
    assert got.shape == (4, contract.horizon, len(contract.quantile_levels))
    assert got.dtype == np.float32
    expected = given.ohlcv[:, -1, 3][:, None, None] * ratios(5, 1.5)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert (forecaster.version, forecaster.contract) == (3, contract)


def test_altered_graph_is_refused(tmp_path):
    write_model_folder(tmp_path)
    path = tmp_path / MODEL_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ContractError, match=r"model\.onnx is altered: sha256"):
        Forecaster.load(tmp_path, 1)


def test_unreadable_graph_with_a_matching_hash_is_refused(tmp_path):
    contract = write_model_folder(tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(b"no graph")
    rehash(tmp_path, contract, MODEL_FILE)
    with pytest.raises(ContractError, match="not a graph that can run"):
        Forecaster.load(tmp_path, 1)


def test_other_golden_output_is_refused(tmp_path):
    contract = write_model_folder(tmp_path)
    golden = json.loads((tmp_path / GOLDEN_FILE).read_text())
    golden["quantiles"][0][0][0] *= 1 + 5e-5
    (tmp_path / GOLDEN_FILE).write_text(json.dumps(golden))
    rehash(tmp_path, contract, GOLDEN_FILE)
    with pytest.raises(ContractError, match=r"does not reproduce golden\.json"):
        Forecaster.load(tmp_path, 1)


@pytest.mark.parametrize("broken", ["ragged", "nan", "other context"])
def test_broken_golden_is_refused(tmp_path, broken):
    contract = write_model_folder(tmp_path)
    golden = json.loads((tmp_path / GOLDEN_FILE).read_text())
    if broken == "ragged":
        golden["ohlcv"][0][0] = [1.0]
    elif broken == "nan":
        golden["ohlcv"][0][-1][3] = 1e39  # infinite as float32
    else:
        golden["ohlcv"][0] = golden["ohlcv"][0][1:]
    (tmp_path / GOLDEN_FILE).write_text(json.dumps(golden))
    rehash(tmp_path, contract, GOLDEN_FILE)
    with pytest.raises(ContractError), np.errstate(over="ignore"):
        Forecaster.load(tmp_path, 1)


def test_missing_golden_is_refused(tmp_path):
    contract = write_model_folder(tmp_path)
    (tmp_path / GOLDEN_FILE).unlink()
    files = {MODEL_FILE: contract.files[MODEL_FILE]}
    raw = encode(msgspec.structs.replace(contract, files=files))
    (tmp_path / CONTRACT_FILE).write_bytes(raw)
    with pytest.raises(ContractError, match=r"lacks golden\.json"):
        Forecaster.load(tmp_path, 1)


def test_graph_with_other_horizon_than_its_contract_is_refused(tmp_path):
    write_model_folder(tmp_path)
    contract = msgspec.structs.replace(read_contract(tmp_path), horizon=4)
    (tmp_path / CONTRACT_FILE).write_bytes(encode(contract))
    with pytest.raises(ContractError, match=r"shape \(1, 4, 39\)"):
        Forecaster.load(tmp_path, 1)


def test_wrong_shapes_name_what_was_expected(tmp_path):
    write_model_folder(tmp_path)
    forecaster = Forecaster.load(tmp_path, 2)
    given = window(batch=2, context=63)
    with pytest.raises(ModelError, match=r"version 2 expects ohlcv \(2, 64, 5\).*\(2, 63, 5\)"):
        forecaster.predict(given.ohlcv, given.dates, given.symbol)


def test_output_that_is_not_finite_is_an_error(tmp_path):
    write_model_folder(tmp_path)
    forecaster = Forecaster.load(tmp_path, 1)
    given = window(batch=1)
    given.ohlcv[0, -1, 3] = np.inf
    with pytest.raises(ModelError, match="not finite"):
        forecaster.predict(given.ohlcv, given.dates, given.symbol)
