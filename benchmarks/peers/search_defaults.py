"""Ray Tune as its first page shows it: a function, a search algorithm, its own settings.

`python -m benchmarks.peers.search_defaults TRIALS EPOCHS WINDOWS` prints one JSON object last.
"""

import json
import sys
import tempfile
from pathlib import Path

from ray import tune
from ray.tune.search.optuna import OptunaSearch

from benchmarks.search import SEED, parts
from forecasting import model
from forecasting.hyperparameters import METRIC, ModelConfig


def main() -> int:
    """Search and tell."""
    trials, epochs, windows = map(int, sys.argv[1:])
    splits = parts(windows)

    def trial(config: dict[str, float]) -> None:
        def report(epoch: int, score: float) -> None:
            tune.report({METRIC: score, "epoch": epoch})

        chosen = ModelConfig(**config, hidden=32, seed=SEED)  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as folder:
            model.fit(splits, chosen, epochs, folder=Path(folder), patience=epochs, report=report)

    space = {
        "dropout": tune.uniform(0.0, 0.4),
        "reach": tune.uniform(0.1, 0.4),
        "lr": tune.loguniform(5e-4, 1e-2),
        "weight_decay": tune.loguniform(1e-3, 0.3),
    }
    plan = tune.TuneConfig(
        metric=METRIC, mode="min", num_samples=trials, search_alg=OptunaSearch(seed=SEED)
    )
    found = tune.Tuner(trial, param_space=space, tune_config=plan).fit()
    scores = [each.metrics[METRIC] for each in found if each.metrics]
    print(json.dumps({"trials": len(scores), "best": min(scores)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
