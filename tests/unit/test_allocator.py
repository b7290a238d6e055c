"""The allocator's settings stand before Python starts wherever something is trained."""

import os
import subprocess
import sys

import psutil
import pytest
import yaml

from deployments.stack import ALLOCATOR, PREFECT_FILE, Stack
from tasks.cluster import _WORKER_ENVIRONMENT
from tests.serving.running import until

DEPLOYMENTS = yaml.safe_load(PREFECT_FILE.read_text())["deployments"]

MAPPED = """
import ctypes, numpy
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd".split()]
    _fields_ += [(f"more{i}", ctypes.c_size_t) for i in range(5)]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
before = mallinfo().hblks
held = numpy.zeros(8_000_000)
print(mallinfo().hblks - before)
"""
"""Prints how many of one large array's pieces were fetched from the kernel by themselves."""


def _without() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ALLOCATOR}


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda each: each["name"])
def test_a_flow_run_is_started_with_it(deployment):
    variables = deployment["work_pool"]["job_variables"]["env"]
    assert {key: variables.get(key) for key in ALLOCATOR} == ALLOCATOR


def test_every_process_of_the_stack_is_started_with_it(tmp_path):
    assert Stack(tmp_path).environment().items() >= ALLOCATOR.items()


def test_a_worker_of_the_search_is_started_with_it():
    assert _WORKER_ENVIRONMENT.items() >= ALLOCATOR.items()


def test_a_replay_which_trains_in_its_own_process_starts_anew_with_it(tmp_path):
    command = [sys.executable, "-m", "deployments.replay", "--policy", "never"]
    environment = _without() | {"PERENNIAL_HOME": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        told = psutil.Process(process.pid)
        try:
            until(lambda: told.environ().items() >= ALLOCATOR.items(), "the allocator")
        finally:
            process.kill()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="variables of glibc")
@pytest.mark.parametrize(("own", "mapped"), [({}, "1"), (ALLOCATOR, "0")])
def test_it_keeps_large_tensors_out_of_the_kernel(own, mapped):
    command = [sys.executable, "-c", MAPPED]
    found = subprocess.run(
        command, env=_without() | own, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == mapped
