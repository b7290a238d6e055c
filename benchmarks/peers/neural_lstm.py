"""The LSTM of NeuralForecast on daily log returns, with a quantile loss.

`python neural_lstm.py [STEPS] FOLDER`. One network over all symbols, as ours is, trained anew for
each stretch of test days on the rows before it. Two layers of 128, windows scaled robustly, Adam at
1e-3 and batches of 128 windows are the library's defaults; a context of 64 rows, the 39 levels and
240 to 1000 steps are not: every 40 steps the last 250 rows before the test are scored, and it stops
when five times in a row nothing was won. It says how each of the next days may move, not how they
hang together, so they are added up as if they did not: 4000 independent draws from its quantiles.

Returns, not prices: on GOOG's 2007, before the tested years, log prices did far worse.
"""

import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from exchange import Task, added_up, answer
from neuralforecast import NeuralForecast
from neuralforecast.losses.pytorch import MQLoss
from neuralforecast.models import LSTM

CONTEXT, STEPS, CHECK, PATIENCE = 64, 1000, 40, 5


def main() -> int:
    """Train, forecast and leave."""
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    folder, steps = Path(sys.argv[-1]), int(sys.argv[1]) if len(sys.argv) > 2 else STEPS
    torch.set_num_threads(1)
    task = Task.read(folder)
    series = []
    for which, symbol in enumerate(task.symbols):
        rows, closes = task.history(which)
        moves = np.diff(np.log(closes))
        series.append(pd.DataFrame({"unique_id": symbol, "ds": rows[1:], "y": moves}))
    network = LSTM(
        h=task.horizon,
        input_size=CONTEXT,
        loss=MQLoss(quantiles=task.levels.tolist()),
        max_steps=steps,
        val_check_steps=CHECK,
        early_stop_patience_steps=PATIENCE,
        random_seed=task.seed,
        alias="LSTM",
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    found = NeuralForecast([network], freq=1).cross_validation(
        df=pd.concat(series),
        n_windows=None,
        val_size=task.validation,
        test_size=len(task.origins) + task.horizon - 1,
    )
    found = found[found["unique_id"] == task.symbols[0]].sort_values(["cutoff", "ds"])
    columns = [each for each in found.columns if each.startswith("LSTM")]
    shape = (len(task.origins), task.horizon, len(task.levels))
    days = np.sort(found[columns].to_numpy(np.float64).reshape(shape), axis=-1)
    answer(folder, added_up(days, task.levels, task.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
