"""A server that lives: new versions, damaged versions, restarts, and the end."""

import threading
import time
from collections import Counter

import httpx
import pytest

from forecasting.contract import MODEL_FILE
from forecasting.predictions import open_segments
from serving.model_store import CURRENT_FILE, ModelStore
from tests.serving.running import (
    FORECASTER,
    Server,
    install,
    put_prices,
    request_body,
    started,
    until,
    web,
)


def median(server: Server) -> float:
    response = server.get("/v1/forecast/GOOG")
    assert response.is_success, response.text
    return float(response.json()["forecast"][0]["median"])


def damage(home, version: int) -> None:
    path = ModelStore(home / "store").version_folder(FORECASTER, version) / MODEL_FILE
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    swap(path, raw)


def swap(path, raw: bytes) -> None:
    """At once: a worker that looks meanwhile sees all of it or nothing."""
    beside = path.with_name(f"{path.name}.swapped")
    beside.write_bytes(raw)
    beside.replace(path)


def test_without_a_model_it_lives_but_is_not_ready_until_one_comes(tmp_path):
    with web(tmp_path, ready=False) as server:
        assert server.get("/health/live").is_success
        for response in (
            server.get("/health/ready"),
            server.get("/v1/forecast/GOOG"),
            server.client.post("/v1/forecast", json=request_body()),
        ):
            assert response.status_code == 503
            assert response.json()["type"] == "/problems/no-model"
            assert int(response.headers["retry-after"]) > 0
        listed = server.get("/v1/models").json()
        assert {name for name, value in listed.items() if value} == {"traffic"}
        put_prices(tmp_path)
        install(tmp_path, 1)
        server.wait_version(1)
        assert server.get("/health/ready").is_success
        assert median(server) == 100.0


@pytest.mark.parametrize("workers", [1, 2])
def test_hot_swap_under_clients_fails_nobody_and_mixes_nothing(tmp_path, workers):
    """Version n has scale n: an answer's version, run and quantiles must belong together."""
    install(tmp_path, 1, scale=1.0)
    put_prices(tmp_path)
    seen: Counter[int] = Counter()
    faults: list[str] = []
    counting, stop = threading.Lock(), threading.Event()

    def check(response: httpx.Response) -> None:
        if not response.is_success:
            faults.append(response.text)
            return
        answer = response.json()
        version = answer["model_version"]
        medians = [step["median"] for step in answer["forecast"]]
        if medians != [100.0 * version] * 5 or answer["run_id"] != f"{version:032d}":
            faults.append(f"version {version} with {medians} of {answer['run_id']}")
        with counting:
            seen[version] += 1

    def ask(url: str, *, rows: bool) -> None:
        body = request_body()
        with httpx.Client(base_url=url, timeout=20) as client:
            while not stop.is_set():
                try:
                    check(
                        client.post("/v1/forecast", json=body)
                        if rows
                        else client.get("/v1/forecast/GOOG")
                    )
                except httpx.HTTPError as error:
                    faults.append(repr(error))

    with web(tmp_path, web_workers=workers) as server:
        clients = [
            threading.Thread(target=ask, args=(server.url,), kwargs={"rows": rows})
            for rows in (False, True, False, True)
        ]
        for client in clients:
            client.start()
        try:
            for version in range(1, 7):
                if version > 1:
                    install(tmp_path, version, scale=float(version))
                until(lambda v=version: seen[v] > 10, f"answers of version {version}")
        finally:
            stop.set()
            for client in clients:
                client.join()
        assert not faults, faults[:5]
        assert set(seen) == {1, 2, 3, 4, 5, 6}
        log = server.log
    assert "Traceback" not in log
    with open_segments(tmp_path / "spool") as segments:
        read = [batch for segment in segments for batch in iter(segment_reader(segment), None)]
    posted = [record for batch in read for record in batch.records if record.source == "post"]
    totals: dict[tuple[str, int], int] = {}
    for counted in (each for batch in read for each in batch.counts):
        totals[counted.writer, counted.model_version] = counted.answers
    assert len(posted) + sum(totals.values()) == sum(seen.values())
    computed = {r.model_version: r.id for batch in read for r in batch.records if r.source == "get"}
    assert set(computed) == {version for _, version in totals}


def segment_reader(segment):
    def read():
        batch = segment.read()
        if batch is not None:
            segment.offset = batch.end
        return batch

    return read


def test_new_prices_are_taken_up(tmp_path):
    install(tmp_path, 1)
    put_prices(tmp_path, close=100.0)
    with web(tmp_path) as server:
        assert median(server) == 100.0
        put_prices(tmp_path, close=90.0, md5="q" * 32)
        until(lambda: median(server) == 90.0, "the new prices")
        assert server.get("/v1/forecast/GOOG").json()["prices_md5"] == "q" * 32


def test_damaged_prices_leave_the_last_good_ones(tmp_path):
    install(tmp_path, 1)
    put_prices(tmp_path)
    with web(tmp_path) as server:
        (tmp_path / "store/prices/GOOG.json").write_text('{"symbol": "GOOG", "as')
        refused = until(lambda: server.get("/v1/models").json()["refused"], "a refusal")
        assert (refused[0]["name"], refused[0]["version"]) == ("GOOG", None)
        assert "not a valid Snapshot" in refused[0]["reason"]
        assert median(server) == 100.0


def test_damaged_newer_version_is_refused_and_the_last_good_one_stays(tmp_path):
    install(tmp_path, 1)
    put_prices(tmp_path)
    with web(tmp_path) as server:
        install_damaged(tmp_path, 2)
        refused = until(lambda: server.get("/v1/models").json()["refused"], "a refusal")
        assert [(r["name"], r["version"]) for r in refused] == [(FORECASTER, 2)]
        assert "model.onnx is altered" in refused[0]["reason"]
        assert (server.versions(), median(server)) == ({FORECASTER: 1}, 100.0)
        assert f'perennial_refusals_total{{name="{FORECASTER}"}}' in server.get("/metrics").text
        install(tmp_path, 3, scale=3.0)
        server.wait_version(3)
        assert server.get("/v1/models").json()["refused"] == []


def install_damaged(home, version: int) -> None:
    """A current version that was damaged after sync had checked it."""
    store = ModelStore(home / "store")
    before = (home / "store/models" / FORECASTER / CURRENT_FILE).read_bytes()
    install(home, version, scale=float(version))
    after = (home / "store/models" / FORECASTER / CURRENT_FILE).read_bytes()
    path = home / "store/models" / FORECASTER / CURRENT_FILE
    swap(path, before)
    damage(home, version)
    swap(path, after)
    assert store.current(FORECASTER).version == version


def test_restart_falls_back_to_the_last_good_version(tmp_path):
    install(tmp_path, 1, scale=1.0)
    install(tmp_path, 2, scale=2.0)
    install(tmp_path, 3, scale=3.0)
    put_prices(tmp_path)
    damage(tmp_path, 3)
    with web(tmp_path) as server:
        assert server.versions() == {FORECASTER: 2}
        assert median(server) == 200.0
        (refused,) = server.get("/v1/models").json()["refused"]
        assert refused["version"] == 3


@pytest.mark.parametrize("content", ['{"ver', "[]", '{"version": "three"}'])
def test_damaged_pointer_falls_back_to_the_newest_version(tmp_path, content):
    install(tmp_path, 1)
    install(tmp_path, 2, scale=2.0)
    put_prices(tmp_path)
    (tmp_path / "store/models" / FORECASTER / CURRENT_FILE).write_text(content)
    with web(tmp_path) as server:
        assert server.versions() == {FORECASTER: 2}
        (refused,) = server.get("/v1/models").json()["refused"]
        assert "current.json should hold" in refused["reason"]


def test_a_server_whose_store_vanishes_goes_on(tmp_path):
    install(tmp_path, 1)
    put_prices(tmp_path)
    with web(tmp_path) as server:
        (tmp_path / "store").rename(tmp_path / "gone")
        time.sleep(0.3)
        assert median(server) == 100.0
        assert server.get("/health/live").is_success
        (tmp_path / "gone").rename(tmp_path / "store")
        install(tmp_path, 2, scale=2.0)
        server.wait_version(2)


def test_two_forecasters_serve_their_own_symbols(tmp_path):
    install(tmp_path, 7, forecaster="all", symbols=("AAPL", "GOOG"), scale=7.0)
    install(tmp_path, 1)
    put_prices(tmp_path, "GOOG")
    put_prices(tmp_path, "AAPL", 10.0)
    with web(tmp_path) as server:
        assert server.versions() == {"all": 7, FORECASTER: 1}
        assert median(server) == 100.0  # the one that serves fewer symbols
        assert server.get("/v1/forecast/AAPL").json()["forecast"][0]["median"] == 70.0


def test_every_answer_is_on_disk_after_sigterm_under_load(tmp_path):
    install(tmp_path, 1)
    put_prices(tmp_path)
    answered: list[str] = []

    def ask(url: str) -> None:
        with httpx.Client(base_url=url, timeout=20) as client:
            while True:
                try:
                    response = client.get("/v1/forecast/GOOG")
                except httpx.TransportError:
                    return
                if not response.is_success:
                    return
                answered.append(response.json()["id"])

    with web(tmp_path) as server:
        clients = [threading.Thread(target=ask, args=(server.url,)) for _ in range(3)]
        for client in clients:
            client.start()
        until(lambda: len(answered) > 100, "some answers")
        status = server.stop()
        for client in clients:
            client.join()
    assert status == 0, server.log
    with open_segments(tmp_path / "spool") as segments:
        batches = [batch for segment in segments for batch in iter(segment_reader(segment), None)]
    assert set(answered) <= {record.id for batch in batches for record in batch.records}
    assert not [line for batch in batches for line in batch.bad]


def test_a_spool_that_cannot_be_written_does_not_stop_answers(tmp_path):
    install(tmp_path, 1)
    put_prices(tmp_path)
    (tmp_path / "spool").write_text("in the way")
    with web(tmp_path) as server:
        assert median(server) == 100.0
        text = server.get("/metrics").text
        assert "perennial_spool_pending 1.0" in text
        (tmp_path / "spool").unlink()
        until(lambda: "perennial_spool_pending 0.0" in server.get("/metrics").text, "the flush")
    assert list((tmp_path / "spool").glob("*.jsonl"))


def test_a_port_in_use_is_said_and_nothing_is_started(tmp_path):
    with (
        web(tmp_path / "one", ready=False) as server,
        started("web", tmp_path / "two", port=server.client.base_url.port) as second,
    ):
        assert second.popen.wait(30) == 2
        assert "cannot be bound: Address already in use" in second.log
        assert "PERENNIAL_PORT" in second.log
        assert server.get("/health/live").is_success


def test_unknown_setting_and_unknown_command_are_refused(tmp_path):
    with started("web", tmp_path, prot=8201) as process:
        assert process.popen.wait(30) == 2
        assert "Did you mean PERENNIAL_PORT?" in process.log
    with started("wob", tmp_path) as process:
        assert process.popen.wait(30) == 2
        assert "invalid choice: 'wob'" in process.log


def test_metrics_of_several_workers_are_summed(tmp_path):
    install(tmp_path, 1)
    put_prices(tmp_path)
    with web(tmp_path, web_workers=2) as server:
        for _ in range(20):  # a connection each, so that both workers get some
            assert httpx.get(f"{server.url}/v1/forecast/GOOG").is_success
        line = 'perennial_requests_total{method="GET",route="/v1/forecast/{symbol}",status="200"} '
        until(lambda: f"{line}20.0" in server.get("/metrics").text, "20 requests counted")
        assert (
            'perennial_model_version{forecaster="perennial-goog",role="champion"} 1.0'
            in server.get("/metrics").text
        )
