"""Rate limits over processes, against a slow definition of the same limit, and worn files."""

import multiprocessing
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from forecasting.errors import ConfigError
from serving.limits import PROBES, RateLimiter, rate_limited
from tests.serving.running import until

SECOND = 10**9


class Clock:
    """Nanoseconds as a test wants them."""

    def __init__(self, now: int = 10**15) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "limits"


@pytest.fixture
def limiter(path, clock):
    with closing(RateLimiter(path, clock=clock)) as made:
        yield made


def at_once(limiter: RateLimiter, name: str, rate: float, burst: float) -> int:
    """How many requests are let in without waiting."""
    count = 0
    while limiter.take(name, rate, burst) == 0 and count < 1000:
        count += 1
    return count


class Slow:
    """The limit by its definition: from no request let in to a later one may there be more than
    `burst` and one for every interval between them."""

    def __init__(self, interval: int, burst: int) -> None:
        self.interval, self.burst = interval, burst
        self.let_in: list[int] = []

    def take(self, now: int) -> int:
        """Nanoseconds until the request is let in."""
        wait = 0
        for index, earlier in enumerate(self.let_in):
            count = len(self.let_in) - index + 1
            wait = max(wait, earlier + (count - self.burst) * self.interval - now)
        if wait == 0:
            self.let_in.append(now)
        return wait


@hypothesis_settings(deadline=None, max_examples=200)
@given(
    interval=st.integers(1, 50),
    burst=st.integers(1, 6),
    pauses=st.lists(st.integers(0, 120), max_size=60),
)
def test_it_agrees_with_the_slow_definition(tmp_path_factory, interval, burst, pauses):
    clock = Clock()
    path = tmp_path_factory.getbasetemp() / f"limits-{time.monotonic_ns()}"
    slow = Slow(interval * 1000, burst)
    with closing(RateLimiter(path, 8, clock)) as limiter:
        for pause in pauses:
            clock.now += pause * 1000
            expected = slow.take(clock.now) / SECOND
            assert limiter.take("anna", 1e6 / interval, burst) == pytest.approx(expected)
    path.unlink()
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)


def test_a_burst_then_the_rate(limiter, clock):
    assert at_once(limiter, "anna", 10, 5) == 5
    assert limiter.take("anna", 10, 5) == pytest.approx(0.1)
    assert limiter.take("anna", 10, 5) == pytest.approx(0.1), "a refused request costs nothing"
    clock.now += SECOND // 10
    assert at_once(limiter, "anna", 10, 5) == 1
    clock.now += 3600 * SECOND
    assert at_once(limiter, "anna", 10, 5) == 5


def test_names_have_limits_of_their_own_and_no_rate_is_no_limit(limiter):
    assert at_once(limiter, "anna", 1, 3) == 3
    assert at_once(limiter, "bob", 1, 2) == 2
    assert at_once(limiter, "carl", 0, 1) == 1000
    assert at_once(limiter, "dora", 1, 0) == 1, "a burst is at least one request"
    assert at_once(limiter, "emil", 1e-12, 1) == 1
    assert at_once(limiter, "fritz", 1e12, 1e12) == 1000


def test_it_survives_a_restart(path, clock, limiter):
    assert at_once(limiter, "anna", 1, 3) == 3
    with closing(RateLimiter(path, clock=clock)) as again:
        assert again.take("anna", 1, 3) == pytest.approx(1)


def test_times_of_an_earlier_boot_heal(path, clock, limiter):
    assert at_once(limiter, "anna", 1, 3) == 3
    clock.now = 5 * SECOND  # the machine has just started
    with closing(RateLimiter(path, clock=clock)) as again:
        assert again.take("anna", 1, 3) == pytest.approx(1)
        assert again.take("bob", 1, 3) == 0
        clock.now += SECOND
        assert at_once(again, "anna", 1, 3) == 1
        clock.now += 3 * SECOND
        assert at_once(again, "anna", 1, 3) == 3


def test_a_changed_rate_holds_at_once(limiter, clock):
    assert at_once(limiter, "anna", 0.001, 10) == 10
    assert limiter.take("anna", 100, 10) <= 0.01
    clock.now += SECOND
    assert at_once(limiter, "anna", 100, 10) == 10


def test_every_name_finds_its_slot_in_a_full_table(path, clock):
    with closing(RateLimiter(path, PROBES, clock)) as limiter:
        names = [f"name {number}" for number in range(PROBES)]
        for _ in range(2):
            assert [limiter.take(name, 1, 2) for name in names] == [0.0] * PROBES
        for name in names:
            assert limiter.take(name, 1, 2) == pytest.approx(1)
        with closing(RateLimiter(path, PROBES, clock)) as other:  # without a memory of slots
            for name in names:
                assert other.take(name, 1, 2) == pytest.approx(1)


def test_in_a_full_table_the_most_silent_name_makes_room(path, clock):
    with closing(RateLimiter(path, 4, clock)) as limiter:
        for name in "abcd":
            assert at_once(limiter, name, 1, 2) == 2
            clock.now += SECOND // 10
        assert at_once(limiter, "e", 1, 2) == 2
        for name in "bcde":
            assert limiter.take(name, 1, 2) > 0
        clock.now += 60 * SECOND
        for name in "fghia":
            assert at_once(limiter, name, 1, 2) == 2


@pytest.mark.parametrize("content", [b"", b"no table at all", b"\xff" * 65552, b"\0" * 65552])
def test_a_file_that_is_none_is_made_anew(path, clock, content):
    path.write_bytes(content)
    with closing(RateLimiter(path, clock=clock)) as limiter:
        assert at_once(limiter, "anna", 1, 3) == 3
    with closing(RateLimiter(path, clock=clock)) as limiter:
        assert limiter.take("anna", 1, 3) > 0


def test_a_table_full_of_nonsense_heals(path, clock):
    with closing(RateLimiter(path, 8, clock)):
        pass
    path.write_bytes(path.read_bytes()[:16] + b"\x7f" * (path.stat().st_size - 16))
    with closing(RateLimiter(path, 8, clock)) as limiter:
        assert at_once(limiter, "anna", 1, 3) == 3


def test_a_table_of_another_size_is_replaced_while_the_old_one_is_used(path, clock, limiter):
    assert at_once(limiter, "anna", 1, 3) == 3
    with closing(RateLimiter(path, 16, clock)) as other:
        assert at_once(other, "anna", 1, 3) == 3
    assert limiter.take("anna", 1, 3) > 0


def test_a_place_where_no_file_can_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"can be written was expected at .*file/limits"):
        RateLimiter(tmp_path / "file" / "limits")


HAMMER = """
import sys, time
from pathlib import Path
from serving.limits import RateLimiter
limiter, rate, burst = RateLimiter(Path(sys.argv[1])), float(sys.argv[2]), float(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
start = time.monotonic()
count = 0
while time.monotonic() < start + 1.0:
    wait = limiter.take("anna", rate, burst)
    if wait == 0:
        count += 1
    limiter.take(f"noise {count % 50}", 1e6, 1)
end = time.monotonic()
print(start, end, count)
"""


def test_processes_together_get_the_rate_and_one_burst(path):
    rate, burst = 500, 100
    command = [sys.executable, "-c", HAMMER, path, str(rate), str(burst)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        process.stdin.write(b"go\n")
        process.stdin.flush()
    reports = [process.communicate(timeout=30)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    start = min(float(report[0]) for report in reports)
    end = max(float(report[1]) for report in reports)
    count, expected = sum(int(report[2]) for report in reports), burst + rate * (end - start)
    assert count <= expected + 1
    assert count >= 0.95 * expected


def test_a_killed_worker_leaves_nothing_locked(path):
    command = [sys.executable, "-c", HAMMER.replace("1.0", "60"), path, "1e9", "1"]
    with closing(RateLimiter(path)) as limiter:
        before = path.read_bytes()
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            try:
                process.stdin.write(b"go\n")
                process.stdin.flush()
                until(lambda: path.read_bytes() != before, "its requests", 10)
            finally:
                process.kill()
        assert limiter.take("bob", 1e9, 1) == 0


def _in_child(limiter: RateLimiter, pipe) -> None:
    pipe.send([limiter.take("anna", 1e-6, 5) == 0 for _ in range(3)])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_opens_the_file_again(path):
    context = multiprocessing.get_context("fork")
    with closing(RateLimiter(path)) as limiter:
        assert at_once(limiter, "anna", 1e-6, 3) == 3
        ours, theirs = context.Pipe()
        child = context.Process(target=_in_child, args=(limiter, theirs))
        child.start()
        assert ours.recv() == [True, True, False]
        child.join(10)
        for pipe in (ours, theirs):
            pipe.close()
        assert limiter.take("anna", 1e-6, 5) > 0


def test_the_answer_says_how_long_to_wait():
    error = rate_limited("anna", 50, 0.02)
    assert (error.kind, error.status) == ("rate-limited", 429)
    assert "At most 50 requests a second were expected from 'anna'" in error.detail
    assert "in 0.02 s" in error.detail
    waits = [rate_limited("anna", 50, wait).headers["Retry-After"] for wait in (0.001, 1, 1.2)]
    assert waits == ["1", "1", "2"]
