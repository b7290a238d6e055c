"""Speed of the loop on real processes: `make bench-loop`; the last line is one JSON object.

Keys and what they mean (seconds unless said otherwise; each bar is for 2 cores):
    train_cold_s, train_cached_s   `train` with 16 trials of at most 10 epochs, process start
                                   included, and the same again from cache (120, 15)
    serving_import_cpu_s           CPU of `import serving.app`, median of 5 (1.2)
    ready_s, rss_mb                a web worker from the model store, median of 3 (3, 200 MB)
    alias_to_served_p95_s, failed  over 50 alias moves under 4 clients (1.5, 0)
    event_to_served_s              drift event posted to new version served (90)
    log_model_s                    registering one model version, median of 5 (0.3)
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import httpx
import numpy as np
import psutil
from rich.console import Console

from deployments.prefect_api import PrefectApi
from deployments.stack import Ports, Stack
from forecasting import datasets, events
from forecasting.registry import PRODUCTION, Registry, open_registry
from forecasting.settings import Settings, load_settings
from forecasting.store import engine_of
from tests.models import write_model_folder

SYMBOL, FORECASTER = "GOOG", "perennial-goog"
AS_OF, LATER = date(2010, 12, 31), date(2011, 6, 30)
DELIVER = (
    "from forecasting.settings import load_settings; from tasks.events import deliver; "
    "deliver(load_settings())"
)
MOVES, CLIENTS = 50, 4
console = Console(stderr=False, highlight=False)


def main() -> None:
    """Run every measurement and print the table and the JSON line."""
    home = Path(tempfile.mkdtemp(prefix="perennial-bench-"))
    stack = Stack(home)
    os.environ.clear()
    os.environ.update(stack.environment())
    measured: dict[str, float] = {}
    try:
        stack.start(console.print)
        stack.deploy()
        settings = load_settings()
        measured["train_cold_s"] = timed(lambda: train(stack, "promoted"))
        measured["train_cached_s"] = timed(lambda: train(stack, "unchanged"))
        registry = open_registry(settings)
        measured["log_model_s"] = log_model(registry, settings)
        measured |= alias_moves(registry, stack)
        measured["event_to_served_s"] = event_to_served(registry, settings, stack)
        measured["serving_import_cpu_s"] = import_cpu()
        measured |= ready(stack)
    finally:
        stack.stop()
        shutil.rmtree(home, ignore_errors=True)
    for name, value in measured.items():
        console.print(f"  {name:24} {value:8.3f}")
    print(json.dumps({name: round(value, 4) for name, value in measured.items()}))


def timed(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def train(stack: Stack, expected: str) -> None:
    """One ad-hoc `train` in a fresh process against the running servers."""
    code = (
        "from datetime import date; from flows.train import train; "
        f"print('outcome', train('{SYMBOL}', date.fromisoformat('{AS_OF}')).outcome)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=stack.environment(), capture_output=True, text=True
    )
    if f"outcome {expected}" not in done.stdout:
        raise SystemExit(f"train: {expected} expected.\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def log_model(registry: Registry, settings: Settings, times: int = 5) -> float:
    """Median seconds of registering the production model's folder as another version."""
    version = registry.alias(FORECASTER, PRODUCTION)
    assert version is not None
    with tempfile.TemporaryDirectory() as name:
        folder = registry.download(FORECASTER, version, Path(name) / "model")
        run_id = registry.start_run("bench", {})
        took = [
            timed(lambda: registry.register(folder, FORECASTER, run_id, {})) for _ in range(times)
        ]
        registry.finish(run_id, "FINISHED")
    return statistics.median(took)


def alias_moves(registry: Registry, stack: Stack) -> dict[str, float]:
    """Alias moved to served, under clients that never stop asking."""
    versions = sorted(info.version for info in registry.history(FORECASTER))[:2]
    stop, failures, asked = threading.Event(), [0] * CLIENTS, [0] * CLIENTS

    def client(index: int) -> None:
        with httpx.Client(base_url=stack.server_url, timeout=5) as http:
            while not stop.is_set():
                try:
                    failures[index] += not http.get(f"/v1/forecast/{SYMBOL}").is_success
                except httpx.HTTPError:
                    failures[index] += 1
                asked[index] += 1

    threads = [threading.Thread(target=client, args=(index,)) for index in range(CLIENTS)]
    for thread in threads:
        thread.start()
    took = []
    with httpx.Client(base_url=stack.server_url, timeout=5) as http:
        for move in range(MOVES):
            target = versions[(move + 1) % 2]
            began = time.perf_counter()
            registry.set_alias(FORECASTER, PRODUCTION, target)
            while http.get(f"/v1/forecast/{SYMBOL}").json().get("model_version") != target:
                if time.perf_counter() - began > 30:
                    raise SystemExit(f"version {target} was not served within 30 s")
                time.sleep(0.01)
            took.append(time.perf_counter() - began)
    stop.set()
    for thread in threads:
        thread.join()
    console.print(f"  {sum(asked)} requests during {MOVES} alias moves")
    return {"alias_to_served_p95_s": float(np.quantile(took, 0.95)), "failed": float(sum(failures))}


def event_to_served(registry: Registry, settings: Settings, stack: Stack) -> float:
    """A weak model in production, new prices, a drift event: seconds to the new version."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "weak"
        write_model_folder(folder, scale=1.02, as_of=AS_OF)
        run_id = registry.start_run("planted", {})
        weak = registry.register(folder, FORECASTER, run_id, {"planted": "weak"})
        registry.finish(run_id, "FINISHED")
    registry.set_alias(FORECASTER, PRODUCTION, weak)
    dataset = datasets.ingest(settings, [SYMBOL], LATER)
    event = events.DriftDetected(
        symbol=SYMBOL,
        as_of=LATER,
        forecaster=FORECASTER,
        version=weak,
        share=1.0,
        threshold=settings.drift_share,
        features=("planted",),
        dataset_md5=dataset.md5,
    )
    with engine_of(settings.sql_url) as engine:
        events.put(engine, event)
    began = time.perf_counter()
    # In a process of its own: Prefect reads its API address when it is imported.
    subprocess.run([sys.executable, "-c", DELIVER], check=True)
    with httpx.Client(base_url=stack.server_url, timeout=5) as http:
        while http.get(f"/v1/forecast/{SYMBOL}").json().get("model_version", 0) <= weak:
            if time.perf_counter() - began > 300:
                with PrefectApi(stack.prefect_url) as api:
                    logs = [api.logs(run.id) for run in api.runs("retrain")]
                raise SystemExit("no new version within 300 s\n" + "\n".join(logs))
            time.sleep(0.05)
    return time.perf_counter() - began


def import_cpu(times: int = 5) -> float:
    """Median CPU seconds of a process that only imports the server."""
    code = "import serving.app, time; print(time.process_time())"
    run = [sys.executable, "-c", code]
    return statistics.median(
        float(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
        for _ in range(times)
    )


def ready(stack: Stack, times: int = 3) -> dict[str, float]:
    """Seconds from process start to ready, and memory of the worker, on a copy of the store."""
    seconds, memory = [], []
    for _ in range(times):
        port = Ports.free().server
        environment = stack.environment() | {"PERENNIAL_PORT": str(port)}
        began = time.perf_counter()
        command = [sys.executable, "-m", "serving", "web"]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            while True:
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health/ready", timeout=1).is_success:
                        break
                except httpx.HTTPError:
                    pass
                if time.perf_counter() - began > 60 or process.poll() is not None:
                    raise SystemExit(f"the web worker did not get ready (code {process.poll()})")
                time.sleep(0.01)
            seconds.append(time.perf_counter() - began)
            for _ in range(20):
                httpx.get(f"http://127.0.0.1:{port}/v1/forecast/{SYMBOL}").raise_for_status()
            memory.append(psutil.Process(process.pid).memory_info().rss / 2**20)
            process.terminate()
    return {"ready_s": statistics.median(seconds), "rss_mb": statistics.median(memory)}


if __name__ == "__main__":
    main()
