"""Load on one address from a process of its own: wrk where it is, else oha, else a small client."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).resolve().parent / "peers" / "wrk.lua"
_TIMEOUT = 10
_ERRORS = ("connect", "read", "write", "timeout", "status")


class LoadError(Exception):
    """The load client failed, for instance since nobody listens."""


@dataclass(frozen=True)
class Target:
    """What is asked; `body` is a file."""

    url: str
    method: str
    body: Path | None
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Load:
    """What one measurement saw.

    Attributes:
        rps: good answers a second.
        p50_ms: median latency of all answers; `p99_ms` likewise.
        errors: requests that failed, by kind: connect, read, write, timeout, status.
    """

    rps: float
    p50_ms: float
    p99_ms: float
    errors: Mapping[str, int]

    @property
    def failed(self) -> int:
        """Requests that failed."""
        return sum(self.errors.values())


def tool() -> str:
    """The load client that this machine has: wrk, oha, or `own`."""
    return next((name for name in ("wrk", "oha") if shutil.which(name)), "own")


def load(target: Target, connections: int, seconds: float) -> Load:
    """Ask over keep-alive connections, each as fast as it is answered."""
    run = {"wrk": _wrk, "oha": _oha, "own": _own}[tool()]
    return run(target, connections, seconds)


def _headers(target: Target) -> list[str]:
    return [f"{name}: {value}" for name, value in target.headers.items()]


def _wrk(target: Target, connections: int, seconds: float) -> Load:
    command = ["wrk", "--threads", "1", "--connections", str(connections)]
    command += ["--duration", f"{max(round(seconds), 1)}s", "--timeout", f"{_TIMEOUT}s"]
    command += ["--script", str(_SCRIPT), target.url, "--", target.method]
    return _from_counts(_run([*command, str(target.body or "-"), *_headers(target)]))


def _own(target: Target, connections: int, seconds: float) -> Load:
    command = [sys.executable, "-m", "benchmarks.peers.load", target.url]
    command += ["--connections", str(connections), "--seconds", str(seconds)]
    command += ["--method", target.method]
    command += ["--body", str(target.body)] if target.body else []
    for header in _headers(target):
        command += ["--header", header]
    return _from_counts(_run(command))


def _oha(target: Target, connections: int, seconds: float) -> Load:
    command = ["oha", "--no-tui", "--output-format", "json", "-z", f"{seconds}s"]
    command += ["-c", str(connections), "-t", f"{_TIMEOUT}s", "-m", target.method]
    command += ["-D", str(target.body)] if target.body else []
    for header in _headers(target):
        command += ["-H", header]
    found = json.loads(_run([*command, target.url]))
    answers = {int(code): count for code, count in found["statusCodeDistribution"].items()}
    lost = {
        kind: count
        for kind, count in found["errorDistribution"].items()
        if "deadline" not in kind  # requests in flight at the end
    }
    bad = sum(count for code, count in answers.items() if code > 399)
    good = sum(answers.values()) - bad
    return Load(
        rps=good / found["summary"]["total"],
        p50_ms=(found["latencyPercentiles"]["p50"] or 0) * 1000,
        p99_ms=(found["latencyPercentiles"]["p99"] or 0) * 1000,
        errors=lost | {"status": bad},
    )


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-500:]
        raise LoadError(f"{command[0]} failed ({done.returncode}): {said}")
    return done.stdout


def _from_counts(text: str) -> Load:
    """From the one line of JSON that wrk.lua and peers/load.py print last."""
    found: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return Load(
        rps=(found["requests"] - found["status"]) / found["microseconds"] * 1e6,
        p50_ms=found["p50_us"] / 1000,
        p99_ms=found["p99_us"] / 1000,
        errors={kind: found[kind] for kind in _ERRORS},
    )
