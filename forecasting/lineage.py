"""Where an answer of the server came from, back to the rows of a file.

An answer names its version, run and datasets. From there the registry has the run's parameters and
the gate's verdict, the contract the commit and the training span, the data registry the file and
its rows, and the database who promoted the version and why. What is nowhere to be found, or does
not fit together, is said and not left out.
"""

import tempfile
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path

import msgspec
from sqlalchemy import Engine, select

from forecasting import datasets, promotion
from forecasting.contract import CONTRACT_FILE, MODEL_FILE, Contract, read_contract, sha256_file
from forecasting.errors import ContractError, DataError, PerennialError
from forecasting.registry import CONTRACT_TAG, Registry
from forecasting.sessions import sessions_between
from forecasting.settings import Settings
from forecasting.store import predictions


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a server's answer that says where it came from; other fields are ignored."""

    symbol: str
    forecaster: str
    model_version: int
    run_id: str
    dataset_md5: str
    origin: date
    prices_md5: str | None = None


@dataclass(frozen=True)
class Rows:
    """Rows of a symbol in a dataset version.

    Attributes:
        file: path below the dataset's folder.
        file_md5: DVC's md5 of the file.
        first, last: sessions.
        first_row, last_row: their numbers in the file, from 0.
        source: name and address that the newest rows came from; empty where it was not kept.
    """

    dataset_md5: str
    dataset_rev: str
    file: str
    file_md5: str
    first: date
    last: date
    first_row: int
    last_row: int
    source: str


@dataclass(frozen=True)
class Lineage:
    """Everything behind one answer.

    Attributes:
        answer: what was asked about.
        logged: answers of the same version, symbol and origin in the prediction log.
        first_made_at: of the earliest of these.
        contract: of the version.
        contract_sha256, model_sha256: of its files.
        aliases: that the version holds now.
        run_tags, run_params: of its training run; `outcome` and `reasons` are the gate's.
        trained_on: rows of its symbol in the training span.
        asked_about: rows that the forecast was computed from; None where the client sent them.
        promotions: every time that it was put into production, newest first.
        missing: what could not be found, or contradicts the answer.
    """

    answer: Answer
    logged: int
    first_made_at: datetime | None
    contract: Contract | None
    contract_sha256: str
    model_sha256: str
    aliases: tuple[str, ...]
    run_tags: dict[str, str]
    run_params: dict[str, str]
    run_url: str
    trained_on: Rows | None
    asked_about: Rows | None
    promotions: tuple[promotion.Promotion, ...]
    missing: tuple[str, ...] = field(default=())

    def table(self) -> list[tuple[str, str, str]]:
        """Section, name and value of each fact, in the order in which the answer came about."""
        rows: list[tuple[str, str, str]] = []
        add = rows.append
        answer, contract, tags = self.answer, self.contract, self.run_tags
        add(("answer", "forecast", f"{answer.symbol} from {answer.origin}"))
        made = f", first at {self.first_made_at:%Y-%m-%d %H:%M:%S %Z}" if self.first_made_at else ""
        add(("answer", "in the prediction log", f"{self.logged} time(s){made}"))
        if self.asked_about:
            rows += _told("prices asked about", self.asked_about)
        elif answer.prices_md5:
            add(("prices asked about", "rows", "ours, but not found: see what is missing"))
        else:
            add(("prices asked about", "rows", "sent by the client; not kept"))
        held = f" ({', '.join(self.aliases)})" if self.aliases else ""
        add(("version", "number", f"{answer.forecaster} {answer.model_version}{held}"))
        if contract:
            add(("version", "kind", f"{contract.kind}, {', '.join(contract.symbols)}"))
            add(("version", "code", contract.git_commit))
            add(("version", MODEL_FILE, self.model_sha256))
            add(("version", CONTRACT_FILE, self.contract_sha256))
        add(("run", "MLflow", " ".join(filter(None, (answer.run_id, self.run_url)))))
        for name in ("as_of", "trigger", "flow_run_id"):
            if tags.get(name):
                add(("run", name, tags[name]))
        for name, value in sorted(self.run_params.items()):
            add(("run", name, value))
        if self.trained_on:
            rows += _told("trained on", self.trained_on)
        add(("gate", tags.get("outcome") or "unknown", tags.get("reasons") or "no reasons kept"))
        for line in self.promotions:
            when = f"{line.created_at:%Y-%m-%d %H:%M:%S %Z}"
            add(("promotion", f"{line.state} {when}", f"{line.who}: {line.why}"))
        rows += [("missing", "", each) for each in self.missing]
        return rows


def parse(raw: bytes | str) -> Answer:
    """The answer of `GET` or `POST /v1/forecast`.

    Raises:
        DataError: it is no such answer.
    """
    try:
        return msgspec.json.decode(raw, type=Answer)
    except msgspec.MsgspecError as error:
        raise DataError(
            f"An answer of /v1/forecast was expected, JSON with symbol, forecaster, model_version, "
            f"run_id, dataset_md5 and origin: {error}."
        ) from error


def logged_answer(engine: Engine, identity: str) -> Answer:
    """An answer by its id in the prediction log.

    Raises:
        DataError: there is none.
    """
    query = select(predictions).where(predictions.c.id == identity).limit(1)
    with engine.connect() as connection:
        row = connection.execute(query).mappings().first()
    if row is None:
        raise DataError(f"The prediction log has no answer {identity!r}; see its column `id`.")
    return Answer(**{name: row[name] for name in Answer.__struct_fields__})


def trace(settings: Settings, registry: Registry, engine: Engine, answer: Answer) -> Lineage:
    """Everything behind an answer.

    Raises:
        RegistryError: the registry is away, or has no such version.
    """
    missing: list[str] = []
    version = registry.version(answer.forecaster, answer.model_version)
    contract, contract_sha, model_sha = _files(registry, answer, missing)
    _compare("run of the version", version.run_id, answer.run_id, missing)
    if contract:
        _compare("dataset of the contract", contract.dataset_md5, answer.dataset_md5, missing)
        tag = version.tags.get(CONTRACT_TAG, "")
        _compare(f"sha256 of {CONTRACT_FILE} in the registry", tag, contract_sha, missing)
    tags, params = _run(registry, answer, missing)
    promotions = tuple(
        line
        for line in promotion.history(engine, answer.forecaster)
        if line.version == answer.model_version
    )
    if not promotions:
        missing.append("This version was never put into production through the ledger.")
    logged, first = _logged(engine, answer)
    return Lineage(
        answer=answer,
        logged=logged,
        first_made_at=first,
        contract=contract,
        contract_sha256=contract_sha,
        model_sha256=model_sha,
        aliases=version.aliases,
        run_tags=tags,
        run_params=params,
        run_url=registry.run_url(answer.run_id),
        trained_on=_trained_on(settings, answer, contract, missing),
        asked_about=_asked_about(settings, answer, contract, missing),
        promotions=promotions,
        missing=tuple(missing),
    )


def _told(section: str, rows: Rows) -> list[tuple[str, str, str]]:
    return [
        (section, "dataset", f"{rows.dataset_md5} (commit {rows.dataset_rev})"),
        (section, "file", f"{rows.file}, md5 {rows.file_md5}"),
        (section, "rows", f"{rows.first_row} to {rows.last_row}: {rows.first} to {rows.last}"),
        (section, "source", rows.source or "not kept"),
    ]


def _compare(what: str, found: str, told: str, missing: list[str]) -> None:
    if found != told:
        missing.append(f"The {what} is {found or 'unknown'}; {told or 'nothing'} was expected.")


def _files(
    registry: Registry, answer: Answer, missing: list[str]
) -> tuple[Contract | None, str, str]:
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = registry.download(answer.forecaster, answer.model_version, Path(scratch))
            contract = read_contract(folder)
        except (ContractError, OSError) as error:
            missing.append(f"The version's files cannot be read: {error}")
            return None, "", ""
        return contract, sha256_file(folder / CONTRACT_FILE), sha256_file(folder / MODEL_FILE)


def _run(
    registry: Registry, answer: Answer, missing: list[str]
) -> tuple[dict[str, str], dict[str, str]]:
    try:
        run = registry.run(answer.run_id)
    except PerennialError as error:
        missing.append(str(error))
        return {}, {}
    shown = {key: value for key, value in run.tags.items() if not key.startswith("mlflow.")}
    return shown, dict(run.params)


def _logged(engine: Engine, answer: Answer) -> tuple[int, datetime | None]:
    query = (
        select(predictions.c.made_at)
        .where(
            predictions.c.forecaster == answer.forecaster,
            predictions.c.model_version == answer.model_version,
            predictions.c.symbol == answer.symbol,
            predictions.c.origin == answer.origin,
            predictions.c.horizon == 1,
        )
        .order_by(predictions.c.made_at)
    )
    with engine.connect() as connection:
        made = connection.execute(query).scalars().all()
    first = made[0] if made else None
    return len(made), first.replace(tzinfo=first.tzinfo or UTC) if first else None


def _trained_on(
    settings: Settings, answer: Answer, contract: Contract | None, missing: list[str]
) -> Rows | None:
    if contract is None:
        return None
    symbol = answer.symbol if answer.symbol in contract.symbols else contract.symbols[0]
    span = (contract.train_start, contract.train_end)
    return _rows(settings, symbol, contract.dataset_md5, span, missing)


def _asked_about(
    settings: Settings, answer: Answer, contract: Contract | None, missing: list[str]
) -> Rows | None:
    """The last `context` sessions up to the origin, which is what the graph is given."""
    if answer.prices_md5 is None or contract is None:
        return None
    days = sessions_between(date(answer.origin.year - 3, 1, 1), answer.origin)
    span = (days[-contract.context], answer.origin)
    return _rows(settings, answer.symbol, answer.prices_md5, span, missing)


def _rows(
    settings: Settings, symbol: str, md5: str, span: tuple[date, date], missing: list[str]
) -> Rows | None:
    try:
        file_md5, first, last = datasets.row_span(settings, symbol, md5, *span)
        return Rows(
            dataset_md5=md5,
            dataset_rev=datasets.find(settings, md5).rev,
            file=f"{symbol}/rows.parquet",
            file_md5=file_md5,
            first=span[0],
            last=span[1],
            first_row=first,
            last_row=last,
            source=datasets.source_of(settings, symbol, md5),
        )
    except DataError as error:
        missing.append(str(error))
        return None
