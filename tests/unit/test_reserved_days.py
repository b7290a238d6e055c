"""The ledger of reserved days, in SQLite and in PostgreSQL."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from threading import Barrier

import numpy as np
import pytest
from sqlalchemy import Engine

from forecasting import reserved_days
from forecasting.reserved_days import Look
from forecasting.sessions import sessions_between
from forecasting.store import engine_of
from tests.tables import looks

SESSIONS = np.array(sessions_between(date(2007, 1, 3), date(2008, 12, 31)), dtype="datetime64[D]")
AT_ONCE = 6


def claim(engine: Engine, model: str, first: int = 0, days: int = 100, **changes: str) -> Look:
    asked = {"forecaster": "perennial-goog", "dataset_md5": "d" * 32, "run_id": "run"} | changes
    span = SESSIONS[first : first + days]
    return reserved_days.claim(engine, model_sha256=model, days=span, **asked)


def test_new_days_have_judged_nobody(engine):
    look = claim(engine, "a")
    assert look.uses == 0.0
    assert (look.first_day, look.last_day) == (date(2007, 1, 3), SESSIONS[99].astype(object))
    (line,) = looks(engine)
    assert (line["model_sha256"], line["days"], line["verdict"]) == ("a", 100, "open")
    assert (line["dataset_md5"], line["run_id"]) == ("d" * 32, "run")


def test_every_other_candidate_counts_once_a_day(engine):
    claim(engine, "a")
    assert claim(engine, "b").uses == 1.0
    assert claim(engine, "c").uses == 2.0
    assert claim(engine, "d", first=80).uses == pytest.approx(3 * 0.2)
    # of the days of this one a, b and c have seen 30, and d 100
    assert claim(engine, "e", first=70).uses == pytest.approx(3 * 0.3 + 0.9)
    assert claim(engine, "f", first=300).uses == 0.0


def test_a_candidate_that_looked_twice_counts_once_for_others(engine):
    claim(engine, "a", first=0, days=60)
    claim(engine, "a", first=40, days=60)
    assert claim(engine, "b").uses == 1.0


def test_the_same_candidate_on_the_same_days_is_the_same_look(engine):
    claim(engine, "a")
    before = claim(engine, "b")
    claim(engine, "c")
    again = claim(engine, "b", run_id="a later run")
    assert again == before
    assert again.uses == 1.0
    assert len(looks(engine)) == 3


def test_its_own_looks_at_other_days_do_not_count(engine):
    claim(engine, "a", first=0)
    assert claim(engine, "a", first=5).uses == 0.0


def test_forecasters_have_days_of_their_own(engine):
    claim(engine, "a")
    assert claim(engine, "b", forecaster="perennial-ibm").uses == 0.0


def test_the_verdict_is_written_down_and_the_newest_stays(engine):
    look = claim(engine, "a")
    claim(engine, "b")
    reserved_days.close(engine, look, "refused", "Too wide.")
    reserved_days.close(engine, claim(engine, "a"), "passed", "")
    lines = {line["model_sha256"]: line for line in looks(engine)}
    assert (lines["a"]["verdict"], lines["a"]["reasons"]) == ("passed", "")
    assert lines["b"]["verdict"] == "open"


def test_of_candidates_at_once_each_sees_those_before_it(engine):
    """Every thread has a connection of its own, as every process would."""
    start = Barrier(AT_ONCE)

    def ask(number: int) -> float:
        with engine.connect():  # its connection is open before the race
            start.wait(30)
        return claim(engine, f"model {number}").uses

    with ThreadPoolExecutor(AT_ONCE) as threads:
        assert sorted(threads.map(ask, range(AT_ONCE))) == list(map(float, range(AT_ONCE)))


KILLED = """
import os, signal, sys
import numpy as np
from forecasting import reserved_days
from forecasting.store import open_engine
days = np.arange(np.datetime64("2007-01-03"), np.datetime64("2007-04-01"))
reserved_days.claim(open_engine(sys.argv[1]), forecaster="perennial-goog", model_sha256=sys.argv[2],
                    days=days, dataset_md5="", run_id="killed")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_look_of_a_process_that_was_killed_counts_and_is_taken_up_again(tmp_path):
    url = f"sqlite:///{tmp_path / 'perennial.db'}"
    command = [sys.executable, "-c", KILLED, url, "a"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    with engine_of(url) as engine:
        (line,) = looks(engine)
        assert line["verdict"] == "open"
        assert claim(engine, "b", days=40).uses == 1.0
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL  # run again
        assert len(looks(engine)) == 2
        span = np.arange(np.datetime64("2007-01-03"), np.datetime64("2007-04-01"))
        again = reserved_days.claim(
            engine,
            forecaster="perennial-goog",
            model_sha256="a",
            days=span,
            dataset_md5="",
            run_id="again",
        )
        assert again.uses == 0.0
        reserved_days.close(engine, again, "passed", "")
        assert {row["verdict"] for row in looks(engine)} == {"passed", "open"}
