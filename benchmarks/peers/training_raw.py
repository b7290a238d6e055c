"""The same network on the same tensors in a plain loop: what a trainer may cost is told against it.

`python -m benchmarks.peers.training_raw EPOCHS` prints one JSON object.
"""

import copy
import json
import math
import sys
import time

import torch

from benchmarks.training import config, windows
from forecasting import model
from forecasting.loss import Loss


def main() -> int:
    """Fit and tell."""
    epochs, parts, chosen = int(sys.argv[1]), windows(), config()
    torch.set_num_threads(1)
    began = time.perf_counter()
    network = model.untrained(parts, chosen)
    train = model._Inputs.of(network, parts.train)
    validation = model._Inputs.of(network, parts.validation)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=chosen.lr, weight_decay=chosen.weight_decay, fused=True
    )
    loss = Loss(network)
    count, size = len(parts.train), chosen.batch_size
    best, kept = math.inf, None
    for epoch in range(epochs):
        torch.manual_seed(chosen.seed * 100_003 + epoch)
        order = torch.randperm(count)
        network.train()
        for first in range(0, count, size):
            optimizer.zero_grad()
            batch = train.take(order[first : first + size])
            corrections = network.corrections(batch.features)
            _, slope = loss(corrections, batch.sigma, batch.returns)
            corrections.backward(slope)
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        network.eval()
        with torch.no_grad():
            score = validation.crps(network).item()
        if score < best:
            best, kept = score, copy.deepcopy(network.state_dict())
    assert kept is not None
    print(json.dumps({"seconds": time.perf_counter() - began, "validation": best}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
