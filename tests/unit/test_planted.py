"""Planted candidates: real model folders, judged on GOOG's days of the first half of 2007.

All are variations of one network that was fitted on the days before; each gets the verdict that it
deserves, and for the right reason.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from msgspec import structs
from onnx import TensorProto, helper, numpy_helper

from forecasting import model
from forecasting.contest import gather
from forecasting.contract import (
    CONTRACT_FILE,
    GOLDEN_FILE,
    MODEL_FILE,
    QUANTILE_LEVELS,
    Golden,
    decode,
    encode,
    seal,
)
from forecasting.gate import Evidence, GateVerdict, Rule, judge
from forecasting.hyperparameters import ModelConfig
from forecasting.model import Fitted
from forecasting.windows import Splits, join, make_windows, split
from tests.market import goog
from tests.models import write_model_folder

AS_OF = date(2007, 6, 29)
EARLIER = date(2006, 6, 30)
FRAME = goog(AS_OF.isoformat())
CONTEXT, HORIZON, DAYS = 64, 5, 120
CALMER = 0.96
"""Of the gate's days beside those before them: a network this much narrower is about right."""
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def splits() -> Splits:
    return split(make_windows(FRAME, CONTEXT, HORIZON), DAYS, DAYS)


@pytest.fixture(scope="module")
def fitted(splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    return model.fit(splits, ModelConfig(seed=7), 1, folder=tmp_path_factory.mktemp("fit"))


@pytest.fixture
def write(fitted: Fitted, splits: Splits, tmp_path: Path) -> Write:
    """Write the network as a model version, its quantiles `width` times as wide as is right.

    Of `cut` quantiles at either end all are as near as the next one.
    """

    def write(
        name: str, width: float = 1.0, train_end: date = fitted.train_end, cut: int = 0
    ) -> Path:
        network = copy.deepcopy(fitted.network)
        network.volatility.estimate(join([splits.train, splits.validation]))
        shape = network.volatility.shape.mul_(CALMER * width)
        shape[:, :cut] = shape[:, [cut]]
        shape[:, shape.shape[1] - cut :] = shape[:, [-1 - cut]]
        folder = tmp_path / name
        folder.mkdir()
        model.export_onnx(replace(fitted, network=network), folder)
        return sealed(folder, train_end)

    return write


def sealed(folder: Path, train_end: date) -> Path:
    texts = ("dataset_md5", "dataset_rev", "run_id", "git_commit")
    facts = {
        "forecaster": "perennial-goog",
        "symbols": ("GOOG",),
        "kind": "volatility",
        "context": CONTEXT,
        "horizon": HORIZON,
        "as_of": AS_OF,
        "train_start": date(2004, 11, 17),
        "train_end": train_end,
    }
    seal(folder, dict.fromkeys(texts, "") | facts)
    return folder


def evidence_of(candidate: Path, production: Path | None = None) -> Evidence:
    return gather(
        {"GOOG": FRAME},
        candidate,
        production,
        horizon=HORIZON,
        validation_days=DAYS,
        gate_days=DAYS,
    )


def verdict_of(candidate: Path, production: Path | None = None) -> GateVerdict:
    return judge(evidence_of(candidate, production), Rule(0.01, 0.03, DAYS))


# --- better, equal, worse ------------------------------------------------------------------------


def test_a_good_first_model_is_promoted(write):
    verdict = verdict_of(write("candidate"))
    assert verdict.promote, verdict.reasons
    assert verdict.relative_to_random_walk < -0.02
    assert [each.name for each in verdict.slices] == ["calm", "volatile", "after earnings"]
    assert all(each.lower is not None for each in verdict.slices)
    assert {each.opponent for each in verdict.pairings} == {"random walk", "GARCH", "HAR"}


def test_better_is_promoted_even_if_it_learned_from_the_same_days(write):
    verdict = verdict_of(write("candidate"), write("production", width=1.6))
    assert verdict.promote, verdict.reasons
    assert verdict.pairings[-1].opponent == "production"
    assert verdict.pairings[-1].upper < 0


def test_equal_is_promoted_only_if_it_learned_from_later_days(write):
    candidate = write("candidate")
    assert verdict_of(candidate, write("older", train_end=EARLIER)).promote
    refused = verdict_of(candidate, write("as old"))
    (reason,) = refused.reasons
    assert reason.startswith("Not shown to be better than the model in production")


def test_a_little_better_by_chance_on_the_same_days_is_refused(write):
    """Of two widths one has the lower mean; that the gate's days chose it is no evidence."""
    pair = [write("narrow", width=0.97), write("wide", width=1.0)]
    verdicts = [verdict_of(pair[0], pair[1]), verdict_of(pair[1], pair[0])]
    differences = [each.pairings[-1].difference for each in verdicts]
    assert differences[0] == pytest.approx(-differences[1])
    assert min(differences) < 0
    assert [each.promote for each in verdicts] == [False, False]


def test_worse_is_refused(write):
    verdict = verdict_of(write("candidate", width=1.8), write("production", train_end=EARLIER))
    assert [each.split(":")[0] for each in verdict.reasons[:4]] == [
        "Not shown to be as good as the random walk",
        "Not shown to be as good as HAR",
        "Not shown to be as good as the model in production",
        "Too cautious",
    ]
    slices = {(each.name, each.opponent) for each in verdict.slices}
    assert len(slices) == len(verdict.reasons[4:]) == 6
    assert all(each.startswith("Worse than the ") for each in verdict.reasons[4:])


# --- overconfident -------------------------------------------------------------------------------


def test_overconfident_is_refused_though_its_score_passes(write):
    """Its tails are cut off at its own 80 % interval, which CRPS hardly notices."""
    verdict = verdict_of(write("candidate", cut=3))
    (reason,) = verdict.reasons
    assert reason.startswith("Overconfident: the 95 % interval held ")
    assert verdict.upper < 0


def test_overconfident_replaces_what_is_more_so(write):
    """Both cut off; production is too narrow besides, which CRPS shows beyond doubt."""
    production = write("production", width=0.5, cut=3, train_end=EARLIER)
    verdict = verdict_of(write("candidate", cut=3), production)
    assert (verdict.promote, verdict.provisional) == (True, True), verdict.reasons
    _, overconfident = verdict.notes
    assert overconfident.startswith("Overconfident: the 95 % interval held ")
    assert all(each.production < each.share for each in verdict.intervals)
    wide = write("wide", width=1.6, train_end=EARLIER)
    (reason,) = verdict_of(write("again", cut=3), wide).reasons
    assert reason.startswith("Overconfident: the 95 % interval held ")


# --- leaky ---------------------------------------------------------------------------------------


def test_learning_that_reaches_into_the_gates_days_is_a_leak(write, splits):
    first = splits.gate.first_day
    position = FRAME.index.get_loc(str(first))
    last_honest = FRAME.index[position - HORIZON].date()
    assert verdict_of(write("honest", train_end=last_honest)).promote
    leaky = write("leaky", train_end=FRAME.index[position - HORIZON + 1].date())
    (reason,) = verdict_of(leaky).reasons
    assert reason.startswith("Leak: it has learned from days up to ")
    assert f"reach beyond {first}" in reason


def test_one_that_remembers_what_came_is_too_good_to_be_true(splits, tmp_path, write):
    """Its contract says that it is honest; its graph is a table of the answers, blurred."""
    rng = np.random.default_rng(1)
    blurred = splits.gate.returns + rng.normal(0, 0.01, splits.gate.returns.shape)
    z = np.linspace(-2, 2, len(QUANTILE_LEVELS))
    memory = np.exp(blurred[:, :, None] + 0.01 * z).astype(np.float32)
    folder = write("leaky")
    onnx.save(remembering(splits.gate.dates[:, -1], memory), folder / MODEL_FILE)
    rewrite_golden(folder)
    verdict = verdict_of(sealed(folder, EARLIER))
    reasons = [each for each in verdict.reasons if each.startswith("Too good to be true")]
    assert len(reasons) == 1
    assert "Look for what leaks" in reasons[0]
    assert verdict.relative_to_random_walk < -0.4


def rewrite_golden(folder: Path) -> None:
    """What the graph in the folder answers to the golden input."""
    golden = decode((folder / GOLDEN_FILE).read_bytes(), Golden, "golden")
    session = onnxruntime.InferenceSession(folder / MODEL_FILE)
    inputs = {
        "ohlcv": np.array(golden.ohlcv, dtype=np.float32),
        "dates": np.array(golden.dates),
        "symbol": np.array(golden.symbol),
    }
    (quantiles,) = session.run(None, inputs)
    (folder / GOLDEN_FILE).write_bytes(
        encode(structs.replace(golden, quantiles=quantiles.tolist()))
    )


def remembering(days: np.ndarray, memory: np.ndarray) -> onnx.ModelProto:
    """A graph whose answer is looked up by the day of the last row; before and after, the edge."""
    dense = memory[np.clip(np.searchsorted(days, np.arange(days[0], days[-1] + 1)), 0, None)]
    constants = {
        "memory": dense,
        "base": np.array(days[0]),
        "least": np.array(0),
        "most": np.array(len(dense) - 1),
        "last": np.array(CONTEXT - 1),
        "close_column": np.array(3),
        "axes": np.array([1, 2]),
    }
    nodes = [
        helper.make_node("Gather", ["dates", "last"], ["day"], axis=1),
        helper.make_node("Sub", ["day", "base"], ["since"]),
        helper.make_node("Clip", ["since", "least", "most"], ["row"]),
        helper.make_node("Gather", ["memory", "row"], ["ratios"], axis=0),
        helper.make_node("Gather", ["ohlcv", "last"], ["newest"], axis=1),
        helper.make_node("Gather", ["newest", "close_column"], ["close"], axis=1),
        helper.make_node("Unsqueeze", ["close", "axes"], ["close3"]),
        helper.make_node("Mul", ["close3", "ratios"], ["quantiles"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "remembering",
        [
            value("ohlcv", TensorProto.FLOAT, ["batch", CONTEXT, 5]),
            value("dates", TensorProto.INT64, ["batch", CONTEXT]),
            value("symbol", TensorProto.INT64, ["batch"]),
        ],
        [value("quantiles", TensorProto.FLOAT, ["batch", HORIZON, len(QUANTILE_LEVELS)])],
        [numpy_helper.from_array(each, name) for name, each in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


# --- broken --------------------------------------------------------------------------------------


def test_broken_files_are_refused(write):
    folder = write("altered")
    (folder / MODEL_FILE).write_bytes(b"not the graph that was sealed")
    (reason,) = verdict_of(folder).reasons
    assert reason.startswith("The candidate cannot be loaded: ")
    assert "altered" in reason
    (folder / CONTRACT_FILE).unlink()
    assert "is not a model version" in verdict_of(folder).reasons[0]


def test_one_that_does_not_answer_is_refused(tmp_path):
    write_model_folder(tmp_path / "broken", horizon=4, train_end=EARLIER)
    verdict = verdict_of(tmp_path / "broken")
    assert verdict.reasons[0].startswith("The candidate cannot be scored: ")
    assert "600 of 600 scores of the candidate are not finite numbers" in verdict.reasons[1]


def test_a_broken_model_in_production_is_refused_too(write, tmp_path):
    """Nobody can say whether the candidate is better: a person has to look."""
    write_model_folder(tmp_path / "broken", horizon=4)
    verdict = verdict_of(write("candidate"), tmp_path / "broken")
    assert verdict.reasons[0].startswith("The model in production cannot be scored: ")
    (tmp_path / "broken" / CONTRACT_FILE).unlink()
    verdict = verdict_of(tmp_path / "candidate", tmp_path / "broken")
    assert "600 of 600 scores of the production are not finite numbers" in verdict.reasons[1]
