"""Training and nothing else: trials of a search, one after the other in a warm process.

`python -m benchmarks.peers.search_pure TRIALS EPOCHS WINDOWS` waits for a line on stdin, so that
all such processes train at the same time, and prints one JSON object with the seconds it trained.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.search import SEED, parts
from forecasting import model
from forecasting.hyperparameters import ModelConfig
from forecasting.windows import Splits


def main() -> int:
    """Train and tell."""
    trials, epochs, windows = map(int, sys.argv[1:])
    splits = parts(windows)
    chosen = ModelConfig(hidden=32, seed=SEED)
    _train(splits, chosen, 1)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    for _ in range(trials):
        _train(splits, chosen, epochs)
    print(json.dumps({"seconds": time.perf_counter() - began}))
    return 0


def _train(splits: Splits, chosen: ModelConfig, epochs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.fit(splits, chosen, epochs, folder=Path(folder), patience=epochs)


if __name__ == "__main__":
    sys.exit(main())
