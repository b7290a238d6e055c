"""A forecaster that is worse, in production."""

from datetime import date
from pathlib import Path

from sqlalchemy import Engine

from forecasting import datasets, promotion
from forecasting.registry import Registry
from forecasting.settings import Settings
from tests.models import write_model_folder

NAME = "perennial-goog"


def plant(settings: Settings, registry: Registry, engine: Engine, folder: Path, day: date) -> int:
    """A forecaster that is a tenth off the price, put into production by hand; its version.

    Args:
        settings: of a stack whose server answers.
        registry: of the same.
        engine: of the same.
        folder: where its files are made.
        day: as of which it says that it was trained.
    """
    run_id, md5 = registry.start_run("planted", {}), datasets.find(settings).md5
    write_model_folder(folder, scale=1.1, run_id=run_id, dataset_md5=md5, as_of=day)
    version = registry.register(folder, NAME, run_id)
    done = promotion.promote(settings, registry, engine, NAME, version, "a test", "planted")
    assert done.confirmed
    return version
