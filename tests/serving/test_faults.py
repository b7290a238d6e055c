"""A server that is killed, starved and soaked: nobody waits for ever, nothing answered is lost."""

import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from forecasting.predictions import Prediction, open_segments
from forecasting.registry import PRODUCTION, Registry
from serving.web import HEALTH_SECONDS
from tests.models import write_model_folder
from tests.serving.running import (
    FORECASTER,
    install,
    put_prices,
    request_body,
    started,
    until,
    web,
    workers,
)


def spooled(home: Path) -> list[Prediction]:
    found: list[Prediction] = []
    with open_segments(home / "spool") as segments:
        for segment in segments:
            while batch := segment.read():
                found += batch.records
                segment.offset = batch.end
    return found


@contextmanager
def posting(url: str, count: int, answered: list[str], faults: list[str]) -> Iterator[None]:
    """Clients that POST all the time; one that loses its connection tries again with a new one."""
    stop, body = threading.Event(), request_body()

    def work() -> None:
        while not stop.is_set():
            with httpx.Client(base_url=url, timeout=20) as client:
                try:
                    while not stop.is_set():
                        response = client.post("/v1/forecast", json=body)
                        if response.is_success:
                            answered.append(response.json()["id"])
                        else:
                            faults.append(response.text)
                except httpx.TransportError as error:
                    faults.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_killed_worker_is_replaced_and_loses_nothing_that_it_answered(tmp_path):
    install(tmp_path, 1)
    answered: list[str] = []
    with web(tmp_path, web_workers=2) as server:
        until(lambda: len(workers(server)) == 2, "both workers")
        before = workers(server)
        with posting(server.url, 4, answered, []):
            until(lambda: len(answered) > 50, "some answers")
            os.kill(min(before), signal.SIGKILL)
            until(lambda: len(workers(server) | before) == 3, "another worker")
            seen = len(answered)
            until(lambda: len(answered) > seen + 50, "more answers")
            os.kill(max(before), signal.SIGKILL)
            until(lambda: len(workers(server) - before) == 2, "two new workers")
        assert server.stop() == 0
    assert set(answered) <= {record.id for record in spooled(tmp_path)}


def test_a_worker_that_is_killed_while_it_is_asked_for_its_health_is_replaced_at_once(tmp_path):
    install(tmp_path, 1)
    with web(tmp_path, web_workers=2) as server:
        until(lambda: len(workers(server)) == 2, "both workers")
        before = workers(server)
        silent = psutil.Process(min(before))
        silent.suspend()
        time.sleep(2)  # the supervisor asks twice a second, and waits for this one now
        silent.kill()
        until(lambda: len(workers(server) | before) == 3, "another worker", HEALTH_SECONDS / 2)
        assert server.stop() == 0


def test_sighup_replaces_the_workers_one_by_one(tmp_path):
    install(tmp_path, 1)
    answered: list[str] = []
    faults: list[str] = []
    with web(tmp_path, web_workers=2) as server:
        until(lambda: len(workers(server)) == 2, "both workers")
        before = workers(server)
        with posting(server.url, 3, answered, faults):
            until(lambda: len(answered) > 20, "some answers")
            server.popen.send_signal(signal.SIGHUP)
            until(lambda: len(workers(server) - before) == 2, "two new workers")
            until(lambda: workers(server).isdisjoint(before), "the end of the old ones")
            seen = len(answered)
            until(lambda: len(answered) > seen + 20, "more answers")
        # whoever sends at the moment in which its connection is closed has to send again
        assert len(faults) <= 6
        assert not [fault for fault in faults if "problems" in fault]
        assert server.stop() == 0
    assert set(answered) <= {record.id for record in spooled(tmp_path)}


def test_a_killed_server_has_counted_all_but_the_last_second(tmp_path):
    install(tmp_path, 1)
    put_prices(tmp_path)
    with web(tmp_path) as server:
        (worker,) = until(lambda: workers(server), "the worker")
        times: list[float] = []
        while len(times) < 200:
            assert server.get("/v1/forecast/GOOG").is_success
            times.append(time.monotonic())
            time.sleep(0.01)
        os.kill(server.popen.pid, signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        killed = time.monotonic()
    with open_segments(tmp_path / "spool") as segments:
        (batch,) = [segment.read() for segment in segments]
    counted = max(each.answers for each in batch.counts)
    assert counted >= sum(moment < killed - 1 for moment in times)
    assert len(batch.records) == 1


def test_sigterm_answers_what_was_asked_and_logs_it(tmp_path):
    install(tmp_path, 1)
    answered: list[str] = []
    faults: list[str] = []
    with web(tmp_path, web_workers=2) as server:
        with posting(server.url, 4, answered, faults):
            until(lambda: len(answered) > 50, "some answers")
            assert server.stop() == 0
        assert not [fault for fault in faults if "problems" in fault]
    assert set(answered) <= {record.id for record in spooled(tmp_path)}


def rows(database: Path) -> int:
    if not database.is_file():
        return 0
    with (
        closing(sqlite3.connect(database, timeout=30)) as connection,
        suppress(sqlite3.OperationalError),  # its tables are not made yet
    ):
        return int(connection.execute("SELECT count(*) FROM predictions").fetchone()[0])
    return 0


def test_a_dead_database_fills_a_bounded_spool_that_drains_later(tmp_path):
    install(tmp_path, 1)
    put_prices(tmp_path)
    database = tmp_path / "perennial.db"
    database.mkdir()  # nothing can be opened there
    body = request_body()
    with web(tmp_path, spool_max_mb=0.2) as server, started("drain", tmp_path) as drain:
        assert server.get("/v1/forecast/GOOG").is_success
        answered = 0

        def refused() -> httpx.Response | None:
            nonlocal answered
            response = server.client.post("/v1/forecast", json=body)
            answered += response.is_success
            return None if response.is_success else response

        response = until(refused, "a full spool")
        assert (response.status_code, response.json()["type"]) == (503, "/problems/log-unavailable")
        assert int(response.headers["retry-after"]) > 0
        assert "PERENNIAL_SPOOL_MAX_MB" in response.json()["detail"]
        assert server.get("/v1/forecast/GOOG").is_success
        assert "perennial_spool_lag_seconds" in server.get("/metrics").text
        until(lambda: drain.logged("cannot be used"), "the complaint")
        database.rmdir()
        until(lambda: rows(database) >= 5 * answered, "all in SQL", 60)
        server.stop()
        until(lambda: not list((tmp_path / "spool").glob("web*.jsonl")), "an empty spool", 60)
        assert rows(database) == 5 * (answered + 1)
    with web(tmp_path, spool_max_mb=0.2) as server:
        assert server.client.post("/v1/forecast", json=body).is_success


def test_a_full_disk_under_the_spool_is_survived(tmp_path):
    """The spool's writes fail as on a full disk (RLIMIT_FSIZE); GETs and the worker go on."""
    install(tmp_path, 1)
    put_prices(tmp_path)
    with web(tmp_path) as server:
        (worker,) = until(lambda: workers(server), "the worker")
        assert server.client.post("/v1/forecast", json=request_body()).is_success
        process = psutil.Process(worker)
        unlimited = process.rlimit(psutil.RLIMIT_FSIZE)
        process.rlimit(psutil.RLIMIT_FSIZE, (4096, unlimited[1]))
        answers = [server.client.post("/v1/forecast", json=request_body()) for _ in range(5)]
        assert {answer.status_code for answer in answers} == {200}
        until(lambda: "cannot be written" in server.log, "the complaint")
        assert server.get("/v1/forecast/GOOG").is_success
        process.rlimit(psutil.RLIMIT_FSIZE, unlimited)
        until(lambda: "perennial_spool_pending 0.0" in server.get("/metrics").text, "the flush")
        ids = {answer.json()["id"] for answer in answers}
        server.stop()
    assert ids <= {record.id for record in spooled(tmp_path)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_300_alias_moves_under_16_clients(tmp_path):
    """No failed or hung request, no answer that mixes versions, memory flat."""
    registry = Registry(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "artifacts")
    run = registry.start_run("soak", {})
    for version in (1, 2):
        folder = tmp_path / f"model-{version}"
        write_model_folder(folder, run_id=f"{version:032d}", scale=float(version))
        assert registry.register(folder, FORECASTER, run) == version
    registry.set_alias(FORECASTER, PRODUCTION, 1)
    put_prices(tmp_path)
    seen: Counter[int] = Counter()
    faults: list[str] = []
    stop, body = threading.Event(), request_body()

    def check(response: httpx.Response) -> None:
        answer = response.json()
        version = answer.get("model_version")
        medians = [step["median"] for step in answer.get("forecast", [])]
        if medians != [100.0 * version] * 5 or answer["run_id"] != f"{version:032d}":
            faults.append(response.text)
        seen[version] += 1

    def ask(url: str, number: int) -> None:
        with httpx.Client(base_url=url, timeout=10) as client:
            while not stop.is_set():
                try:
                    if number % 2:
                        check(client.post("/v1/forecast", json=body))
                    else:
                        check(client.get("/v1/forecast/GOOG"))
                except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
                    faults.append(repr(error))
                stop.wait(0.05)

    settings = {"tracking_uri": registry.uri, "poll_seconds": 0.05}
    with started("sync", tmp_path, **settings), web(tmp_path) as server:
        (worker,) = until(lambda: workers(server), "the worker")
        clients = [threading.Thread(target=ask, args=(server.url, n)) for n in range(16)]
        for client in clients:
            client.start()
        try:
            memory = {}
            for move in range(1, 301):
                version = 1 + move % 2
                registry.set_alias(FORECASTER, PRODUCTION, version)
                server.wait_version(version)
                if move in (20, 100, 200, 300):
                    memory[move] = psutil.Process(worker).memory_info().rss
        finally:
            stop.set()
            for client in clients:
                client.join()
        assert not faults, faults[:5]
        assert set(seen) == {1, 2}
        assert memory[300] - memory[20] <= 5 * 2**20, memory
