"""The study on disk: what is asked, told, stopped, and taken up again."""

import math
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from forecasting.hyperparameters import ModelConfig
from forecasting.study import REDUCTION, SPACE, STARTUP, Study, open_study

DEFAULTS = {name: getattr(ModelConfig(), name) for name in SPACE}


def _study(folder: Path, grace: int = 2) -> Study:
    folder.mkdir(exist_ok=True)
    return Study(folder, seed=7, grace=grace)


def test_what_is_best_elsewhere_is_tried_first_if_it_is_in_the_space(tmp_path):
    study = _study(tmp_path)
    good = DEFAULTS | {"lr": 1e-3}
    study.suggest_first([DEFAULTS, good | {"hidden": 17}, good | {"lr": 9.0}, {"lr": 1e-3}, good])
    asked = [study.propose().params for _ in range(3)]
    assert asked[:2] == [DEFAULTS, good]
    assert asked[2] not in asked[:2]
    study.suggest_first([DEFAULTS])  # too late
    assert study.propose().params != DEFAULTS


def test_every_proposal_is_drawn_from_seed_and_number_alone(tmp_path):
    straight = _study(tmp_path / "straight")
    expected = [straight.propose() for _ in range(STARTUP)]
    assert len({tuple(each.params.items()) for each in expected}) == STARTUP

    broken = _study(tmp_path / "broken")
    first = [broken.propose() for _ in range(3)]
    broken.report(1, 1, 5.0)
    broken.close(1, "FINISHED")
    again = _study(tmp_path / "broken")
    rest = [again.propose() for _ in range(STARTUP - 1)]
    assert [each.number for each in rest] == [0, 2, *range(3, STARTUP)]  # lost ones first
    assert first + rest[2:] == expected


def test_a_trial_that_was_cut_off_while_it_was_drawn_gets_all_its_parameters(tmp_path):
    whole = _study(tmp_path / "whole")
    proposals = [whole.propose() for _ in range(2)]
    journal = (tmp_path / "whole" / "study.journal").read_bytes().splitlines(keepends=True)
    second = len(journal) - len(SPACE)  # lines up to the second trial, without its parameters
    for kept in range(second, len(journal) + 1):
        folder = tmp_path / str(kept)
        folder.mkdir()
        (folder / "study.journal").write_bytes(b"".join(journal[:kept]))
        again = _study(folder)
        first, cut_off = again.propose(), again.propose()
        assert not again.in_flight()
        assert (first, cut_off.number) == (proposals[0], 1)
        assert cut_off.params.keys() == SPACE.keys()
        written = [*SPACE][: kept - second]
        assert all(cut_off.params[name] == proposals[1].params[name] for name in written)
        if not written:
            assert cut_off == proposals[1]


def test_what_a_dead_process_told_is_known_and_its_checkpoint_kept(tmp_path):
    study = _study(tmp_path)
    for number in range(2):
        study.propose()
        study.report(number, 1, 9.0 + number)
    study.keep(0, b"as far as it came")
    study.run_id = "abc"
    study.report(1, 2, 8.0)
    study.close(1, "FINISHED")

    again = _study(tmp_path)
    assert again.run_id == "abc"
    assert [(told.status, told.scores) for told in again.trials] == [
        ("RUNNING", (9.0,)),
        ("FINISHED", (10.0, 8.0)),
    ]
    assert again.in_flight()
    proposal = again.propose()
    assert (proposal.number, proposal.checkpoint) == (0, b"as far as it came")
    assert not again.in_flight()
    assert not again.report(0, 1, 99.0)  # an epoch done again
    again.report(0, 2, 7.0)
    again.close(0, "FINISHED")
    assert again.told(0).scores == (9.0, 7.0)
    assert again.checkpoint(0) is None
    assert [told.number for told in again.ranked()] == [0, 1]


def test_the_worse_part_of_a_rung_is_stopped(tmp_path):
    grace = 2
    study = _study(tmp_path, grace)
    stopped = []
    for number in range(8):
        study.propose()
        assert not study.report(number, 1, 1.0 + number)  # no rung yet
        stopped.append(study.report(number, grace, 1.0 + number))  # each worse than the last
    assert stopped[0] is False
    assert sum(not each for each in stopped) <= math.ceil(8 / REDUCTION)
    better = study.propose().number
    assert not study.report(better, 1, 0.5)
    assert not study.report(better, grace, 0.5)


def test_trials_without_gain_are_counted_from_the_best(tmp_path):
    study = _study(tmp_path, 100)
    counted = []
    for number, score in enumerate([5.0, 4.0, 6.0, 4.0, 3.0]):
        study.propose()
        study.report(number, 1, score)
        study.close(number, "FINISHED")
        counted.append(study.without_gain())
    study.propose()
    study.close(5, "FAILED", "lost")
    assert [*counted, study.without_gain()] == [0, 0, 1, 2, 0, 1]
    assert study.told(5).error == "lost"
    assert study.ranked()[-1].number == 5


def test_importances_and_plots_need_something_to_compare(tmp_path):
    study = _study(tmp_path, 100)
    assert (study.importances(), study.page()) == ({}, "")
    for number in range(12):
        params = study.propose().params
        study.report(number, 1, 100 + 1000 * params["lr"])
        study.close(number, "FINISHED")
    shares = study.importances()
    assert set(shares) == set(SPACE)
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=shares.__getitem__) == "lr"
    page = study.page()
    assert page.count("plotly-graph-div") >= 2
    assert "parcoords" in page


def test_a_second_process_waits_and_old_studies_go(tmp_path):
    old, again = tmp_path / "old", tmp_path / "again"
    long_ago = time.time() - 40 * 24 * 3600
    for folder in (old, again):
        with open_study(folder, seed=7, grace=1) as study:
            study.propose()
        for path in (*folder.iterdir(), folder):
            os.utime(path, (long_ago, long_ago))
    with open_study(again, seed=7, grace=1) as study:
        assert len(study.trials) == 1
    with open_study(tmp_path / "new", seed=7, grace=1):
        assert not old.exists()
        with pytest.raises(Timeout):
            FileLock(tmp_path / "new" / "lock").acquire(timeout=0)
    FileLock(tmp_path / "new" / "lock").acquire(timeout=0).lock.release()


def test_what_a_process_left_that_died_while_it_wrote_is_mended(tmp_path):
    with open_study(tmp_path / "key", seed=7, grace=9) as study:
        study.report(study.propose().number, 1, 5.0)
    journal = tmp_path / "key" / "study.journal"
    with journal.open("ab") as file:
        file.write(b'{"op_code": 5, "half')
    journal.with_name("study.journal.lock").symlink_to(journal)
    began = time.monotonic()
    with open_study(tmp_path / "key", seed=7, grace=9) as study:
        study.propose()
        study.report(0, 2, 4.0)
        assert study.told(0).scores == (5.0, 4.0)
    assert time.monotonic() - began < 10


def test_a_journal_that_is_none_is_put_aside(tmp_path, caplog):
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "study.journal").write_bytes(b"\x00garbage\n{}\n")
    with open_study(tmp_path / "key", seed=7, grace=9) as study:
        assert study.trials == []
        assert study.propose().number == 0
    assert "starts anew" in caplog.text
    assert (tmp_path / "key" / "study.journal.damaged").is_file()


def test_import_is_without_effect_and_without_torch():
    code = "import sys, forecasting.study; print({'torch', 'ray', 'mlflow'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_defaults_are_within_the_space(tmp_path):
    study = _study(tmp_path)
    study.suggest_first([asdict(ModelConfig())])
    assert study.propose().params == DEFAULTS
