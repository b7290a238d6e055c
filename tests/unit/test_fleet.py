"""What a worker makes for one of many symbols."""

from datetime import date
from pathlib import Path

from forecasting.settings import load_settings
from tasks.fleet import Job, Made, make
from tests.market import goog

DAY = date(2006, 6, 30)
SHORT = {"trials": 1, "epochs": 1, "folds": 1, "fit_epochs": 2}
DAYS = {"validation_days": 40, "gate_days": 40}


def _made(home: Path, **changes: object) -> Made:
    settings = load_settings(home=home, **SHORT | DAYS | changes)
    facts = dict.fromkeys(("forecaster", "dataset_md5", "dataset_rev", "run_id", "git_commit"), "")
    facts |= {"symbols": ("GOOG",), "context": settings.context, "horizon": 5, "as_of": DAY}
    return make(Job(settings.for_workers(), {"GOOG": goog(str(DAY))}, facts, [], None))


def test_a_fit_of_many_is_shared_neither_by_processes_nor_by_threads(tmp_path):
    alone = _made(tmp_path, fit_workers=1, fit_threads=1)
    told = _made(tmp_path, fit_workers=2, fit_threads=2)
    assert told.candidate.history == alone.candidate.history  # sharing rounds in another way
    assert told.candidate.files == alone.candidate.files
