"""A batch that threads share: the gradient of one thread, the same each time."""

import copy

import pytest
import torch

from forecasting.hyperparameters import ModelConfig
from forecasting.loss import BP, Answer, Loss, crps
from forecasting.model import untrained
from forecasting.network import Network, features
from forecasting.shards import Shards, thread_pool
from forecasting.windows import Splits, make_windows, split
from tests.market import market


@pytest.fixture(scope="module")
def splits() -> Splits:
    return split(make_windows(market(420), 40, 5), 40, 40)


@pytest.fixture
def network(splits) -> Network:
    """Whose corrections are some."""
    network = untrained(splits, ModelConfig(hidden=8, layers=2, dropout=0.3))
    torch.nn.init.normal_(network.head.weight, generator=torch.Generator().manual_seed(1))
    return network


@pytest.fixture(scope="module")
def batch(splits):
    ohlcv = torch.from_numpy(splits.train.ohlcv)
    returns = torch.from_numpy(splits.train.returns).float()
    return ohlcv, features(ohlcv, torch.from_numpy(splits.train.dates)), returns


def _gradient(network: Network, batch, rows: torch.Tensor, threads: int, seed: int = 3):
    ohlcv, inputs, returns = batch
    with thread_pool(threads) as pool:
        torch.manual_seed(seed)
        shards = Shards(network, threads, pool)
        corrections = shards.corrections(inputs[rows])
        sigma = network.volatility(ohlcv)
        loss, slope = Loss(network)(corrections, sigma[rows], returns[rows])
        shards.backward(slope)
        return loss, shards.gradient.clone()


def test_the_slope_is_what_autograd_makes_of_the_crps(network, batch):
    ohlcv, inputs, returns = batch
    network = network.eval().double()
    sigma, returns = network.volatility(ohlcv.double()), returns.double()
    corrections = network.corrections(inputs.double()).detach().requires_grad_()
    plain = crps(returns, network.spread(sigma, corrections)).mean() * BP
    plain.backward()
    loss, slope = Loss(network)(corrections, sigma, returns)
    torch.testing.assert_close(loss, plain.detach())
    torch.testing.assert_close(slope, corrections.grad)
    assert float(slope.abs().min()) > 0
    weighed = Loss(network)(corrections, sigma, returns, weight=0.25)
    torch.testing.assert_close(weighed, (loss / 4, slope / 4))


@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
def test_the_answer_and_its_gradients_are_autograds_to_the_bit(splits, dropout):
    network = untrained(splits, ModelConfig(hidden=8, dropout=dropout))
    torch.nn.init.normal_(network.head.weight)
    parameters = (network.head.weight, network.head.bias)
    state, slope = torch.randn(64, 8, requires_grad=True), torch.randn(64, 6)
    for training in (True, False):
        network.train(training)
        torch.manual_seed(5)
        plain = network.answer(state)
        expected = torch.autograd.grad(plain, (state, *parameters), slope)
        for each in parameters:
            each.grad = torch.ones_like(each)  # of the batch before
        torch.manual_seed(5)
        answer = Answer(network)
        assert torch.equal(answer.forward(state.detach()), plain)
        along = answer.backward(slope)
        assert all(map(torch.equal, (along, *(each.grad for each in parameters)), expected))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("rows", [64, 63, 2, 1])
def test_threads_come_to_the_gradient_of_one(network, batch, threads, rows):
    chosen = torch.arange(100, 100 + rows)
    loss, gradient = _gradient(network, batch, chosen, 1)
    shared_loss, shared = _gradient(network, batch, chosen, threads)
    torch.testing.assert_close(shared_loss, loss)
    torch.testing.assert_close(shared, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    assert float(gradient.abs().max()) > 0


def test_batch_after_batch_comes_to_what_autograd_makes_of_the_network(network, batch):
    ohlcv, inputs, returns = batch
    sigma = network.volatility(ohlcv)
    plain = copy.deepcopy(network)
    with thread_pool(3) as pool:
        shards = Shards(network, 3, pool)
        for number, rows in enumerate((64, 1, 63, 2, 3, 64, 5)):
            torch.manual_seed(number)
            plain.zero_grad()
            made = plain.corrections(inputs[:rows])
            _, slope = Loss(plain)(made, sigma[:rows], returns[:rows])
            made.backward(slope)
            torch.manual_seed(number)
            corrections = shards.corrections(inputs[:rows])
            _, slope = Loss(network)(corrections, sigma[:rows], returns[:rows])
            shards.backward(slope)
            expected = torch.cat([each.grad.flatten() for each in plain.parameters()])
            assert float((shards.gradient - expected).abs().max() / expected.abs().max()) < 1e-5
            with torch.no_grad():
                for each, other in zip(network.parameters(), plain.parameters(), strict=True):
                    each.sub_(0.01 * torch.sign(each.grad))
                    other.copy_(each)


def test_dropout_of_threads_comes_from_the_seed(network, batch):
    rows = torch.arange(64)
    first, again, other = (_gradient(network, batch, rows, 2, seed)[1] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
