"""BentoML: the model behind adaptive batching; `PEER_MODEL` names its folder.

An endpoint that batches takes one list, so a client sends its window as `windows: [{...}]`. One
worker a core, each with a session of one thread.
"""

import os
from pathlib import Path

import bentoml
import numpy as np
import onnxruntime as ort
from pydantic import BaseModel


class Window(BaseModel):
    """One window, as every peer is sent it."""

    ohlcv: list[list[float]]
    dates: list[int]
    symbol: int


@bentoml.service(workers=len(os.sched_getaffinity(0)))
class Forecast:
    """Answers `POST /predict`."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = Path(os.environ["PEER_MODEL"]) / "model.onnx"
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    @bentoml.api(batchable=True, max_batch_size=64)
    def predict(self, windows: list[Window]) -> list[list[list[float]]]:
        """Price quantiles of each window."""
        feed = {
            "ohlcv": np.array([window.ohlcv for window in windows], dtype=np.float32),
            "dates": np.array([window.dates for window in windows], dtype=np.int64),
            "symbol": np.array([window.symbol for window in windows], dtype=np.int64),
        }
        return self.session.run(["quantiles"], feed)[0].tolist()
