import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from forecasting.errors import ConfigError
from forecasting.settings import PREFIX, Settings, load_settings


def test_every_field_has_a_description():
    bare = [name for name, field in Settings.model_fields.items() if not field.description]
    assert bare == []


LISTS = ("extra_closures", "peers")
CHOICES = {"source": "file", "accelerator": "cpu", "clock": "market"}


@pytest.mark.parametrize("field", [n for n in Settings.model_fields if n not in LISTS])
def test_every_field_is_its_own_environment_variable(field, monkeypatch):
    plain = load_settings()
    default = getattr(plain, field)
    if isinstance(default, bool):
        value = str(not default)
    elif isinstance(default, int | float):
        value = str(default * 1.5 if isinstance(default, float) else default + 1)
        value = {"drift_share": "0.75", "rate_limit": "7.5"}.get(field, value)
        value = "0.25" if field in ("shadow_share", "canary_share") else value
    else:
        choices = {
            "source": "file",
            "accelerator": "cpu",
            "retrain_search": "never",
            "clock": "market",
        }
        value = choices.get(field, "/somewhere/else")
    monkeypatch.setenv(f"{PREFIX}{field.upper()}", value)
    changed = load_settings()
    found = getattr(changed, field)
    assert str(found.get_secret_value() if isinstance(found, SecretStr) else found) == value
    others = set(Settings.model_fields) - {field}
    assert {n: getattr(changed, n) for n in others} == {n: getattr(plain, n) for n in others}


def test_lists_are_read_from_json(monkeypatch):
    monkeypatch.setenv("PERENNIAL_EXTRA_CLOSURES", '["2001-09-11", "2001-09-12"]')
    monkeypatch.setenv("PERENNIAL_PEERS", '["AAPL", "IBM"]')
    assert load_settings().extra_closures == (date(2001, 9, 11), date(2001, 9, 12))
    assert load_settings().peers == ("AAPL", "IBM")


def test_an_unknown_key_is_refused_with_the_nearest_known_one(monkeypatch):
    monkeypatch.setenv("PERENNIAL_TRAILS", "3")
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert "PERENNIAL_TRAILS='3'" in str(caught.value)
    assert "Did you mean PERENNIAL_TRIALS?" in str(caught.value)


def test_an_unknown_key_that_resembles_nothing_is_refused_without_a_guess(monkeypatch):
    monkeypatch.setenv("perennial_zzzzzzzz", "1")
    with pytest.raises(ConfigError, match="Unknown setting perennial_zzzzzzzz") as caught:
        load_settings()
    assert "Did you mean" not in str(caught.value)


def test_an_unknown_override_is_refused():
    with pytest.raises(ConfigError, match="PERENNIAL_TRAILS: Extra inputs are not permitted"):
        load_settings(trails=3)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("TRIALS", "many", "valid integer"),
        ("TRIALS", "0", "greater than or equal to 1"),
        ("HORIZON", "21", "less than or equal to 20"),
        ("PORT", "65536", "less than or equal to 65535"),
        ("GATE_TOLERANCE", "-0.1", "greater than or equal to 0"),
        ("DRIFT_SHARE", "1.5", "less than or equal to 1"),
        ("SOURCE", "ftp", "'sample', 'file' or 'yfinance'"),
        ("EXTRA_CLOSURES", "2001-09-11", "JSON list"),
        ("EXTRA_CLOSURES", '["2001-13-01"]', "valid date"),
        ("HOME", "~nobody-of-that-name/loop", "folder was expected"),
    ],
)
def test_a_bad_value_names_key_expectation_and_what_came(key, value, expected, monkeypatch):
    monkeypatch.setenv(f"{PREFIX}{key}", value)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    came = value.strip('[]"')
    for part in (f"{PREFIX}{key}", expected, came):
        assert part in str(caught.value)


def test_every_bad_value_is_named_at_once(monkeypatch):
    monkeypatch.setenv("PERENNIAL_TRIALS", "none")
    monkeypatch.setenv("PERENNIAL_POLL_SECONDS", "0")
    with pytest.raises(ConfigError, match=r"(?s)PERENNIAL_TRIALS.*PERENNIAL_POLL_SECONDS"):
        load_settings()


def test_home_is_made_absolute_once(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERENNIAL_HOME", "state/../mine")
    settings = load_settings()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert settings.home == tmp_path / "mine"
    assert settings.sql_url == f"sqlite:///{tmp_path / 'mine' / 'perennial.db'}"


def test_home_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_settings(home="~/loop").home == tmp_path / "loop"


def test_the_default_home_is_a_folder_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_settings().home == tmp_path / ".perennial"
    assert not (tmp_path / ".perennial").exists()


def test_every_embedded_default_lies_under_home(tmp_path):
    settings = load_settings(home=tmp_path)
    assert settings.mlflow_uri == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert settings.sql_url == f"sqlite:///{tmp_path}/perennial.db"
    folders = [
        settings.mlflow_artifacts,
        settings.data_dir,
        Path(settings.published),
        settings.model_store,
        settings.spool_dir,
        settings.quarantine_dir,
        settings.work_dir,
    ]
    assert all(folder.is_relative_to(tmp_path) for folder in folders)
    assert len(set(folders)) == len(folders)


def test_every_embedded_default_gives_way_to_a_shared_service(tmp_path):
    settings = load_settings(
        home=tmp_path,
        tracking_uri="http://mlflow:5000",
        database_url="postgresql://db/perennial",
        published_url="s3://bucket/published",
    )
    assert settings.mlflow_uri == "http://mlflow:5000"
    assert settings.sql_url == "postgresql://db/perennial"
    assert settings.published == "s3://bucket/published"


def test_settings_are_frozen():
    settings = load_settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.trials = 3


@pytest.mark.parametrize(
    ("field", "variable"),
    [("tracking_uri", "MLFLOW_TRACKING_URI"), ("ray_address", "RAY_ADDRESS")],
)
def test_variables_of_the_packages_are_taken_ours_before_theirs(field, variable, monkeypatch):
    monkeypatch.setenv(variable, "http://theirs:1")
    assert getattr(load_settings(), field) == "http://theirs:1"
    monkeypatch.setenv(f"{PREFIX}{field.upper()}", "http://ours:1")
    assert getattr(load_settings(), field) == "http://ours:1"


def test_overrides_win_over_the_environment(monkeypatch):
    monkeypatch.setenv("PERENNIAL_TRIALS", "3")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://theirs:1")
    monkeypatch.setenv("PERENNIAL_RAY_ADDRESS", "ray://ours:1")
    settings = load_settings(trials=5, tracking_uri="http://mine:1", ray_address="ray://mine:1")
    assert (settings.trials, settings.tracking_uri) == (5, "http://mine:1")
    assert settings.ray_address == "ray://mine:1"


def test_nothing_is_read_at_import():
    code = (
        "import os, forecasting.settings as s\n"
        "from forecasting.errors import ConfigError\n"
        "try: s.load_settings()\n"
        "except ConfigError: del os.environ['PERENNIAL_TRAILS']\n"
        "print(s.load_settings().trials)"
    )
    broken = os.environ | {"PERENNIAL_TRAILS": "3", "PERENNIAL_TRIALS": "9"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=broken, capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "9", run.stderr
