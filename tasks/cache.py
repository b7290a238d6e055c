"""What a cached step depends on: dataset version, code and parameters, never a DataFrame."""

import hashlib
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

import msgspec

import forecasting
import tasks

FORECASTING = (
    "contract",
    "datasets",
    "prices",
    "windows",
    "hyperparameters",
    "study",
    "network",
    "model",
    "metrics",
)
"""Modules of that package that windows, search and fit run."""
PACKAGES = ("torch", "lightning", "ray", "optuna", "onnx", "numpy")
"""Packages whose version changes what a search or a fit finds."""


@cache
def code_fingerprint() -> str:
    """Hash of the sources that windows, search and fit run, and of the packages below them."""
    digest = hashlib.sha256()
    for module, names in (
        (forecasting, FORECASTING),
        (tasks, ("search", "trials", "training")),
    ):
        folder = Path(next(iter(module.__path__)))
        for name in names:
            path = folder / f"{name}.py"
            digest.update(path.read_bytes() if path.is_file() else b"")
    for package in PACKAGES:
        digest.update(f"{package}=={version(package)}".encode())
    return digest.hexdigest()


@cache
def code_commit() -> str:
    """Git commit of this code, `-dirty` if changed; the package's version where it is installed."""
    folder = Path(next(iter(tasks.__path__))).parent
    described = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    tracked = (folder / ".git").exists() and described.returncode == 0
    return described.stdout.strip() if tracked else f"perennial {version('perennial')}"


def cache_key(step: str, dataset_md5: str, parameters: Mapping[str, object]) -> str:
    """Key of one step's result; equal only if data, code and parameters are."""
    described = msgspec.json.encode([step, dataset_md5, parameters], order="deterministic")
    return f"{step}-{hashlib.sha256(described + code_fingerprint().encode()).hexdigest()[:32]}"
