"""What a web worker imports, and how much memory it takes."""

import subprocess
import sys

import psutil

from tests.serving.running import install, put_prices, web, workers

FOREIGN = (
    "prefect",
    "ray",
    "torch",
    "lightning",
    "evidently",
    "mlflow",
    "pandas",
    "sqlalchemy",
    "dvc",
    "fsspec",
    "scipy",
)


def test_the_app_imports_no_heavy_library():
    code = f"import sys, serving.app; print([m for m in {FOREIGN} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_worker_stays_below_150_mb(tmp_path):
    install(tmp_path, 1)
    put_prices(tmp_path, count=512)
    with web(tmp_path) as server:
        for _ in range(200):
            assert server.get("/v1/forecast/GOOG").is_success
        (worker,) = workers(server)
        assert psutil.Process(worker).memory_info().rss < 150e6
