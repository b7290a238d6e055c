"""One frozen settings class; every other module is handed an instance of it.

Nothing is read when this module is imported: entry points (flows, the server, commands) call
`load_settings()`, which reads `PERENNIAL_*` and the few variables that the stack's own packages
define, and refuses keys that it does not know.
"""

import difflib
import os
from datetime import date
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from forecasting.errors import ConfigError

PREFIX = "PERENNIAL_"
Clock = Literal["wall", "market"]


class Settings(BaseSettings):
    """All settings of perennial. Each is the environment variable `PERENNIAL_<NAME>`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", populate_by_name=True
    )

    home: Path = Field(
        Path(".perennial"),
        description="Folder of all local state; made absolute once, when settings are built.",
    )
    # external services ------------------------------------------------------------------------
    tracking_uri: str = Field(
        "",
        validation_alias=AliasChoices("PERENNIAL_TRACKING_URI", "MLFLOW_TRACKING_URI"),
        description="MLflow tracking and registry; empty means SQLite under `home`.",
    )
    ray_address: str = Field(
        "",
        validation_alias=AliasChoices("PERENNIAL_RAY_ADDRESS", "RAY_ADDRESS"),
        description="Ray cluster for the search; empty means Ray inside the flow's process.",
    )
    database_url: str = Field(
        "",
        description="SQLAlchemy URL of predictions and ledgers; empty means SQLite under `home`.",
    )
    dvc_remote: str = Field(
        "", description="DVC remote URL that each new dataset version is pushed to; empty: none."
    )
    published_url: str = Field(
        "",
        description="fsspec URL where latest prices are published; empty: `home`/published.",
    )
    server_url: str = Field(
        "http://127.0.0.1:8200",
        description="Where a promotion asks the inference server which version it serves.",
    )
    # prices -----------------------------------------------------------------------------------
    source: Literal["sample", "file", "yfinance"] = Field(
        "sample", description="Price source: bokeh_sampledata, a file or URL, or Yahoo (extra)."
    )
    source_url: str = Field(
        "",
        description="For `file`: CSV or Parquet, any fsspec URL; `{symbol}` is replaced.",
    )
    fetch_attempts: int = Field(4, ge=1, description="Attempts to read a source before failing.")
    extra_closures: tuple[date, ...] = Field(
        (),
        description="Days without trading that the calendar does not know (JSON list of dates).",
    )
    # data and model ---------------------------------------------------------------------------
    context: int = Field(
        64, ge=32, le=512, description="Rows of history that the network sees (512 are published)."
    )
    peers: tuple[str, ...] = Field(
        (), description="Symbols whose past a training learns from as well (JSON list)."
    )
    horizon: int = Field(5, ge=1, le=20, description="Trading days ahead that are forecast.")
    validation_days: int = Field(
        120, ge=20, description="Windows before the gate's, used to choose a candidate."
    )
    seed: int = Field(7, description="Seed of every random choice in search and training.")
    trials: int = Field(16, ge=1, description="Most trials of one search.")
    search_seconds: float = Field(
        0.0, ge=0, description="Time after which a search ends with what it has; 0: no limit."
    )
    search_patience: int = Field(
        0, ge=0, description="Trials without a better one after which a search ends; 0: no limit."
    )
    folds: int = Field(
        3, ge=1, description="Validation blocks that a trial is scored on, as far as history goes."
    )
    grace_epochs: int = Field(
        3, ge=1, description="Epochs that every trial gets before it may be stopped."
    )
    concurrency: int = Field(2, ge=1, description="Trials that run at the same time.")
    epochs: int = Field(10, ge=1, description="Most epochs of one trial.")
    fit_epochs: int = Field(40, ge=1, description="Most epochs of the final fit (early stopping).")
    checkpoint_seconds: float = Field(
        2.0,
        ge=0,
        description="Between two checkpoints of a trial: as much is done again after a crash.",
    )
    fit_workers: int = Field(
        1, ge=1, description="Processes, or GPUs, that share the final fit; for large panels."
    )
    fit_threads: int = Field(
        2,
        ge=1,
        description="Threads that share each batch of that fit on a CPU; with several workers each "
        "has one.",
    )
    accelerator: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="What the final fit runs on; auto: a GPU if there is one."
    )
    # gate -------------------------------------------------------------------------------------
    gate_days: int = Field(
        120, ge=20, description="Most recent windows on which every contestant is scored."
    )
    gate_tolerance: float = Field(
        0.01,
        ge=0,
        description="Upper 95 % bound allowed for the relative CRPS difference to random walk and "
        "production.",
    )
    gate_classical_tolerance: float = Field(
        0.03, ge=0, description="The same to the best classical baseline (GARCH, HAR)."
    )
    # monitor ----------------------------------------------------------------------------------
    drift_window: int = Field(40, ge=20, description="Trading days of recent data per comparison.")
    drift_threshold: float = Field(
        1.25,
        gt=0,
        description="Distance (in reference standard deviations) at which one feature has drifted.",
    )
    drift_share: float = Field(
        0.5, gt=0, le=1, description="Share of drifted features at which a drift event is emitted."
    )
    report_days: int = Field(
        1,
        ge=0,
        description="Trading days between two of Evidently's pages on drift; drift that begins has "
        "one as well; 0: only that.",
    )
    performance_alpha: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="Probability that a version which is no worse than the random walk is ever "
        "said to have degraded.",
    )
    retrain_cooldown_days: int = Field(
        20, ge=0, description="Trading days during which a symbol is not retrained again."
    )
    retrain_after_days: int = Field(
        126,
        ge=0,
        description="Most trading days without a retrain though nothing alarms; the first comes a "
        "cooldown after an alarm's, each next after twice the time; 0: none. A provisional version "
        "asks no later.",
    )
    retrain_budget_runs: int = Field(
        5, ge=0, description="Most retrains of all symbols that start in a week; 0: no limit."
    )
    retrain_budget_cpu_minutes: float = Field(
        120.0,
        ge=0,
        description="CPU time of retrains in a week after which none starts; 0: no limit.",
    )
    clock: Clock = Field(
        "wall",
        description="What cooldown and budget count: days on the `wall`, or `market` days of "
        "`as_of`, for history.",
    )
    # notification -----------------------------------------------------------------------------
    notify_url: SecretStr = Field(
        SecretStr(""),
        description="Webhook that automations tell what a person should see; empty: none.",
    )
    notify_silence_hours: float = Field(
        100.0,
        gt=0,
        description="Hours without a completed `monitor` that are told; a long weekend has 96.",
    )
    notify_failures: int = Field(
        3, ge=1, description="Runs of one deployment that fail in a week until it is told."
    )
    # repair -----------------------------------------------------------------------------------
    retrain_search: Literal["if-needed", "always", "never"] = Field(
        "if-needed",
        description="Whether a retrain searches; if-needed: where production's parameters fail.",
    )
    retrain_margin: float = Field(
        0.01,
        ge=0,
        description="Validation loss over the past's at which production's parameters have failed.",
    )
    probation_days: int = Field(
        60,
        ge=0,
        description="Market days that a new version is watched beside the one before it; 0: none.",
    )
    probation_alpha: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="Probability of rolling back a version that is no worse, in all of these days.",
    )
    approval: bool = Field(
        False,
        description="Whether a person has to approve what the gate would promote, and what a "
        "probation would roll back.",
    )
    approval_hours: float = Field(
        24.0, gt=0, description="How long a run waits for a person; no answer is a no."
    )
    # server -----------------------------------------------------------------------------------
    host: str = Field("127.0.0.1", description="Address that the inference server binds.")
    port: int = Field(8200, ge=1, le=65535, description="Port of the inference server.")
    prefect_port: int = Field(
        4200, ge=1, le=65535, description="Port of the Prefect server that `make up` starts."
    )
    mlflow_port: int = Field(
        5000, ge=1, le=65535, description="Port of the MLflow server that `make up` starts."
    )
    web_workers: int = Field(1, ge=1, description="Processes that answer HTTP.")
    poll_seconds: float = Field(
        0.3, gt=0, le=60, description="How often aliases and published prices are looked at."
    )
    max_models: int = Field(
        64, ge=1, description="Models that a worker keeps open; others are opened when asked for."
    )
    docs: bool = Field(True, description="Whether the pages and the OpenAPI file at /schema exist.")
    access_log: bool = Field(False, description="Whether every request is logged.")
    # limits of the server ---------------------------------------------------------------------
    api_keys: str = Field(
        "", description="File of hashed API keys; empty: `home`/api-keys.json, if there is one."
    )
    rate_limit: float = Field(
        0.0, ge=0, description="Requests a second of one key, over all workers; 0: no limit."
    )
    max_body_mb: float = Field(4.0, gt=0, description="Largest request body accepted.")
    max_windows: int = Field(1024, ge=1, description="Most windows in one request.")
    max_rows: int = Field(10_000, ge=512, description="Most rows of one window in a request.")
    max_concurrency: int = Field(
        512, ge=1, description="Requests in progress in one worker before it answers 503."
    )
    max_connections: int = Field(
        4096, ge=1, description="Connections of one worker before it answers 503 and closes."
    )
    request_seconds: float = Field(
        20.0, gt=0, description="How long a client may take to send a request."
    )
    spool_max_mb: float = Field(
        1024.0, gt=0, description="Prediction log on disk at which no new forecast is computed."
    )
    # promotion and challenger -----------------------------------------------------------------
    server_key: SecretStr = Field(
        SecretStr(""), description="API key with which a promotion asks the inference server."
    )
    signing_key: str = Field(
        "", description="PEM file of the Ed25519 key that signs what is promoted; empty: none."
    )
    trusted_key: str = Field(
        "",
        description="PEM file of the public key that served versions must be signed for; "
        "empty: signatures are not looked at.",
    )
    webhook_secret: SecretStr = Field(
        SecretStr(""),
        description="Secret of the registry's webhook at /hooks/registry; empty: no such route.",
    )
    shadow_share: float = Field(
        0.0, ge=0, le=1, description="Share of requests that the challenger computes as well."
    )
    canary_share: float = Field(
        0.0, ge=0, le=1, description="Share of clients that the challenger answers."
    )
    confirm_seconds: float = Field(
        10.0, ge=0, description="How long a promotion waits for the server to confirm a version."
    )

    @field_validator("home", mode="after")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        try:
            return value.expanduser().resolve()
        except RuntimeError as error:  # ~somebody
            raise ValueError(f"a folder was expected: {error}") from error

    @property
    def mlflow_uri(self) -> str:
        """Tracking URI, the embedded default filled in."""
        return self.tracking_uri or f"sqlite:///{self.home / 'mlflow' / 'mlflow.db'}"

    @property
    def mlflow_artifacts(self) -> Path:
        """Artifact folder of the embedded MLflow."""
        return self.home / "mlflow" / "artifacts"

    @property
    def sql_url(self) -> str:
        """SQLAlchemy URL, the embedded default filled in."""
        return self.database_url or f"sqlite:///{self.home / 'perennial.db'}"

    def for_workers(self) -> "Settings":
        """A copy for processes elsewhere: numbers as here, addresses and secrets as by default."""
        fields = type(self).model_fields
        told = {
            name: fields[name].default
            for name, value in self
            if isinstance(value, (str, SecretStr)) and name != "source"
        }
        return self.model_copy(update=told)

    @property
    def data_dir(self) -> Path:
        """The data registry (git + DVC)."""
        return self.home / "data"

    @property
    def published(self) -> str:
        """fsspec URL of published price snapshots."""
        return self.published_url or str(self.home / "published")

    @property
    def model_store(self) -> Path:
        """Verified model versions and snapshots, as the web workers read them."""
        return self.home / "store"

    @property
    def spool_dir(self) -> Path:
        """Prediction log before it is drained into SQL."""
        return self.home / "spool"

    @property
    def keys_file(self) -> Path:
        """File of hashed API keys, whether or not there is one."""
        return Path(self.api_keys).expanduser() if self.api_keys else self.home / "api-keys.json"

    @property
    def trusted_key_path(self) -> Path | None:
        """Public key that served versions must be signed for, if any."""
        return Path(self.trusted_key).expanduser() if self.trusted_key else None

    @property
    def traffic_file(self) -> Path:
        """Shares of the challenger, as changed while the server runs."""
        return self.home / "traffic.json"

    @property
    def evidently_dir(self) -> Path:
        """Workspace that `evidently ui` opens."""
        return self.home / "evidently"

    @property
    def quarantine_dir(self) -> Path:
        """Refused price files."""
        return self.home / "quarantine"

    @property
    def work_dir(self) -> Path:
        """Candidates, checkpoints and other files between steps of a run."""
        return self.home / "work"


def load_settings(**overrides: object) -> Settings:
    """Build the settings from the environment.

    Args:
        overrides: field values that win over the environment.

    Raises:
        ConfigError: a value is out of range, or a `PERENNIAL_*` key is not known.
    """
    known = {name.upper() for name in Settings.model_fields}
    for key in sorted(os.environ):
        name = key.upper().removeprefix(PREFIX)
        if key.upper().startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {PREFIX}{near[0]}?" if near else ""
            raise ConfigError(
                f"Unknown setting {key}={os.environ[key]!r}.{hint} "
                "The README's settings table lists every key; unset or rename this one."
            )
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except SettingsError as error:  # a tuple that is no JSON
        field = next((name for name in Settings.model_fields if f'"{name}"' in str(error)), "")
        key = f"{PREFIX}{field.upper()}"
        raise ConfigError(
            f"Settings cannot be used:\n  {key}: a JSON list such as "
            f'["2001-09-11"] was expected (got {os.environ.get(key)!r})'
        ) from error
    except ValidationError as error:
        lines = [
            f"{PREFIX}{'.'.join(map(str, e['loc'])).removeprefix(PREFIX).upper()}: "
            f"{e['msg']} (got {e.get('input')!r})"
            for e in error.errors()
        ]
        raise ConfigError("Settings cannot be used:\n  " + "\n  ".join(lines)) from error
