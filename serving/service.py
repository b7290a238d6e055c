"""Answers to questions, whatever protocol asks: what is served, who answers, what is logged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from forecasting.contract import Contract
from forecasting.errors import ConfigError, ContractError, ModelError, ServiceError
from forecasting.inference import Forecaster
from forecasting.predictions import Source, Spool
from forecasting.settings import Settings
from serving import problems
from serving.answers import Numbers, forecast, windows_of_rows, windows_of_tensors
from serving.batcher import Batcher, Computed, Observe
from serving.intake import check_tensors, fit
from serving.open_models import Served
from serving.predictor import Latest, Predictor, State
from serving.queries import Prepared, Query, Requests
from serving.schemas import Forecast, ForecastRequest, Models
from serving.shadow import Shadow
from serving.traffic import TrafficSwitch
from serving.windows import Rows, Tensors


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one request may ask for."""

    windows: int
    rows: int


class Service:
    """One worker's forecasts.

    Args:
        observe: see `Batcher`.
        is_busy: whether the worker has no time for the challenger's shadow.
    """

    def __init__(
        self,
        settings: Settings,
        predictor: Predictor,
        spool: Spool,
        traffic: TrafficSwitch,
        observe: Observe,
        is_busy: Callable[[], bool],
    ) -> None:
        self.predictor = predictor
        self.batcher = Batcher(spool, observe)
        self.shadow = Shadow(spool, predictor.models, is_busy)
        self.traffic = traffic
        self._spool = spool
        self._limits = Limits(settings.max_windows, settings.max_rows)

    @property
    def state(self) -> State:
        """What is served now."""
        return self.predictor.state

    def describe(self) -> Models:
        """What is served and what was refused."""
        return self.state.describe(self.traffic.traffic)

    def latest(self, symbol: str, client: str) -> Latest:
        """The forecast of a symbol from its latest prices, logged once, and counted each time.

        Raises:
            ProblemError: unknown symbol, no model, no usable rows, or no log to write.
        """
        state = self.state
        found = state.latest_of(symbol, rival=self.traffic.is_canary(client))
        rival = state.rival_latest.get(symbol)
        try:
            found.write(self._spool, "canary" if found is rival else "get")
        except ServiceError as error:
            raise problems.log_unavailable(error) from error
        if found.answered is not None:
            self._spool.count(found.answered)
        if rival is not None and rival is not found and "shadow" not in rival.logged:
            self.shadow.offer_latest(rival, self.traffic.traffic.shadow_share)
        return found

    async def forecast_one(self, request: ForecastRequest, client: str) -> Forecast:
        """As `forecast`, without what several windows need: this is what most requests ask.

        Raises:
            ProblemError: the window is not usable, or nothing answers for its symbol.
        """
        state = self.state
        served = state.served(
            request.symbol, request.forecaster, rival=self.traffic.is_canary(client)
        )
        load = Requests((request,), _source(state, served), self._limits.rows)
        found = await self._computed(state, Query(served, await self._opened(served), load))
        return forecast(found.windows[0], served.contract, served.version, found.numbers[0])

    async def forecast(
        self, windows: Sequence[ForecastRequest | Rows], client: str
    ) -> list[Forecast]:
        """Forecasts from rows of any symbols, in their order; all from one state.

        Args:
            windows: decoded from JSON, or rows as arrays.
            client: by which a canary is chosen.

        Raises:
            ProblemError: a window is not usable, or nothing answers for its symbol.
        """
        self._check_count(len(windows))
        state, canary = self.state, self.traffic.is_canary(client)
        groups: dict[Served, list[int]] = {}
        for place, window in enumerate(windows):
            served = state.served(window.symbol, window.forecaster, rival=canary)
            groups.setdefault(served, []).append(place)
        answers: dict[int, Forecast] = {}
        for served, places in groups.items():
            made = await self._forecast(state, served, [windows[place] for place in places])
            answers.update(zip(places, made, strict=True))
        return [answers[place] for place in range(len(windows))]

    async def _forecast(
        self, state: State, served: Served, windows: Sequence[ForecastRequest | Rows]
    ) -> list[Forecast]:
        load = self._load(windows, served.contract, _source(state, served))
        found = await self._computed(state, Query(served, await self._opened(served), load))
        return [
            forecast(window, served.contract, served.version, item)
            for window, item in zip(found.windows, found.numbers, strict=True)
        ]

    def _load(
        self, windows: Sequence[ForecastRequest | Rows], contract: Contract, source: Source
    ) -> Prepared | Requests:
        requests = [each for each in windows if isinstance(each, ForecastRequest)]
        if requests:
            return Requests(requests, source, self._limits.rows)
        rows = [each for each in windows if isinstance(each, Rows)]
        return Prepared(
            fit(rows, contract, self._limits.rows), windows_of_rows(rows, contract, source)
        )

    async def forecast_tensors(self, served: Served, tensors: Tensors) -> list[Numbers]:
        """Quantiles of windows that came in the shape of the graph.

        Raises:
            ProblemError: a window is not usable.
        """
        self._check_count(len(tensors.symbol))
        state = self.state
        check_tensors(tensors, served.contract)
        source = _source(state, served)
        load = Prepared(tensors, windows_of_tensors(tensors, served.contract, source))
        found = await self._computed(state, Query(served, await self._opened(served), load))
        return found.numbers

    def _check_count(self, count: int) -> None:
        if not 1 <= count <= self._limits.windows:
            raise problems.window_count(self._limits.windows, count)

    async def _opened(self, served: Served) -> Forecaster:
        found = self.predictor.models.get(served)
        if found is not None:
            return found
        try:
            return await self.predictor.models.opened(served)
        except (ContractError, ConfigError, OSError) as error:
            raise problems.not_open(served.contract.forecaster, error) from error

    async def _computed(self, state: State, query: Query) -> Computed:
        try:
            self._spool.check()
            found = await self.batcher.submit(query)
        except ModelError as error:
            raise problems.no_forecast(error) from error
        except ServiceError as error:
            raise problems.log_unavailable(error) from error
        share = self.traffic.traffic.shadow_share
        if share:
            rival = state.challengers.get(query.served.contract.forecaster)
            if rival is not None and rival is not query.served:
                self.shadow.offer(query.served, found, rival, share)
        return found


def _source(state: State, served: Served) -> Source:
    is_champion = state.champions.get(served.contract.forecaster) is served
    return "post" if is_champion else "canary"


def settled(forecasts: Sequence[Forecast]) -> list[Forecast]:
    """Forecasts with plain numbers in the place of JSON, for protocols that write their own."""
    return msgspec.json.decode(msgspec.json.encode(forecasts), type=list[Forecast])
