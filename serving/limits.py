"""Rate limits that hold over all worker processes of one server.

The generic cell rate algorithm in its form of virtual scheduling (ITU-T Recommendation I.371,
annex A): of every name one number is kept, the time at which its next request is due if it asked
at exactly its rate. A request may come `burst - 1` intervals before it is due, so that within any
t seconds at most `burst + rate * t` requests are let in.

The numbers lie in a file that all workers map into memory, guarded by `flock`, which ends with its
holder: a worker that is killed never leaves it locked. A check costs about 4 microseconds, half
of them in the two system calls; a byte-range lock (`lockf`) costs twice as much as `flock`.
Times are of the monotonic clock, which begins anew at boot: a time further ahead than a full burst
cannot be from this boot (or belongs to a rate changed since) and is cut to that.
"""

import fcntl
import hashlib
import math
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from forecasting.errors import ConfigError
from serving.problems import ProblemError

SLOTS = 4096
PROBES = 64
"""Neighbouring slots in which a name may lie."""

_MAGIC = int.from_bytes(b"PERLIM01", "little")
_HEADER = 2  # words: magic, slots
_WORD = 8  # bytes
_LONGEST = 2**60  # nanoseconds, 36 years: no sum of times leaves 64 bits


def rate_limited(name: str, rate: float, wait: float) -> ProblemError:
    """429: more requests than agreed; `wait` as `RateLimiter.take` gave it."""
    error = ProblemError(
        "rate-limited",
        429,
        "Too many requests",
        f"At most {rate:g} requests a second were expected from {name!r}; more came. Send the next "
        f"one in {max(wait, 0.001):.3g} s, or ask whoever runs this server for a higher rate.",
    )
    error.headers["Retry-After"] = str(max(1, math.ceil(wait)))  # whole seconds (RFC 9110)
    return error


class RateLimiter:
    """The file of limits, as one process sees it. May be used from several threads.

    Names take slots by open addressing on a 64-bit hash, which lies in the slot beside the time,
    so that no two names share one. Where all neighbouring slots are taken, the name that has been
    silent for longest loses its own; if it is due in the past, as it is unless thousands of names
    ask at once, nothing is lost with it.

    Args:
        path: file that the workers share; made, or made anew, where it is not such a file.
        slots: how many names it holds.
        clock: nanoseconds that ascend, the same in all processes.

    Raises:
        ConfigError: no file can be made there.
    """

    def __init__(
        self, path: Path, slots: int = SLOTS, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._path = path
        self._slots = slots
        self._clock = clock
        self._mutex = threading.Lock()
        self._places: dict[str, tuple[int, int]] = {}
        self._open()

    def take(self, name: str, rate: float, burst: float = 1.0) -> float:
        """Let one request in, or not.

        Args:
            name: whose request it is.
            rate: requests a second; 0: no limit.
            burst: requests that may come at once after a pause; at least 1.

        Returns:
            0.0 if it is let in; else seconds until it would be. A refused request costs nothing.
        """
        if rate <= 0:
            return 0.0
        interval = max(1, min(round(1e9 / rate), _LONGEST))
        full = min(int(interval * max(burst, 1.0)), _LONGEST)
        with self._mutex:
            if os.getpid() != self._pid:  # a fork shares its parent's lock, so it needs its own
                self._open()
            fcntl.flock(self._handle, fcntl.LOCK_EX)
            try:
                now = self._clock()
                times = self._words
                at = self._find(name)
                due = times[at]
                if due > now + full:
                    times[at] = due = now + full
                wait = due - now - (full - interval)
                if wait > 0:
                    return wait / 1e9
                times[at] = max(due, now) + interval
                return 0.0
            finally:
                fcntl.flock(self._handle, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go of the file, which stays."""
        self._words.release()
        self._map.close()
        os.close(self._handle)

    def _find(self, name: str) -> int:
        """Where the name's time lies; under the lock."""
        words, place = self._words, self._places.get(name)
        if place is not None and words[place[1] - 1] == place[0]:
            return place[1]
        digest = hashlib.blake2b(name.encode(), digest_size=_WORD).digest()
        key = int.from_bytes(digest, "little", signed=True) or 1  # 0 is an empty slot
        nearby = [
            _HEADER + 2 * ((key + step) % self._slots) for step in range(min(PROBES, self._slots))
        ]
        # Slots are never emptied again, so that a name cannot lie behind an empty one.
        at = next((at for at in nearby if words[at] in (key, 0)), None)
        if at is None:
            at = min(nearby, key=lambda at: words[at + 1])
        if words[at] != key:
            words[at + 1] = 0  # long ago: a full burst
            words[at] = key
        if len(self._places) > self._slots:
            self._places.clear()
        self._places[name] = key, at + 1
        return at + 1

    def _open(self) -> None:
        self._pid = os.getpid()
        size = _WORD * (_HEADER + 2 * self._slots)
        head = b"".join(word.to_bytes(_WORD, "little") for word in (_MAGIC, self._slots))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self._path}.lock"):
                if not _is_table(self._path, head, size):
                    # Written out and not only made long: a full disk must not show later, when
                    # the memory is touched. Replaced, because others may have the old one mapped.
                    temporary = self._path.with_name(f".{self._path.name}.tmp")
                    temporary.write_bytes(head.ljust(size, b"\0"))
                    temporary.replace(self._path)
                self._handle = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            self._map = mmap.mmap(self._handle, size)
        except OSError as error:
            raise ConfigError(
                f"A file of rate limits that can be written was expected at {self._path}: "
                f"{error.strerror}. Give the server a folder of its own as PERENNIAL_HOME."
            ) from error
        self._words = memoryview(self._map).cast("q")


def _is_table(path: Path, head: bytes, size: int) -> bool:
    try:
        with path.open("rb") as handle:
            return handle.read(len(head)) == head and os.fstat(handle.fileno()).st_size == size
    except FileNotFoundError:
        return False
