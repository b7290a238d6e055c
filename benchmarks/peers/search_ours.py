"""Our search. `python -m benchmarks.peers.search_ours TRIALS EPOCHS WINDOWS` prints one JSON line.

All trials run all epochs: nothing is stopped early. Ray starts first, as in the task `search`.
"""

import json
import sys
import tempfile
from pathlib import Path

from forecasting.settings import load_settings
from tasks import cluster

SEED = 7


def main() -> int:
    """Search and tell."""
    trials, epochs, windows = map(int, sys.argv[1:])
    meanwhile = ("tasks.search", "benchmarks.search")
    with tempfile.TemporaryDirectory() as name, cluster.short_lived() as scratch:
        home = Path(name)
        settings = load_settings(home=home, trials=trials, epochs=epochs, folds=1, seed=SEED)
        with cluster.running(settings, scratch, meanwhile):
            from benchmarks.search import SPACE, parts
            from forecasting.study import open_study
            from tasks.search import run_search

            with open_study(home / "study", seed=SEED, grace=epochs, space=SPACE) as study:
                found = run_search(parts(windows), settings, study)
    rows = [row for row in found.leaderboard if row["epochs"] == epochs]
    print(json.dumps({"trials": len(rows), "best": rows[0]["validation_crps_bp"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
