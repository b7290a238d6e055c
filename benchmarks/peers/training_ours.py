"""Our fit. `python -m benchmarks.peers.training_ours EPOCHS THREADS` prints one JSON object."""

import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.training import config, windows
from forecasting import model


def main() -> int:
    """Fit and tell."""
    epochs, threads, parts = int(sys.argv[1]), int(sys.argv[2]), windows()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        fitted = model.fit(
            parts, config(), epochs, folder=Path(folder), patience=epochs, threads=threads
        )
        seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "validation": fitted.trained}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
