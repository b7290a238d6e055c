"""Nothing that was not known on `as_of` reaches a model: not a price, not a split, not a revision.

Two homes hold the same rows up to `as_of` and other ones after it. Both datasets reach far beyond
`as_of` before a model is trained as of then; everything found must be the same in both.
"""

import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from bokeh_sampledata.stocks import AAPL, GOOG

from flows.train import TrainResult, train
from forecasting import datasets
from forecasting.contract import Contract, read_contract
from forecasting.prices import PRICES, Frame
from forecasting.registry import open_registry
from tests.flows.support import client_of, configured, kept

NAME = "perennial-goog"
AS_OF = date(2006, 12, 29)
SPLIT = "2007-06-01"
REVISED_ON = date(2007, 10, 1)
TAKEN_IN = date(2007, 12, 31)

pytestmark = pytest.mark.usefixtures("prefect_server")


@dataclass(frozen=True)
class Trained:
    """What one home came to."""

    result: TrainResult
    contract: Contract
    network: bytes
    params: dict[str, str]
    leaderboard: list[dict[str, Any]]
    verdict: dict[str, Any]
    seen: Frame
    later: Frame


def real(until: date = TAKEN_IN) -> pd.DataFrame:
    table = pd.DataFrame(GOOG)
    return table[table["date"] <= until.isoformat()].reset_index(drop=True)


def altered() -> pd.DataFrame:
    """Another future: prices mirrored at the close of `AS_OF`, trebled volume, a split 2:1.

    As a vendor would, the split restates the adjusted close of every row before it.
    """
    table = real()
    after, split = table["date"] > AS_OF.isoformat(), table["date"] >= SPLIT
    level = float(table.loc[~after, "close"].iloc[-1])
    mirrored = {"open": "open", "high": "low", "low": "high", "close": "close"}
    future = {name: (level**2 / table[old]).round(4) for name, old in mirrored.items()}
    for name, values in future.items():
        table[name] = table[name].where(~after, values).where(~split, values / 2)
    table["volume"] = table["volume"].astype("float64").where(~after, table["volume"] * 3)
    table["adj_close"] = (table["close"] / 2).where(~split, table["close"])
    return table


def revised() -> pd.DataFrame:
    """The altered future, whose vendor has since corrected every tenth close before `AS_OF`."""
    table = altered()
    old = (table["date"] <= AS_OF.isoformat()) & (table.index % 10 == 0)
    table.loc[old, "close"] = ((table["high"] + table["low"]) / 2).round(4)[old]
    table["adj_close"] = (table["close"] / 2).where(table["date"] < SPLIT, table["close"])
    return table


def peer(*, is_altered: bool) -> pd.DataFrame:
    """AAPL, which the training learns from as well; or with its future mirrored."""
    table = pd.DataFrame(AAPL)
    table = table[table["date"] <= TAKEN_IN.isoformat()].reset_index(drop=True)
    if is_altered:
        after = table["date"] > AS_OF.isoformat()
        level, ratio = table.loc[~after, ["close", "adj_close"]].iloc[-1]
        mirrored = {"open": "open", "high": "low", "low": "high", "close": "close"}
        future = {name: (level**2 / table[old]).round(4) for name, old in mirrored.items()}
        for name, values in future.items():
            table[name] = table[name].where(~after, values)
        table["adj_close"] = table["adj_close"].where(~after, table["close"] * ratio / level)
    return table


def train_in(home: Path, histories: dict[date, pd.DataFrame], aapl: pd.DataFrame) -> Trained:
    """Take in each history on its day, then train as of `AS_OF`."""
    home.mkdir()
    aapl.to_csv(home / "AAPL.csv", index=False)
    changes = {"source": "file", "source_url": home / "{symbol}.csv", "peers": '["AAPL"]'}
    with configured(home, **changes, concurrency=1, epochs=3) as settings:
        for day, table in histories.items():
            table.to_csv(home / "GOOG.csv", index=False)
            datasets.ingest(settings, ["GOOG", "AAPL"], day)
        result = train(symbol="GOOG", as_of=AS_OF)
        registry = open_registry(settings)
        folder = registry.download(NAME, registry.aliases(NAME)["production"], home / "served")
        run = client_of(settings).get_run(result.run_id)
        return Trained(
            result=result,
            contract=read_contract(folder),
            network=(folder / "model.onnx").read_bytes(),
            params={k: v for k, v in run.data.params.items() if k != "search_run"},
            leaderboard=json.loads(kept(settings, result.run_id, "search.json"))["trials"],
            verdict=json.loads(kept(settings, result.run_id, "gate-verdict.json")),
            seen=datasets.load_frame(settings, "GOOG", AS_OF, result.dataset_md5),
            later=datasets.load_frame(settings, "GOOG", TAKEN_IN, result.dataset_md5),
        )


@pytest.fixture(scope="module")
def homes(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> list[Trained]:
    root = tmp_path_factory.mktemp("leak")
    other = {REVISED_ON: altered(), TAKEN_IN: revised()}
    return [
        train_in(root / "real", {TAKEN_IN: real()}, peer(is_altered=False)),
        train_in(root / "altered", other, peer(is_altered=True)),
    ]


def test_the_futures_do_differ(homes):
    one, other = homes
    assert one.result.dataset_md5 != other.result.dataset_md5
    days = one.later.index > pd.Timestamp(AS_OF)
    assert days.sum() == 251
    assert (one.later.loc[days, "close"] != other.later.loc[days, "close"]).all()
    # the split and the revisions are there for whoever asks as of a later day
    past = other.later.loc[~days, "close"] / one.later.loc[~days, "close"]
    assert past.median() == pytest.approx(0.5)
    assert (past.sub(0.5).abs() > 1e-6).sum() > 40


def test_what_is_seen_as_of_the_day_is_the_same(homes):
    one, other = homes
    pd.testing.assert_frame_equal(one.seen, other.seen, check_exact=True)
    pd.testing.assert_frame_equal(
        one.seen.loc[:, list(PRICES)].reset_index(drop=True),
        real(AS_OF)[list(PRICES)],
        check_exact=True,
    )


def test_the_network_is_the_same_to_the_byte(homes):
    one, other = homes
    assert one.network == other.network
    assert one.contract.files == other.contract.files
    assert one.contract.train_start < date.fromisoformat(real()["date"][0])  # AAPL is older
    assert one.contract.symbols == ("GOOG",)
    own = ("dataset_md5", "dataset_rev", "run_id", "files")
    names = [name for name in Contract.__struct_fields__ if name not in own]
    for name in names:
        assert getattr(one.contract, name) == getattr(other.contract, name), name


def test_the_search_and_its_winner_are_the_same(homes):
    one, other = homes
    assert one.leaderboard == other.leaderboard
    assert len(one.leaderboard) == 2
    assert one.params == other.params
    assert "'hidden': " in one.params["config"]


def test_the_verdict_is_the_same(homes):
    one, other = homes
    assert one.verdict == other.verdict
    assert one.verdict["windows"] == 120
    assert one.result.outcome == other.result.outcome == "promoted"
    assert (one.result.reasons, one.result.scores) == (other.result.reasons, other.result.scores)
