"""Runs, model versions, aliases and their history (the only room that knows MLflow).

A `Registry` is an object built from an address: there is no tracking URI set anywhere, no active
run, no environment read or written at import. Only MLflow's tracking client is used; the flavours
(`mlflow.pyfunc`, `mlflow.onnx`) are never imported, for the `MLmodel` file that they read is
written here from the contract.
"""

import hashlib
import json
import logging
import os
import platform
import re
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from functools import cached_property, partial
from importlib.metadata import version as installed
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import urlsplit

import numpy as np
from google.protobuf.json_format import ParseError  # type: ignore[import-untyped]
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Metric, Param, Run, RunTag
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.entities.webhook import Webhook, WebhookEvent, WebhookEventStr
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.types import ColSpec, Schema, TensorSpec
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from forecasting.contract import CONTRACT_FILE, MODEL_FILE, Contract, read_contract, verify_files
from forecasting.errors import ConfigError, ContractError, RegistryError
from forecasting.settings import Settings

EXPERIMENT = "perennial"
PRODUCTION = "production"
PREVIOUS = "previous"
CHALLENGER = "challenger"
SERVED = (PRODUCTION, CHALLENGER)
"""Aliases that the server follows."""
CONTRACT_TAG = "contract_sha256"
MODEL_TAG = "model_sha256"
"""The network alone: two trainings that came to the same one differ in their contracts."""
SIGNATURE_TAG = "signature"
PROVISIONAL_TAG = "provisional"
"""Of a version that the gate let in only because the one before was worse; its value is `true`."""
OWNER_TAG = "perennial"
"""Tag of registered models that are ours; a shared registry may hold others."""
REQUIREMENTS = ("numpy", "onnx", "onnxruntime", "pandas")
WEBHOOK_NAME = "perennial"
WEBHOOK_EVENTS: tuple[WebhookEventStr, ...] = (
    "model_version_alias.created",
    "model_version_alias.deleted",
)
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""What MLflow's client takes from the environment; its defaults wait minutes for a dead server."""

T = TypeVar("T")
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
_NOT_MLFLOW = (ValueError, TypeError, KeyError, AttributeError, ParseError)
"""What MLflow's client stumbles with over an answer that is none of MLflow's (a proxy's page)."""
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")
READY_SECONDS = 30
_TRIAL = "perennial.trial"
_METRICS_A_BATCH, _PARAMS_A_BATCH, _TAGS_A_BATCH = 1000, 100, 100


@dataclass(frozen=True)
class VersionInfo:
    """One version of a registered model."""

    forecaster: str
    version: int
    run_id: str
    created_at: datetime
    tags: Mapping[str, str]
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunInfo:
    """One run: its tags, parameters and the last value of each metric."""

    run_id: str
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    params: Mapping[str, str]


def open_registry(settings: Settings) -> "Registry":
    """The registry that the settings name, with the client's patience bounded to seconds.

    Variables that the environment already holds are left as they are.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    return Registry(settings.mlflow_uri, settings.mlflow_artifacts)


def register_webhook(settings: Settings, url: str) -> str:
    """Have the registry tell the server of alias moves; says what was done.

    Args:
        settings: `webhook_secret` signs what the registry sends.
        url: the server's `/hooks/registry`, as the registry's own machine reaches it.

    Raises:
        ConfigError: no secret is set, or there is no MLflow server that could send anything.
        RegistryError: the server is away, or does not take the address.
    """
    secret = settings.webhook_secret.get_secret_value()
    if not secret:
        raise ConfigError(
            "PERENNIAL_WEBHOOK_SECRET should be a long random text that only the registry and the "
            "server know; it is empty. Set it for both: openssl rand -hex 32"
        )
    registry = open_registry(settings)
    if not registry.is_served:
        raise ConfigError(
            f"Only an MLflow server sends webhooks; the registry is {registry.shown}. Set "
            "MLFLOW_TRACKING_URI to a server's http:// or https:// address."
        )
    made = registry.set_webhook(url, secret)
    return f"{'created' if made else 'updated'}: {registry.shown} tells {url} of every alias move"


class Registry:
    """MLflow runs and registered models at one address.

    Nothing is contacted before the first call. Every method raises `RegistryError` that names the
    address when the registry does not answer.

    Args:
        uri: tracking and registry URI: `http(s)://` or a SQLAlchemy URL.
        artifacts: artifact folder of the experiment when `uri` is a database; with a server, the
            server decides.
    """

    def __init__(self, uri: str, artifacts: Path | None = None) -> None:
        self.uri = uri
        self.artifacts = artifacts
        self._known: set[str] = set()

    # runs ---------------------------------------------------------------------------------------

    def start_run(self, name: str, tags: Mapping[str, str], parent: str | None = None) -> str:
        """Start a run; its id. With `parent`, nested under that run."""
        nested = {"mlflow.parentRunId": parent} if parent else {}
        with self._talk(f"start run {name!r}"):
            run = self._client.create_run(self._experiment, run_name=name, tags={**tags, **nested})
        return str(run.info.run_id)

    def take_up_run(self, run_id: str, parent: str) -> bool:
        """Go on with a run that was interrupted, below `parent`; False if it is not there."""
        with self._talk("look for an interrupted run"):
            found = self._client.search_runs(
                [self._experiment], f"attributes.run_id = '{run_id}'", max_results=1
            )
            if found:
                self._client.set_tag(run_id, "mlflow.parentRunId", parent)
                self._client.update_run(run_id, status="RUNNING")
        return bool(found)

    def log_params(self, run_id: str, params: Mapping[str, object]) -> None:
        """Log parameters, a hundred a call."""
        entries = [Param(key, str(value)) for key, value in params.items()]
        with self._talk("log parameters"):
            for some in _chunks(entries, _PARAMS_A_BATCH):
                self._client.log_batch(run_id, params=some)

    def log_metrics(self, run_id: str, values: Iterable[tuple[str, float, int]]) -> None:
        """Log (key, value, step) triples in one call (one more for every thousand)."""
        with self._talk("log metrics"):
            for some in _chunks(_metrics(values), _METRICS_A_BATCH):
                self._client.log_batch(run_id, metrics=some)

    def set_tags(self, run_id: str, tags: Mapping[str, object]) -> None:
        """Set tags of a run, a hundred a call."""
        entries = [RunTag(key, str(value)) for key, value in tags.items()]
        with self._talk("set tags"):
            for some in _chunks(entries, _TAGS_A_BATCH):
                self._client.log_batch(run_id, tags=some)

    def log_trial(
        self,
        parent_run_id: str,
        number: int,
        config: Mapping[str, object],
        history: Sequence[float],
        status: RunStatus = "FINISHED",
        metric: str = "validation_crps_bp",
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Log one finished trial of a search as a nested run, in three calls; its run id.

        Args:
            history: `metric` after each epoch, from epoch 1.
            status: `KILLED` for a trial that the scheduler stopped early.
        """
        own = {"perennial.kind": "trial", _TRIAL: str(number)}
        run_id = self.start_run(f"trial-{number:03d}", {**own, **(tags or {})}, parent_run_id)
        points = [(metric, value, step) for step, value in enumerate(history, start=1)]
        if history:
            points.append((f"best_{metric}", float(np.nanmin(history)), len(history)))
        params = [Param(key, str(value)) for key, value in config.items()]
        with self._talk(f"log trial {number}"):
            self._client.log_batch(
                run_id,
                metrics=_metrics(points)[-_METRICS_A_BATCH:],
                params=params[:_PARAMS_A_BATCH],
            )
        self.finish(run_id, status)
        return run_id

    def logged_trials(self, parent_run_id: str) -> set[int]:
        """Numbers of the trials that are logged in full below a run.

        One that was being logged when its process died is removed, so that it can be logged anew.
        """
        wanted = f"tags.mlflow.parentRunId = '{parent_run_id}' and tags.perennial.kind = 'trial'"
        logged = set()
        with self._talk("list the trials of a search"):
            for run in self._client.search_runs([self._experiment], wanted, max_results=1000):
                if run.info.status == "RUNNING":
                    self._client.delete_run(run.info.run_id)
                else:
                    logged.add(int(run.data.tags[_TRIAL]))
        return logged

    def past_searches(self, symbol: str, before: date, limit: int) -> list[dict[str, str]]:
        """Best parameters of the newest searches of a symbol that knew no day from `before` on."""
        wanted = f"tags.perennial.kind = 'search' and tags.symbol = '{symbol}'"
        with self._talk("look for past searches"):
            runs = self._client.search_runs(
                [self._experiment],
                wanted,
                max_results=100,
                order_by=["attributes.start_time DESC"],
            )
        past = [run for run in runs if run.data.tags.get("as_of", "9999") < before.isoformat()]
        found = [dict(run.data.params) for run in past if run.info.status == "FINISHED"]
        return found[:limit]

    def trial_logger(self, parent_run_id: str, tags: Mapping[str, str]) -> Callable[..., str]:
        """`log_trial` below one parent run, to be called as trials end; each gets the tags."""
        return partial(self.log_trial, parent_run_id, tags=tags)

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Keep text as the artifact `name`."""
        with self._talk(f"keep {name}"):
            self._client.log_text(run_id, text, name)

    def log_dict(self, run_id: str, value: Mapping[str, object], name: str) -> None:
        """Keep a mapping as the JSON artifact `name`."""
        self.log_text(run_id, json.dumps(value, indent=1, sort_keys=True, default=str), name)

    def finish(self, run_id: str, status: RunStatus = "FINISHED") -> None:
        """End a run."""
        with self._talk(f"end run {run_id}"):
            self._client.set_terminated(run_id, status)

    def find_run(self, tags: Mapping[str, str]) -> RunInfo | None:
        """Newest run that carries all of `tags`, or None."""
        wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        with self._talk("search runs"):
            found = self._client.search_runs([self._experiment], wanted, max_results=1)
        return _run_info(found[0]) if found else None

    def run(self, run_id: str) -> RunInfo:
        """One run.

        Raises:
            RegistryError: there is none, or the registry is away.
        """
        with self._talk(f"read run {run_id}"):
            return _run_info(self._client.get_run(run_id))

    def run_url(self, run_id: str) -> str:
        """Address of the run in MLflow's web interface; empty when there is no server."""
        if not self.is_served:
            return ""
        with self._talk("find the experiment"):
            return f"{self.shown}/#/experiments/{self._experiment}/runs/{run_id}"

    def run_link(self, run_id: str) -> str:
        """The run in Markdown, linked where it has an address."""
        url = self.run_url(run_id)
        return f"[MLflow run {run_id}]({url})" if url else f"MLflow run {run_id}"

    def artifact_link(self, run_id: str, name: str, text: str) -> str:
        """An artifact of a run in Markdown, linked where it has an address."""
        url = self.run_url(run_id)
        return f"[{text}]({url}/artifacts/{name})" if url else f"{text}: {name} of run {run_id}"

    # versions -----------------------------------------------------------------------------------

    def register(
        self,
        folder: Path,
        forecaster: str,
        run_id: str,
        tags: Mapping[str, str] | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> int:
        """Register a model folder as the next version of `forecaster`; its number.

        The folder's own files and an `MLmodel` (ONNX flavour, signature, pinned requirements)
        become the version's artifacts, so that `mlflow models serve` and `mlflow.pyfunc` load it.
        The same folder registered again is the version that it already is.

        Args:
            folder: holds `contract.json` and every file that it names.
            tags: further tags, beside those taken from the contract.
            notes: text files to lie beside the version's own, by name, such as its model card.

        Raises:
            ContractError: the folder is incomplete or altered, or made for another forecaster.
        """
        contract = read_contract(folder)
        verify_files(folder, contract)
        if contract.forecaster != forecaster:
            raise ContractError(
                f"{folder} was made for {contract.forecaster!r}; got forecaster {forecaster!r}."
            )
        own = _contract_tags(folder, contract)
        same = self.find(forecaster, {CONTRACT_TAG: own[CONTRACT_TAG]})
        if same is not None:
            return same
        with self._talk(f"register a version of {forecaster}"):
            uploaded = self._upload(folder, contract, run_id, notes or {})
            self._create_model(forecaster)
            made = self._client.create_model_version(
                forecaster,
                # a database cannot resolve models:/, since that goes through the global URI
                f"models:/{uploaded.model_id}" if self.is_served else uploaded.artifact_location,
                run_id,
                {**(tags or {}), **own},
                model_id=uploaded.model_id,
                await_creation_for=0,
            )
            self._wait_ready(made)
        return int(made.version)

    def find(self, forecaster: str, tags: Mapping[str, str]) -> int | None:
        """Newest version of `forecaster` that carries all of `tags`, or None."""
        for info in self._versions(forecaster):
            if all(info.tags.get(key) == value for key, value in tags.items()):
                return info.version
        return None

    def version(self, forecaster: str, version: int) -> VersionInfo:
        """One version with its tags and aliases.

        Raises:
            RegistryError: no such version; names those that exist.
        """
        with self._talk(f"read {forecaster} version {version}"):
            try:
                return _info(self._client.get_model_version(forecaster, str(version)))
            except MlflowException as error:
                if error.error_code not in _MISSING:
                    raise
        known = ", ".join(str(each.version) for each in self.history(forecaster)) or "none"
        raise RegistryError(
            f"{self.shown} holds no version {version} of {forecaster}; it holds: {known}."
        )

    def history(self, forecaster: str) -> list[VersionInfo]:
        """Every version of `forecaster`, newest first, with its aliases."""
        holders: dict[int, list[str]] = {}
        for alias, number in self.aliases(forecaster).items():
            holders.setdefault(number, []).append(alias)
        return [
            replace(info, aliases=tuple(sorted(holders.get(info.version, ()))))
            for info in self._versions(forecaster)
        ]

    def tag_version(self, forecaster: str, version: int, tags: Mapping[str, str]) -> None:
        """Set tags of a version; one call each."""
        with self._talk(f"tag {forecaster} version {version}"):
            for key, value in tags.items():
                self._client.set_model_version_tag(forecaster, str(version), key, value)

    def download(self, forecaster: str, version: int, dst: Path) -> Path:
        """Copy the files of a version into the folder `dst` (made if missing); `dst`.

        Nothing is verified here; `contract.verify_files` and the golden output do that.
        """
        dst.mkdir(parents=True, exist_ok=True)
        with self._talk(f"download {forecaster} version {version}"):
            source = self._client.get_model_version_download_uri(forecaster, str(version))
            files = get_artifact_repository(source, self.uri, self.uri)
            files.download_artifacts("", dst_path=str(dst))  # type: ignore[no-untyped-call]
        return dst

    # aliases ------------------------------------------------------------------------------------

    def aliases(self, forecaster: str) -> dict[str, int]:
        """Alias to version; empty when there is no such model. One call."""
        with self._talk(f"read the aliases of {forecaster}"):
            try:
                return _aliases(self._client.get_registered_model(forecaster))
            except MlflowException as error:
                if error.error_code in _MISSING:
                    return {}
                raise

    def alias(self, forecaster: str, alias: str) -> int | None:
        """Version that holds `alias`, or None."""
        return self.aliases(forecaster).get(alias)

    def set_alias(self, forecaster: str, alias: str, version: int) -> None:
        """Move `alias` to `version` (it leaves the version that held it, in one step)."""
        with self._talk(f"move {alias} of {forecaster} to version {version}"):
            self._client.set_registered_model_alias(forecaster, alias, str(version))

    def delete_alias(self, forecaster: str, alias: str) -> None:
        """Take `alias` away; it may be missing already."""
        with self._talk(f"take {alias} of {forecaster} away"):
            self._client.delete_registered_model_alias(forecaster, alias)

    def served_versions(self) -> dict[str, dict[str, int]]:
        """Aliases that the server follows, of every forecaster of ours, each with its version.

        One call (one more for every thousand forecasters); cheap enough to poll. A forecaster
        without such an alias is there with none.
        """
        found: dict[str, dict[str, int]] = {}
        token: str | None = None
        with self._talk("read the versions that are to be served"):
            while True:
                page = self._client.search_registered_models(
                    f"tags.{OWNER_TAG} = 'forecaster'", max_results=1000, page_token=token
                )
                for model in page:
                    aliases = _aliases(model)
                    found[model.name] = {name: aliases[name] for name in SERVED if name in aliases}
                token = page.token
                if not token:
                    return found

    def _versions(self, forecaster: str) -> list[VersionInfo]:
        """Every version, newest first, without aliases: the search does not return them."""
        found: list[VersionInfo] = []
        token: str | None = None
        with self._talk(f"list the versions of {forecaster}"):
            while True:
                page = self._client.search_model_versions(
                    f"name='{forecaster}'", max_results=1000, page_token=token
                )
                found += [_info(each) for each in page]
                token = page.token
                if not token:
                    return sorted(found, key=lambda info: -info.version)

    # webhooks -----------------------------------------------------------------------------------

    def set_webhook(self, url: str, secret: str) -> bool:
        """Have the registry tell `url` of every alias that moves or goes; whether it is new.

        The webhook with this address, if there is one, gets the secret and is switched on again.
        """
        events: list[WebhookEventStr | WebhookEvent] = list(WEBHOOK_EVENTS)
        with self._talk(f"set the webhook {url}"):
            for each in self._webhooks():
                if each.url == url:
                    self._client.update_webhook(
                        each.webhook_id, events=events, secret=secret, status="ACTIVE"
                    )
                    return False
            self._client.create_webhook(WEBHOOK_NAME, url, events, secret=secret)
        return True

    def _webhooks(self) -> list[Webhook]:
        found: list[Webhook] = []
        token: str | None = None
        while True:
            page = self._client.list_webhooks(page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    # plumbing -----------------------------------------------------------------------------------

    @property
    def shown(self) -> str:
        """The address without credentials, for messages."""
        if self.is_served:
            parts = urlsplit(self.uri)
            return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        return make_url(self.uri).render_as_string(hide_password=True)

    @property
    def is_served(self) -> bool:
        """Whether a server answers at the address (else it is a database)."""
        return self.uri.startswith(("http://", "https://"))

    @cached_property
    def _client(self) -> MlflowClient:
        self._prepare_sqlite()
        logging.getLogger("alembic").setLevel(logging.WARNING)  # sixty lines at the first start
        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    def _prepare_sqlite(self) -> None:
        """Make the database's folder, and refuse a damaged file at once (MLflow retries 100 s)."""
        if not self.uri.startswith("sqlite"):
            return
        path = Path(make_url(self.uri).database or "")
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=10)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master")

    @cached_property
    def _experiment(self) -> str:
        """Id of the experiment, made on first use."""
        location = self.artifacts.as_uri() if self.artifacts and not self.is_served else None
        for _ in range(2):  # the second time, when another process made it in between
            found = self._client.get_experiment_by_name(EXPERIMENT)
            if found is not None:
                return str(found.experiment_id)
            try:
                return str(self._client.create_experiment(EXPERIMENT, artifact_location=location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        raise RegistryError(
            f"The MLflow experiment {EXPERIMENT!r} at {self.shown} is deleted; restore it "
            "(`mlflow experiments restore`) or remove it for good (`mlflow gc`)."
        )

    def _create_model(self, forecaster: str) -> None:
        if forecaster in self._known:
            return
        try:
            self._client.create_registered_model(forecaster, {OWNER_TAG: "forecaster"})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        self._known.add(forecaster)

    def _upload(
        self, folder: Path, contract: Contract, run_id: str, notes: Mapping[str, str]
    ) -> LoggedModel:
        """Upload the folder's files, and MLflow's own and the notes beside them."""
        client = self._client
        model = client.create_logged_model(
            self._experiment, contract.forecaster, source_run_id=run_id, model_type="forecaster"
        )
        with tempfile.TemporaryDirectory() as scratch:
            beside = Path(scratch)
            for name, text in notes.items():
                (beside / name).write_text(text, encoding="utf-8")
            _write_mlmodel(beside, contract, run_id, model.model_id)
            for name in (CONTRACT_FILE, *contract.files):
                target = beside / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to((folder / name).resolve())
            client.log_model_artifacts(model.model_id, str(beside))
        return client.finalize_logged_model(model.model_id, "READY")

    def _wait_ready(self, made: ModelVersion) -> None:
        """Wait for a registry that copies the files first; MLflow's own is ready at once."""
        deadline = time.monotonic() + READY_SECONDS
        while made.status == "PENDING_REGISTRATION" and time.monotonic() < deadline:
            time.sleep(0.2)
            made = self._client.get_model_version(made.name, made.version)
        if made.status != "READY":
            raise RegistryError(
                f"{self.shown} left {made.name} version {made.version} in state {made.status} "
                f"({made.status_message}) for {READY_SECONDS} s; READY expected."
            )

    @contextmanager
    def _talk(self, what: str) -> Iterator[None]:
        """Turn what MLflow, its database or the network raise into a RegistryError."""
        try:
            yield
        except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, *_NOT_MLFLOW) as error:
            raise RegistryError(
                f"The model registry {self.shown} could not {what}: {_reason(error)} "
                "Check that it runs and that MLFLOW_TRACKING_URI names it."
            ) from error


def _reason(error: Exception) -> str:
    """First line of an error, shortened and without credentials: MLflow's carry all of it."""
    text = re.sub(r"//[^/@\s]+@", "//", str(getattr(error, "orig", None) or error))
    lines = text.strip().splitlines() or [repr(error)]
    return f"{lines[0][:400].rstrip('.')}."


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _metrics(values: Iterable[tuple[str, float, int]]) -> list[Metric]:
    stamp = int(datetime.now(UTC).timestamp() * 1000)
    return [Metric(key, float(value), stamp, step) for key, value, step in values]


def _aliases(model: RegisteredModel) -> dict[str, int]:
    return {alias: int(version) for alias, version in model.aliases.items()}


def _run_info(found: Run) -> RunInfo:
    data = found.data
    return RunInfo(found.info.run_id, data.tags, data.metrics, data.params)


def _info(found: ModelVersion) -> VersionInfo:
    return VersionInfo(
        forecaster=found.name,
        version=int(found.version),
        run_id=found.run_id or "",
        created_at=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
        tags=dict(found.tags),
        aliases=tuple(sorted(found.aliases)),
    )


def _contract_tags(folder: Path, contract: Contract) -> dict[str, str]:
    return {
        CONTRACT_TAG: hashlib.sha256((folder / CONTRACT_FILE).read_bytes()).hexdigest(),
        MODEL_TAG: contract.files[MODEL_FILE],
        "dataset_md5": contract.dataset_md5,
        "as_of": contract.as_of.isoformat(),
        "kind": contract.kind,
        "git_commit": contract.git_commit,
        "symbols": ",".join(contract.symbols),
    }


def _write_mlmodel(folder: Path, contract: Contract, run_id: str, model_id: str) -> None:
    """Write what MLflow's ONNX flavour would: `MLmodel`, requirements and Python version."""
    python = platform.python_version()
    model = Model(run_id=run_id, signature=_signature(contract), model_id=model_id)
    model.add_flavor(
        "python_function",
        loader_module="mlflow.onnx",
        data=MODEL_FILE,
        env={"virtualenv": "python_env.yaml"},
        python_version=python,
    )
    model.add_flavor(
        "onnx",
        onnx_version=installed("onnx"),
        data=MODEL_FILE,
        providers=["CPUExecutionProvider"],
        onnx_session_options=None,
        code=None,
    )
    model.save(folder / "MLmodel")
    pins = [f"{name}=={installed(name)}" for name in ("mlflow", *REQUIREMENTS)]
    (folder / "requirements.txt").write_text("\n".join(pins) + "\n")
    (folder / "python_env.yaml").write_text(
        f"python: {python}\ndependencies:\n- -r requirements.txt\n"
    )


def _signature(contract: Contract) -> ModelSignature:
    rows, columns = contract.context, len(contract.columns)
    steps, levels = contract.horizon, len(contract.quantile_levels)
    inputs: list[ColSpec | TensorSpec] = [
        TensorSpec(np.dtype(np.float32), (-1, rows, columns), "ohlcv"),
        TensorSpec(np.dtype(np.int64), (-1, rows), "dates"),
        TensorSpec(np.dtype(np.int64), (-1,), "symbol"),
    ]
    output = TensorSpec(np.dtype(np.float32), (-1, steps, levels), "quantiles")
    return ModelSignature(inputs=Schema(inputs), outputs=Schema([output]))
