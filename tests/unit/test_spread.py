"""Work spread on a Ray of one's own: what comes back, what fails, what is lost."""

import os
import time

import pytest

from forecasting.errors import TrainingError
from forecasting.settings import load_settings
from tasks.cluster import RETRIES, spread


def squared(number: int) -> int:
    """Slowest first, so that the order of the ends is not that of the items."""
    time.sleep(0.2 / (1 + number))
    if number == 3:
        raise ValueError("three")
    return number * number


def lost_once(path: str) -> str:
    if not os.path.exists(path):  # noqa: PTH110
        open(path, "w").close()  # noqa: PTH123
        os._exit(1)
    return "done again"


def lost_always(_: str) -> str:
    os._exit(1)


def test_each_item_comes_back_with_what_came_of_it(tmp_path):
    settings = load_settings(home=tmp_path, concurrency=2)
    taken: list[int] = []

    def items():
        for number in range(8):
            taken.append(number)
            yield number

    found = {}
    for number, result in spread(settings, squared, items()):
        found[number] = result
        assert len(taken) <= len(found) + 4  # as there is room for them
    failed = found.pop(3)
    assert isinstance(failed, ValueError)
    assert "three" in str(failed)
    assert found == {n: n * n for n in range(8) if n != 3}


@pytest.mark.slow
def test_what_a_lost_worker_had_is_done_again_but_not_for_ever(tmp_path):
    settings = load_settings(home=tmp_path, concurrency=2)
    mark = str(tmp_path / "mark")
    assert list(spread(settings, lost_once, [mark])) == [(mark, "done again")]
    ((_, found),) = spread(settings, lost_always, ["x"])
    assert isinstance(found, TrainingError)
    assert f"lost {1 + RETRIES} times" in str(found)
