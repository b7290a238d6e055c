"""Our search. `python -m benchmarks.peers.search_ours TRIALS EPOCHS WINDOWS` prints one JSON line.

All trials run all epochs: nothing is stopped early.
"""

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.search import SEED, SPACE, parts
from forecasting.settings import load_settings
from forecasting.study import METRIC, open_study
from tasks.search import run_search


def main() -> int:
    """Search and tell."""
    trials, epochs, windows = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        settings = load_settings(home=home, trials=trials, epochs=epochs, folds=1, seed=SEED)
        with open_study(home / "study", seed=SEED, grace=epochs, space=SPACE) as study:
            found = run_search(parts(windows), settings, study)
    rows = [row for row in found.leaderboard if row["epochs"] == epochs]
    print(json.dumps({"trials": len(rows), "best": rows[0][METRIC]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
