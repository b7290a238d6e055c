"""One real stack for all end-to-end tests: Prefect server and worker, MLflow, inference server."""

from collections.abc import Iterator

import pytest

from deployments.prefect_api import PrefectApi
from deployments.stack import Stack
from forecasting.settings import Settings, load_settings

QUICK = {
    "PERENNIAL_TRIALS": "4",
    "PERENNIAL_EPOCHS": "4",
    "PERENNIAL_FIT_EPOCHS": "10",
    "PERENNIAL_POLL_SECONDS": "0.2",
}
"""A small search; the gate's settings are the usual ones."""


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("stack"), extra=QUICK) as running:
        running.start()
        running.deploy()
        yield running


@pytest.fixture(scope="session")
def settings(stack: Stack) -> Settings:
    """What the stack's own processes are told."""
    return load_settings(
        home=stack.home, tracking_uri=stack.mlflow_url, server_url=stack.server_url
    )


@pytest.fixture(scope="session")
def api(stack: Stack) -> Iterator[PrefectApi]:
    with PrefectApi(stack.prefect_url) as client:
        yield client
