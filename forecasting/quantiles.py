"""What is read off quantiles, the same for everybody who answers. Light: web workers import it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def medians(quantiles: NDArray[np.float32], levels: Sequence[float]) -> NDArray[np.float32]:
    """The median of each window and horizon, interpolated where 0.5 is no level.

    Args:
        quantiles: float32 [windows, horizon, levels].
        levels: ascending.

    Returns:
        float32 [windows, horizon].
    """
    if 0.5 in levels:
        exact: NDArray[np.float32] = quantiles[..., list(levels).index(0.5)]
        return exact
    above = int(np.clip(np.searchsorted(levels, 0.5), 1, len(levels) - 1))
    low, high = levels[above - 1], levels[above]
    weight = float(np.clip((0.5 - low) / (high - low), 0, 1))
    between = quantiles[..., above - 1] * (1 - weight) + quantiles[..., above] * weight
    return between.astype(np.float32)
