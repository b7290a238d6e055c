"""Ray for the time of one job: a private one in this process, or the cluster of `ray_address`.

With `tasks.search` and `tasks.trials` the only room that knows Ray.
"""

import gc
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import ray
from ray._private.node import Node
from ray.exceptions import RayError, RayTaskError

from forecasting.errors import ConfigError, ServiceError, TrainingError
from forecasting.scratch import scratch, sweep
from forecasting.settings import Settings

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 3
"""How often something is done again whose worker or node was lost."""
_OBJECT_STORE = 128 * 1024**2
_SCRATCH = "perennial-search-"
_WORKER_ENVIRONMENT = {
    # one thread a trial; malloc that keeps its memory makes the same LSTM 1.3-1.8x faster
    "OMP_NUM_THREADS": "1",
    "PL_DISABLE_FORK": "1",  # as Tune would set it
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(8 * 1024**3),
}
_ENVIRONMENT = {
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a banner even when told to be silent
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the run, not only the experiment
}
_WARM = "tasks.warm"
_SET_BY_RAY = ("PYTHONBREAKPOINT", "RAY_AUTH_MODE")


def spread(
    settings: Settings, work: Callable[[T], R], items: Iterable[T], warm: Sequence[str] = ()
) -> Iterator[tuple[T, R | Exception]]:
    """Do `work` for every item on Ray, one a CPU, and give back each with what came of it.

    Items are taken as there is room for them, and come back in the order in which they end. One
    whose worker or node is lost is done again.

    Args:
        settings: concurrency, ray_address.
        work: a function of a module, which workers import.
        items: what it is called with.
        warm: modules that a worker imports as it starts, beside torch and the network.
    """
    waiting = iter(items)
    flying: dict[Any, T] = {}
    # on a Ray of one's own the next ones lie ready for a worker that is done
    room = settings.concurrency * (1 if settings.ray_address else 2)
    with short_lived() as folder, running(settings, folder, warm=warm):
        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(work)
        while True:
            for item in islice(waiting, room - len(flying)):
                flying[remote.remote(item)] = item
            if not flying:
                return
            (done,), _ = ray.wait(list(flying), num_returns=1)
            item = flying.pop(done)
            try:
                found: R | Exception = ray.get(done)
            except RayTaskError as error:  # of one item; the caller decides
                found = error
            except RayError as error:
                found = TrainingError(f"Its worker was lost {1 + RETRIES} times: {error}")
            yield item, found


@contextmanager
def short_lived() -> Iterator[Path]:
    """A folder for Ray and Tune, which write a lot: in memory, where there is room."""
    shared = Path("/dev/shm")
    sweep(shared, _SCRATCH, kept_seconds=0)  # what a killed search holds there is memory
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 4 * _OBJECT_STORE
    folder = shared if roomy else Path(tempfile.gettempdir())
    with scratch(folder, _SCRATCH, kept_seconds=0) as made:
        yield made


@contextmanager
def running(
    settings: Settings, folder: Path, meanwhile: Sequence[str] = (), warm: Sequence[str] = ()
) -> Iterator[None]:
    """Ray for the time of a job: the cluster of `ray_address`, else one in this process.

    A Ray that the caller has started already is used and left running.

    Args:
        settings: ray_address, concurrency.
        folder: short-lived, for what Ray writes.
        meanwhile: modules to import while Ray starts, which is mostly waiting.
        warm: modules that workers of a Ray of our own import as they start, after `tasks.warm`.
    """
    tempfile.gettempdir()  # remembered from here on: TMPDIR is another for Ray's own processes
    own = {} if settings.ray_address else _private(folder, warm)
    with _environment(_ENVIRONMENT | _WORKER_ENVIRONMENT | own), _signals_kept():
        if ray.is_initialized():
            yield
            return
        with _imported(meanwhile):
            _start_ray(settings, folder)
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _imported(names: Sequence[str]) -> Iterator[None]:
    """Import modules in another thread, undisturbed by the garbage collector (see `warm`).

    If there were any to import, it does not look again at what there is by then: it would as the
    process ends, too, for half a second.
    """
    missing = [name for name in names if name not in sys.modules]
    thread = threading.Thread(target=lambda: [import_module(name) for name in missing], daemon=True)
    collects = gc.isenabled()
    gc.disable()
    thread.start()
    try:
        yield
        thread.join()
        if missing:
            gc.freeze()
    finally:
        thread.join()
        if collects:
            gc.enable()


def _private(folder: Path, warm: Sequence[str]) -> dict[str, str]:
    """What keeps an own Ray to itself: a killed trial's files, and the token of its ports.

    Without a token in the environment, Ray would write one into the user's home.
    """
    return {
        "TMPDIR": str(folder),
        "RAY_AUTH_TOKEN": _token(),
        "RAY_preload_python_modules": ",".join((_WARM, *warm)),  # while the driver goes on
        # or a worker that has imported for a second is ended as idle, and another started
        "RAY_idle_worker_killing_time_threshold_ms": str(60 * 60 * 1000),
    }


@cache
def _token() -> str:
    """One a process, since Ray reads it once."""
    return secrets.token_hex(32)


def _start_ray(settings: Settings, folder: Path) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not settings.ray_address:
        with _bare():
            ray.init(
                address="local",
                num_cpus=settings.concurrency,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE,
                _temp_dir=str(folder / "ray"),
                **quiet,
            )
        return
    if settings.ray_address.startswith("ray://"):
        raise ConfigError(
            f"PERENNIAL_RAY_ADDRESS or RAY_ADDRESS is {settings.ray_address}; host:port of the "
            "cluster's head is expected, such as head.example:6379, from a machine of the cluster. "
            "Ray Tune does not tell a Ray Client of its trials."
        )
    try:
        _knock(settings.ray_address)
        ray.init(
            address=settings.ray_address,
            runtime_env={
                "env_vars": _WORKER_ENVIRONMENT,
                "worker_process_setup_hook": "tasks.cluster.warm_up",
            },
            **quiet,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ServiceError(
            f"No Ray cluster answers at {settings.ray_address}: {error}. "
            "Check PERENNIAL_RAY_ADDRESS or RAY_ADDRESS; empty means Ray in this process."
        ) from error


@contextmanager
def _bare() -> Iterator[None]:
    """Ray without three processes that one of our own has no use for.

    Without a dashboard it would start one for its makers' statistics, and wait for that one; the
    autoscaler, which has no nodes to start here, takes a second to end; and what is read out of
    logs for the driver is told to nobody.
    """
    left_out = ("start_api_server", "start_monitor", "start_log_monitor")
    kept = {name: getattr(Node, name) for name in left_out if hasattr(Node, name)}
    for name in kept:
        setattr(Node, name, lambda self, *_, **__: None)
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(Node, name, method)


def _knock(address: str) -> None:
    """Fail within seconds where Ray would wait for minutes and then end the process."""
    where = urlsplit(address if "://" in address else f"ray://{address}")
    if where.hostname and where.port:
        socket.create_connection((where.hostname, where.port), timeout=5).close()


def warm_up() -> None:
    """Run in each new worker, so that its imports are not part of its first trial."""
    import_module(_WARM)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables that Ray and its workers read when they start, put back with what Ray sets."""
    before = {name: os.environ.get(name) for name in (*values, *_SET_BY_RAY)}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes over SIGTERM and keeps it; give it back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
