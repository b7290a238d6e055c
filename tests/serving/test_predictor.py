"""What is served: taken up in slices, with a bounded number of open models."""

import asyncio
import json

import pytest

from forecasting.contract import MODEL_FILE
from forecasting.errors import ContractError
from serving import predictor as room
from serving.model_store import ModelStore
from serving.predictor import Predictor
from serving.problems import ProblemError
from tests.models import make_snapshot, write_model_folder

MANY = 30


@pytest.fixture
def store(tmp_path):
    return ModelStore(tmp_path / "store")


def install(store: ModelStore, name: str, version: int, symbol: str, **model) -> None:
    folder = store.incoming()
    write_model_folder(folder, forecaster=name, symbols=(symbol,), **model)
    store.install(name, version, folder)


def settle(predictor: Predictor) -> None:
    while not predictor.refresh()[2]:
        pass


def median(predictor: Predictor, symbol: str) -> float:
    body = predictor.state.latest_of(symbol).body
    return float(json.loads(body)["forecast"][0]["median"])


def test_many_forecasters_are_served_with_few_models_open(store):
    for number in range(MANY):
        install(store, f"f{number:02d}", 1, f"S{number:02d}", scale=1.0 + number)
        store.put_snapshot(make_snapshot(f"S{number:02d}", close=10.0))
    predictor = Predictor(store, most_open=4)
    settle(predictor)
    assert len(predictor.models) == 4
    assert len(predictor.state.by_symbol) == MANY
    for number in range(MANY):
        assert median(predictor, f"S{number:02d}") == pytest.approx(10.0 * (1 + number))
    served = predictor.state.served("S00")
    forecaster = predictor.models.open(served)
    assert forecaster.contract == served.contract
    assert len(predictor.models) == 4


def test_work_is_done_in_slices_and_swapped_as_it_comes(store, monkeypatch):
    monkeypatch.setattr(room, "SLICE_SECONDS", 0.0)
    for number in range(4):
        install(store, f"f{number}", 1, f"S{number}")
        store.put_snapshot(make_snapshot(f"S{number}"))
    predictor = Predictor(store, most_open=8)
    seen = []
    for _ in range(20):
        _, state, done = predictor.refresh()
        seen.append(len(state.champions))
        if done:
            break
    assert seen[0] == 1
    assert seen[-1] == 4
    assert set(predictor.state.latest) == {"S0", "S1", "S2", "S3"}


def test_a_closed_model_that_was_damaged_is_not_opened_again(store):
    install(store, "a", 1, "A")
    install(store, "b", 1, "B")
    predictor = Predictor(store, most_open=1)
    settle(predictor)
    closed = next(s for s in predictor.state.champions.values() if not predictor.models.get(s))
    (closed.folder / MODEL_FILE).write_bytes(b"damaged")
    with pytest.raises(ContractError, match="altered"):
        predictor.models.open(closed)
    with pytest.raises(ContractError, match="altered"):
        asyncio.run(predictor.models.opened(closed))


def test_those_who_ask_at_once_share_the_opening(store):
    install(store, "a", 1, "A")
    install(store, "b", 1, "B")
    predictor = Predictor(store, most_open=1)
    settle(predictor)
    closed = next(s for s in predictor.state.champions.values() if not predictor.models.get(s))

    async def ask():
        return await asyncio.gather(*(predictor.models.opened(closed) for _ in range(8)))

    assert len({id(each) for each in asyncio.run(ask())}) == 1


def test_a_new_version_closes_the_old_one(store):
    install(store, "a", 1, "A", scale=1.0)
    store.put_snapshot(make_snapshot("A", close=10.0))
    predictor = Predictor(store, most_open=8)
    settle(predictor)
    before = predictor.state.served("A")
    install(store, "a", 2, "A", scale=2.0)
    settle(predictor)
    assert predictor.models.get(before) is None
    assert median(predictor, "A") == 20.0


def test_the_identity_of_a_computed_answer_is_the_same_in_every_worker(store):
    install(store, "a", 1, "A")
    store.put_snapshot(make_snapshot("A"))
    bodies = set()
    for _ in range(2):
        predictor = Predictor(store, most_open=8)
        settle(predictor)
        bodies.add(predictor.state.latest_of("A").body)
    assert len(bodies) == 1


def test_a_challenger_is_taken_up_beside_the_champion(store):
    install(store, "a", 1, "A", scale=1.0)
    store.put_snapshot(make_snapshot("A", close=10.0))
    folder = store.incoming()
    write_model_folder(folder, forecaster="a", symbols=("A",), scale=3.0)
    store.install("a", 2, folder, alias="challenger")
    predictor = Predictor(store, most_open=8)
    settle(predictor)
    state = predictor.state
    assert (state.served("A").version, state.served("A", rival=True).version) == (1, 2)
    assert median(predictor, "A") == 10.0
    assert b'"median":30.0' in state.latest_of("A", rival=True).body
    store.drop_challenger("a")
    settle(predictor)
    assert predictor.state.served("A", rival=True).version == 1
    assert not predictor.state.rival_latest


def test_a_damaged_challenger_harms_nobody(store):
    install(store, "a", 1, "A")
    folder = store.incoming()
    write_model_folder(folder, forecaster="a", symbols=("A",))
    store.install("a", 2, folder, alias="challenger")
    (store.version_folder("a", 2) / MODEL_FILE).write_bytes(b"damaged")
    predictor = Predictor(store, most_open=8)
    settle(predictor)
    assert predictor.state.served("A").version == 1
    assert [(r.name, r.version) for r in predictor.state.refused.values()] == [("a", 2)]


def test_symbols_that_nobody_serves_are_named(store):
    predictor = Predictor(store, most_open=8)
    with pytest.raises(ProblemError, match="No model version"):
        predictor.state.served("A")
    install(store, "a", 1, "A")
    settle(predictor)
    with pytest.raises(ProblemError, match="One of A was expected; got 'B'"):
        predictor.state.served("B")
