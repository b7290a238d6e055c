"""What schemathesis cannot know from the specification: run by it, see `test_openapi.py`.

JSON Schema says what each value may be. That rows ascend by date, that high is not below low, that
a window is as long as the model's context, that a tensor's elements fit its shape: that it cannot
say. So of the bodies that fuzzing generates as good ones the rest is mended here; bodies that are
bad by the schema, and those that probe its boundaries, are sent as they are. Binary media types
are beyond JSON Schema altogether; here is how to make such bodies.
"""

import json
import time
from datetime import date, timedelta
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

from forecasting.contract import COLUMNS
from serving import columnar, hooks
from tests.models import EPOCH, price_rows

WEBHOOK_SECRET = "shared"
CONTEXT = 64
LAST = date(2008, 1, 2)
HEADER = "Inference-Header-Content-Length"
PADDED = 512
"""Bytes to which the JSON before binary tensors is filled up, so that its length is known."""

closes = st.floats(1e-3, 1e30)
symbols = st.sampled_from(["GOOG", "AAPL", "GOGO"])


def prices(close=100.0):
    return [list(row) for row in price_rows(CONTEXT, LAST, close)[1]]


def days():
    return price_rows(CONTEXT, LAST)[0]


def numbers():
    return [(day - EPOCH).days for day in days()]


# bodies that are no JSON --------------------------------------------------------------------------
def table(close, symbol) -> pa.Table:
    columns = np.array(prices(close)).T
    return pa.table(
        {"symbol": [symbol] * CONTEXT, "date": days()} | dict(zip(COLUMNS, columns, strict=True))
    )


def arrow(close, symbol, new=pa.ipc.new_stream) -> bytes:
    made, sink = table(close, symbol), pa.BufferOutputStream()
    with new(sink, made.schema) as writer:
        writer.write_table(made)
    return sink.getvalue().to_pybytes()


def parquet(close, symbol) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table(close, symbol), sink)
    return sink.getvalue().to_pybytes()


def csv() -> str:
    made = table(100.0, "GOOG").to_pydict()
    lines = [made, *zip(*made.values(), strict=True)]
    return "".join(",".join(map(str, line)) + "\n" for line in lines)


def octets(close, binary) -> bytes:
    ohlcv = np.array([prices(close)], dtype="<f4").tobytes()
    request = {
        "inputs": [
            {
                "name": "ohlcv",
                "shape": [1, CONTEXT, 5],
                "datatype": "FP32",
                "parameters": {"binary_data_size": len(ohlcv)},
            },
            {"name": "dates", "shape": [1, CONTEXT], "datatype": "INT64", "data": numbers()},
            {"name": "symbol", "shape": [1], "datatype": "BYTES", "data": ["GOOG"]},
        ],
        "parameters": {"binary_data_output": binary},
    }
    return json.dumps(request).encode().ljust(PADDED) + ohlcv


for name, strategy in {
    columnar.STREAM: st.builds(arrow, closes, symbols),
    columnar.FILE: st.builds(arrow, closes, symbols, st.just(pa.ipc.new_file)),
    columnar.PARQUET: st.builds(parquet, closes, symbols),
    "application/octet-stream": st.builds(octets, closes, st.booleans()),
}.items():
    schemathesis.openapi.media_type(name, strategy)


@schemathesis.serializer("text/csv")
def text(context, value):
    return (value if isinstance(value, str) else str(value)).encode(errors="surrogatepass")


# JSON and CSV -------------------------------------------------------------------------------------
@schemathesis.hook
def map_case(context, case):
    if not is_good(case):
        return case
    path, body = case.operation.path, case.body
    if path.endswith("/infer"):
        case.headers.pop(HEADER, None)
        if isinstance(body, bytes):
            case.headers[HEADER] = str(PADDED)
        else:
            body["inputs"] = tensors()
    elif path == "/v1/forecast":
        mend(body)
    elif path == "/v1/forecasts" and isinstance(body, dict):
        for window in body["windows"]:
            mend(window)
    elif path == "/invocations" and isinstance(body, str):
        case.body = csv()
    elif path == "/invocations":
        mend_invocation(body)
    return case


@schemathesis.hook
def before_call(context, case, kwargs):
    """Sign what is meant to be good as the registry would."""
    if case.operation.path != "/hooks/registry" or not is_good(case):
        return
    body = requests.Request(**case.as_transport_kwargs()).prepare().body or b""
    identity, stamp = str(uuid4()), str(int(time.time()))
    body = body.encode() if isinstance(body, str) else body
    case.headers["X-MLflow-Signature"] = hooks.signature(WEBHOOK_SECRET, identity, stamp, body)
    case.headers["X-MLflow-Delivery-Id"] = identity
    case.headers["X-MLflow-Timestamp"] = stamp


def is_good(case) -> bool:
    return case.meta is not None and case.meta.generation.mode == GenerationMode.POSITIVE


def mend(window) -> None:
    """Turn a window that the schema allows into one that a model takes."""
    window["symbol"] = ("GOOG", "AAPL")[len(window["symbol"]) % 2]
    if "forecaster" in window:
        window["forecaster"] = "perennial-goog"
    rows = {known_day(row["date"]): row for row in window["rows"]}
    first = min(rows)
    for back in range(1, CONTEXT + 1 - len(rows)):
        rows[first - timedelta(back)] = rows[first]
    window["rows"] = [plausible(row) | {"date": str(day)} for day, row in sorted(rows.items())]


def known_day(text: str) -> date:
    """A day for which the trading calendar is known, and enough days before it as well."""
    return date(1990, 1, 1) + timedelta(date.fromisoformat(text).toordinal() % 20_000)


def plausible(row):
    """The row, high above low, and no price at the very ends of what the graph can multiply."""
    clipped = {name: float(np.clip(row[name], 1e-30, 1e30)) for name in COLUMNS}
    low, high = sorted((clipped["low"], clipped["high"]))
    return clipped | {"low": low, "high": high}


def mend_invocation(body) -> None:
    (form,) = body
    windows = tensors()
    whole = {tensor["name"]: tensor["data"] for tensor in windows}
    if form == "inputs":
        body[form] = {**whole, "ohlcv": [prices()], "dates": [numbers()]}
    elif form == "instances":
        body[form] = [{"ohlcv": prices(), "dates": numbers(), "symbol": "GOOG"}] * len(body[form])
    elif form == "dataframe_records":
        window = {"symbol": "", "rows": [row | {"date": str(LAST)} for row in body[form][:1]]}
        mend(window)
        body[form] = [row | {"symbol": window["symbol"]} for row in window["rows"]]
    else:
        rows = [["GOOG", str(day), *row] for day, row in zip(days(), prices(), strict=True)]
        body[form] = {"columns": ["symbol", "date", *COLUMNS], "data": rows}


def tensors():
    return [
        {"name": "ohlcv", "shape": [1, CONTEXT, 5], "datatype": "FP32", "data": [prices()]},
        {"name": "dates", "shape": [1, CONTEXT], "datatype": "INT64", "data": numbers()},
        {"name": "symbol", "shape": [1], "datatype": "BYTES", "data": ["GOOG"]},
    ]
