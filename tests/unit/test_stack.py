"""The local stack's own machinery, with tiny real processes in the place of the servers."""

import importlib
import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from deployments import orphans
from deployments.stack import HOST, Ports, Service, Stack
from forecasting.errors import ConfigError, ServiceError
from forecasting.settings import PREFIX, Settings
from tests.serving.running import until


@dataclass
class Tiny(Stack):
    """A stack of other processes."""

    made: Callable[["Tiny"], list[Service]] = lambda stack: []
    interrupted: set[str] = field(default_factory=set)

    def services(self) -> list[Service]:
        return self.made(self)

    def _spawn(self, service: Service) -> None:
        super()._spawn(service)
        if service.name in self.interrupted:
            raise KeyboardInterrupt


def script(name: str, code: str, ready: Callable[[], bool] = lambda: True, **more) -> Service:
    return Service(name, [sys.executable, "-c", textwrap.dedent(code)], ready, **more)


def http_server(name: str, port: int, **more) -> Service:
    command = [sys.executable, "-m", "http.server", str(port), "--bind", HOST]
    return Service(name, command, lambda: answers(port), **more)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def says(path: Path, word: str) -> bool:
    return path.exists() and word in path.read_text()


def child_of(log: Path) -> psutil.Process:
    return psutil.Process(int(log.read_text().split()[1]))


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    for process in left:
        process.kill()
    assert left == set()


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of somebody else's servers."""
    for key, value in {
        "PREFECT_API_URL": "http://theirs:4200/api",
        "PREFECT_API_KEY": "theirs",
        "MLFLOW_TRACKING_URI": "http://theirs:5000",
        "MLFLOW_EXPERIMENT_NAME": "theirs",
        "RAY_ADDRESS": "ray://theirs:10001",
        "DVC_STUDIO_TOKEN": "theirs",
        "PERENNIAL_HOME": "/theirs",
        "PERENNIAL_TRIALS": "99",
        "perennial_epochs": "99",
        "UNRELATED": "kept",
    }.items():
        monkeypatch.setenv(key, value)


def test_free_ports_are_distinct_and_can_be_bound():
    for _ in range(20):
        ports = Ports.free()
        numbers = [ports.prefect, ports.mlflow, ports.server]
        assert len(set(numbers)) == 3
        for number in numbers:
            with socket.socket() as probe:
                probe.bind((HOST, number))


@pytest.mark.usefixtures("foreign")
def test_nobody_elses_servers_are_in_the_environment(tmp_path):
    stack = Stack(tmp_path)
    environment = stack.environment()
    assert not [key for key, value in environment.items() if "theirs" in value or value == "99"]
    assert "RAY_ADDRESS" not in environment
    assert environment["PREFECT_API_URL"] == f"http://{HOST}:{stack.ports.prefect}/api"
    assert environment["MLFLOW_TRACKING_URI"] == f"http://{HOST}:{stack.ports.mlflow}"
    assert environment["PERENNIAL_HOME"] == str(tmp_path)
    assert environment["UNRELATED"] == "kept"


@pytest.mark.usefixtures("foreign")
def test_with_inherit_the_callers_settings_stay_and_the_stacks_addresses_win(tmp_path):
    stack = Stack(tmp_path, inherit=True)
    environment = stack.environment()
    assert environment["PERENNIAL_TRIALS"] == environment["perennial_epochs"] == "99"
    assert environment["RAY_ADDRESS"] == "ray://theirs:10001"
    assert environment["MLFLOW_TRACKING_URI"] == stack.mlflow_url
    assert environment["PREFECT_API_URL"] == f"{stack.prefect_url}/api"
    assert environment["PERENNIAL_HOME"] == str(tmp_path)


def test_path_is_kept_behind_the_environments_own_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/some/where:/else")
    first, *rest = Stack(tmp_path).environment()["PATH"].split(os.pathsep)
    assert Path(first) == Path(sys.executable).parent
    assert rest == ["/some/where", "/else"]


def test_leases_are_kept_where_a_server_that_is_killed_finds_them(tmp_path):
    environment = Stack(tmp_path).environment()
    kept = importlib.import_module(environment["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"])
    assert kept.ConcurrencyLeaseStorage().storage_path.is_relative_to(os.environ["PREFECT_HOME"])


def test_extra_variables_win_over_everything(tmp_path):
    stack = Stack(tmp_path, extra={"PERENNIAL_TRIALS": "8", "DO_NOT_TRACK": "0"})
    environment = stack.environment()
    assert (environment["PERENNIAL_TRIALS"], environment["DO_NOT_TRACK"]) == ("8", "0")


def test_every_setting_that_the_stack_makes_is_known(tmp_path):
    ours = {key for key in Stack(tmp_path).environment() if key.startswith(PREFIX)}
    assert {key.removeprefix(PREFIX).lower() for key in ours} <= set(Settings.model_fields)


@pytest.mark.parametrize(
    ("field", "name"),
    [("prefect", "Prefect"), ("mlflow", "MLflow"), ("server", "the inference server")],
)
def test_a_port_in_use_is_named_with_a_remedy_and_nothing_starts(tmp_path, field, name):
    stack = Tiny(tmp_path / "home", made=lambda _: [script("web", "print('started')")])
    port = getattr(stack.ports, field)
    with socket.socket() as taken:
        taken.bind((HOST, port))
        taken.listen()
        with pytest.raises(ConfigError) as caught:
            stack.start()
    for part in (f"Port {port} for {name} is in use", "Stop what listens", f":{port}'"):
        assert part in str(caught.value)
    assert stack.processes == {}
    assert not stack.home.exists()


def test_a_stack_starts_in_order_answers_stops_and_starts_again(tmp_path):
    def made(stack: Tiny) -> list[Service]:
        return [
            http_server("web", stack.ports.server, needs=("mlflow",)),
            http_server("mlflow", stack.ports.mlflow, needs=("prefect",)),
            http_server("prefect", stack.ports.prefect),
        ]

    stack = Tiny(tmp_path, made=made)
    for _ in range(2):
        lines: list[str] = []
        stack.start(lines.append)
        assert [line.split()[0] for line in lines] == ["prefect", "mlflow", "web"]
        for url in (stack.prefect_url, stack.mlflow_url, stack.server_url):
            assert httpx.get(url).is_success
        started = [psutil.Process(process.pid) for process in stack.processes.values()]
        assert [process.cwd() for process in started] == [str(tmp_path)] * 3
        assert started[0].environ()["PERENNIAL_HOME"] == str(tmp_path)
        stack.stop()
        assert not any(process.is_running() for process in started)
        assert not any(map(answers, vars(stack.ports).values()))


KILLED = """
import sys
from pathlib import Path
from tests.unit.test_stack import Ports, Tiny, http_server, script

home, *ports = sys.argv[1:]
stack = Tiny(
    Path(home),
    Ports(*map(int, ports)),
    made=lambda stack: [
        http_server("prefect", stack.ports.prefect),
        # as Prefect's worker starts a flow run
        script(
            "worker",
            "import subprocess; subprocess.run(['sleep', '300'], start_new_session=True)",
        ),
    ],
)
stack.start()
print([process.pid for process in stack.processes.values()], flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("worker", ["lives", "was killed too"])
def test_what_a_killed_stack_left_is_ended_by_the_next_one(tmp_path, worker):
    ports = Ports.free()
    command = [sys.executable, "-c", KILLED, str(tmp_path), *map(str, vars(ports).values())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        left = [psutil.Process(pid) for pid in json.loads(first.stdout.readline())]
        until(lambda: bool(left[1].children()), "the worker's own child", 20)
        left += left[1].children()
        stack = Tiny(tmp_path, ports, made=lambda _: [http_server("prefect", ports.prefect)])
        with pytest.raises(ConfigError, match=f"runs already, as process {first.pid}"):
            stack.start()
        stack.stop()
        assert (tmp_path / "stack.json").exists(), "it is the other one's"
        assert all(process.is_running() for process in left)
        first.kill()
    assert len(left) == 3
    if worker == "was killed too":
        left[1].kill()
        left.pop(1).wait(5)
    assert all(process.is_running() for process in left), "a kill cannot be answered"
    lines: list[str] = []
    stack.start(lines.append)
    assert lines[0] == f"ended {len(left)} processes that a killed stack had left"
    assert not any(process.is_running() for process in left)
    assert answers(ports.prefect)
    stack.stop()
    assert not (tmp_path / "stack.json").exists()


@pytest.mark.parametrize("mark", [{"mark": "a"}, {}, {"started": []}])
def test_only_what_has_the_mark_of_a_dead_stack_is_ended(tmp_path, mark):
    with subprocess.Popen(["sleep", "60"], env={orphans.MARK: "b"}) as other:
        dead = {"pid": other.pid, "began": psutil.Process(other.pid).create_time() - 100}
        (tmp_path / "stack.json").write_text(json.dumps({"owner": dead, **mark}))
        assert orphans.end(tmp_path) == 0
        assert other.poll() is None
        other.kill()


def test_a_service_that_dies_is_told_with_its_log_and_stops_the_others(tmp_path):
    def made(stack: Tiny) -> list[Service]:
        dying = """
            import sys
            for number in range(40): print(f"line {number}.")
            sys.exit("no such table: experiments")
        """
        return [
            http_server("prefect", stack.ports.prefect),
            script("mlflow", dying, lambda: False, needs=("prefect",)),
            http_server("web", stack.ports.server, needs=("mlflow",)),
        ]

    stack = Tiny(tmp_path, made=made)
    with pytest.raises(ServiceError) as caught:
        stack.start()
    said = str(caught.value)
    assert "mlflow ended with code 1" in said
    assert str(tmp_path / "logs" / "mlflow.log") in said
    assert "no such table: experiments" in said
    assert "line 39." in said
    assert "line 9." not in said
    assert stack.processes == {}
    assert not answers(stack.ports.prefect)
    assert stack.log("prefect").exists()
    assert not stack.log("web").exists()


def test_a_service_that_never_answers_is_told_with_its_log_and_stopped(tmp_path):
    waiting = "import time; print('thinking', flush=True); time.sleep(600)"

    def made(stack: Tiny) -> list[Service]:
        def never() -> bool:
            return False

        return [script("mlflow", waiting, never, seconds=1.0)]

    stack = Tiny(tmp_path, made=made)
    with pytest.raises(ServiceError, match="mlflow was not ready after 1 s") as caught:
        stack.start()
    assert str(stack.log("mlflow")) in str(caught.value)
    assert "thinking" in str(caught.value)
    assert stack.processes == {}


def test_a_command_that_does_not_exist_stops_the_others(tmp_path):
    def made(stack: Tiny) -> list[Service]:
        return [
            http_server("prefect", stack.ports.prefect),
            Service("mlflow", ["/no/such/command"], lambda: True, needs=("prefect",)),
        ]

    stack = Tiny(tmp_path, made=made)
    with pytest.raises(FileNotFoundError):
        stack.start()
    assert not answers(stack.ports.prefect)


def test_what_ignores_the_request_to_stop_is_killed_with_its_children(tmp_path):
    deaf = """
        import signal, subprocess, sys
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print("child", child.pid, flush=True)
        child.wait()
    """

    def made(stack: Tiny) -> list[Service]:
        return [script("web", deaf, lambda: says(stack.log("web"), "child"))]

    stack = Tiny(tmp_path, made=made)
    stack.start()
    (process,) = stack.processes.values()
    child = child_of(stack.log("web"))
    stack._end([process], seconds=0.2)
    assert process.poll() is not None
    assert not psutil.pid_exists(process.pid)
    assert not child.is_running()


def test_what_a_dead_service_left_behind_is_ended_too(tmp_path):
    leaving = """
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print("child", child.pid, flush=True)
        sys.exit("no more memory")
    """

    def made(stack: Tiny) -> list[Service]:
        return [script("mlflow", leaving, lambda: False)]

    stack = Tiny(tmp_path, made=made)
    with pytest.raises(ServiceError, match="no more memory"):
        stack.start()
    left = int(stack.log("mlflow").read_text().split()[1])
    with suppress(psutil.NoSuchProcess):
        psutil.Process(left).wait(5)
    assert not psutil.pid_exists(left)


def test_a_service_of_any_name_is_stopped(tmp_path):
    stack = Tiny(tmp_path, made=lambda stack: [http_server("another", stack.ports.server)])
    stack.start()
    (process,) = stack.processes.values()
    stack.stop()
    assert process.poll() is not None


def test_watch_starts_again_what_died(tmp_path, capsys):
    stack = Tiny(tmp_path, made=lambda stack: [http_server("web", stack.ports.server)])
    stack.start()
    first = stack.processes["web"]
    first.kill()
    first.wait()
    stack.interrupted.add("web")  # Ctrl-C, as soon as it runs again
    with pytest.raises(KeyboardInterrupt):
        stack.watch()
    assert "web ended with code -9; starting it again" in capsys.readouterr().out
    assert stack.processes["web"].pid != first.pid
    assert stack.processes["web"].poll() is None
    stack.stop()


def test_a_command_runs_against_the_stack_and_its_failure_is_told(tmp_path):
    stack = Stack(tmp_path, extra={"PERENNIAL_TRIALS": "none"})
    with pytest.raises(ServiceError) as caught:
        stack.run("serving", "web")
    assert "`serving web` ended with 2" in str(caught.value)
    assert "PERENNIAL_TRIALS" in str(caught.value)
    assert "usage" in stack.run("http.server", "--help")


def test_the_real_services_need_only_one_another(tmp_path):
    services = Stack(tmp_path).services()
    names = [service.name for service in services]
    assert len(set(names)) == len(names)
    assert all(set(service.needs) < set(names) for service in services)
