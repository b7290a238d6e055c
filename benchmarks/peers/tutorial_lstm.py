"""The LSTM of the tutorials: the price, scaled to 0..1, 60 days in, the next day out.

`python tutorial_lstm.py [EPOCHS] FOLDER`. One symbol, two layers of 50 with dropout 0.2, mean
squared error, Adam at 1e-3, batches of 32, 100 epochs, no early stopping. As honest as it can be
made: smallest and largest price are those of the training days, which are all but the last
`validation` rows before the test, and several days ahead are reached by feeding forecasts back in.
Its quantiles are the point forecast with the quantiles of what it missed on those validation days,
log(price / forecast).
"""

import sys
from pathlib import Path

import numpy as np
import torch
from exchange import Task, answer
from torch import Tensor, nn

WINDOW, UNITS, DROPOUT, BATCH, EPOCHS = 60, 50, 0.2, 32, 100


class Tutorial(nn.Module):
    """Two LSTM layers and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, UNITS, 2, batch_first=True, dropout=DROPOUT)
        self.dropout = nn.Dropout(DROPOUT)
        self.head = nn.Linear(UNITS, 1)

    def forward(self, windows: Tensor) -> Tensor:
        """[n, WINDOW] to [n]."""
        states, _ = self.lstm(windows.unsqueeze(-1))
        return self.head(self.dropout(states[:, -1])).squeeze(-1)


def train(scaled: Tensor, epochs: int) -> Tutorial:
    """On every window of a series [rows] and the value after it."""
    network = Tutorial()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    windows, targets = scaled.unfold(0, WINDOW, 1)[:-1], scaled[WINDOW:]
    for _ in range(epochs):
        for rows in torch.randperm(len(targets)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.mse_loss(network(windows[rows]), targets[rows]).backward()
            optimizer.step()
    return network.eval()


@torch.no_grad()
def ahead(network: Tutorial, scaled: Tensor, last: np.ndarray, horizon: int) -> Tensor:
    """Scaled prices of the days after the windows that end in the rows `last` [n, horizon]."""
    windows = scaled.unfold(0, WINDOW, 1)[torch.from_numpy(last - WINDOW + 1)]
    for _ in range(horizon):
        windows = torch.cat([windows, network(windows[:, -WINDOW:])[:, None]], dim=1)
    return windows[:, WINDOW:]


def main() -> int:
    """Train, forecast and leave."""
    folder, epochs = Path(sys.argv[-1]), int(sys.argv[1]) if len(sys.argv) > 2 else EPOCHS
    task = Task.read(folder)
    torch.set_num_threads(1)
    torch.manual_seed(task.seed)
    rows, closes = task.history()
    first = int(np.searchsorted(rows, task.first))
    known = first + 1 - task.validation
    low, high = closes[:known].min(), closes[:known].max()
    scaled = torch.from_numpy((closes - low) / (high - low)).float()
    network = train(scaled[:known], epochs)

    def log_prices(last: np.ndarray) -> np.ndarray:
        moved = ahead(network, scaled, last, task.horizon).double().numpy()
        return np.log(np.maximum(moved * (high - low) + low, 0.01))

    past = np.arange(known - 1, first + 1 - task.horizon)
    steps = np.arange(1, task.horizon + 1)
    missed = np.log(closes[past[:, None] + steps]) - log_prices(past)
    spread = np.quantile(missed, task.levels, axis=0).T
    tested = np.arange(first, len(closes) - task.horizon)
    answer(folder, log_prices(tested)[:, :, None] + spread - task.last_logs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
