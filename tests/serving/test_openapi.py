"""The specification against the server: schemathesis sends what it allows, and what it forbids.

All of its checks are on, in all of its phases. What JSON Schema cannot say is told in
`openapi_hooks.py`; which statuses that leaves for bodies that the schema allows, in `CONFIG`.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.keys import new_key
from tests.serving.openapi_hooks import WEBHOOK_SECRET
from tests.serving.running import Server, install, put_prices, web

ROOT = Path(__file__).parents[2]
CONFIG = f"""
hooks = "{ROOT}/tests/serving/openapi_hooks.py"

[warnings]
fail-on = true

# A body that the schema allows may name a symbol or a model that is not served (404), or break a
# rule that JSON Schema has no words for (422): dates that ascend, high above low, enough rows.
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "404", "422"]

# 413: an array longer than `maxItems` may be too large as a body before anybody counts it.
[checks.negative_data_rejection]
expected-statuses = ["400", "401", "404", "413", "415", "422"]

# Elements that do not fit the shape beside them are a 400 in the Open Inference Protocol.
[[operations]]
include-path-regex = "(/infer|/invocations)$"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "404", "422"]
"""
OPEN = ("/health", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready", "/ping")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("home")
    install(made, 3, symbols=("GOOG", "AAPL"))
    put_prices(made, "GOOG", 100.0)
    put_prices(made, "AAPL", 20.0)
    return made


@pytest.fixture(scope="module")
def server(home) -> Iterator[Server]:
    # limits that the specification states, low enough to be passed
    with web(home, max_windows=3, max_rows=512) as running:
        yield running


@pytest.fixture(scope="module")
def locked(tmp_path_factory, home) -> Iterator[Server]:
    """The same with API keys, and with a webhook."""
    made = tmp_path_factory.mktemp("locked")
    (made / "store").symlink_to(home / "store")
    key = new_key(made / "api-keys.json", "schemathesis")
    with web(made, max_windows=3, max_rows=512, webhook_secret=WEBHOOK_SECRET) as running:
        running.client.headers["Authorization"] = f"Bearer {key}"
        yield running


def schemathesis(server: Server, folder: Path, *arguments: str) -> str:
    """Run it to its end; what it printed."""
    (folder / "schemathesis.toml").write_text(CONFIG)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml"]
    command += ["run", f"{server.url}/schema/openapi.json", "--checks", "all", "--no-color"]
    command += ["--generation-deterministic", "--no-shrink", "--max-examples", "10", *arguments]
    run = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, "\n".join(line[:400] for line in run.stdout.splitlines()[:200])
    return run.stdout


def operations(server: Server) -> dict[tuple[str, str], dict]:
    paths = server.get("/schema/openapi.json").json()["paths"]
    return {(method.upper(), path): each for path in paths for method, each in paths[path].items()}


def answered_well(server: Server) -> set[tuple[str, str]]:
    """Method and route of everything that was answered with a 2xx."""
    families = text_string_to_metric_families(server.get("/metrics").text)
    samples = [sample.labels for family in families for sample in family.samples]
    return {
        (labels["method"], labels["route"])
        for labels in samples
        if labels.get("status", "").startswith("2")
    }


def test_the_server_is_as_its_specification_says(server, tmp_path):
    said = schemathesis(server, tmp_path)
    everything = operations(server)
    assert f"Tested: {len(everything)}" in said
    for phase in ("Examples", "Coverage", "Fuzzing", "Stateful"):
        assert f"✅ {phase}" in said
    assert set(everything) <= answered_well(server), "operations that were never answered well"
    assert server.popen.poll() is None


def test_keys_are_needed_where_the_specification_says(locked, tmp_path):
    key = locked.client.headers["Authorization"]
    said = schemathesis(locked, tmp_path, "-H", f"Authorization: {key}")
    everything = operations(locked)
    assert f"Tested: {len(everything)}" in said
    assert set(everything) <= answered_well(locked), "operations that were never answered well"
    assert key.removeprefix("Bearer ") not in locked.log


def test_security_is_declared_only_where_there_are_keys(server, locked):
    assert "security" not in server.get("/schema/openapi.json").json()
    specification = locked.get("/schema/openapi.json").json()
    assert specification["security"] == [{"bearer": []}, {"key": []}]
    assert set(specification["components"]["securitySchemes"]) == {"bearer", "key"}
    for (_, path), operation in operations(locked).items():
        is_open = path in (*OPEN, "/hooks/registry")
        assert operation.get("security") == ([] if is_open else None), path
        assert ("401" in operation["responses"]) == (not is_open or path == "/hooks/registry")


def test_the_webhook_is_documented_only_where_there_is_one(server, locked):
    assert ("POST", "/hooks/registry") not in operations(server)
    assert ("POST", "/hooks/registry") in operations(locked)


def test_every_operation_tells_what_may_be_answered_in_its_place(server):
    for (_, path), operation in operations(server).items():
        told = set(operation["responses"])
        assert told >= {"200", "414", "431", "500", "503"}, path
        assert ("429" in told) == (path not in OPEN), path
        if "requestBody" in operation:
            assert told >= {"400", "408", "413", "415"}, path
            assert operation["requestBody"]["required"]


def test_limits_of_this_server_are_told(server):
    schemas = server.get("/schema/openapi.json").json()["components"]["schemas"]
    assert schemas["Windows"]["properties"]["windows"]["maxItems"] == 3
    assert schemas["Window"]["properties"]["rows"]["maxItems"] == 512


def test_methods_that_are_none_of_a_route(server):
    for method in ("DELETE", "TRACE", "PATCH", "QUERY"):
        refused = server.client.request(method, "/v1/models")
        assert refused.status_code == 405
        assert set(refused.headers["allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}
        assert refused.headers["content-type"] == "application/problem+json"
    allowed = server.client.options("/v1/forecast").headers["allow"]
    assert set(allowed.split(", ")) == {"POST", "OPTIONS"}
    assert server.client.head("/v1/forecast").status_code == 405


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/v1/forecast/GOOG", "/v1/forecast/GOGO", "/ping", "/metrics", "/nowhere"],
)
def test_head_is_get_without_the_body(server, path):
    got, head = server.get(path), server.client.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    if path != "/metrics":
        assert head.headers["content-length"] == got.headers["content-length"]
    assert server.get(path).status_code == got.status_code, "the connection is still in step"
