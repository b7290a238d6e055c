"""The evidence that the gate judges: every contestant on the same most recent days.

The days are those that `windows.split` keeps for the gate, on which nothing was learned. The best
classical baseline is chosen on the validation days before them.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from forecasting import backtest, baselines
from forecasting.contract import Contract
from forecasting.errors import ContractError, HistoryError, ModelError
from forecasting.garch import garch_quantiles
from forecasting.gate import CANDIDATE, INTERVALS, PRODUCTION, WALK, Evidence
from forecasting.inference import Forecaster
from forecasting.metrics import Array, inside
from forecasting.windows import Windows, join, make_windows, split

Baseline = Callable[[pd.DataFrame, baselines.Origins, int, tuple[float, ...]], Array]

CLASSICAL: dict[str, Baseline] = {"GARCH": garch_quantiles, "HAR": baselines.har_quantiles}
"""Both with filtered history: the ones that are hardest to beat."""
MONTH = 22
"""Sessions over which the volatility is taken that tells calm from volatile."""
SEASON = (14, 45)
"""Days of a quarter, from 0, on which most companies report the one before or have just done so:
the middle of January, April, July and October to the middle of the month after. There is no
calendar of the reports themselves in the prices."""


def gather(
    frames: Mapping[str, pd.DataFrame],
    candidate: Path,
    production: Path | None,
    *,
    horizon: int,
    validation_days: int,
    gate_days: int,
) -> Evidence:
    """Ask every contestant about the gate's windows.

    Args:
        frames: prices of each symbol, as known on the day of the training.
        candidate: folder of a model version.
        production: folder of the version in production, if there is one.
        horizon: days ahead that are forecast.
        validation_days: windows before the gate's that chose the candidate.
        gate_days: windows to be judged on.

    Returns:
        Evidence; what a contestant cannot answer is NaN, with the reason in `problems`.

    Raises:
        HistoryError: the prices are too short to be split.
    """
    try:
        challenger = Forecaster.load(candidate, version=0)
        windows = {
            symbol: _windows(challenger, frame, symbol, horizon) for symbol, frame in frames.items()
        }
    except ContractError as error:
        return Evidence.nothing(f"The candidate cannot be loaded: {error}")
    cut = split(join(list(windows.values())), validation_days, gate_days)
    asked = {
        symbol: each.take(np.isin(each.origins, cut.gate.origins) & each.known)
        for symbol, each in windows.items()
    }
    asked = {symbol: each for symbol, each in asked.items() if len(each)}
    levels = challenger.contract.quantile_levels
    contest = _Contest(frames, asked, horizon)
    problems = _leaks(challenger.contract, frames, cut.gate.origins.min())
    quantiles, failed = contest.answers(challenger)
    problems += [f"The candidate cannot be scored: {each}" for each in failed]
    crps = {
        CANDIDATE: contest.score(quantiles, levels),
        WALK: contest.of_baseline(baselines.random_walk_quantiles, levels),
    }
    validation = {
        symbol: each.take(np.isin(each.origins, cut.validation.origins) & each.known)
        for symbol, each in windows.items()
    }
    classical, scores = _classical(contest, _Contest(frames, validation, horizon), levels)
    crps |= scores
    standing = None if production is None else contest.of_production(production)
    served = np.ones(len(crps[CANDIDATE]), dtype=np.bool_)
    if standing is not None:
        crps[PRODUCTION], served = standing.crps, standing.served
        failed = [f"The model in production cannot be scored: {each}" for each in standing.failed]
        problems += failed
    volatility = np.concatenate([_rank(frames[name], each) for name, each in asked.items()])
    gate = join(list(asked.values()))
    return Evidence(
        origins=gate.origins,
        symbols=np.concatenate([np.full(len(each), name) for name, each in asked.items()]),
        last_close=gate.last_close,
        returns=gate.returns,
        levels=levels,
        quantiles=quantiles,
        crps=crps,
        classical=classical,
        volatility=volatility,
        slices={
            "calm": volatility < 0.5,
            "volatile": volatility >= 0.5,
            "after earnings": after_earnings(gate.origins),
        },
        served=served,
        fresher=standing is not None and standing.is_older_than(challenger.contract),
        held={} if standing is None else standing.held,
        problems=tuple(problems),
    )


def after_earnings(origins: NDArray[np.datetime64]) -> NDArray[np.bool_]:
    """Whether a day lies in the weeks in which companies report their quarter, `SEASON`; [n]."""
    days = origins.astype("datetime64[D]")
    months = days.astype("datetime64[M]").astype(np.int64)
    quarter = (months - months % 3).astype("datetime64[M]").astype("datetime64[D]")
    since = (days - quarter).astype(np.int64)
    season: NDArray[np.bool_] = (since >= SEASON[0]) & (since < SEASON[1])
    return season


@dataclass(frozen=True, eq=False)
class _Production:
    """What the version in production answers, in the order of the contest's windows.

    Attributes:
        crps: basis points [n, h], NaN where there is no answer.
        served: [n], windows whose symbol it serves.
        held: [n, h] by probability, whether its central interval held the outcome.
        contract: None if it cannot be loaded.
        failed: why there are no answers.
    """

    crps: Array
    served: NDArray[np.bool_]
    held: Mapping[float, NDArray[np.bool_]]
    contract: Contract | None
    failed: list[str]

    def is_older_than(self, other: Contract) -> bool:
        """Whether the other has learned from later days."""
        return self.contract is not None and other.train_end > self.contract.train_end


class _Contest:
    """Windows of each symbol to be asked about, and answers in their order."""

    def __init__(
        self, frames: Mapping[str, pd.DataFrame], asked: Mapping[str, Windows], horizon: int
    ) -> None:
        self.frames, self.asked, self.horizon = frames, asked, horizon
        self.returns = np.concatenate([each.returns for each in asked.values()])

    def score(self, quantiles: Array, levels: tuple[float, ...]) -> Array:
        """CRPS in basis points [n, h]."""
        return backtest.score(self.returns, quantiles, levels)

    def answers(self, forecaster: Forecaster) -> tuple[Array, list[str]]:
        """Log-return quantiles [n, h, k], and why there are none."""
        parts, failed = [], []
        for windows in self.asked.values():
            try:
                parts.append(backtest.return_quantiles(forecaster, windows))
            except ModelError as error:
                shape = (*windows.returns.shape, len(forecaster.contract.quantile_levels))
                parts.append(np.full(shape, np.nan))
                failed.append(str(error))
        return np.concatenate(parts), failed

    def of_baseline(self, baseline: Baseline, levels: tuple[float, ...]) -> Array:
        """CRPS of a baseline [n, h].

        Raises:
            HistoryError: a symbol has too few rows for it.
        """
        parts = [
            baseline(self.frames[symbol], windows.origins, self.horizon, levels)
            for symbol, windows in self.asked.items()
            if len(windows)
        ]
        return self.score(np.concatenate(parts), levels)

    def of_production(self, folder: Path) -> "_Production":
        """What the version in production says to the windows of the symbols that it serves."""
        try:
            champion = Forecaster.load(folder, version=0)
        except ContractError as error:
            everything = np.ones(len(self.returns), dtype=np.bool_)
            nothing = np.full(self.returns.shape, np.nan)
            return _Production(nothing, everything, {}, None, [str(error)])
        levels = champion.contract.quantile_levels
        parts, served, failed = [], [], []
        for symbol, windows in self.asked.items():
            known = symbol in champion.contract.symbols
            served.append(np.full(len(windows), known))
            quantiles = np.full((*windows.returns.shape, len(levels)), np.nan)
            if known:
                try:
                    theirs = _windows(champion, self.frames[symbol], symbol, self.horizon)
                    quantiles = backtest.return_quantiles(champion, theirs.at(windows.origins))
                except (ModelError, HistoryError) as error:
                    failed.append(str(error))
            parts.append(quantiles)
        answers = np.concatenate(parts)
        return _Production(
            crps=self.score(answers, levels),
            served=np.concatenate(served),
            held=_held(self.returns, answers, levels),
            contract=champion.contract,
            failed=failed,
        )


def _held(
    returns: Array, quantiles: Array, levels: tuple[float, ...]
) -> dict[float, NDArray[np.bool_]]:
    """Whether each central interval that the gate judges held the outcome, [n, h] each."""
    found = {}
    for mass in INTERVALS:
        with suppress(ValueError):  # of levels that do not reach as far out
            found[mass] = inside(returns, quantiles, levels, mass)
    return found


def _windows(forecaster: Forecaster, frame: pd.DataFrame, symbol: str, horizon: int) -> Windows:
    contract = forecaster.contract
    return make_windows(frame, contract.context, horizon, contract.symbol_index(symbol))


def _classical(
    gate: _Contest, validation: _Contest, levels: tuple[float, ...]
) -> tuple[str, dict[str, Array]]:
    """Name of the classical baseline that did best on validation, and the gate's scores of all.

    One that a symbol's history is too short for is left out.
    """
    earlier: dict[str, float] = {}
    scores: dict[str, Array] = {}
    for name, baseline in CLASSICAL.items():
        try:
            before = float(validation.of_baseline(baseline, levels).mean())
            now = gate.of_baseline(baseline, levels)
        except HistoryError:
            continue
        if np.isfinite(before) and np.isfinite(now).all():
            earlier[name], scores[name] = before, now
    return min(earlier, key=lambda name: earlier[name], default=""), scores


def _leaks(
    contract: Contract, frames: Mapping[str, pd.DataFrame], first: np.datetime64
) -> list[str]:
    """What the candidate has learned from must have come true by the gate's first origin."""
    learned = np.datetime64(contract.train_end, "D")
    for symbol, frame in frames.items():
        days = frame.index.to_numpy().astype("datetime64[D]")
        known = int(np.searchsorted(days, learned, side="right")) - 1 + contract.horizon
        if known > int(np.searchsorted(days, first)):
            return [
                f"Leak: it has learned from days up to {contract.train_end}, of which the next "
                f"{contract.horizon} reach beyond {first}, the first of the gate's days "
                f"({symbol}). Train on earlier days."
            ]
    return []


def _rank(frame: pd.DataFrame, windows: Windows) -> Array:
    """Rank, 0 to 1, of each window's volatility over the month before it, as known then."""
    monthly = pd.Series(baselines.range_variance(frame)).rolling(MONTH, min_periods=1).mean()
    known = monthly.to_numpy()[baselines.positions(frame, windows.origins)]
    rank: Array = (np.argsort(np.argsort(known, kind="stable")) + 0.5) / len(known)
    return rank
