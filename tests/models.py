"""Tiny but real model folders and price rows for tests: ONNX nodes that honour the contract."""

import math
from datetime import date
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from forecasting.contract import (
    CONTRACT_FILE,
    GOLDEN_FILE,
    MODEL_FILE,
    QUANTILE_LEVELS,
    Contract,
    Golden,
    Snapshot,
    encode,
    sha256_file,
)
from forecasting.sessions import sessions_between

EPOCH = date(1970, 1, 1)
DAILY_SIGMA = 0.02


def ratios(horizon: int, scale: float = 1.0) -> NDArray[np.float32]:
    """What the tiny graph multiplies the last close with: float32 [horizon, levels]."""
    z = np.array([NormalDist().inv_cdf(level) for level in QUANTILE_LEVELS])
    steps = np.sqrt(np.arange(1, horizon + 1))[:, None]
    return (scale * np.exp(DAILY_SIGMA * steps * z)).astype(np.float32)


def price_rows(
    count: int, last: date = date(2008, 1, 2), close: float = 100.0
) -> tuple[list[date], list[tuple[float, float, float, float, float]]]:
    """`count` sessions up to `last` with smooth OHLCV rows; the last close is `close`."""
    days = sessions_between(date(last.year - count // 200 - 1, 1, 1), last)[-count:]
    rows = []
    for back in range(count - 1, -1, -1):
        price = close * (1 + 0.05 * math.sin(back / 7))
        rows.append((price * 0.995, price * 1.01, price * 0.99, price, 1e6 + 1000 * back))
    return days, rows


def make_snapshot(
    symbol: str = "GOOG",
    last: date = date(2008, 1, 2),
    close: float = 100.0,
    *,
    count: int = 80,
    md5: str = "p" * 32,
) -> Snapshot:
    """A published snapshot whose last close is `close` on `last`."""
    days, rows = price_rows(count, last, close)
    return Snapshot(
        symbol=symbol, as_of=last, dataset_md5=md5, dataset_rev="r" * 40, dates=days, ohlcv=rows
    )


def write_model_folder(
    folder: Path,
    *,
    forecaster: str = "perennial-goog",
    symbols: tuple[str, ...] = ("GOOG",),
    scale: float = 1.0,
    context: int = 64,
    horizon: int = 5,
    run_id: str = "0" * 32,
    dataset_md5: str = "d" * 32,
    as_of: date = date(2007, 12, 31),
    train_end: date | None = None,
    kind: Literal["lstm", "volatility"] = "lstm",
) -> Contract:
    """Write `model.onnx`, `golden.json` and `contract.json`; quantiles = last close * `ratios`."""
    folder.mkdir(parents=True, exist_ok=True)
    table = ratios(horizon, scale)
    onnx.save(_graph(table, context, horizon), folder / MODEL_FILE)
    days, rows = price_rows(context, as_of)
    window = np.array(rows, dtype=np.float32)
    golden = Golden(
        ohlcv=[window.tolist()],
        dates=[[(day - EPOCH).days for day in days]],
        symbol=[0],
        quantiles=[(window[-1, 3] * table).tolist()],
    )
    (folder / GOLDEN_FILE).write_bytes(encode(golden))
    contract = Contract(
        forecaster=forecaster,
        symbols=symbols,
        kind=kind,
        context=context,
        horizon=horizon,
        as_of=as_of,
        train_start=date(2004, 8, 19),
        train_end=train_end or as_of,
        dataset_md5=dataset_md5,
        dataset_rev="e" * 40,
        run_id=run_id,
        git_commit="f" * 40,
        files={name: sha256_file(folder / name) for name in (MODEL_FILE, GOLDEN_FILE)},
    )
    (folder / CONTRACT_FILE).write_bytes(encode(contract))
    return contract


def _graph(table: NDArray[np.float32], context: int, horizon: int) -> onnx.ModelProto:
    constants = {
        "table": table[None],
        "zero": np.zeros(1, dtype=np.float32),
        "starts": np.array([context - 1, 3], dtype=np.int64),
        "ends": np.array([context, 4], dtype=np.int64),
        "axes": np.array([1, 2], dtype=np.int64),
        "day_axes": np.array([1], dtype=np.int64),
        "symbol_shape": np.array([-1, 1], dtype=np.int64),
        "scalar_shape": np.array([-1, 1, 1], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Slice", ["ohlcv", "starts", "ends", "axes"], ["close"]),
        helper.make_node("Cast", ["dates"], ["days"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["days", "day_axes"], ["day_sum"], keepdims=1),
        helper.make_node("Cast", ["symbol"], ["index"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["index", "symbol_shape"], ["column"]),
        helper.make_node("Add", ["day_sum", "column"], ["mixed"]),
        helper.make_node("Mul", ["mixed", "zero"], ["nothing"]),
        helper.make_node("Reshape", ["nothing", "scalar_shape"], ["nothing3"]),
        helper.make_node("Add", ["close", "nothing3"], ["origin"]),
        helper.make_node("Mul", ["origin", "table"], ["quantiles"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info("ohlcv", TensorProto.FLOAT, ["batch", context, 5]),
            helper.make_tensor_value_info("dates", TensorProto.INT64, ["batch", context]),
            helper.make_tensor_value_info("symbol", TensorProto.INT64, ["batch"]),
        ],
        [
            helper.make_tensor_value_info(
                "quantiles", TensorProto.FLOAT, ["batch", horizon, len(QUANTILE_LEVELS)]
            )
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="tests"
    )
