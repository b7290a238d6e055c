"""The network: its baseline against a slow loop, and what must hold for any weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forecasting.contract import QUANTILE_LEVELS
from forecasting.network import FLOOR, SPANS, ModelConfig, Network, Volatility, features
from forecasting.windows import Windows, join, make_windows
from tests.market import market

CONTEXT, HORIZON = 40, 5


@pytest.fixture(scope="module")
def windows() -> Windows:
    every = make_windows(market(320), CONTEXT, HORIZON)
    return every.take(every.known)


def _network(windows: Windows, seed: int = 1, boldness: float = 30.0) -> Network:
    """A network whose LSTM corrects boldly, as no fit would leave it."""
    torch.manual_seed(seed)
    network = Network(ModelConfig(hidden=8), CONTEXT, HORIZON)
    network.volatility.estimate(windows)
    with torch.no_grad():
        network.head.weight.mul_(boldness)
    return network.eval()


@torch.no_grad()
def _prices(network: Network, windows: Windows) -> np.ndarray:
    inputs = (windows.ohlcv, windows.dates, windows.symbol)
    return network(*map(torch.from_numpy, inputs)).numpy()


def test_volatility_agrees_with_a_slow_loop(windows):
    volatility = Volatility(CONTEXT, HORIZON)
    volatility.estimate(windows)
    sigma = volatility(torch.from_numpy(windows.ohlcv))

    def log_variance(rows):
        return np.array([np.log(np.log(r[1] / r[2]) ** 2 / (4 * np.log(2)) + FLOOR) for r in rows])

    design = np.array(
        [
            [1.0, *(log_variance(window[-span:]).mean() for span in (*SPANS, CONTEXT))]
            for window in windows.ohlcv.astype(float)
        ]
    )
    for h in range(HORIZON):
        target = np.log(windows.ranges[:, h] / (4 * np.log(2)) + FLOOR)
        solved = np.linalg.solve(design.T @ design, design.T @ target)
        slow = np.exp(0.5 * design @ solved) * np.sqrt(h + 1)
        np.testing.assert_allclose(sigma[:, h].numpy(), slow, rtol=1e-3)
        residuals = np.quantile(windows.returns[:, h] / slow, QUANTILE_LEVELS)
        residuals[QUANTILE_LEVELS.index(0.5)] = 0.0
        np.testing.assert_allclose(volatility.shape[h].numpy(), residuals, rtol=1e-3, atol=1e-4)


def test_whatever_the_past_drifted_the_middle_is_the_last_price(windows):
    rising = replace(windows, returns=windows.returns + 0.05)
    prices = _prices(_network(rising), windows)
    np.testing.assert_array_equal(
        prices[:, :, QUANTILE_LEVELS.index(0.5)],
        np.repeat(windows.ohlcv[:, -1:, 3], HORIZON, axis=1),
    )
    assert (np.diff(prices, axis=-1) >= 0).all()


def test_one_baseline_is_learned_from_all_symbols_and_answers_for_any(windows):
    other = make_windows(market(320, seed=5), CONTEXT, HORIZON, symbol_index=1)
    both = join([windows, other.take(other.known)])
    network, alone = _network(both), _network(windows)
    assert not torch.equal(network.volatility.shape, alone.volatility.shape)
    renamed = replace(both, symbol=np.full_like(both.symbol, 77))
    np.testing.assert_array_equal(_prices(network, renamed), _prices(network, both))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), boldness=st.floats(0, 1000))
def test_quantiles_never_cross(windows, seed, boldness):
    prices = _prices(_network(windows, seed, boldness), windows)
    assert np.isfinite(prices).all()
    assert (np.diff(prices, axis=-1) >= 0).all()


@settings(max_examples=25, deadline=None)
@given(factor=st.floats(1e-3, 1e4), shares=st.floats(0.01, 100))
def test_prices_in_another_unit_give_quantiles_in_that_unit(windows, factor, shares):
    network = _network(windows)
    scaled = replace(
        windows,
        ohlcv=(windows.ohlcv * np.array([factor] * 4 + [shares])).astype(np.float32),
    )
    np.testing.assert_allclose(
        _prices(network, scaled), _prices(network, windows) * factor, rtol=1e-3
    )


def test_switched_off_it_is_the_volatility_baseline(windows):
    network = _network(windows)
    corrected = _prices(network, windows)
    network.switch.zero_()
    sigma = network.volatility(torch.from_numpy(windows.ohlcv)).numpy()[:, :, None]
    baseline = windows.last_close[:, None, None] * np.exp(sigma * network.volatility.shape.numpy())
    np.testing.assert_allclose(_prices(network, windows), baseline, rtol=1e-6)
    assert np.abs(corrected / baseline - 1).max() > 1e-3


def test_rows_that_stand_still_or_are_extreme_give_finite_features(windows):
    still = np.full_like(windows.ohlcv[:2], 50.0)
    still[:, :, 4] = 0.0
    wild = still.copy()
    wild[:, ::2, :4] *= 1e4
    for rows in (still, wild):
        found = features(torch.from_numpy(rows), torch.from_numpy(windows.dates[:2]))
        assert torch.isfinite(found).all()
        assert found.abs().max() <= 5
        changed = replace(windows.take(np.arange(2)), ohlcv=rows)
        assert np.isfinite(_prices(_network(windows), changed)).all()
