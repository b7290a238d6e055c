"""Clients that ask the inference server all the time, and what they saw."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx


@dataclass
class Clients:
    """What clients saw that asked all the time."""

    versions: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


@contextmanager
def asking(url: str, count: int = 4) -> Iterator[Clients]:
    """Clients that ask for a forecast again and again until the block ends."""
    seen, stop = Clients(), threading.Event()

    def work() -> None:
        with httpx.Client(base_url=url, timeout=10) as client:
            while not stop.is_set():
                try:
                    answer = client.get("/v1/forecast/GOOG")
                except httpx.HTTPError as error:
                    seen.problems.append(repr(error))
                    continue
                if answer.status_code == 200:
                    seen.versions[answer.json()["model_version"]] += 1
                else:
                    seen.problems.append(answer.text)
                stop.wait(0.02)

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()
