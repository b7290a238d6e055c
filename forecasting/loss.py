"""The CRPS of quantiles, and its slope along the network's corrections, written by hand.

A batch has some ten thousand quantiles. Through autograd their dozen operations, forward and back,
cost a sixth of a step of the fit; what they come to, a slope for each correction, is one formula.
"""

from functools import cache

import torch
from torch import Tensor

from forecasting.contract import QUANTILE_LEVELS
from forecasting.network import TAIL_REACH, Network

BP = 1e4
"""Basis points of a log return of 1."""


def crps(returns: Tensor, quantiles: Tensor) -> Tensor:
    """CRPS from equally spaced quantiles: twice their mean pinball loss.

    Args:
        returns: [n, horizon].
        quantiles: [n, horizon, levels].

    Returns:
        [n, horizon], in the units of `returns`.
    """
    error = returns.unsqueeze(-1) - quantiles
    return 2 * (_levels(returns.dtype, returns.device) * error + torch.relu(-error)).mean(-1)


@torch.no_grad()
def crps_and_slope(
    network: Network, corrections: Tensor, sigma: Tensor, returns: Tensor, weight: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Mean CRPS in bp, and its gradient with respect to `corrections`, both times `weight`.

    The slope of a pinball loss is (error < 0) - level, by quantile; of a quantile it is `reach`
    times itself by its horizon's scale, and `TAIL_REACH` log |shape| times itself by the tails.

    Args:
        network: whose `spread` makes the quantiles.
        corrections: [batch, horizon + 1], as `network.corrections` gave them.
        sigma: [batch, horizon].
        returns: [batch, horizon].
        weight: what both are multiplied by.

    Returns:
        A number, and [batch, horizon + 1].
    """
    quantiles = network.spread(sigma, corrections)
    error = returns.unsqueeze(-1) - quantiles
    slope = (error < 0).to(error.dtype) - _levels(error.dtype, error.device)
    unit = 2 * BP * weight / error.numel()
    value = (slope * error).sum() * -unit
    slope.mul_(quantiles)
    by_scale = slope.sum(-1) * (network.reach * unit)
    by_tails = (slope * torch.log(network.volatility.size())).sum((1, 2)) * (TAIL_REACH * unit)
    return value, torch.cat([by_scale, by_tails.unsqueeze(-1)], dim=-1)


@cache
def _levels(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(QUANTILE_LEVELS, dtype=dtype, device=device)
