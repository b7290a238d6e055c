"""What is computed together, and how long a request may wait for others."""

import asyncio
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forecasting.predictions import Spool
from serving.batcher import Batcher
from serving.intake import parse_request
from serving.model_store import ModelStore
from serving.pace import HOLD_SECONDS, Pace
from serving.predictor import Predictor
from serving.queries import Query, Requests
from tests.serving.running import FORECASTER, install, request_body

HOLD = 0.5
"""Longer than a server's, so that a machine that is slow for a moment changes no test."""


# pace ---------------------------------------------------------------------------------------------
def test_the_first_request_and_one_after_a_pause_are_computed_at_once():
    pace = Pace()
    assert pace.is_enough(1, now=10.0)
    pace.computed(64, now=10.0)
    assert not pace.is_enough(1, now=10.0005)
    assert pace.is_enough(1, now=10.0 + 2 * HOLD_SECONDS)


@pytest.mark.parametrize("clients", [1, 2, 3])
def test_few_clients_are_never_held(clients):
    pace, now = Pace(), 0.0
    for _ in range(10):
        assert pace.is_enough(1, now)
        pace.computed(clients, now)
        now += 0.0001


def test_half_of_what_was_lately_computed_is_waited_for_and_a_small_batch_changes_nothing():
    pace = Pace()
    for size in (8, 1, 2):
        pace.computed(size, now=0.0)
    assert [pace.is_enough(waiting, 0.0) for waiting in range(1, 6)] == [False] * 3 + [True] * 2
    for _ in range(2):
        pace.computed(1, now=0.0)  # clients went away: 8 is forgotten
    assert pace.is_enough(1, 0.0)


@given(st.lists(st.integers(1, 200), max_size=20), st.integers(1, 200))
def test_as_many_as_ever_came_are_always_enough(sizes, waiting):
    pace = Pace()
    for size in sizes:
        pace.computed(size, now=0.0)
    assert pace.is_enough(max([*sizes, waiting]), now=0.0)
    assert pace.is_enough(1, now=2 * HOLD_SECONDS)


# batches ------------------------------------------------------------------------------------------
def ask(tmp_path, conversation) -> list[int]:
    """Talk to a batcher of a real version; how many windows each batch had."""
    install(tmp_path, 1)
    predictor = Predictor(ModelStore(tmp_path / "store"), most_open=1)
    predictor.refresh()
    served = predictor.state.champions[FORECASTER]
    request = parse_request(json.dumps(request_body()).encode())
    query = Query(served, predictor.models.open(served), Requests((request,), "post", 1000))
    sizes: list[int] = []
    spool = Spool(tmp_path / "spool", "test")

    async def talk() -> None:
        pace = Pace(HOLD)
        batcher = Batcher(spool, lambda windows, _: sizes.append(windows), pace)
        await asyncio.wait_for(conversation(lambda: batcher.submit(query)), 30)
        await batcher.close()

    asyncio.run(talk())
    spool.close()
    return sizes


def test_what_comes_in_one_turn_is_computed_together(tmp_path):
    async def conversation(submit):
        answers = await asyncio.gather(*(submit() for _ in range(16)))
        assert len({answer.windows[0].id for answer in answers}) == 16

    assert ask(tmp_path, conversation) == [16]


def test_stragglers_of_a_busy_worker_are_computed_together_and_soon(tmp_path):
    async def conversation(submit):
        await asyncio.gather(*(submit() for _ in range(16)))
        began = time.monotonic()
        await asyncio.gather(submit(), submit())
        assert HOLD / 2 < time.monotonic() - began < 10 * HOLD

    assert ask(tmp_path, conversation) == [16, 2]


def test_enough_of_them_are_not_held(tmp_path):
    async def conversation(submit):
        await asyncio.gather(*(submit() for _ in range(16)))
        held = submit()
        others = [submit() for _ in range(8)]
        for _ in range(3):
            await asyncio.sleep(0)
        assert held.done()
        assert all(other.done() for other in others)
        await asyncio.sleep(1.5 * HOLD)  # the timer of the first was stopped

    assert ask(tmp_path, conversation) == [16, 9]


def test_a_client_that_goes_away_harms_nobody(tmp_path):
    async def conversation(submit):
        gone, stays = submit(), submit()
        gone.cancel()
        assert (await stays).numbers

    assert ask(tmp_path, conversation) == [2]
