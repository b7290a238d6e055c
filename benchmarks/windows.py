"""Google's real prices as every server's clients send them: bodies, and the answers expected.

Numbers keep the repr that bokeh_sampledata's have, since that is what a client's JSON holds.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from bokeh_sampledata.stocks import GOOG
from numpy.typing import NDArray

from forecasting.contract import COLUMNS, GOLDEN_FILE, Golden, Snapshot, decode
from forecasting.inference import Forecaster

FORECASTER, SYMBOL = "perennial-goog", "GOOG"
MANY = 64
"""Windows in one large request."""
PUBLISHED_ROWS = 512
EPOCH = date(1970, 1, 1)
Quantiles = NDArray[np.float32]


@dataclass(frozen=True)
class Window:
    """Rows of one window, oldest first: days since 1970-01-01, and open to volume of each."""

    dates: list[int]
    ohlcv: list[list[float]]

    @property
    def days(self) -> list[date]:
        """The dates as such."""
        return [date.fromordinal(EPOCH.toordinal() + day) for day in self.dates]


@dataclass(frozen=True)
class Case:
    """Windows to ask about and the quantiles that they must give, [windows, horizon, levels]."""

    windows: list[Window]
    expected: Quantiles


def last_windows(count: int, context: int) -> list[Window]:
    """The last `count` consecutive windows."""
    rows = context + count - 1
    days = [(date.fromisoformat(each) - EPOCH).days for each in GOOG["date"][-rows:]]
    ohlcv = [list(row) for row in zip(*(GOOG[name][-rows:] for name in COLUMNS), strict=True)]
    return [Window(days[i : i + context], ohlcv[i : i + context]) for i in range(count)]


def snapshot() -> Snapshot:
    """The latest rows as ingest publishes them."""
    (window,) = last_windows(1, PUBLISHED_ROWS)
    return Snapshot(
        symbol=SYMBOL,
        as_of=window.days[-1],
        dataset_md5="0" * 32,
        dataset_rev="0" * 40,
        dates=window.days,
        ohlcv=[(o, h, low, c, v) for o, h, low, c, v in window.ohlcv],
    )


def cases(folder: Path) -> dict[str, Case]:
    """What a model version must answer: `golden` by its own file, `one` and `many` by its graph."""
    forecaster = Forecaster.load(folder, version=1)
    golden = decode((folder / GOLDEN_FILE).read_bytes(), Golden, GOLDEN_FILE)
    context = forecaster.contract.context
    found = {
        "golden": Case(
            [Window(golden.dates[0], golden.ohlcv[0])],
            np.array(golden.quantiles, dtype=np.float32),
        )
    }
    for name, count in (("one", 1), ("many", MANY)):
        windows = last_windows(count, context)
        found[name] = Case(windows, _compute(forecaster, windows))
    return found


def _compute(forecaster: Forecaster, windows: Sequence[Window]) -> Quantiles:
    return forecaster.predict(
        np.array([each.ohlcv for each in windows], dtype=np.float32),
        np.array([each.dates for each in windows], dtype=np.int64),
        np.zeros(len(windows), dtype=np.int64),
    )


# bodies, one function a dialect -----------------------------------------------------------------
def rows_body(windows: Sequence[Window]) -> bytes:
    """This project's own: dated rows of a symbol."""
    (window,) = windows
    rows = [
        {"date": day.isoformat(), **dict(zip(COLUMNS, row, strict=True))}
        for day, row in zip(window.days, window.ohlcv, strict=True)
    ]
    return _json({"symbol": SYMBOL, "rows": rows})


def oip_body(windows: Sequence[Window]) -> bytes:
    """Open Inference Protocol v2: flat tensors in row-major order, as its clients send them."""
    count, context = len(windows), len(windows[0].dates)
    flat = [value for window in windows for row in window.ohlcv for value in row]
    days = [day for window in windows for day in window.dates]
    tensors = (
        ("ohlcv", "FP32", [count, context, len(COLUMNS)], flat),
        ("dates", "INT64", [count, context], days),
        ("symbol", "INT64", [count], [0] * count),
    )
    names = ("name", "datatype", "shape", "data")
    return _json({"inputs": [dict(zip(names, each, strict=True)) for each in tensors]})


def mlflow_body(windows: Sequence[Window]) -> bytes:
    """MLflow's scoring protocol: tensors by name."""
    return _json(
        {
            "inputs": {
                "ohlcv": [each.ohlcv for each in windows],
                "dates": [each.dates for each in windows],
                "symbol": [0] * len(windows),
            }
        }
    )


def bare_body(windows: Sequence[Window]) -> bytes:
    """One window and nothing around it."""
    (window,) = windows
    return _json(_bare(window))


def listed_body(windows: Sequence[Window]) -> bytes:
    """A list of bare windows."""
    return _json({"windows": [_bare(each) for each in windows]})


def _bare(window: Window) -> dict[str, Any]:
    return {"ohlcv": window.ohlcv, "dates": window.dates, "symbol": 0}


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


# answers ----------------------------------------------------------------------------------------
def rows_answer(answer: Any) -> Any:  # noqa: ANN401  (JSON)
    """Quantiles of this project's own answer."""
    return [[step["quantiles"] for step in answer["forecast"]]]


def oip_answer(answer: Any) -> Any:  # noqa: ANN401
    """Quantiles of an answer of the Open Inference Protocol."""
    (output,) = answer["outputs"]
    return np.array(output["data"], dtype=np.float64).reshape(output["shape"])


def mlflow_answer(answer: Any) -> Any:  # noqa: ANN401
    """Quantiles of MLflow's answer."""
    return answer["predictions"]["quantiles"]


def bare_answer(answer: Any) -> Any:  # noqa: ANN401
    """Quantiles of the answer to one bare window."""
    return [answer["quantiles"]]


def listed_answer(answer: Any) -> Any:  # noqa: ANN401
    """Quantiles of the answer to a list of windows."""
    return answer
