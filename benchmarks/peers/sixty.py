"""The network of an earlier comparison, 60 rows x 8 features, 2 x 64 LSTM, 15 outputs, as a model.

`python -m benchmarks.peers.sixty FOLDER` writes a model version with random weights that keeps this
project's contract, so that every server can be asked the same of it.
"""

import argparse
import warnings
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.windows import FORECASTER, Window, last_windows
from forecasting.contract import COLUMNS, GOLDEN_FILE, MODEL_FILE, Golden, encode, seal

CONTEXT, HORIZON, LEVELS = 60, 5, (0.1, 0.5, 0.9)
FEATURES, HIDDEN, LAYERS = 8, 64, 2


class Sixty(nn.Module):
    """Price quantiles from rows; only its cost means anything."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, HIDDEN, LAYERS, batch_first=True)
        self.head = nn.Linear(HIDDEN, HORIZON * len(LEVELS))

    def forward(self, ohlcv: Tensor, dates: Tensor, symbol: Tensor) -> Tensor:
        """Price quantiles [batch, horizon, levels]; see `contract.Contract` for the inputs."""
        last = ohlcv[:, -1:, 3:4]
        start = ohlcv.new_zeros(LAYERS, ohlcv.shape[0], HIDDEN)
        hidden, _ = self.lstm(_features(ohlcv, last), (start, start))
        moves = self.head(hidden[:, -1]).reshape(-1, HORIZON, len(LEVELS))
        nothing = 0.0 * (dates[:, -1] + symbol).to(ohlcv.dtype)  # the exporter drops idle inputs
        ordered, _ = torch.sort(moves, dim=-1)
        return last * torch.exp(0.02 * ordered) + nothing[:, None, None]


def _features(ohlcv: Tensor, last: Tensor) -> Tensor:
    """Five columns scaled by the last close (volume by its mean), and three differences."""
    prices = ohlcv[..., :4] / last - 1
    volume = ohlcv[..., 4:]
    volume = volume / (volume.mean(1, keepdim=True) + 1)
    opened, high, low, close = prices.unbind(-1)
    before = torch.cat([close[:, :1], close[:, :-1]], dim=1)
    spreads = torch.stack([close - before, close - opened, high - low], dim=-1)
    return torch.cat([prices, volume, spreads], dim=-1)


def main() -> None:
    """Write the model version."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    torch.manual_seed(7)
    torch.set_num_threads(1)
    network, windows = Sixty().eval(), last_windows(2, CONTEXT)
    sample = _tensors(windows)
    _export(network, sample, folder / MODEL_FILE)
    with torch.no_grad():
        quantiles = network(*sample)
    golden = Golden(
        ohlcv=sample[0][-1:].tolist(),
        dates=sample[1][-1:].tolist(),
        symbol=[0],
        quantiles=quantiles[-1:].tolist(),
    )
    (folder / GOLDEN_FILE).write_bytes(encode(golden))
    seal(folder, _facts())


def _tensors(windows: list[Window]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.tensor([each.ohlcv for each in windows]),
        torch.tensor([each.dates for each in windows]),
        torch.zeros(len(windows), dtype=torch.int64),
    )


def _export(network: Sixty, sample: tuple[Tensor, Tensor, Tensor], path: Path) -> None:
    """The legacy exporter, which keeps the LSTM one node, and warns of its age."""
    names = ["ohlcv", "dates", "symbol"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            sample,
            path,
            dynamo=False,
            opset_version=17,
            input_names=names,
            output_names=["quantiles"],
            dynamic_axes={name: {0: "batch"} for name in [*names, "quantiles"]},
        )


def _facts() -> dict[str, object]:
    return {
        "forecaster": FORECASTER,
        "symbols": ("GOOG",),
        "kind": "lstm",
        "context": CONTEXT,
        "horizon": HORIZON,
        "columns": COLUMNS,
        "quantile_levels": LEVELS,
        "as_of": date(2007, 1, 31),
        "train_start": date(2004, 8, 19),
        "train_end": date(2007, 1, 31),
        "dataset_md5": "0" * 32,
        "dataset_rev": "0" * 40,
        "run_id": "0" * 32,
        "git_commit": "",
    }


if __name__ == "__main__":
    main()
