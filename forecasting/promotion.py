"""Promotion of a model version: intent first, move the aliases, let the server confirm.

Every promotion is one line of the table `promotions`, written before anything moves:

    intended ──▶ moved ──▶ confirmed        a server said that it serves the version
        └──────────┴─────▶ undone           the aliases are back where they were

A process that is killed on the way leaves its line `intended` or `moved`; `reconcile` finishes it
or puts the aliases back. Where no server answers a promotion stands as `moved`, and the next
`reconcile` confirms it if the version loads. One promotion of a forecaster at a time: a lock file
under `home`, which the operating system releases when its holder dies.

That a promotion stands, or stands no longer, is an event that is put into the outbox by the
transaction that writes it into the line. An earlier version in the place of a later one is told as
`perennial.model.rolled-back`, a later one as `perennial.model.promoted`.

Where a signing key is set, a version is signed before anything moves (`signing`).
"""

import hashlib
import logging
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import httpx
import msgspec
from filelock import FileLock, Timeout
from sqlalchemy import Connection, Engine, Row, insert, select, update

from forecasting import audit, events
from forecasting.contract import CONTRACT_FILE
from forecasting.errors import (
    ContractError,
    OvertakenError,
    PerennialError,
    RegistryError,
    ServiceError,
)
from forecasting.events import ModelPromoted, ModelRolledBack
from forecasting.inference import Forecaster
from forecasting.registry import (
    CONTRACT_TAG,
    PREVIOUS,
    PRODUCTION,
    SIGNATURE_TAG,
    Registry,
)
from forecasting.settings import Settings
from forecasting.signing import sign
from forecasting.store import now, promotions

log = logging.getLogger(__name__)

OPEN = ("intended", "moved")
ANY = -1
"""Of `judged_against`: no matter what is in production."""
SILENT_SECONDS = 1.0
"""How long an address may refuse connections before it counts as no server."""
_ASK_SECONDS, _POLL_SECONDS, _LOCK_SECONDS = 2.0, 0.1, 60.0


@dataclass(frozen=True)
class PromotionResult:
    """What came of a promotion that stands.

    Attributes:
        previous: version that `previous` names now, None for the first one.
        served: what the server said.
        confirmed: whether a server said that it serves `version`.
        promotion: line of the ledger, to `undo` it; empty if `version` was in production already.
    """

    forecaster: str
    version: int
    previous: int | None
    served: str
    confirmed: bool
    promotion: str = ""


@dataclass(frozen=True)
class Promotion:
    """One line of the ledger: who put which version into production, when and why.

    `previous` held `production` before, `fallback` held `previous` before.
    """

    id: str
    forecaster: str
    version: int
    previous: int | None
    fallback: int | None
    state: Literal["intended", "moved", "confirmed", "undone"]
    served: str
    who: str
    why: str
    created_at: datetime
    updated_at: datetime

    def __str__(self) -> str:
        return f"{self.forecaster} version {self.version} is {self.state}: {self.served}"


def promote(
    settings: Settings,
    registry: Registry,
    engine: Engine,
    forecaster: str,
    version: int,
    who: str,
    why: str,
    judged_against: int | None = ANY,
) -> PromotionResult:
    """Put `version` into production and wait until the server serves it.

    What an earlier, killed promotion of the forecaster left behind is reconciled first. Promoting
    the version in production moves nothing and asks the server again. Where a signing key is set,
    the version is signed first, unless it is already.

    Args:
        judged_against: version in production (None: none) that `version` was found better than;
            `ANY` promotes whatever holds production by now.

    Raises:
        RegistryError: no such version, or the registry is away.
        ConfigError: the signing key cannot be used; nothing was moved.
        ContractError: a version that is to be signed does not load; nothing was moved.
        OvertakenError: another version went into production since; nothing was moved.
        ServiceError: the server refused the version; the aliases are back where they were.
    """
    with _exclusive(settings, forecaster):
        _reconcile(settings, registry, engine, forecaster)
        registry.version(forecaster, version)
        aliases = registry.aliases(forecaster)
        if aliases.get(PRODUCTION) == version:
            sign_version(settings, registry, forecaster, version)
            answer = _wait_served(settings, forecaster, version)
            return PromotionResult(
                forecaster, version, aliases.get(PREVIOUS), answer.text, answer.kind == "serves"
            )
        if judged_against not in (ANY, aliases.get(PRODUCTION)):
            raise OvertakenError(
                f"{forecaster} version {version} was judged against "
                f"{_named(judged_against)}, but {_named(aliases.get(PRODUCTION))} is in "
                "production by now. Train again to be judged against that one."
            )
        sign_version(settings, registry, forecaster, version)
        line = _intend(engine, forecaster, version, aliases, who, why)
        try:
            _move(registry, engine, line)
            return _confirm(settings, engine, line)
        except PerennialError as error:
            _undo_after(error, registry, engine, line)
            raise


def sign_version(settings: Settings, registry: Registry, forecaster: str, version: int) -> bool:
    """Sign a version with `settings.signing_key`, if one is set; whether a signature was written.

    What is signed is what the registry gives out now, after it was loaded. A version that carries
    the key's signature stays as it is. The server asks a challenger for a signature too.

    Raises:
        RegistryError: no such version, or the registry is away.
        ConfigError: the signing key cannot be used.
        ContractError: the version does not load, or is not the one that was registered.
    """
    if not settings.signing_key:
        return False
    tags = registry.version(forecaster, version).tags
    digest = tags.get(CONTRACT_TAG, "")
    signature = sign(Path(settings.signing_key), forecaster, version, digest)
    if tags.get(SIGNATURE_TAG) == signature:  # Ed25519 gives the same one each time
        return False
    _require_registered(registry, forecaster, version, digest)
    registry.tag_version(forecaster, version, {SIGNATURE_TAG: signature})
    log.info("signed %s version %d with %s", forecaster, version, settings.signing_key)
    return True


def undo(
    settings: Settings, registry: Registry, engine: Engine, promotion: str, reason: str
) -> Promotion:
    """Put the aliases back where they were before a promotion; its line afterwards.

    Aliases that somebody moved since are left alone. Doing it twice is the same as once.

    Raises:
        RegistryError: no such promotion, or the registry is away.
    """
    line = _line(engine, promotion)
    with _exclusive(settings, line.forecaster):
        _undo(registry, engine, line, reason)
    return _line(engine, promotion)


def reconcile(
    settings: Settings, registry: Registry, engine: Engine, forecaster: str | None = None
) -> list[Promotion]:
    """Finish or undo what killed promotions left behind; the lines as they are afterwards.

    A version that holds `production` and is served, or at least loads, is confirmed; anything else
    is undone. Without `forecaster`, of all forecasters. Costs one query when nothing is open.
    """
    names = sorted({line.forecaster for line in _open_lines(engine, forecaster)})
    settled: list[Promotion] = []
    for name in names:
        with _exclusive(settings, name):
            settled += _reconcile(settings, registry, engine, name)
    return settled


def history(engine: Engine, forecaster: str) -> list[Promotion]:
    """Every promotion of a forecaster, newest first."""
    query = (
        select(promotions)
        .where(promotions.c.forecaster == forecaster)
        .order_by(promotions.c.created_at.desc())
    )
    with engine.connect() as connection:
        return [_as_line(row) for row in connection.execute(query)]


def replaced_by(engine: Engine, forecaster: str, version: int) -> Promotion | None:
    """The newest promotion that took the place of a version and stood; None: it never gave way."""
    lines = history(engine, forecaster)
    stood = (line for line in lines if line.state in ("moved", "confirmed"))
    return next((line for line in stood if line.previous == version), None)


def _named(version: int | None) -> str:
    return f"version {version}" if version is not None else "no version"


# steps ------------------------------------------------------------------------------------------


def _intend(
    engine: Engine, forecaster: str, version: int, aliases: dict[str, int], who: str, why: str
) -> Promotion:
    identity = str(uuid.uuid4())
    with engine.begin() as connection:
        connection.execute(
            insert(promotions).values(
                id=identity,
                forecaster=forecaster,
                version=version,
                previous=aliases.get(PRODUCTION),
                fallback=aliases.get(PREVIOUS),
                state="intended",
                who=who,
                why=why,
                created_at=now(),
                updated_at=now(),
            )
        )
        query = select(promotions).where(promotions.c.id == identity)
        line = _as_line(connection.execute(query).one())
        _audit(connection, line, "intended", "")
    return line


def _move(registry: Registry, engine: Engine, line: Promotion) -> None:
    if line.previous is not None:
        registry.set_alias(line.forecaster, PREVIOUS, line.previous)
    registry.set_alias(line.forecaster, PRODUCTION, line.version)
    with engine.begin() as connection:
        _record(connection, line, "moved", "")


def _confirm(settings: Settings, engine: Engine, line: Promotion) -> PromotionResult:
    answer = _wait_served(settings, line.forecaster, line.version)
    if answer.kind == "refused":
        raise ServiceError(
            f"{answer.text} The aliases of {line.forecaster} were put back "
            f"(production: {line.previous or 'none'})."
        )
    confirmed = answer.kind == "serves"
    _stands(engine, line, "confirmed" if confirmed else "moved", answer.text)
    return PromotionResult(
        line.forecaster, line.version, line.previous, answer.text, confirmed, line.id
    )


def _undo(registry: Registry, engine: Engine, line: Promotion, reason: str) -> None:
    if line.state == "undone":
        return
    newest = history(engine, line.forecaster)[0].id == line.id
    back_again = newest and _put_back(registry, line)
    with engine.begin() as connection:
        _record(connection, line, "undone", reason)
        if back_again and _was_told(connection, line):
            back = _event(line, line.previous, line.version, why=f"undone: {reason}")
            events.put_once_with(connection, back, f"{line.id} undone")


def _undo_after(error: PerennialError, registry: Registry, engine: Engine, line: Promotion) -> None:
    """Undo because of `error`; where that fails too, say so and leave it to `reconcile`."""
    try:
        _undo(registry, engine, line, str(error))
    except RegistryError as again:
        error.add_note(
            f"The aliases could not be put back either ({again}); the next train, retrain or "
            "rollback reconciles them."
        )


def _put_back(registry: Registry, line: Promotion) -> bool:
    """Undo `_move`, whichever of its steps were taken, and whichever of these were already.

    False where somebody else has moved `production` since, which is left as it is.
    """
    held = registry.aliases(line.forecaster)
    if held.get(PRODUCTION) == line.version:
        _point(registry, line.forecaster, PRODUCTION, line.previous)
    elif held.get(PRODUCTION) != line.previous:
        return False
    if held.get(PREVIOUS) == line.previous != line.fallback:
        _point(registry, line.forecaster, PREVIOUS, line.fallback)
    return True


def _point(registry: Registry, forecaster: str, alias: str, version: int | None) -> None:
    if version is None:
        registry.delete_alias(forecaster, alias)
    else:
        registry.set_alias(forecaster, alias, version)


def _reconcile(
    settings: Settings, registry: Registry, engine: Engine, forecaster: str
) -> list[Promotion]:
    lines = _open_lines(engine, forecaster)
    for line in lines:
        if registry.alias(forecaster, PRODUCTION) != line.version:
            _undo(registry, engine, line, "reconciled: the alias had not moved.")
            continue
        answer = _ask(settings, forecaster, line.version)
        broken = answer.text if answer.kind == "refused" else ""
        if answer.kind in ("behind", "denied", "silent"):
            try:
                broken = _broken(registry, line)
            except RegistryError as error:  # stays open; it must not block a way out of it
                log.warning("An interrupted promotion cannot be settled yet: %s", error)
                continue
        if broken:
            _undo(registry, engine, line, f"reconciled: {broken}")
        else:
            loads = "" if answer.kind == "serves" else " The version loads."
            _stands(engine, line, "confirmed", f"reconciled: {answer.text}{loads}")
    return [_line(engine, line.id) for line in lines]


def _broken(registry: Registry, line: Promotion) -> str:
    """Why the version does not load; empty if it does."""
    try:
        _load(registry, line.forecaster, line.version)
    except ContractError as error:
        return str(error)
    return ""


def _require_registered(registry: Registry, forecaster: str, version: int, digest: str) -> None:
    """Refuse to sign what does not load, or is another contract than the registry's tag says."""
    loaded, found = _load(registry, forecaster, version)
    if (loaded, found) != (forecaster, digest):
        raise ContractError(
            f"{forecaster} version {version} should have a {CONTRACT_FILE} of sha256 "
            f"{digest or '(no tag ' + CONTRACT_TAG + ')'}; the registry gives out one of {loaded} "
            f"with {found}. It is not signed; train again."
        )


def _load(registry: Registry, forecaster: str, version: int) -> tuple[str, str]:
    """Download and load a version; the forecaster that it is of, and its contract's sha256."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = registry.download(forecaster, version, Path(scratch))
        loaded = Forecaster.load(folder, version)
        raw = (folder / CONTRACT_FILE).read_bytes()
    return loaded.contract.forecaster, hashlib.sha256(raw).hexdigest()


# the server -------------------------------------------------------------------------------------


class _Model(msgspec.Struct):
    forecaster: str
    version: int


class _Refusal(msgspec.Struct):
    name: str
    version: int | None
    reason: str
    alias: str = PRODUCTION
    refused_at: datetime | None = None


class _Models(msgspec.Struct):
    """The part of GET /v1/models that matters here."""

    models: list[_Model]
    refused: list[_Refusal] = []


@dataclass(frozen=True)
class _Answer:
    kind: Literal["serves", "refused", "behind", "denied", "silent"]
    text: str


def _wait_served(settings: Settings, forecaster: str, version: int) -> _Answer:
    """Ask until the server serves or refuses the version, or patience ends."""
    start, since = time.monotonic(), now()
    while True:
        answer = _ask(settings, forecaster, version, since)
        waited = time.monotonic() - start
        patience = settings.confirm_seconds
        if answer.kind in ("silent", "denied"):
            patience = min(patience, SILENT_SECONDS)
        if answer.kind in ("serves", "refused") or waited >= patience:
            return answer
        time.sleep(_POLL_SECONDS)


def _ask(
    settings: Settings, forecaster: str, version: int, since: datetime | None = None
) -> _Answer:
    """Ask the server once what it serves; refusals before `since` are of an earlier attempt."""
    url = settings.server_url.rstrip("/")
    if not url:
        return _Answer("silent", "No server is configured (PERENNIAL_SERVER_URL is empty).")
    try:
        response = httpx.get(f"{url}/v1/models", headers=_headers(settings), timeout=_ASK_SECONDS)
    except httpx.TransportError:
        return _Answer("silent", f"No server answered at {url}.")
    if response.status_code in (401, 403):
        return _Answer("denied", _denied(settings, url, response.status_code))
    try:
        found = msgspec.json.decode(response.content, type=_Models)
    except msgspec.DecodeError:
        return _Answer(
            "behind", f"{url}/v1/models answered {response.status_code} and no list of models."
        )
    for refusal in found.refused:
        # as a challenger it may have been refused for want of the signature that it has now
        if since is not None and refusal.refused_at is not None and refusal.refused_at < since:
            continue
        if (refusal.name, refusal.version, refusal.alias) == (forecaster, version, PRODUCTION):
            return _Answer(
                "refused", f"{url} refused {forecaster} version {version}: {refusal.reason}"
            )
    serving = {model.forecaster: model.version for model in found.models}.get(forecaster)
    if serving == version:
        return _Answer("serves", f"{url} serves {forecaster} version {version}.")
    instead = f"version {serving}" if serving is not None else "no version"
    return _Answer("behind", f"{url} serves {instead} of {forecaster}, not yet version {version}.")


def _headers(settings: Settings) -> dict[bytes, bytes]:
    key = settings.server_key.get_secret_value().strip()
    return {b"Authorization": f"Bearer {key}".encode()} if key else {}


def _denied(settings: Settings, url: str, status: int) -> str:
    if not settings.server_key.get_secret_value().strip():
        lacks = "a key is asked for, and PERENNIAL_SERVER_KEY is not set"
    elif status == 401:
        lacks = "the key in PERENNIAL_SERVER_KEY is unknown or no longer valid"
    else:
        lacks = "the key in PERENNIAL_SERVER_KEY may not read it"
    return f"{url}/v1/models answered {status}: {lacks}."


# the ledger -------------------------------------------------------------------------------------


def _record(connection: Connection, line: Promotion, state: str, served: str) -> None:
    connection.execute(
        update(promotions)
        .where(promotions.c.id == line.id)
        .values(state=state, served=served[:200], updated_at=now())
    )
    _audit(connection, line, state, served)


def _stands(engine: Engine, line: Promotion, state: str, served: str) -> None:
    """Record that a promotion stands and, in the same transaction, the event that tells it."""
    with engine.begin() as connection:
        _record(connection, line, state, served)
        told = _event(line, line.version, line.previous, why=line.why, served=served)
        events.put_once_with(connection, told, line.id)


def _event(
    line: Promotion, version: int | None, before: int | None, why: str, served: str = ""
) -> ModelPromoted | ModelRolledBack:
    """`version` took the place of `before`; versions grow, so the later one is the newer one."""
    if before is not None and (version is None or version < before):
        return ModelRolledBack(
            forecaster=line.forecaster, version=version, rolled_back=before, who=line.who, why=why
        )
    assert version is not None  # one of the two is there
    return ModelPromoted(
        forecaster=line.forecaster,
        version=version,
        previous=before,
        who=line.who,
        why=why,
        served=served,
    )


def _was_told(connection: Connection, line: Promotion) -> bool:
    kinds = (ModelPromoted, ModelRolledBack)
    return any(events.was_put(connection, kind, line.id) for kind in kinds)


def _audit(connection: Connection, line: Promotion, state: str, served: str) -> None:
    details = {
        "promotion": line.id,
        "state": state,
        "previous": line.previous,
        "served": served,
    }
    audit.add(
        connection,
        "alias",
        line.forecaster,
        version=line.version,
        who=line.who,
        reason=line.why,
        details=details,
    )


def _open_lines(engine: Engine, forecaster: str | None) -> list[Promotion]:
    """Lines that neither stand nor fell, newest first."""
    query = (
        select(promotions)
        .where(promotions.c.state.in_(OPEN))
        .order_by(promotions.c.created_at.desc())
    )
    if forecaster is not None:
        query = query.where(promotions.c.forecaster == forecaster)
    with engine.connect() as connection:
        return [_as_line(row) for row in connection.execute(query)]


def _line(engine: Engine, identity: str) -> Promotion:
    with engine.connect() as connection:
        row = connection.execute(select(promotions).where(promotions.c.id == identity)).first()
    if row is None:
        raise RegistryError(f"The ledger holds no promotion {identity!r}; see its history.")
    return _as_line(row)


def _as_line(row: Row[tuple[object, ...]]) -> Promotion:
    values = dict(row._mapping)
    for key in ("created_at", "updated_at"):  # SQLite gives them back without their zone
        values[key] = values[key].replace(tzinfo=values[key].tzinfo or UTC)
    return Promotion(**values)


@contextmanager
def _exclusive(settings: Settings, forecaster: str) -> Iterator[None]:
    """Hold the forecaster's lock."""
    path = settings.home / "locks" / f"promotion-{forecaster}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds = settings.confirm_seconds + _LOCK_SECONDS
    try:
        with FileLock(path, timeout=seconds):
            yield
    except Timeout as error:
        raise ServiceError(
            f"Another promotion of {forecaster} holds {path} for more than {seconds:.0f} s; "
            "look for a hanging train, retrain or rollback."
        ) from error
