"""The network: a volatility forecast around the last price, and an LSTM that corrects its shape.

Raw rows in, price quantiles out; features, scaling and the way back to prices are part of the
graph, so that nothing is left to compute where it is served.

1. A heterogeneous autoregression (Corsi 2009) forecasts, for each horizon, the log of the mean
   range variance, log(high / low)^2 / (4 log 2) (Parkinson 1980), from the means of its log over
   the last 1, 5 and 22 rows and over the whole window. Its coefficients are ordinary least squares
   over all windows of all symbols, held as buffers.
2. The quantiles of past returns divided by that volatility (filtered historical simulation) turn
   it into a distribution whose middle is the last price, again over all symbols: what a short
   history has not seen yet, another's has. That much is the volatility baseline.
3. An LSTM scales it per horizon and thickens or thins its tails; it does not move its middle,
   since a learned mean or skew did worse on days it had not seen. The corrections are monotone in
   the quantile, so quantiles never cross; they are bounded, and start near nothing.

Nothing is tied to a symbol, so that a version answers for one that it was not trained on as well.
"""

import math

import torch
from torch import Tensor, nn

from forecasting.contract import QUANTILE_LEVELS
from forecasting.hyperparameters import ModelConfig
from forecasting.windows import Windows

SPANS = (1, 5, 22)
"""Rows over which the autoregression averages past log variance, beside the whole window."""
FLOOR = 1e-6
"""Added to a variance before its log: a day that never moved counts as 0.1 % of movement."""
TAIL_REACH = 0.25
"""Largest change of the power to which a quantile, in units of sigma, is raised."""
FEATURES = 11
QUARTER = 365.25 / 4
_PARKINSON = 1 / (4 * math.log(2))


class Volatility(nn.Module):
    """The baseline: sigma per horizon, and the quantiles of returns in units of sigma.

    An average over rows and a regression on averages are one matrix: so they are held.

    Buffers: `weights` [context, horizon] and `bias` [horizon], which make the log variance of the
    h-day return of the log variances of the rows; `shape` [horizon, levels].
    """

    weights: Tensor
    bias: Tensor
    shape: Tensor

    def __init__(self, context: int, horizon: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.zeros(context, horizon))
        self.register_buffer("bias", torch.zeros(horizon))
        self.register_buffer("shape", torch.zeros(horizon, len(QUANTILE_LEVELS)))

    def forward(self, ohlcv: Tensor) -> Tensor:
        """Sigma of the h-day log return, [batch, horizon]."""
        return torch.exp(0.5 * torch.addmm(self.bias, _daily(ohlcv), self.weights))

    def size(self) -> Tensor:
        """How far out each quantile lies, in units of sigma, [horizon, levels]; never nothing."""
        return self.shape.abs().clamp(min=1e-6)

    @torch.no_grad()
    def estimate(self, windows: Windows) -> None:
        """Set the buffers from windows whose targets are known, of any symbols, in float64."""
        daily = _daily(torch.from_numpy(windows.ohlcv).double())
        averages = _averages(daily.shape[1])
        terms = torch.cat([torch.ones(len(daily), 1).double(), daily @ averages], dim=1)
        ahead = log_variance(torch.from_numpy(windows.ranges) * _PARKINSON)
        solved = torch.linalg.lstsq(terms, ahead, driver="gelsd").solution
        steps = torch.arange(1, windows.horizon + 1).double()
        self.weights.copy_(averages @ solved[1:])
        self.bias.copy_(solved[0] + steps.log())
        sigma = torch.exp(0.5 * terms @ solved) * steps.sqrt()
        levels = torch.tensor(QUANTILE_LEVELS, dtype=torch.float64)
        residuals = torch.from_numpy(windows.returns) / sigma
        shape = torch.quantile(residuals, levels, dim=0).T
        # The point forecast is the last price: no mean earned its place.
        shape[:, levels == 0.5] = 0
        self.shape.copy_(torch.where(levels < 0.5, shape.clamp(max=0), shape.clamp(min=0)))


def _averages(context: int) -> Tensor:
    """[context, 4], float64: what makes of a window its means over `SPANS` and over all of it."""
    columns = torch.zeros(context, len(SPANS) + 1).double()
    for column, span in enumerate((*SPANS, context)):
        columns[-span:, column] = 1 / span
    return columns


class Network(nn.Module):
    """Price quantiles from rows; see the module's docstring.

    With the buffer `switch` at 0 the LSTM is off and the volatility baseline is what comes out;
    nothing else is computed then, nor exported.
    """

    switch: Tensor

    def __init__(self, config: ModelConfig, context: int, horizon: int) -> None:
        super().__init__()
        self.reach = config.reach
        self.hidden, self.layers = config.hidden, config.layers
        self.volatility = Volatility(context, horizon)
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
            symbol: int64 [batch]; whatever it is, the answer is the same.
        """
        moves = self.correct(features(ohlcv, dates), self.volatility(ohlcv))
        return ohlcv[:, -1, 3, None, None] * torch.exp(moves)

    def correct(self, inputs: Tensor, sigma: Tensor) -> Tensor:
        """Quantiles of log returns [batch, horizon, levels], the baseline corrected by the LSTM.

        Args:
            inputs: [batch, context - 1, FEATURES].
            sigma: [batch, horizon].
        """
        return self.spread(sigma, self.corrections(inputs))

    def corrections(self, inputs: Tensor) -> Tensor | None:
        """What the LSTM says, each within -1 and 1: of each horizon's scale, and of the tails.

        Returns:
            [batch, horizon + 1]; None if it is off.
        """
        return self.answer(self.state(inputs)) if self.switch else None

    def state(self, inputs: Tensor) -> Tensor:
        """What the LSTM has made of the rows at the last of them, [batch, hidden]."""
        start = inputs.new_zeros(self.layers, inputs.shape[0], self.hidden)
        last: Tensor
        _, (last, _) = self.lstm(inputs, (start, start))
        return last[-1]

    def answer(self, state: Tensor) -> Tensor:
        """The corrections, from `state`."""
        return torch.tanh(self.head(self.dropout(state)))

    def spread(self, sigma: Tensor, corrections: Tensor | None) -> Tensor:
        """Quantiles of log returns [batch, horizon, levels] from sigma and `corrections`."""
        shape = self.volatility.shape
        if corrections is None:
            return sigma.unsqueeze(-1) * shape
        scale = sigma * torch.exp(self.reach * corrections[:, :-1])
        size = self.volatility.size()
        bent = shape * torch.exp(TAIL_REACH * corrections[:, -1, None, None] * torch.log(size))
        return scale.unsqueeze(-1) * bent


def log_variance(variance: Tensor) -> Tensor:
    """Log with a floor."""
    return torch.log(variance + FLOOR)


def _daily(ohlcv: Tensor) -> Tensor:
    """Log range variance of each row, [batch, context]."""
    return log_variance(torch.log(ohlcv[:, :, 1] / ohlcv[:, :, 2]).square() * _PARKINSON)


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
