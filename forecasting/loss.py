"""The CRPS of quantiles, and its slopes along what the network says, written by hand.

A batch has some ten thousand quantiles. Through autograd their dozen operations, forward and back,
cost a sixth of a step of the fit; what they come to, a slope for each correction, is one formula.
From there to the LSTM's state it is three, for which autograd's own work costs more than theirs.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

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
    levels = torch.tensor(QUANTILE_LEVELS, dtype=returns.dtype, device=returns.device)
    return 2 * (levels * error + torch.relu(-error)).mean(-1)


class Loss:
    """Mean CRPS in bp of a network's quantiles, and its gradient along the corrections.

    A quantile's log is linear in the corrections: `reach` by its horizon's, `TAIL_REACH` times
    log |shape| by the tails'. So one matrix makes quantiles of corrections, and corrections' slopes
    of quantiles'. It depends on the baseline, which stays as it is while a network learns.
    """

    def __init__(self, network: Network) -> None:
        """What `network.spread` does, as a matrix."""
        shape = network.volatility.shape
        size = torch.log(network.volatility.size())
        reach = torch.eye(len(shape)).to(shape) * network.reach
        by_scale = reach.repeat_interleave(shape.shape[1], dim=1)
        self._bend = torch.cat([by_scale, _row(size * TAIL_REACH)])
        self._shape, self._sign = _row(torch.log(shape.abs())), _row(torch.sign(shape))
        levels = torch.tensor(QUANTILE_LEVELS, dtype=shape.dtype, device=shape.device)
        self._middle = 0.5 - levels

    @torch.no_grad()
    def __call__(
        self, corrections: Tensor, sigma: Tensor, returns: Tensor, weight: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Both, times `weight`.

        Args:
            corrections: [batch, horizon + 1], as `Network.corrections` gives them.
            sigma: [batch, horizon].
            returns: [batch, horizon].
            weight: what both are multiplied by.

        Returns:
            A number, and [batch, horizon + 1].
        """
        flat = torch.addmm(self._shape, corrections, self._bend).exp_().mul_(self._sign)
        quantiles = flat.view(*sigma.shape, -1).mul_(sigma.unsqueeze(-1))
        error = returns.unsqueeze(-1) - quantiles
        # of a pinball loss: (error < 0) - level
        slope = torch.sub(self._middle, torch.sign(error), alpha=0.5)
        unit = 2 * BP * weight / error.numel()
        value = torch.dot(slope.view(-1), error.view(-1)) * -unit
        return value, (slope.view_as(flat).mul_(flat) @ self._bend.T).mul_(unit)


def _row(by_horizon: Tensor) -> Tensor:
    return by_horizon.reshape(1, -1)


class Answer:
    """`Network.answer` while it learns, and its gradient.

    The same numbers, on a CPU to the bit; a GPU draws its dropout in another way.
    """

    def __init__(self, network: Network) -> None:
        """The network, whose parameters have gradients, which are written to."""
        self._dropout, self._head = network.dropout, network.head
        self._state = self._corrections = torch.empty(0)
        self._noise: Tensor | None = None

    @torch.no_grad()
    def forward(self, state: Tensor) -> Tensor:
        """The corrections [batch, horizon + 1], from the LSTM's state [batch, hidden]."""
        self._noise = None
        if self._dropout.training and self._dropout.p:
            kept = 1 - self._dropout.p
            self._noise = torch.empty_like(state).bernoulli_(kept).div_(kept or 1)
            state = state * self._noise
        self._state = state
        self._corrections = torch.tanh(linear(state, self._head.weight, self._head.bias))
        return self._corrections

    @torch.no_grad()
    def backward(self, slope: Tensor) -> Tensor:
        """Set the head's gradients from the loss's slope along the corrections.

        Returns:
            The slope along the state.
        """
        weight, bias = self._head.weight, self._head.bias
        assert weight.grad is not None
        assert bias.grad is not None
        inner = torch.ops.aten.tanh_backward(slope, self._corrections)
        torch.mm(inner.T, self._state, out=weight.grad)
        torch.sum(inner, 0, out=bias.grad)
        along: Tensor = inner @ weight
        return along if self._noise is None else along.mul_(self._noise)
