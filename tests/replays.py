"""`python -m tests.replays HOME`: a short replay of GOOG that retrains twice, in HOME.

Each day that is done is a line of its own, so that a test knows when to kill it.
"""

import os
import sys
from datetime import date
from pathlib import Path

from deployments.replay import play
from flows.replay import Span
from forecasting.replay import Policy
from tests.flows.support import QUICK

SPAN = Span("GOOG", date(2007, 3, 1), date(2007, 3, 14))
POLICY = Policy("every-four-days", every=4)
SHORT = QUICK | {"trials": 1, "epochs": 1, "fit_epochs": 1, "folds": 1, "retrain_cooldown_days": 3}


def main() -> None:
    os.environ |= {f"PERENNIAL_{name.upper()}": str(value) for name, value in SHORT.items()}
    play(Path(sys.argv[1]), SPAN, POLICY, lambda *told: print(told[2], flush=True))


if __name__ == "__main__":
    main()
