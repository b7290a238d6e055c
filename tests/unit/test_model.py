"""Fit and export: quality of the start, reproducible to the byte, free of leaks."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from forecasting import backtest, metrics
from forecasting.contract import GOLDEN_FILE, MODEL_FILE, QUANTILE_LEVELS, Golden, decode, seal
from forecasting.errors import TrainingError
from forecasting.inference import Forecaster
from forecasting.model import (
    CHECKPOINT,
    YEARLY,
    Fitted,
    ModelConfig,
    _Inputs,
    _widths,
    crps,
    export_onnx,
    fit,
    quantiles_of_returns,
)
from forecasting.network import Network
from forecasting.windows import Splits, make_windows, split
from tests.market import goog, market

CONFIG = ModelConfig(hidden=8)


def _splits(frame) -> Splits:
    return split(make_windows(frame, 40, 5), 40, 40)


@pytest.fixture(scope="module")
def splits() -> Splits:
    return _splits(market(420))


@pytest.fixture(scope="module")
def fitted(splits, tmp_path_factory) -> Fitted:
    made = fit(splits, CONFIG, 4, folder=tmp_path_factory.mktemp("fit"))
    assert made.kind == "lstm"  # else what is exported and compared would hold no LSTM
    return made


def _exported(fitted: Fitted, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    export_onnx(fitted, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _load(fitted: Fitted, folder: Path) -> Forecaster:
    facts = dict.fromkeys(("forecaster", "dataset_md5", "dataset_rev", "run_id", "git_commit"), "")
    seal(
        folder,
        facts
        | {
            "symbols": ("A",),
            "kind": fitted.kind,
            "context": fitted.sample.context,
            "horizon": fitted.sample.horizon,
            "as_of": fitted.train_end,
            "train_start": fitted.train_start,
            "train_end": fitted.train_end,
        },
    )
    return Forecaster.load(folder, version=1)


def test_the_loss_is_the_metric():
    rng = np.random.default_rng(0)
    returns = rng.normal(size=(7, 3))
    quantiles = np.sort(rng.normal(size=(7, 3, len(QUANTILE_LEVELS))), axis=-1)
    np.testing.assert_allclose(
        crps(torch.from_numpy(returns), torch.from_numpy(quantiles)).numpy(),
        metrics.crps(returns, quantiles, QUANTILE_LEVELS),
        rtol=1e-6,
    )


def test_a_fit_says_how_it_went(splits, tmp_path):
    heard: list[tuple[int, float]] = []
    fitted = fit(splits, CONFIG, 3, folder=tmp_path, report=lambda *said: heard.append(said))
    assert heard == [(score.epoch, score.validation) for score in fitted.history]
    assert [epoch for epoch, _ in heard] == [1, 2, 3]
    assert fitted.trained == min(score for _, score in heard)
    # the first weights hardly correct the baseline
    assert fitted.untrained == pytest.approx(fitted.volatility, rel=1e-3)
    better = fitted.trained < min(fitted.untrained, fitted.volatility)
    assert fitted.kind == ("lstm" if better else "volatility")
    assert float(fitted.network.switch) == float(better)
    assert fitted.train_start == splits.train.first_day
    assert fitted.train_end == splits.validation.last_day
    assert (tmp_path / CHECKPOINT).is_file()


def test_a_network_that_learned_nothing_is_switched_off(splits, tmp_path):
    harmed = fit(splits, ModelConfig(hidden=8, lr=3.0), 1, folder=tmp_path)
    assert harmed.trained > harmed.volatility
    assert harmed.kind == "volatility"
    assert float(harmed.network.switch) == 0


def _widths_asked(fitted: Fitted, splits: Splits, factor: float, count: int) -> torch.Tensor:
    """What `count` days ask for whose outcomes are `factor` times as far out as was forecast."""
    torch.manual_seed(0)
    inputs = _Inputs.of(fitted.network, splits.train)
    inputs = inputs.take(torch.randint(0, len(inputs.returns), (count,)))
    with torch.no_grad():
        quantiles = fitted.network.correct(inputs.features, inputs.sigma)
    drawn = torch.rand(quantiles.shape[:2]) * 40 - 1  # between levels, the outermost beyond them
    drawn = drawn.clamp(0, len(QUANTILE_LEVELS) - 1.001)
    low, high = (quantiles.gather(2, (drawn.long() + step)[:, :, None])[:, :, 0] for step in (0, 1))
    planted = replace(inputs, returns=torch.lerp(low, high, drawn % 1) * factor)
    before = fitted.network.volatility.shape.clone()
    found = _widths(fitted.network, planted)
    assert torch.equal(fitted.network.volatility.shape, before)
    return found


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.2, 1.5])
@pytest.mark.parametrize("count", [40, 4000])
def test_intervals_widen_as_new_days_ask_for_if_there_are_enough(fitted, splits, factor, count):
    found = _widths_asked(fitted, splits, factor, count)
    assert found.min() >= 1
    if count == 4000:
        assert found.mean().item() == pytest.approx(max(factor, 1.0), rel=0.06)
    else:  # a fifth to half of the way
        assert found.max().item() < 1 + 0.75 * max(factor - 1.0, 0.2)


def test_intervals_narrow_in_another_market_by_what_is_beyond_doubt(fitted, splits):
    certain, thin = (_widths_asked(fitted, splits, 0.4, count) for count in (4000, 60))
    assert certain.mean().item() == pytest.approx(0.4 * (1 + 2 * YEARLY), rel=0.06)
    assert certain.mean() < thin.mean() < 0.8


def test_a_served_answer_is_the_backtests(fitted, splits, tmp_path):
    """One window from raw rows, as the server asks, beside returns as the benchmark scores them."""
    _exported(fitted, tmp_path / "model")
    served = _load(fitted, tmp_path / "model")
    gate = splits.gate
    scored = gate.last_close[:, None, None] * np.exp(quantiles_of_returns(fitted.network, gate))
    for row in range(0, len(gate), 7):
        one = slice(row, row + 1)
        answer = served.predict(gate.ohlcv[one], gate.dates[one], gate.symbol[one])
        np.testing.assert_allclose(answer, scored[one], rtol=1e-6)


def test_the_export_gives_what_torch_gives(fitted, splits, tmp_path):
    files = _exported(fitted, tmp_path / "model")
    assert sorted(files) == [GOLDEN_FILE, MODEL_FILE]
    forecaster = _load(fitted, tmp_path / "model")
    gate = splits.gate
    with torch.no_grad():
        expected = fitted.network(
            torch.from_numpy(gate.ohlcv),
            torch.from_numpy(gate.dates),
            torch.from_numpy(gate.symbol),
        ).numpy()
    got = forecaster.predict(gate.ohlcv, gate.dates, gate.symbol)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    one = forecaster.predict(gate.ohlcv[:1], gate.dates[:1], gate.symbol[:1])
    np.testing.assert_allclose(one, expected[:1], rtol=1e-5)
    golden = decode(files[GOLDEN_FILE], Golden, GOLDEN_FILE)
    assert golden.dates == splits.validation.dates[-1:].tolist()


def test_what_is_switched_off_is_not_exported_and_nothing_else_changes(fitted, splits, tmp_path):
    network = Network(CONFIG, 40, 5).eval()
    network.load_state_dict(fitted.network.state_dict())
    network.switch.zero_()
    off = replace(fitted, network=network, kind="volatility")
    _exported(off, tmp_path / "model")
    operators = {node.op_type for node in onnx.load(tmp_path / "model" / MODEL_FILE).graph.node}
    assert operators.isdisjoint({"LSTM", "Sin", "Cos"})
    gate = splits.gate
    sigma = network.volatility(torch.from_numpy(gate.ohlcv)).numpy()[:, :, None]
    moves = sigma * network.volatility.shape.numpy()
    expected = gate.last_close[:, None, None] * np.exp(moves)
    got = _load(off, tmp_path / "model").predict(gate.ohlcv, gate.dates, gate.symbol)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


class _Unfaithful(Network):
    """Computes one thing and exports another."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(*inputs) * (1.01 if torch.jit.is_tracing() else 1.0)


def test_an_export_that_differs_from_torch_is_refused(fitted, tmp_path):
    network = _Unfaithful(CONFIG, 40, 5).eval()
    network.load_state_dict(fitted.network.state_dict())
    with pytest.raises(TrainingError, match=r"cannot be served.*does not reproduce"):
        _exported(replace(fitted, network=network), tmp_path / "model")
    assert list((tmp_path / "model").iterdir()) == []


def test_the_same_windows_and_seed_give_the_same_bytes(fitted, splits, tmp_path):
    torch.manual_seed(123)  # nobody's business
    state = torch.get_rng_state()
    again = fit(splits, CONFIG, 4, folder=tmp_path / "fit")
    assert torch.equal(torch.get_rng_state(), state)
    assert again.history == fitted.history
    first, second = _exported(fitted, tmp_path / "a"), _exported(again, tmp_path / "b")
    assert first == second
    other = fit(splits, ModelConfig(hidden=8, seed=8), 4, folder=tmp_path / "other")
    assert _exported(other, tmp_path / "c") != first
    assert str(tmp_path).encode() not in first[MODEL_FILE]


def test_a_resumed_fit_is_the_fit_that_was_interrupted(fitted, splits, tmp_path):
    fit(splits, CONFIG, 2, folder=tmp_path)
    resumed = fit(splits, CONFIG, 4, folder=tmp_path, resume=tmp_path / CHECKPOINT)
    assert resumed.history == fitted.history
    assert resumed.best_epoch == fitted.best_epoch
    for mine, theirs in zip(
        resumed.network.state_dict().values(), fitted.network.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_no_row_after_the_last_validation_target_is_looked_at(fitted, splits, tmp_path):
    frame = market(420)
    first_unseen = frame.index.get_loc(str(splits.validation.last_day)) + 5 + 1
    changed = frame.copy()
    changed.iloc[first_unseen:] = market(420, seed=9).iloc[first_unseen:] * 3
    again = fit(_splits(changed), CONFIG, 4, folder=tmp_path / "fit")
    assert _exported(again, tmp_path / "a") == _exported(fitted, tmp_path / "b")


def test_a_diverging_fit_is_an_error(splits, tmp_path):
    with pytest.raises(TrainingError, match="Lower lr"):
        fit(splits, ModelConfig(hidden=8, lr=float("inf")), 2, folder=tmp_path)


@pytest.mark.parametrize("as_of", ["2007-06-29", "2007-12-31", "2008-10-31"])
def test_untrained_it_is_as_good_as_the_random_walk_on_real_prices(as_of, tmp_path):
    frame = goog(as_of)
    splits = split(make_windows(frame, 64, 5), 120, 120)
    fitted = fit(splits, ModelConfig(), 1, folder=tmp_path)
    random_walk = backtest.score_random_walk(frame, splits.validation).mean()
    assert fitted.untrained < 1.01 * random_walk
    assert fitted.volatility < random_walk


@pytest.mark.parametrize("done", [1, 3])
def test_a_fit_that_is_interrupted_in_an_epoch_goes_on_from_the_one_before(
    fitted, splits, tmp_path, done
):
    class _PowerCut(Exception):  # noqa: N818
        pass

    def cut(epoch: int, _score: float) -> None:
        if epoch == done:
            raise _PowerCut

    with pytest.raises(_PowerCut):
        fit(splits, CONFIG, 4, folder=tmp_path, report=cut)
    heard: list[int] = []
    resumed = fit(
        *(splits, CONFIG, 4),
        folder=tmp_path,
        resume=tmp_path / CHECKPOINT,
        report=lambda epoch, _: heard.append(epoch),
    )
    assert heard == list(range(done + 1, 5))
    assert resumed.history == fitted.history
    assert _exported(resumed, tmp_path / "a") == _exported(fitted, tmp_path / "b")


def test_a_fit_stops_after_epochs_that_were_no_better_and_stays_so_when_resumed(splits, tmp_path):
    stopped = fit(splits, ModelConfig(hidden=8, lr=0.3), 40, folder=tmp_path, patience=2)
    epochs = len(stopped.history)
    assert epochs == stopped.best_epoch + 2 < 40
    resumed = fit(
        *(splits, ModelConfig(hidden=8, lr=0.3), 40),
        folder=tmp_path,
        patience=2,
        resume=tmp_path / CHECKPOINT,
    )
    assert resumed.history == stopped.history
    assert _exported(resumed, tmp_path / "a") == _exported(stopped, tmp_path / "b")


@pytest.mark.parametrize("damage", ["absent", "empty", "half", "garbage", "foreign", "other"])
def test_a_checkpoint_that_cannot_be_used_is_left_aside(fitted, splits, tmp_path, damage, caplog):
    checkpoint = tmp_path / CHECKPOINT
    if damage == "foreign":
        torch.save({"state_dict": {"weight": torch.zeros(3)}}, checkpoint)
    elif damage == "garbage":
        checkpoint.write_bytes(b"no checkpoint")
    elif damage != "absent":
        fit(splits, ModelConfig(hidden=8, seed=8), 1, folder=tmp_path)
    if damage in ("empty", "half"):
        whole = checkpoint.read_bytes()
        checkpoint.write_bytes(whole[: len(whole) // 2 if damage == "half" else 0])
    again = fit(splits, CONFIG, 4, folder=tmp_path, resume=checkpoint)
    assert again.history == fitted.history
    assert ("starting anew" in caplog.text) == (damage != "absent")


def test_threads_share_a_fit_and_come_to_the_same_bytes_each_time_and_resumed(splits, tmp_path):
    dropping = replace(CONFIG, dropout=0.5, batch_size=63)  # an odd batch, and an odd last one
    fits = [fit(splits, dropping, 4, folder=tmp_path / name, threads=2) for name in "ab"]
    assert fits[0].history == fits[1].history
    fit(splits, dropping, 2, folder=tmp_path / "c", threads=2)
    checkpoint = tmp_path / "c" / CHECKPOINT
    resumed = fit(splits, dropping, 4, folder=tmp_path / "c", threads=2, resume=checkpoint)
    assert resumed.history == fits[0].history
    one = fit(splits, replace(dropping, dropout=0.0), 3, folder=tmp_path / "one")
    two = fit(splits, replace(dropping, dropout=0.0), 3, folder=tmp_path / "two", threads=2)
    for mine, theirs in zip(two.history, one.history, strict=True):
        assert mine.train == pytest.approx(theirs.train, rel=1e-5)
        assert mine.validation == pytest.approx(theirs.validation, rel=1e-5)
    assert not [each for each in threading.enumerate() if each.name.startswith("shard")]


def test_two_workers_walk_the_way_of_one(splits, tmp_path):
    plain = replace(CONFIG, dropout=0.0, batch_size=63)  # an odd batch, and an odd last one
    one = fit(splits, plain, 3, folder=tmp_path / "one")
    heard: list[tuple[int, float]] = []
    two = fit(
        *(splits, plain, 3),
        folder=tmp_path / "two",
        workers=2,
        accelerator="cpu",
        report=lambda *said: heard.append(said),
    )
    assert heard == [(each.epoch, each.validation) for each in two.history]
    for mine, theirs in zip(two.history, one.history, strict=True):
        assert mine.train == pytest.approx(theirs.train, rel=1e-5)
        assert mine.validation == pytest.approx(theirs.validation, rel=1e-5)
    state = one.network.state_dict()
    for name, value in two.network.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-5)
    # goes on from what several workers left
    resumed = fit(splits, plain, 4, folder=tmp_path, resume=tmp_path / "two" / CHECKPOINT)
    assert resumed.history[:3] == two.history
    assert len(resumed.history) == 4


@pytest.mark.slow
def test_workers_that_drop_out_come_to_the_same_each_time_and_learn(splits, tmp_path):
    dropping = replace(CONFIG, dropout=0.5)
    told = {"workers": 2, "accelerator": "cpu"}
    a, b = (fit(splits, dropping, 3, folder=tmp_path / name, **told) for name in "ab")
    assert a.history == b.history
    assert a.trained < a.untrained


@pytest.mark.slow
def test_what_a_worker_raises_is_raised(splits, tmp_path):
    with pytest.raises(TrainingError, match=r"^Validation CRPS is nan after epoch 1.*Lower lr"):
        fit(splits, ModelConfig(hidden=8, lr=float("inf")), 2, folder=tmp_path, workers=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_a_gpu_learns_what_a_cpu_learns(splits, tmp_path):
    plain = replace(CONFIG, dropout=0.0)
    on_cpu = fit(splits, plain, 3, folder=tmp_path / "cpu", accelerator="cpu")
    on_gpu = fit(splits, plain, 3, folder=tmp_path / "gpu", accelerator="gpu")
    again = fit(splits, plain, 3, folder=tmp_path / "again", accelerator="auto")
    assert again.history == on_gpu.history
    for mine, theirs in zip(on_gpu.history, on_cpu.history, strict=True):
        assert mine.validation == pytest.approx(theirs.validation, rel=1e-3)
    assert {each.device.type for each in on_gpu.network.state_dict().values()} == {"cpu"}
    assert not torch.are_deterministic_algorithms_enabled()
    assert MODEL_FILE in _exported(on_gpu, tmp_path / "model")
