"""`mlflow models serve`: the model out of a registry, with one thread a session.

`python -m benchmarks.peers.mlflow_model MODEL SCRATCH` registers the folder MODEL in a registry of
its own below SCRATCH, and lays the version into SCRATCH/model as it is to be served.
"""

import sys
from pathlib import Path

import yaml

from benchmarks.windows import FORECASTER
from forecasting.registry import open_registry
from forecasting.settings import load_settings


def main() -> None:
    """Register and download."""
    model, scratch = Path(sys.argv[1]), Path(sys.argv[2])
    settings = load_settings(
        home=scratch / "registry", tracking_uri=f"sqlite:///{scratch / 'mlflow.db'}"
    )
    registry = open_registry(settings)
    version = registry.register(model, FORECASTER, registry.start_run("benchmark", {}))
    described = registry.download(FORECASTER, version, scratch / "model") / "MLmodel"
    content = yaml.safe_load(described.read_text())
    content["flavors"]["onnx"]["onnx_session_options"] = {
        "intra_op_num_threads": 1,
        "inter_op_num_threads": 1,
    }
    described.write_text(yaml.safe_dump(content))


if __name__ == "__main__":
    main()
