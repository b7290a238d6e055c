"""Champion and challenger: shadow off the request path, canary by client, both without restart."""

import asyncio
from collections import Counter

import pytest

from forecasting.errors import ConfigError
from forecasting.predictions import Prediction, Spool, open_segments
from forecasting.settings import load_settings
from serving.answers import windows_of_rows
from serving.batcher import compute
from serving.intake import fit
from serving.model_store import ModelStore
from serving.predictor import Predictor
from serving.queries import Prepared, Query
from serving.schemas import Traffic
from serving.shadow import MOST_WAITING, Shadow
from serving.traffic import TrafficSwitch, write_traffic
from tests.models import make_snapshot, write_model_folder
from tests.serving.running import FORECASTER, install, put_prices, request_body, until, web


def challenge(home, version: int, **model) -> None:
    """A version in the store as sync lays it there for the alias `challenger`."""
    store = ModelStore(home / "store")
    folder = store.incoming()
    contract = write_model_folder(folder, run_id=f"{version:032d}", **model)
    store.install(contract.forecaster, version, folder, alias="challenger")


def logged(home) -> list[Prediction]:
    with open_segments(home / "spool") as segments:
        return [r for segment in segments if (batch := segment.read()) for r in batch.records]


@pytest.fixture
def home(tmp_path):
    install(tmp_path, 1, scale=1.0)
    challenge(tmp_path, 2, scale=2.0)
    put_prices(tmp_path)
    return tmp_path


def ask(server, **headers) -> tuple[int, int]:
    """Versions that answer a POST and a GET."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    posted = server.client.post("/v1/forecast", json=request_body(), headers=named)
    got = server.client.get("/v1/forecast/GOOG", headers=named)
    return posted.json()["model_version"], got.json()["model_version"]


def test_the_shadow_is_logged_with_its_version_and_never_answers(home):
    with web(home, shadow_share=1.0) as server:
        listed = server.get("/v1/models").json()
        assert [m["version"] for m in listed["challengers"]] == [2]
        assert listed["traffic"] == {"shadow_share": 1.0, "canary_share": 0.0}
        for _ in range(5):
            assert ask(server) == (1, 1)
        until(
            lambda: Counter(r.source for r in logged(home))["shadow"] == 6, "the shadow's records"
        )
        text = server.get("/metrics").text
        assert 'perennial_shadow_windows_total{outcome="computed"} 6.0' in text
    records = logged(home)
    assert Counter((r.source, r.model_version) for r in records) == {
        ("post", 1): 5,
        ("get", 1): 1,
        ("shadow", 2): 6,  # five windows, and once the latest prices
    }
    shadow = next(r for r in records if r.source == "shadow")
    assert shadow.quantiles[0][19] == 200.0


def test_a_forecaster_that_is_named_has_its_shadow_and_its_canary(home):
    """Also for a symbol that neither version lists."""
    body = request_body(symbol="TSLA") | {"forecaster": "perennial-goog"}
    with web(home, shadow_share=1.0) as server:
        assert server.client.post("/v1/forecast", json=body).json()["model_version"] == 1
        until(
            lambda: {(r.source, r.symbol) for r in logged(home)} >= {("shadow", "TSLA")},
            "the shadow's record",
        )
        write_traffic(
            load_settings(home=home).traffic_file, Traffic(shadow_share=0.0, canary_share=1.0)
        )
        until(
            lambda: server.client.post("/v1/forecast", json=body).json()["model_version"] == 2,
            "the canary's answer",
        )


def test_a_canary_answers_the_same_clients_each_time_and_shares_change_without_restart(home):
    with web(home) as server:
        clients = [f"client-{number}" for number in range(40)]
        assert {ask(server, x_client_id=name) for name in clients} == {(1, 1)}
        settings = load_settings(home=home)
        write_traffic(settings.traffic_file, Traffic(shadow_share=0.0, canary_share=0.5))
        until(
            lambda: server.get("/v1/models").json()["traffic"]["canary_share"] == 0.5, "the share"
        )
        first = {name: ask(server, x_client_id=name) for name in clients}
        assert {name: ask(server, x_client_id=name) for name in clients} == first
        shares = Counter(first.values())
        assert set(shares) == {(1, 1), (2, 2)}
        assert 8 <= shares[2, 2] <= 32
        canary = [r for r in logged(home) if r.source == "canary"]
        write_traffic(settings.traffic_file, Traffic(shadow_share=0.0, canary_share=0.0))
        until(lambda: {ask(server, x_client_id=name) for name in clients} == {(1, 1)}, "the end")
    assert {r.model_version for r in canary} == {2}
    assert len(canary) == 2 * shares[2, 2] + 1  # every window twice, the latest prices once


def test_a_forecast_from_latest_prices_is_logged_once_for_each_way_it_came_to_be(home):
    with web(home, shadow_share=1.0) as server:
        for _ in range(3):
            assert server.get("/v1/forecast/GOOG").json()["model_version"] == 1
        settings = load_settings(home=home)
        write_traffic(settings.traffic_file, Traffic(shadow_share=0.0, canary_share=1.0))

        def canary() -> dict | None:
            answer = server.get("/v1/forecast/GOOG").json()
            return answer if answer["model_version"] == 2 else None

        answer = until(canary, "the canary")
        until(canary, "the canary again")
    records = logged(home)
    assert Counter((r.source, r.model_version) for r in records) == {
        ("get", 1): 1,
        ("shadow", 2): 1,
        ("canary", 2): 1,
    }
    assert len({r.id for r in records}) == 3
    assert answer["id"] == next(r.id for r in records if r.source == "canary")


def test_a_canary_without_a_forecast_leaves_the_answer_to_the_champion(tmp_path):
    install(tmp_path, 1, scale=1.0)
    challenge(tmp_path, 2, scale=2.0, context=100)
    put_prices(tmp_path, count=80)
    with web(tmp_path, canary_share=1.0) as server:
        assert server.get("/v1/forecast/GOOG").json()["model_version"] == 1


def test_a_damaged_traffic_file_changes_nothing_and_is_said(home):
    with web(home, canary_share=1.0) as server:
        assert ask(server) == (2, 2)
        (home / "traffic.json").write_text('{"canary_share": 7')
        until(lambda: server.logged("The shares stay as they are"), "the complaint")
        assert ask(server) == (2, 2)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(tmp_path, share):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        write_traffic(tmp_path / "traffic.json", Traffic(shadow_share=share, canary_share=0.0))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_share_of_clients_is_the_share_asked_for(tmp_path, share):
    switch = TrafficSwitch(load_settings(home=tmp_path, canary_share=share))
    chosen = sum(switch.is_canary(f"client {number}") for number in range(5000))
    assert chosen == pytest.approx(5000 * share, abs=120)


def test_overload_sheds_the_shadow_first(tmp_path):
    install(tmp_path, 1)
    challenge(tmp_path, 2)
    store = ModelStore(tmp_path / "store")
    store.put_snapshot(make_snapshot())
    predictor = Predictor(store, most_open=4)
    predictor.refresh()
    state = predictor.state
    champion, rival = state.champions[FORECASTER], state.challengers[FORECASTER]
    busy = True
    spool = Spool(tmp_path / "spool", "test")
    shadow = Shadow(spool, predictor.models, lambda: busy)
    computed = compute([Query(champion, predictor.models.open(champion), _window(state))], spool)[0]

    async def offers() -> None:
        nonlocal busy
        shadow.offer(champion, computed, rival, 1.0)
        assert (shadow.scored, shadow.shed) == (0, 1)
        busy = False
        for _ in range(MOST_WAITING + 3):
            shadow.offer(champion, computed, rival, 1.0)
        assert shadow.shed == 4
        shadow.offer(champion, computed, rival, 0.0)
        task = asyncio.create_task(shadow.run())
        while shadow.scored < MOST_WAITING:
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(asyncio.wait_for(offers(), 30))
    spool.close()
    records = logged(tmp_path)
    assert len(records) == len({r.id for r in records}) == MOST_WAITING + 1


def _window(state):
    contract = state.champions[FORECASTER].contract
    rows = [state.rows["GOOG"]]
    return Prepared(fit(rows, contract, 1000), windows_of_rows(rows, contract, "post"))
