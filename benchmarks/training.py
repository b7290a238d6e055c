"""What a fit costs: `make bench-training`.

Our fit as flows run it (each batch shared by two threads) and on one thread, a plain loop on one
thread over the same tensors, and Lightning as its first page shows it, on all cores (once more with
our allocator and one thread); each in a fresh process, in an order that turns from round to round;
the same network, windows, seed, batches and epochs, nobody stops early. Like is compared with like:
our fit on one thread with the plain loop, which both come to the same weights; our fit as it is
with Lightning as it is, at a validation loss as good. Ratios are of the same round, their medians
over the rounds. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks import quality
from benchmarks.bars import judge
from deployments.stack import ALLOCATOR
from forecasting.hyperparameters import ModelConfig
from forecasting.settings import Settings
from forecasting.windows import Splits

EPOCHS = 10
THREADS = Settings.model_fields["fit_threads"].default
PLAIN = "default Lightning"
OURS, ALONE, RAW = "ours", "ours, one thread", "raw loop, one thread"
CONTESTANTS = {
    OURS: ("benchmarks.peers.training_ours", str(THREADS)),
    ALONE: ("benchmarks.peers.training_ours", "1"),
    RAW: ("benchmarks.peers.training_raw",),
    PLAIN: ("benchmarks.peers.training_lightning",),
    # what of the difference is the environment's
    f"{PLAIN}, our environment": ("benchmarks.peers.training_lightning",),
}
BARS = {"vs_raw_loop": ("<=", 1.05), "vs_default_lightning": (">=", 2.0)}
WORSE = 0.5
"""By how many bp our validation CRPS may be above Lightning's: another order of sums moves it by up
to 0.3."""

Runs = Sequence[Mapping[str, float]]
"""Of one contestant: `seconds` and `validation` of each round."""


def windows() -> Splits:
    """Four symbols to 2010, validated on 2011."""
    return quality.splits(quality.PARTS[0])


def config() -> ModelConfig:
    """What everybody fits."""
    return ModelConfig(hidden=32)


def one(name: str, epochs: int) -> dict[str, float]:
    """One contestant in a process of its own."""
    module, *threads = CONTESTANTS[name]
    command = [sys.executable, "-m", module, str(epochs), *threads]
    # Plain is plain: what our entry points set before Python starts, others have to know of.
    own = {} if name == PLAIN else ALLOCATOR | {"OMP_NUM_THREADS": "1"}
    kept = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    done = subprocess.run(command, env=kept | own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed ({done.returncode}): {done.stderr[-800:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> int:
    """Run, and print table and figures; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="What a fit costs.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for number in range(options.rounds):
        names = list(CONTESTANTS)
        for name in names if number % 2 == 0 else reversed(names):
            found = one(name, options.epochs)
            runs[name].append(found)
            told = f"{found['seconds']:.2f} s, validation CRPS {found['validation']:.3f} bp"
            print(f"round {number + 1}  {name}: {told}", file=sys.stderr)
    return 0 if tell(runs, options.epochs) else 1


def tell(runs: Mapping[str, Runs], epochs: int) -> bool:
    """Print table and figures; whether every bar is reached, at a validation loss as good."""
    table = Table(title=f"A fit of {epochs} epochs")
    for column in ("", "seconds", "validation CRPS, bp"):
        table.add_column(column, justify="left" if not column else "right")
    for name, found in runs.items():
        table.add_row(
            name, f"{_median(found, 'seconds'):.2f}", f"{_median(found, 'validation'):.3f}"
        )
    Console().print(table)
    figures = {
        "vs_raw_loop": _ratio(runs[ALONE], runs[RAW]),
        "vs_default_lightning": _ratio(runs[PLAIN], runs[OURS]),
    }
    same, as_good = _are_same(runs[ALONE], runs[RAW]), _is_as_good(runs[OURS], runs[PLAIN])
    met = judge(figures, BARS) and same and as_good
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))
    return met


def _are_same(ours: Runs, raw: Runs) -> bool:
    """Whether both learned the same: a loop that does less is not one to be measured by."""
    scores = {each["validation"] for each in (*ours, *raw)}
    if len(scores) > 1:
        print(f"Our fit and the raw loop should learn the same; they came to {sorted(scores)} bp.")
    return len(scores) == 1


def _is_as_good(ours: Runs, plain: Runs) -> bool:
    """Whether ours learned as much as Lightning: a fit that learns less is no faster one."""
    mine, theirs = (_median(runs, "validation") for runs in (ours, plain))
    as_good = mine <= theirs + WORSE
    if not as_good:
        print(
            f"Our fit should come to a validation CRPS at most {WORSE} bp above {PLAIN}'s; "
            f"it came to {mine:.3f} bp, {PLAIN} to {theirs:.3f}."
        )
    return as_good


def _median(runs: Runs, key: str) -> float:
    return statistics.median(each[key] for each in runs)


def _ratio(above: Runs, below: Runs) -> float:
    pairs = zip(above, below, strict=True)
    return statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)


if __name__ == "__main__":
    sys.exit(main())
