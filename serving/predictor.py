"""What is served now: one immutable state that is swapped whole, and the work that makes the next.

Taking up many models or prices is done in slices: each refresh works for a moment, swaps what it
has, and says whether there is more to do.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from uuid import NAMESPACE_OID, uuid5

import msgspec
import numpy as np

from forecasting.contract import Snapshot
from forecasting.errors import ConfigError, ContractError, ModelError
from forecasting.predictions import Answered, Source, Spool, Window, computed_line
from serving import problems
from serving.answers import body_of, forecast, numbers, windows_of_rows
from serving.intake import EPOCH_ORDINAL, fit
from serving.model_store import CHALLENGER, PRODUCTION, Fingerprint, ModelStore, check
from serving.open_models import OpenModels, Served
from serving.problems import ProblemError
from serving.schemas import SYMBOL, ModelInfo, Models, PricesInfo, Refusal, Traffic
from serving.windows import Rows

SLICE_SECONDS = 2.0
SCAN_SECONDS, SCAN_SHARE = 2.0, 0.05
"""How often a worker looks through the store though nothing says that it changed (a file may have
been damaged), and the most of its time that it does so."""


_OWN = ("model ", "challenger ")
_SYMBOL = re.compile(SYMBOL)
_TROUBLE = (ContractError, ConfigError, OSError)


@dataclass(slots=True)
class Latest:
    """The forecast of a symbol from its latest prices by one version, or why there is none.

    Attributes:
        body: JSON of the answer; empty if there is none.
        window: what is said of it in the log, which holds it once for each source.
        quantiles: JSON of its numbers, as the log takes them.
        answered: what answers are counted by.
        logged: how it is in the log already.
    """

    served: Served
    rows: Rows
    body: bytes = b""
    window: Window | None = None
    quantiles: bytes = b""
    answered: Answered | None = None
    problem: ProblemError | None = None
    logged: set[Source] = field(default_factory=set)

    def write(self, spool: Spool, source: Source) -> None:
        """Log it, unless it is logged.

        Raises:
            ServiceError: the log does not take it.
        """
        if source in self.logged or self.window is None:
            return
        identity = self.window.id
        if source == "shadow":  # beside the answer, which is a record of its own
            identity = str(uuid5(NAMESPACE_OID, f"{identity} shadow"))
        window = msgspec.structs.replace(self.window, id=identity, source=source)
        served = self.served
        spool.write(computed_line(served.contract, served.version, [window], self.quantiles), 1)
        self.logged.add(source)


@dataclass(frozen=True)
class State:
    """All that a request needs. Never changed: a new one replaces it.

    Attributes:
        champions: forecaster -> version in production.
        challengers: forecaster -> version that the alias `challenger` names.
        by_symbol: symbol -> champion.
        rivals: symbol -> challenger of that champion.
        latest: symbol -> forecast of its champion from the latest prices.
        rival_latest: the same of the challenger.
        rows: symbol -> its latest prices.
        prices: symbol -> facts of them.
    """

    champions: dict[str, Served] = field(default_factory=dict)
    challengers: dict[str, Served] = field(default_factory=dict)
    by_symbol: dict[str, Served] = field(default_factory=dict)
    rivals: dict[str, Served] = field(default_factory=dict)
    latest: dict[str, Latest] = field(default_factory=dict)
    rival_latest: dict[str, Latest] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)
    prices: dict[str, PricesInfo] = field(default_factory=dict)
    refused: dict[str, Refusal] = field(default_factory=dict)
    model_marks: dict[str, Fingerprint] = field(default_factory=dict)
    price_marks: dict[str, Fingerprint] = field(default_factory=dict)

    def served(
        self,
        symbol: str,
        forecaster: str | msgspec.UnsetType = msgspec.UNSET,
        *,
        rival: bool = False,
    ) -> Served:
        """The version that answers for a symbol, or that of a forecaster for any symbol.

        Raises:
            ProblemError: there is none.
        """
        if forecaster is not msgspec.UNSET:
            return self._named(forecaster, symbol, rival=rival)
        found = (rival and self.rivals.get(symbol)) or self.by_symbol.get(symbol)
        if found is None:
            raise self._unknown(symbol)
        return found

    def _named(self, forecaster: str, symbol: str, *, rival: bool) -> Served:
        found = (rival and self.challengers.get(forecaster)) or self.champions.get(forecaster)
        if found is None:
            if not self.champions:
                raise problems.no_model()
            raise problems.unknown_model(forecaster, sorted(self.champions))
        if not _SYMBOL.fullmatch(symbol):
            raise problems.bad_symbol(symbol)
        return found

    def latest_of(self, symbol: str, *, rival: bool = False) -> Latest:
        """The forecast of a symbol from its latest prices.

        Raises:
            ProblemError: unknown symbol, no model, or no usable rows.
        """
        found = self.rival_latest.get(symbol) if rival else None
        if found is None or found.problem:
            found = self.latest.get(symbol)
        if found is not None and not found.problem:
            return found
        if symbol not in self.by_symbol:
            raise self._unknown(symbol)
        if found is not None and found.problem:
            raise found.problem
        refused = self.refused.get(f"prices {symbol}")
        reason = f"they were refused: {refused.reason}" if refused else "none were published yet."
        raise problems.no_prices(symbol, reason)

    def refused_since(self, before: "State") -> list[Refusal]:
        """What a worker refused itself (sync tells of its own) and had not refused before."""
        return [
            refusal
            for key, refusal in self.refused.items()
            if key.startswith(_OWN) and _said(refusal) != _said(before.refused.get(key))
        ]

    def versions_of(self, name: str) -> list[Served]:
        """The versions of a forecaster that can be asked, production first."""
        return [role[name] for role in (self.champions, self.challengers) if name in role]

    def _unknown(self, symbol: str) -> ProblemError:
        if not self.champions:
            return problems.no_model()
        return problems.unknown_symbol(symbol, sorted(self.by_symbol))

    def describe(self, traffic: Traffic) -> Models:
        """What is served and what was refused."""
        return Models(
            models=[_describe(self.champions[name]) for name in sorted(self.champions)],
            challengers=[_describe(self.challengers[name]) for name in sorted(self.challengers)],
            traffic=traffic,
            refused=[self.refused[key] for key in sorted(self.refused)],
            prices=[self.prices[symbol] for symbol in sorted(self.prices)],
        )


class Predictor:
    """Holds the one reference that requests read, and moves it.

    Attributes:
        state: what requests are answered from; read it once a request.
        models: those that are open.
    """

    def __init__(self, store: ModelStore, most_open: int, trusted_key: Path | None = None) -> None:
        self.state = State()
        self.models = OpenModels(most_open, trusted_key)
        self._store = store
        self._trusted_key = trusted_key
        self._lock = threading.Lock()
        self._generation: tuple[int, ...] = ()
        self._scan_after = 0.0

    def is_due(self) -> bool:
        """Whether `refresh` may find anything; costs one look at one file."""
        return self._store.generation() != self._generation or time.monotonic() >= self._scan_after

    def refresh(self) -> tuple[State, State, bool]:
        """Look at the model store and swap the state if it asks for another one.

        Loads, verifies and warms up before the swap; meant for a thread of its own.

        Returns:
            The state before, the state now (the same object if nothing changed), and whether all
            that the store asks for is done.
        """
        with self._lock:
            before, began = self.state, time.monotonic()
            generation = self._store.generation()
            slice_ = _Slice(self._store, self.models, before, self._trusted_key)
            self.state, done = slice_.next_state()
            served = (*self.state.champions.values(), *self.state.challengers.values())
            self.models.retain({each.key for each in served})  # the old ones were in use until now
            if done:
                now = time.monotonic()
                self._generation = generation
                self._scan_after = now + max(SCAN_SECONDS, (now - began) / SCAN_SHARE)
            return before, self.state, done


class _Slice:
    """One step from a state towards what the store asks for. Every dict is a copy of its own."""

    def __init__(
        self, store: ModelStore, models: OpenModels, state: State, trusted_key: Path | None
    ) -> None:
        self._store = store
        self._models = models
        self._trusted_key = trusted_key
        self._deadline = time.monotonic() + SLICE_SECONDS
        self._before = state
        self._champions = dict(state.champions)
        self._challengers = dict(state.challengers)
        self._rows = dict(state.rows)
        self._prices = dict(state.prices)
        self._refused = dict(state.refused)
        self._model_marks = dict(state.model_marks)
        self._price_marks = dict(state.price_marks)

    def next_state(self) -> tuple[State, bool]:
        """The next state (the one before if nothing changed), and whether it is all."""
        work = self._stores_work()
        for number, step in enumerate(work):
            if number and time.monotonic() > self._deadline:
                return self._state(), False
            step()
        state = self._state() if work else self._before
        forecasts = list(_stale(state))
        if not forecasts:
            return state, True
        latest = {True: dict(state.rival_latest), False: dict(state.latest)}
        done = True
        for number, (symbol, served, rival) in enumerate(forecasts):
            if number and time.monotonic() > self._deadline:
                done = False
                break
            facts = state.prices[symbol], state.rows[symbol]
            latest[rival][symbol] = _forecast_latest(self._models, served, *facts)
        return replace(state, latest=latest[False], rival_latest=latest[True]), done

    def _stores_work(self) -> list[Callable[[], None]]:
        """What has to be read, because its files changed."""
        steps: list[Callable[[], None]] = []
        for name in self._store.forecasters():
            mark = self._store.model_fingerprint(name)
            if mark != self._model_marks.get(name):
                steps.append(partial(self._take_model, name, mark))
        for symbol, mark in self._store.price_files().items():
            if mark != self._price_marks.get(symbol):
                steps.append(partial(self._take_prices, symbol, mark))
        return steps

    def _take_model(self, name: str, mark: Fingerprint) -> None:
        self._model_marks[name] = mark
        for key in [key for key, each in self._refused.items() if _is_model(key, each, name)]:
            del self._refused[key]
        for alias, noted in self._store.refusals(name).items():
            self._refused[f"sync {name} {alias}"] = Refusal(
                name, noted.version, noted.reason, noted.refused_at, alias
            )
        self._take_champion(name)
        self._take_challenger(name)

    def _take_champion(self, name: str) -> None:
        version: int | None = None
        try:
            current = self._store.current(name)
            if current is None:
                return
            version = current.version
            self._take(name, version, self._champions)
        except _TROUBLE as error:
            self._refuse("model", name, version, error)
            if name not in self._champions:
                self._fall_back(name)

    def _take_challenger(self, name: str) -> None:
        version: int | None = None
        try:
            version = self._store.challenger(name)
            if version is None or version == _version(self._champions.get(name)):
                self._challengers.pop(name, None)
            else:
                self._take(name, version, self._challengers)
        except _TROUBLE as error:
            self._refuse("challenger", name, version, error)

    def _take(self, name: str, version: int, role: dict[str, Served]) -> None:
        """Verify a version and take it up, unless it is the one that is served.

        Raises:
            ContractError: it is not what it says.
        """
        folder = self._store.version_folder(name, version)
        forecaster = check(folder, name, version, self._trusted_key)
        contract, served = forecaster.contract, role.get(name)
        if served is None or (served.version, served.contract) != (version, contract):
            served = role[name] = Served(contract, version, folder, datetime.now(UTC))
        self._models.put(served, forecaster)

    def _fall_back(self, name: str) -> None:
        """After a restart with a damaged current version: the last one that was good."""
        for version in self._store.fallbacks(name):
            with suppress(*_TROUBLE):
                self._take(name, version, self._champions)
                return

    def _take_prices(self, symbol: str, mark: Fingerprint) -> None:
        self._price_marks[symbol] = mark
        self._refused.pop(f"prices {symbol}", None)
        try:
            snapshot = self._store.snapshot(symbol)
        except _TROUBLE as error:
            self._refuse("prices", symbol, None, error)
            return
        self._rows[symbol] = _rows(snapshot)
        self._prices[symbol] = PricesInfo(
            symbol, snapshot.as_of, snapshot.dataset_md5, len(snapshot.dates)
        )

    def _refuse(self, what: str, name: str, version: int | None, error: Exception) -> None:
        alias = CHALLENGER if what == "challenger" else PRODUCTION
        moment = datetime.now(UTC)
        self._refused[f"{what} {name}"] = Refusal(name, version, str(error), moment, alias)

    def _state(self) -> State:
        by_symbol = _by_symbol(self._champions)
        rivals = {
            symbol: rival
            for symbol, served in by_symbol.items()
            if (rival := self._challengers.get(served.contract.forecaster))
            and symbol in rival.contract.symbols
        }
        before = self._before
        return State(
            champions=self._champions,
            challengers=self._challengers,
            by_symbol=by_symbol,
            rivals=rivals,
            latest={name: each for name, each in before.latest.items() if name in by_symbol},
            rival_latest={
                name: each for name, each in before.rival_latest.items() if name in rivals
            },
            rows=self._rows,
            prices=self._prices,
            refused=self._refused,
            model_marks=self._model_marks,
            price_marks=self._price_marks,
        )


def _said(refusal: Refusal | None) -> tuple[int | None, str] | None:
    return (refusal.version, refusal.reason) if refusal else None


def _is_model(key: str, refusal: Refusal, name: str) -> bool:
    return refusal.name == name and not key.startswith("prices ")


def _version(served: Served | None) -> int | None:
    return served.version if served else None


def _by_symbol(champions: dict[str, Served]) -> dict[str, Served]:
    """Symbol -> version; of two, that with fewer symbols, then the first by name."""
    worst_first = sorted(champions.values(), key=_rank, reverse=True)
    return {symbol: served for served in worst_first for symbol in served.contract.symbols}


def _rank(served: Served) -> tuple[int, str]:
    return len(served.contract.symbols), served.contract.forecaster


def _rows(snapshot: Snapshot) -> Rows:
    days = np.array([day.toordinal() for day in snapshot.dates], dtype=np.int64)
    return Rows(snapshot.symbol, days - EPOCH_ORDINAL, np.array(snapshot.ohlcv, dtype=np.float64))


def _stale(state: State) -> Iterator[tuple[str, Served, bool]]:
    """Forecasts that have to be made: whose version or prices are not those of the last one."""
    for rival, role, latest in (
        (False, state.by_symbol, state.latest),
        (True, state.rivals, state.rival_latest),
    ):
        for symbol, rows in state.rows.items():
            served, known = role.get(symbol), latest.get(symbol)
            if served and not (known and known.served is served and known.rows is rows):
                yield symbol, served, rival


def _forecast_latest(models: OpenModels, served: Served, info: PricesInfo, rows: Rows) -> Latest:
    contract = served.contract
    try:
        tensors = fit([rows], contract, len(rows.days))
        quantiles = models.open(served).predict(*tensors)
    except (ProblemError, ModelError, *_TROUBLE) as error:
        return Latest(served, rows, problem=problems.no_prices(info.symbol, str(error)))
    (window,) = windows_of_rows([rows], contract, "get", info.dataset_md5)
    window = msgspec.structs.replace(window, id=_identity(served, info, window))
    whole, (found,) = numbers(quantiles, contract.quantile_levels)
    answer = forecast(window, contract, served.version, found)
    return Latest(
        served,
        rows,
        body=body_of(msgspec.structs.replace(answer, as_of=info.as_of)),
        window=window,
        quantiles=whole,
        answered=Answered(contract.forecaster, served.version, info.symbol, window.origin),
    )


def _identity(served: Served, info: PricesInfo, window: Window) -> str:
    """The same in every worker, so that one forecast is one record of the log."""
    contract = served.contract
    parts = (contract.forecaster, served.version, contract.run_id, info.symbol, window.origin)
    return str(uuid5(NAMESPACE_OID, " ".join(map(str, (*parts, info.as_of, info.dataset_md5)))))


def _describe(served: Served) -> ModelInfo:
    contract = served.contract
    return ModelInfo(
        forecaster=contract.forecaster,
        version=served.version,
        loaded_at=served.loaded_at,
        kind=contract.kind,
        symbols=contract.symbols,
        context=contract.context,
        horizon=contract.horizon,
        columns=contract.columns,
        levels=contract.quantile_levels,
        as_of=contract.as_of,
        train_start=contract.train_start,
        train_end=contract.train_end,
        dataset_md5=contract.dataset_md5,
        dataset_rev=contract.dataset_rev,
        run_id=contract.run_id,
        git_commit=contract.git_commit,
    )
