"""Ray Serve: one replica behind its HTTP proxy, as its own guide starts; until SIGTERM.

`PEER_MODEL` names the model's folder, `PEER_PORT` the port, `PEER_SCRATCH` Ray's folder. The
replica parses JSON itself; a declared FastAPI ingress would be slower.
"""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import ray
from ray import serve
from starlette.requests import Request


@serve.deployment(num_replicas=1, max_ongoing_requests=128)
class Forecast:
    """Answers `POST /`."""

    def __init__(self, folder: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = Path(folder) / "model.onnx"
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Price quantiles of one window; GET tells that the replica is there."""
        if request.method == "GET":
            return {}
        body = await request.json()
        feed = {
            "ohlcv": np.array(body["ohlcv"], dtype=np.float32)[None],
            "dates": np.array(body["dates"], dtype=np.int64)[None],
            "symbol": np.array([body["symbol"]], dtype=np.int64),
        }
        return {"quantiles": self.session.run(["quantiles"], feed)[0][0].tolist()}


def main() -> None:
    """Start Ray in this process's care, deploy, wait."""
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=100_000_000,
        _temp_dir=os.environ["PEER_SCRATCH"],
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["PEER_PORT"])})
        serve.run(Forecast.bind(os.environ["PEER_MODEL"]))
        while True:
            signal.pause()  # Ray's own handler of SIGTERM raises SystemExit
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
