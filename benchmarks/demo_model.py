"""Train the model that `make demo` promotes first, in the home that the environment names.

`python -m benchmarks.demo_model FOLDER` copies the version out of the registry into FOLDER.
"""

import os
import sys
from pathlib import Path

from deployments.demo import SETTINGS, SYMBOL, TRAINED
from flows.train import train
from forecasting.assignment import forecaster_name
from forecasting.registry import open_registry
from forecasting.settings import load_settings


def main() -> int:
    """Train, and copy; 1 when the gate refuses."""
    os.environ.update(SETTINGS)
    result = train(symbol=SYMBOL, as_of=TRAINED)
    if result.version is None:
        print(f"{result.outcome}: {' '.join(result.reasons)}", file=sys.stderr)
        return 1
    registry = open_registry(load_settings())
    registry.download(forecaster_name([SYMBOL]), result.version, Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
