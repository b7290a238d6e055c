"""The network: a volatility forecast around the last price, and an LSTM that corrects its shape.

Raw rows in, price quantiles out; features, scaling and the way back to prices are part of the
graph, so that nothing is left to compute where it is served.

1. A heterogeneous autoregression (Corsi 2009) forecasts, for each horizon, the log of the mean
   range variance, log(high / low)^2 / (4 log 2) (Parkinson 1980), from its means over the last 1,
   5 and 22 rows. Its coefficients are ordinary least squares, held as buffers.
2. The quantiles of past returns divided by that volatility (filtered historical simulation) turn
   it into a distribution. That much is the volatility baseline.
3. An LSTM scales it per horizon and thickens or thins its tails; it does not move its middle,
   since a learned mean or skew did worse on days it had not seen. The corrections are monotone in
   the quantile, so quantiles never cross; they are bounded, and start near nothing.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

from forecasting.contract import QUANTILE_LEVELS
from forecasting.hyperparameters import ModelConfig
from forecasting.windows import Windows

SPANS = (1, 5, 22)
"""Rows over which the autoregression averages past log variance."""
FLOOR = 1e-6
"""Added to a variance before its log: a day that never moved counts as 0.1 % of movement."""
TAIL_REACH = 0.25
"""Largest change of the power to which a quantile, in units of sigma, is raised."""
FEATURES = 11
QUARTER = 365.25 / 4
_PARKINSON = 1 / (4 * math.log(2))


class Volatility(nn.Module):
    """The baseline: sigma per horizon, and the quantiles of returns in units of sigma.

    Buffers (one row a symbol): `coefficients` [symbols, horizon, 4], `shape` [symbols, horizon,
    levels].
    """

    coefficients: Tensor
    shape: Tensor

    def __init__(self, horizon: int, symbols: int) -> None:
        super().__init__()
        self.horizon = horizon
        terms, levels = len(SPANS) + 1, len(QUANTILE_LEVELS)
        self.register_buffer("coefficients", torch.zeros(symbols, horizon, terms))
        self.register_buffer("shape", torch.zeros(symbols, horizon, levels))
        steps = torch.arange(1, horizon + 1, dtype=torch.float32)
        self.register_buffer("root_steps", steps.sqrt(), persistent=False)

    def forward(self, ohlcv: Tensor, symbol: Tensor) -> tuple[Tensor, Tensor]:
        """Sigma of the h-day log return [batch, horizon] and its quantiles [batch, horizon, k]."""
        terms = regressors(ohlcv).unsqueeze(1)
        log_variance = (terms * self.coefficients[symbol]).sum(-1)
        sigma = torch.exp(0.5 * log_variance) * cast(Tensor, self.root_steps)
        return sigma, self.shape[symbol]

    @torch.no_grad()
    def estimate(self, windows: Windows) -> None:
        """Set the buffers from windows whose targets are known, in float64, symbol by symbol."""
        levels = torch.tensor(QUANTILE_LEVELS, dtype=torch.float64)
        for index in range(len(self.coefficients)):
            own = windows.take(windows.symbol == index)
            terms = regressors(torch.from_numpy(own.ohlcv).double())
            ahead = log_variance(torch.from_numpy(own.ranges) * _PARKINSON)
            solved = torch.linalg.lstsq(terms, ahead, driver="gelsd").solution
            sigma = torch.exp(0.5 * terms @ solved) * cast(Tensor, self.root_steps).double()
            residuals = torch.from_numpy(own.returns) / sigma
            self.coefficients[index] = solved.T
            self.shape[index] = torch.quantile(residuals, levels, dim=0).T


class Network(nn.Module):
    """Price quantiles from rows; see the module's docstring.

    With the buffer `switch` at 0 the LSTM is off and the volatility baseline is what comes out;
    nothing else is computed then, nor exported.
    """

    switch: Tensor

    def __init__(self, config: ModelConfig, horizon: int, symbols: int) -> None:
        super().__init__()
        self.horizon, self.reach = horizon, config.reach
        self.hidden, self.layers = config.hidden, config.layers
        self.volatility = Volatility(horizon, symbols)
        self.lstm = nn.LSTM(FEATURES, config.hidden, config.layers, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden, horizon + 1)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("switch", torch.ones(()))

    def forward(self, ohlcv: Tensor, dates: Tensor, symbol: Tensor) -> Tensor:
        """Price quantiles [batch, horizon, levels].

        Args:
            ohlcv: float32 [batch, context, 5].
            dates: int64 [batch, context], days since 1970-01-01.
            symbol: int64 [batch].
        """
        sigma, shape = self.volatility(ohlcv, symbol)
        moves = self.correct(features(ohlcv, dates), sigma, shape)
        return ohlcv[:, -1, 3, None, None] * torch.exp(moves)

    def correct(self, inputs: Tensor, sigma: Tensor, shape: Tensor) -> Tensor:
        """Quantiles of log returns [batch, horizon, levels], the baseline corrected by the LSTM.

        Args:
            inputs: [batch, context - 1, FEATURES].
            sigma: [batch, horizon].
            shape: [batch, horizon, levels], in units of sigma.
        """
        if not self.switch:
            return sigma.unsqueeze(-1) * shape
        start = inputs.new_zeros(self.layers, inputs.shape[0], self.hidden)
        states, _ = self.lstm(inputs, (start, start))
        bounded = torch.tanh(self.head(self.dropout(states[:, -1])))
        scale = sigma * torch.exp(self.reach * bounded[:, :-1])
        size = shape.abs().clamp(min=1e-6)
        bent = shape * torch.exp(TAIL_REACH * bounded[:, -1, None, None] * torch.log(size))
        return scale.unsqueeze(-1) * bent


def log_variance(variance: Tensor) -> Tensor:
    """Log with a floor."""
    return torch.log(variance + FLOOR)


def _daily(ohlcv: Tensor) -> Tensor:
    """Log range variance of each row, [batch, context]."""
    return log_variance(torch.log(ohlcv[:, :, 1] / ohlcv[:, :, 2]).square() * _PARKINSON)


def regressors(ohlcv: Tensor) -> Tensor:
    """[batch, 4]: one, and the mean log range variance of the last 1, 5 and 22 rows."""
    daily = _daily(ohlcv)
    means = [daily[:, -span:].mean(1) for span in SPANS]
    return torch.stack([torch.ones_like(means[0]), *means], dim=1)


def features(ohlcv: Tensor, dates: Tensor) -> Tensor:
    """What the LSTM sees, [batch, context - 1, FEATURES], from the window's second row on.

    All are ratios, so that prices and volumes of any unit give the same: return, overnight and
    intraday move in units of the window's volatility; log range variance against the window's
    mean; place of the close in the day's range; log volume against the window's mean; days since
    the last session; and two harmonics of the quarter, which is when earnings come.
    """
    opened, high, low, close, volume = ohlcv.unbind(-1)
    daily = _daily(ohlcv)
    level = daily.mean(1, keepdim=True)
    sigma = torch.exp(0.5 * level)
    before = close[:, :-1]
    log_volume = torch.log1p(volume)
    spread = high - low + 1e-6 * close
    days = dates.to(ohlcv.dtype)
    quarter = days / QUARTER
    angle = (quarter - torch.floor(quarter))[:, 1:] * (2 * math.pi)
    columns = [
        torch.log(close[:, 1:] / before) / sigma,
        torch.log(opened[:, 1:] / before) / sigma,
        (torch.log(close / opened) / sigma)[:, 1:],
        (daily - level)[:, 1:],
        ((2 * close - high - low) / spread)[:, 1:],
        (log_volume - log_volume.mean(1, keepdim=True))[:, 1:],
        (days[:, 1:] - days[:, :-1] - 1) / 2,
        torch.sin(angle),
        torch.cos(angle),
        torch.sin(2 * angle),
        torch.cos(2 * angle),
    ]
    return torch.stack(columns, dim=-1).clamp(-5.0, 5.0)
