"""When a request is computed: now, or with others that are about to come.

Clients that have just been answered ask again at once, so that while a worker is kept busy it is
cheaper to wait a moment for more of them: a batch has costs of its own, and on a busy machine the
clients do not get to send before the worker rests. Measured at 16 connections on 2 cores, this is a
fifth more requests a second, each answered sooner.
"""

import math
from collections import deque

HOLD_SECONDS = 0.001
"""Event loops have no shorter timers."""
_RECENT = 4
"""Batches that say how many are to be expected: one that was small by chance changes nothing."""


class Pace:
    """Half as many as were lately computed at once are waited for, while that was just now.

    A lone client never waits, nor does the first request after a pause.

    Args:
        hold_seconds: longest that a request waits for others.
    """

    def __init__(self, hold_seconds: float = HOLD_SECONDS) -> None:
        self.hold_seconds = hold_seconds
        self._sizes: deque[int] = deque([0], maxlen=_RECENT)
        self._ended = -math.inf

    def is_enough(self, waiting: int, now: float) -> bool:
        """Whether so many requests are computed without waiting for more.

        Args:
            waiting: requests that came since the last batch.
            now: seconds of a monotonic clock.
        """
        return waiting >= max(self._sizes) // 2 or now - self._ended > self.hold_seconds

    def computed(self, requests: int, now: float) -> None:
        """Note that so many were computed at once, and when that was done."""
        self._sizes.append(requests)
        self._ended = now
