"""`python -m tests.candidates HOME`: the way of `train` from prices to a candidate, in HOME.

Settings come from the environment, as in a deployment; the tasks run without Prefect. It prints one
JSON object: `dataset_md5`, sha256 of `model.onnx`, `kind`, and `history` and `epochs` of the fit.
"""

import hashlib
import json
import logging
import sys
from datetime import date
from pathlib import Path

from forecasting import datasets
from forecasting.contract import MODEL_FILE
from forecasting.hyperparameters import ModelConfig
from forecasting.settings import load_settings
from tasks.training import fit, prepare_windows

DAY = date(2012, 12, 31)
KEY = "fit-of-a-test"


def main() -> None:
    logging.basicConfig(level=logging.INFO, force=True)  # Prefect's is silent
    settings = load_settings(home=Path(sys.argv[1]))
    md5 = datasets.ingest(settings, ["GOOG"], DAY).md5
    splits = prepare_windows.fn(settings, ["GOOG"], DAY, md5, "windows")
    candidate = fit.fn(settings, splits, ModelConfig(seed=settings.seed), KEY)
    found = {
        "dataset_md5": md5,
        "sha256": hashlib.sha256(candidate.files[MODEL_FILE]).hexdigest(),
        "kind": candidate.kind,
        "history": candidate.history,
        "epochs": max(epoch for _, _, epoch in candidate.history),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
