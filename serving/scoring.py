"""MLflow's scoring protocol, `POST /invocations`, which SageMaker's containers speak too.

The same bodies that `mlflow models serve` takes for these models (`inputs` and `instances`: the
graph's tensors), and tables of prices (`dataframe_split`, `dataframe_records`, CSV), which make one
window a symbol. https://mlflow.org/docs/latest/ml/deployment/deploy-model-locally/
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date
from email.message import Message
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from forecasting.contract import COLUMNS, Contract
from serving import oip, problems
from serving.intake import EPOCH_ORDINAL
from serving.oip import cut
from serving.problems import ProblemError
from serving.schemas import Forecast
from serving.windows import Rows, Tensors

FORMATS = ("dataframe_split", "dataframe_records", "instances", "inputs")
TENSORS = ("ohlcv", "dates", "symbol")
NEEDED = ("date", *COLUMNS)
TABLE_COLUMNS = ("symbol", *NEEDED)
Kind = Literal["json", "csv"]
MEDIA_TYPES: dict[str, Kind] = {"application/json": "json", "text/csv": "csv"}

CSV = "CSV"
FIRST_DAY, LAST_DAY = 1 - EPOCH_ORDINAL, date.max.toordinal() - EPOCH_ORDINAL
"""0001-01-01 and 9999-12-31 as days since 1970: what Python's dates know."""
_DAY_MS = 86_400_000
_UNITS = ((10**17, 1_000_000 * _DAY_MS), (10**14, 1_000 * _DAY_MS), (0, _DAY_MS))
"""From which size on integers are nanoseconds, microseconds, milliseconds; and their day."""
_MIDNIGHT = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[T ]00:00(?::00(?:\.0{1,9})?)?(?:Z|[+-][0-9]{2}:?[0-9]{2})?)?"
)


class Arrays(NamedTuple):
    """Tensors as they came, before a contract is known; `tensors` checks them against one.

    Attributes:
        ohlcv: float32 [windows, rows, columns].
        dates: days since 1970-01-01, int64 [windows, rows].
        symbol: indices int64 [windows], or names; None where none were sent.
    """

    ohlcv: NDArray[np.float32]
    dates: NDArray[np.int64]
    symbol: NDArray[np.int64] | list[str] | None


def invalid(field: str, detail: str) -> ProblemError:
    """422: a body of another shape."""
    return ProblemError("invalid-request", 422, "Invalid request", f"`{field}`: {detail}")


# requests ---------------------------------------------------------------------------------------


def media_kind(content_type: str | None) -> Kind:
    """What a Content-Type header says the body is; JSON where there is none.

    Raises:
        ProblemError: 415, another media type or another charset than UTF-8.
    """
    header = Message()
    header["content-type"] = (content_type or "application/json").replace("\n", " ")
    charset = str(header.get_param("charset", "utf-8")).lower()
    kind = MEDIA_TYPES.get(header.get_content_type())
    if kind is None or charset not in ("utf-8", "utf8"):
        expected = f"{' or '.join(MEDIA_TYPES)}, in UTF-8,"
        raise problems.unsupported_media_type((content_type or "")[:60], expected)
    return kind


def parse(body: bytes, content_type: str | None, symbol: str | None = None) -> Arrays | list[Rows]:
    """Decode a scoring request.

    Args:
        body: of the media type that `content_type` names.
        content_type: the request's header.
        symbol: whose rows a table without a symbol column holds, where only one can be meant.

    Returns:
        Tensors for `inputs` and `instances`; for tables one window a symbol, in order of first
        appearance, rows in the order sent.

    Raises:
        ProblemError: 415, another media type; 400, no JSON; 422, of another shape.
    """
    if media_kind(content_type) == "csv":
        return _from_csv(body, symbol)
    form, data = _unwrap(body)
    if form == "inputs":
        return _from_inputs(data)
    if form == "instances":
        return _from_instances(data)
    return _from_split(data, symbol) if form == "dataframe_split" else _from_records(data, symbol)


def tensors(arrays: Arrays, contract: Contract) -> Tensors:
    """The inputs of a contract's graph.

    Raises:
        ProblemError: 400, a shape or a symbol that the contract has not.
    """
    return oip.shaped(arrays.ohlcv, arrays.dates, arrays.symbol, contract)


def _unwrap(body: bytes) -> tuple[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise oip.malformed_json(error, "A JSON object") from error
    if not isinstance(document, dict):
        raise invalid("body", f"an object with one of {', '.join(FORMATS)} was expected.")
    if document.pop("params", None) not in (None, {}):
        raise invalid("params", "these models have no parameters; leave it out.")
    if len(document) != 1 or (form := next(iter(document))) not in FORMATS:
        names = ", ".join(cut(name) for name in list(document)[:5])
        raise invalid(
            "body", f"exactly one of {', '.join(FORMATS)} was expected; got {names or 'none'}."
        )
    return form, document[form]


# tensors


def _from_inputs(data: object) -> Arrays:
    if not isinstance(data, dict):
        raise invalid("inputs", f"an object of tensors {', '.join(TENSORS)} was expected.")
    _check_tensor_names("inputs", data)
    symbol = data.get("symbol")
    return Arrays(
        _numbers("ohlcv", data["ohlcv"], 3, "<f8"),
        _numbers("dates", data["dates"], 2, "<i8"),
        None if symbol is None else _symbols(symbol),
    )


def _from_instances(data: object) -> Arrays:
    if not isinstance(data, list) or not data or set(map(type, data)) != {dict}:
        raise invalid(
            "instances", f"a list of objects with {', '.join(TENSORS)} was expected, at least one."
        )
    for place, instance in enumerate(data):
        _check_tensor_names(f"instances[{place}]", instance)
        if ("symbol" in instance) != ("symbol" in data[0]):
            raise invalid(f"instances[{place}]", "`symbol` was expected in all of them or none.")
    names = [name for name in TENSORS if name in data[0]]
    return _from_inputs({name: [instance[name] for instance in data] for name in names})


def _check_tensor_names(field: str, given: dict[str, Any]) -> None:
    unknown = [name for name in given if name not in TENSORS]
    missing = [name for name in TENSORS[:2] if name not in given]
    if unknown or missing:
        raise invalid(
            field,
            f"{', '.join(TENSORS)} were expected (symbol may be left out where there is only "
            f"one); {_difference(unknown, missing)}.",
        )


def _numbers(name: str, data: object, rank: int, wire: str) -> NDArray[Any]:
    """A nested JSON tensor in the shape that its first entries have."""
    shape: list[int] = []
    first = data
    for _ in range(rank):
        if not isinstance(first, list) or not first:
            raise oip.invalid_tensor(
                name, f"arrays nested {rank} deep, none empty, were expected; got {cut(first)}."
            )
        shape.append(len(first))
        first = first[0]
    return oip.numbers(name, oip.flatten(name, data, shape), wire).reshape(shape)


def _symbols(data: object) -> NDArray[np.int64] | list[str]:
    if isinstance(data, list) and data and isinstance(data[0], str):
        return oip.strings("symbol", data)
    return _numbers("symbol", data, 1, "<i8")


# tables


def _from_split(data: object, symbol: str | None) -> list[Rows]:
    try:
        split = msgspec.convert(data, _Split)
    except msgspec.ValidationError as error:
        raise invalid(
            "dataframe_split", f"{str(error)[:200]}. `columns` and `data` were expected."
        ) from error
    return _table("dataframe_split", split.columns, split.data, symbol)


class _Split(msgspec.Struct, forbid_unknown_fields=True):
    columns: list[str]
    data: list[list[Any]]
    index: list[Any] = []


def _from_records(data: object, symbol: str | None) -> list[Rows]:
    field = "dataframe_records"
    if not isinstance(data, list) or not data or set(map(type, data)) != {dict}:
        raise invalid(field, "a list of objects was expected, one a row, at least one.")
    columns = list(data[0])
    _check_columns(field, columns, symbol)
    for place, record in enumerate(data):
        if record.keys() != data[0].keys():
            unknown = [name for name in record if name not in data[0]]
            missing = [name for name in columns if name not in record]
            raise invalid(
                f"{field}[{place}]",
                f"the columns of the first row were expected; {_difference(unknown, missing)}.",
            )
    return _columns(field, {name: [row[name] for row in data] for name in columns}, symbol)


def _from_csv(body: bytes, symbol: str | None) -> list[Rows]:
    """A table with a header line, as `DataFrame.to_csv` writes it, with or without the index."""
    lines: list[list[str]] = []
    try:
        text = io.StringIO(body.decode("utf-8-sig"), newline="")
        for line in filter(None, csv.reader(text, strict=True)):
            lines.append(line)
            if len(line) != len(lines[0]):  # before the rest is read
                raise _uneven(CSV, len(lines) - 2, len(lines[0]), len(line))
    except (UnicodeDecodeError, csv.Error) as error:
        raise invalid(CSV, f"UTF-8 text with commas was expected: {error}.") from error
    header, *rows = lines or [[]]
    if header[:1] == [""]:
        header, rows = header[1:], [row[1:] for row in rows]
    return _table(CSV, header, rows, symbol)


def _table(field: str, columns: list[str], rows: list[list[Any]], symbol: str | None) -> list[Rows]:
    _check_columns(field, columns, symbol)
    if not rows:
        raise invalid(field, "at least one row was expected; got none.")
    for place, row in enumerate(rows):
        if len(row) != len(columns):
            raise _uneven(field, place, len(columns), len(row))
    return _columns(
        field,
        dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)),
        symbol,
    )


def _uneven(field: str, place: int, expected: int, got: int) -> ProblemError:
    return invalid(field, f"row {place}: {expected} values were expected, one a column; got {got}.")


def _check_columns(field: str, columns: Sequence[str], symbol: str | None) -> None:
    needed = TABLE_COLUMNS if symbol is None else NEEDED
    unknown = [name for name in columns if name not in TABLE_COLUMNS]
    missing = [name for name in needed if name not in columns]
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if unknown or missing or twice:
        raise invalid(
            field,
            f"columns {', '.join(TABLE_COLUMNS)} were expected; "
            f"{_difference(unknown, missing, twice)}. Rename or drop columns (an index of dates "
            "becomes one by `reset_index`).",
        )


def _difference(unknown: Sequence[str], missing: Sequence[str], twice: Sequence[str] = ()) -> str:
    parts = [
        f"{what} {', '.join(cut(name) for name in names[:5])}"
        for what, names in (("unknown:", unknown), ("missing:", missing), ("twice:", twice))
        if names
    ]
    return "; ".join(parts)


def _columns(field: str, columns: dict[str, list[Any]], symbol: str | None) -> list[Rows]:
    days = _days(field, columns["date"])
    text = field == CSV
    ohlcv = np.stack([_prices(field, name, columns[name], text) for name in COLUMNS], axis=1)
    symbols = columns.get("symbol")
    if symbols is None:
        return [Rows(str(symbol), days, ohlcv)]
    if set(map(type, symbols)) != {str} or "" in symbols:
        place = next(i for i, name in enumerate(symbols) if type(name) is not str or not name)
        name = symbols[place]
        raise invalid(field, f"row {place}: a symbol was expected in text; got {cut(name)}.")
    return windows(symbols, days, ohlcv)


def _prices(field: str, name: str, values: list[Any], text: bool) -> NDArray[np.float64]:
    try:
        numbers = _parsed(values) if text else msgspec.convert(values, list[float])
    except (ValueError, msgspec.ValidationError) as error:
        place = next(place for place, value in enumerate(values) if not _is_number(value, text))
        raise invalid(
            field, f"row {place}, column {name}: a number was expected; got {cut(values[place])}."
        ) from error
    return np.array(numbers, dtype=np.float64)


def _parsed(texts: list[str]) -> list[float]:
    if "_" in ",".join(texts):
        raise ValueError("Python would read 1_0 as 10")
    return list(map(float, texts))


def _is_number(value: object, text: bool) -> bool:
    if not text:
        return type(value) in (int, float)
    try:
        _parsed([str(value)])
    except ValueError:
        return False
    return True


def _days(field: str, values: list[Any]) -> NDArray[np.int64]:
    """Days since 1970 of a date column: all ISO dates, or all integers as pandas writes them."""
    kinds = set(map(type, values))
    if kinds == {str}:
        days = {text: iso_day(text) for text in set(values)}
        found = [days[text] for text in values]
        if None in found:
            raise _bad_date(field, found.index(None), values[found.index(None)])
        return np.array(found, dtype=np.int64)
    if kinds == {int}:
        return _epoch_days(field, values)
    kind = int if type(values[0]) is int else str
    place = next(i for i, value in enumerate(values) if type(value) is not kind)
    raise _bad_date(field, place, values[place])


def iso_day(text: str) -> int | None:
    """Days since 1970 of YYYY-MM-DD, with or without a time of midnight; None for anything else."""
    found = _MIDNIGHT.fullmatch(text)
    try:
        return date.fromisoformat(found[1]).toordinal() - EPOCH_ORDINAL if found else None
    except ValueError:
        return None


def _epoch_days(field: str, values: list[int]) -> NDArray[np.int64]:
    largest = max(map(abs, values))
    day = next(day for size, day in _UNITS if largest >= size)
    for place, value in enumerate(values):
        if value % day or not FIRST_DAY <= value // day <= LAST_DAY:
            raise _bad_date(field, place, value)
    return np.array([value // day for value in values], dtype=np.int64)


def _bad_date(field: str, place: int, value: object) -> ProblemError:
    return invalid(
        field,
        f"row {place}, column date: a day was expected, as YYYY-MM-DD, with or without a time of "
        "midnight, or as the milliseconds or nanoseconds since 1970 of midnight UTC, the same "
        f"way in every row; got {cut(value)}.",
    )


def windows(
    symbols: Iterable[str], days: NDArray[np.int64], ohlcv: NDArray[np.float64]
) -> list[Rows]:
    """Split a long table into one window a symbol, in order of first appearance.

    Args:
        symbols: one a row.
        days: int64 [rows].
        ohlcv: float64 [rows, 5].
    """
    places: dict[str, int] = {}
    codes = np.array([places.setdefault(name, len(places)) for name in symbols], dtype=np.int64)
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(1, len(places)))
    return [
        Rows(name, days[rows], ohlcv[rows])
        for name, rows in zip(places, np.split(order, starts), strict=True)
    ]


# answers ----------------------------------------------------------------------------------------


def render_tensors(quantiles: NDArray[np.float32]) -> bytes:
    """What `mlflow models serve` answers for these models: the same numbers, to the last digit.

    Args:
        quantiles: float32 [windows, horizon, levels].
    """
    values = np.ascontiguousarray(quantiles, dtype=np.float64)
    return orjson.dumps({"predictions": {oip.OUTPUT: values}}, option=orjson.OPT_SERIALIZE_NUMPY)


def render_rows(forecasts: Sequence[Forecast]) -> bytes:
    """The answer to a table: one record a symbol and horizon, one column a quantile level."""
    return msgspec.json.encode(
        {"predictions": [record for item in forecasts for record in _records(item)]}
    )


def _records(forecast: Forecast) -> Iterable[dict[str, Any]]:
    names = [f"q{level:g}" for level in forecast.levels]
    for step in forecast.forecast:
        yield {
            "symbol": forecast.symbol,
            "origin": forecast.origin,
            "horizon": step.horizon,
            "target": step.target,
            "median": step.median,
            **dict(zip(names, step.quantiles, strict=True)),
        }
