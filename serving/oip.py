"""The Open Inference Protocol (KServe v2) over HTTP, with its binary tensor data extension.

Bodies become arrays here, and arrays become bodies; what a name, a shape or a datatype must be is
checked, what a price must be is not. The protocol's pages:
https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
and, for tensors that follow the JSON header as raw little-endian bytes,
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from forecasting.contract import Contract
from serving.problems import ProblemError
from serving.windows import Tensors

SERVER_NAME = "perennial"
EXTENSIONS = ("binary_tensor_data",)
PLATFORM = "onnx_onnxv1"
HEADER_LENGTH = "Inference-Header-Content-Length"
OUTPUT = "quantiles"

InputName = Literal["ohlcv", "dates", "symbol"]
Strings = list[str]
_WIRE = {
    "ohlcv": {"FP32": "<f4", "FP64": "<f8"},
    "dates": {"INT64": "<i8", "INT32": "<i4"},
    "symbol": {"INT64": "<i8", "INT32": "<i4", "BYTES": ""},
}
"""Datatypes of each input, and how numpy calls their bytes on the wire."""
_RANK = {"ohlcv": 3, "dates": 2, "symbol": 1}
_LARGEST = 2**31
_SHOWN = 5
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60


class InferInput(msgspec.Struct, frozen=True):
    """One input tensor, whichever way it came.

    Attributes:
        name: which input of the graph.
        datatype: as the client named it.
        values: in the tensor's shape: `ohlcv` float32 (infinite where float32 ends), `dates` and
            `symbol` int64; the names of a BYTES `symbol`.
    """

    name: str
    datatype: str
    values: NDArray[Any] | Strings


class InferOutput(msgspec.Struct, frozen=True):
    """One requested output; `binary` wants raw bytes after the JSON header."""

    name: str
    binary: bool


class InferRequest(msgspec.Struct, frozen=True):
    """An inference request: input tensors by name, and the outputs to answer with, at least one."""

    id: str
    inputs: dict[str, InferInput]
    outputs: tuple[InferOutput, ...]


class TensorMetadata(msgspec.Struct, frozen=True):
    """Name, datatype and shape of a tensor; -1 is any number of windows."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelMetadata(msgspec.Struct, frozen=True):
    """What `GET v2/models/{name}` answers."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


class ServerMetadata(msgspec.Struct, frozen=True):
    """What `GET v2` answers."""

    name: str
    version: str
    extensions: tuple[str, ...]


class _WireTensor(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: Any = None


class _WireOutput(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    parameters: dict[str, Any] = {}


class _WireRequest(msgspec.Struct, forbid_unknown_fields=True):
    inputs: list[_WireTensor]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[_WireOutput] = []


def invalid_tensor(name: str, detail: str) -> ProblemError:
    """400: a tensor that is not what the model takes."""
    return ProblemError("invalid-tensor", 400, "Invalid tensor", f"Tensor {cut(name)}: {detail}")


def invalid_request(detail: str) -> ProblemError:
    """400: not a request of the protocol."""
    return ProblemError("invalid-infer-request", 400, "Invalid inference request", detail)


def malformed_json(error: Exception, expected: str) -> ProblemError:
    """400: the body, or its header, is no JSON."""
    return ProblemError(
        "malformed-json",
        400,
        "Malformed JSON",
        f"{expected} was expected; it cannot be parsed: {error}. NaN and infinities are no JSON.",
    )


def cut(value: object) -> str:
    """A client's value in an error text, which stays short."""
    return _REPR.repr(value)


# requests ---------------------------------------------------------------------------------------


def parse(body: bytes, header_length: int | None) -> InferRequest:
    """Decode an inference request.

    Args:
        body: the JSON request, followed by the raw bytes of its binary tensors if it has any.
        header_length: bytes of the JSON, from the header `Inference-Header-Content-Length`;
            without that header the whole body is JSON.

    Raises:
        ProblemError: 400, not a request of the protocol, or a tensor that no model here takes.
    """
    header, raw = _split(body, header_length)
    request = _decode(header)
    _check_names("input", [tensor.name for tensor in request.inputs], tuple(_RANK))
    _check_names("output", [output.name for output in request.outputs], (OUTPUT,))
    inputs, at = {}, 0
    for tensor in request.inputs:
        size = _binary_size(tensor, header_length is not None, len(raw) - at)
        inputs[tensor.name] = _input(tensor, None if size is None else raw[at : at + size])
        at += size or 0
    if at != len(raw):
        raise invalid_request(
            f"{at} bytes of binary tensors were expected after the JSON header, the sum of every "
            f"binary_data_size; got {len(raw)}. Check {HEADER_LENGTH} and the sizes."
        )
    return InferRequest(request.id, inputs, _outputs(request))


def tensors(request: InferRequest, contract: Contract) -> Tensors:
    """The inputs of a contract's graph; values are not looked at, but for the symbols.

    Raises:
        ProblemError: 400, an input is missing or has a shape or symbol the contract has not.
    """
    missing = [name for name in ("ohlcv", "dates") if name not in request.inputs]
    if missing:
        raise invalid_request(
            f"Inputs ohlcv, dates and (with more than one symbol) symbol were expected; "
            f"{' and '.join(missing)} is missing. Send them in `inputs`."
        )
    values = {name: item.values for name, item in request.inputs.items()}
    return shaped(values["ohlcv"], values["dates"], values.get("symbol"), contract)


def shaped(
    ohlcv: NDArray[Any] | Strings,
    dates: NDArray[Any] | Strings,
    symbol: NDArray[Any] | Strings | None,
    contract: Contract,
) -> Tensors:
    """Check arrays against a contract.

    Args:
        ohlcv: float32 [windows, context, columns].
        dates: int64 [windows, context].
        symbol: int64 [windows] or that many names; None if the contract has one symbol.
        contract: what the graph takes.

    Raises:
        ProblemError: 400, naming the tensor, the expected shape or symbols, and what came.
    """
    prices, days = np.asarray(ohlcv), np.asarray(dates)
    rows, columns = contract.context, len(contract.columns)
    if prices.ndim != 3 or prices.shape[1:] != (rows, columns) or not len(prices):
        raise invalid_tensor(
            "ohlcv",
            f"shape [windows, {rows}, {columns}] was expected, at least one window, columns "
            f"{', '.join(contract.columns)}; got {list(prices.shape)}. Send the last {rows} rows "
            "of each window.",
        )
    windows = len(prices)
    if days.shape != (windows, rows):
        raise invalid_tensor(
            "dates",
            f"shape {[windows, rows]} was expected, as many windows and rows as ohlcv; got "
            f"{list(days.shape)}. Send the days since 1970-01-01 of each row.",
        )
    return Tensors(prices, days, _symbol_indices(symbol, windows, contract))


def _split(body: bytes, header_length: int | None) -> tuple[memoryview, memoryview]:
    view = memoryview(body)
    if header_length is None:
        return view, view[:0]
    if not 0 < header_length <= len(body):
        raise invalid_request(
            f"{HEADER_LENGTH} should be the length of the JSON header, between 1 and the body's "
            f"{len(body)} bytes; got {cut(header_length)}. Send the length that your client "
            "library reports, or leave the header out when all tensors are JSON."
        )
    return view[:header_length], view[header_length:]


def _decode(header: memoryview) -> _WireRequest:
    try:
        return msgspec.convert(orjson.loads(header), _WireRequest)
    except orjson.JSONDecodeError as error:
        raise malformed_json(error, "The JSON of an inference request") from error
    except msgspec.ValidationError as error:
        raise invalid_request(
            f"{str(error)[:200]}. An object with `inputs`, and if need be `id`, `parameters` "
            "and `outputs`, was expected; each input has `name`, `shape`, `datatype`, and `data` "
            "or the parameter `binary_data_size`."
        ) from error


def _check_names(kind: str, names: list[str], known: tuple[str, ...]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise invalid_tensor(
            unknown[0],
            f"there is no {kind} of that name; {kind}s are {', '.join(known)}. GET "
            "v2/models/{name} describes them.",
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise invalid_tensor(twice[0], f"the {kind} comes more than once; send it once.")


def _binary_size(tensor: _WireTensor, has_header: bool, left: int) -> int | None:
    """Bytes of a binary tensor, which are there; None for a tensor in JSON."""
    for name in tensor.parameters:
        if name.startswith("shared_memory"):
            raise invalid_tensor(
                tensor.name, f"{cut(name)}: there is no shared memory. Send data or raw bytes."
            )
    size = tensor.parameters.get("binary_data_size")
    if (size is None) == (tensor.data is None):
        raise invalid_tensor(
            tensor.name,
            "either `data` or the parameter `binary_data_size` was expected; got "
            f"{'neither' if size is None else 'both'}.",
        )
    if size is None:
        return None
    if type(size) is not int or size < 0 or size > left or not has_header:
        raise invalid_tensor(
            tensor.name,
            f"binary_data_size {cut(size)} was announced; {left} bytes are left after the JSON "
            f"header. Binary tensors follow it in the order of `inputs`, and {HEADER_LENGTH} "
            f"says where it ends{'' if has_header else ', which is missing'}.",
        )
    return size


def _input(tensor: _WireTensor, raw: memoryview | None) -> InferInput:
    wire = _WIRE[tensor.name].get(tensor.datatype)
    if wire is None:
        raise invalid_tensor(
            tensor.name,
            f"datatype {' or '.join(_WIRE[tensor.name])} was expected; got "
            f"{cut(tensor.datatype)}. Convert the values.",
        )
    count = _count(tensor)
    if raw is None:
        flat = flatten(tensor.name, tensor.data, tensor.shape)
        values = numbers(tensor.name, flat, wire) if wire else strings(tensor.name, flat)
    else:
        values = _from_raw(tensor, raw, wire, count) if wire else _names(tensor.name, raw, count)
    if isinstance(values, np.ndarray):
        values = values.reshape(tensor.shape)
    return InferInput(tensor.name, tensor.datatype, values)


def _count(tensor: _WireTensor) -> int:
    """Number of elements that the shape asks for."""
    shape, rank = tensor.shape, _RANK[tensor.name]
    if len(shape) != rank or not all(0 < size < _LARGEST for size in shape):
        raise invalid_tensor(
            tensor.name,
            f"a shape of {rank} dimensions, each at least 1, was expected; got {cut(shape)}.",
        )
    return math.prod(shape)


def flatten(name: str, data: object, shape: Sequence[int]) -> list[Any]:
    """The elements of a JSON tensor in row-major order, nested like its shape or flat.

    Raises:
        ProblemError: 400, no array, ragged, or not as many elements as the shape has.
    """
    count = math.prod(shape)
    if not isinstance(data, list):
        raise invalid_tensor(name, f"an array was expected in `data`; got {cut(data)}.")
    if not data or type(data[0]) is not list:
        if len(data) != count:
            raise invalid_tensor(
                name, f"{count} elements were expected for shape {list(shape)}; got {len(data)}."
            )
        return data
    level = [data]
    for depth, size in enumerate(shape):
        if set(map(type, level)) != {list} or set(map(len, level)) != {size}:
            raise invalid_tensor(
                name,
                f"nested arrays of shape {list(shape)} were expected; at depth {depth} not every "
                f"entry is an array of {size}. Send that shape, or the elements in one flat array.",
            )
        level = list(chain.from_iterable(level))
    return level


def numbers(name: str, flat: list[Any], wire: str) -> NDArray[Any]:
    """JSON numbers as an array: float32 for floating wire types, int64 for integers.

    Raises:
        ProblemError: 400, an element is no number, no integer, or does not fit the datatype.
    """
    floating = wire[1] == "f"
    try:
        typed: list[Any] = msgspec.convert(flat, list[float] if floating else list[int])
        values = np.fromiter(typed, "<f8" if floating else wire, len(typed))
    except msgspec.ValidationError as error:
        raise invalid_tensor(name, f"{error} (counted in row-major order).") from error
    except OverflowError as error:
        bits = 8 * np.dtype(wire).itemsize
        raise invalid_tensor(name, f"integers of {bits} bits were expected: {error}.") from error
    return _widen(values)


def strings(name: str, flat: list[Any]) -> Strings:
    """JSON strings.

    Raises:
        ProblemError: 400, an element is something else.
    """
    try:
        return msgspec.convert(flat, list[str])
    except msgspec.ValidationError as error:
        raise invalid_tensor(name, f"{error}.") from error


def _widen(values: NDArray[Any]) -> NDArray[Any]:
    """Floats as float32, integers as int64, in memory of their own."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return values.astype(np.float32 if values.dtype.kind == "f" else np.int64)


def _from_raw(tensor: _WireTensor, raw: memoryview, wire: str, count: int) -> NDArray[Any]:
    needed = count * np.dtype(wire).itemsize
    if len(raw) != needed:
        raise invalid_tensor(
            tensor.name,
            f"binary_data_size {needed} was expected for {tensor.datatype} of shape "
            f"{tensor.shape}; got {len(raw)}.",
        )
    return _widen(np.frombuffer(raw, dtype=wire))


def _names(name: str, raw: memoryview, count: int) -> Strings:
    """Elements of a binary BYTES tensor: each its length (uint32) and then its bytes, UTF-8."""
    found: Strings = []
    at = 0
    while at + 4 <= len(raw) and len(found) <= count:
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        if end > len(raw):
            break
        try:
            found.append(str(raw[at + 4 : end], "utf-8"))
        except UnicodeDecodeError as error:
            raise invalid_tensor(name, f"element {len(found)} is not UTF-8: {error}.") from error
        at = end
    if at != len(raw) or len(found) != count:
        raise invalid_tensor(
            name,
            f"{count} elements, each after its length (4 bytes, little-endian), were expected to "
            f"fill {len(raw)} bytes; got {len(found)} in {at} bytes.",
        )
    return found


def _outputs(request: _WireRequest) -> tuple[InferOutput, ...]:
    binary = _flag("of the request", request.parameters, "binary_data_output", False)
    if not request.outputs:
        return (InferOutput(OUTPUT, binary),)
    for output in request.outputs:
        refused = [key for key in output.parameters if key.startswith(("shared_mem", "classif"))]
        if refused:
            raise invalid_request(f"Output {output.name}: there is no {refused[0]} here.")
    return tuple(
        InferOutput(
            output.name, _flag(f"of {output.name}", output.parameters, "binary_data", binary)
        )
        for output in request.outputs
    )


def _flag(where: str, parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if type(value) is not bool:
        raise invalid_request(
            f"Parameter {name} {where} should be true or false; got {cut(value)}."
        )
    return value


def _symbol_indices(
    symbol: NDArray[Any] | Strings | None, windows: int, contract: Contract
) -> NDArray[np.int64]:
    known = contract.symbols
    if symbol is None:
        if len(known) > 1:
            raise invalid_tensor(
                "symbol",
                f"it is missing, and {contract.forecaster} serves {len(known)} symbols. Send "
                f"shape [{windows}]: {_choices(contract)}.",
            )
        return np.zeros(windows, dtype=np.int64)
    if np.shape(symbol) != (windows,):
        raise invalid_tensor(
            "symbol", f"shape [{windows}] was expected, one a window; got {list(np.shape(symbol))}."
        )
    if isinstance(symbol, list):
        places = {name: index for index, name in enumerate(known)}
        _refuse(sorted({name for name in symbol if name not in places}), contract)
        return np.array([places[name] for name in symbol], dtype=np.int64)
    outside = np.unique(symbol[(symbol < 0) | (symbol >= len(known))])
    _refuse(outside[:_SHOWN].tolist(), contract)
    return symbol


def _refuse(unknown: Sequence[object], contract: Contract) -> None:
    if unknown:
        shown = ", ".join(cut(item) for item in unknown[:_SHOWN])
        raise invalid_tensor("symbol", f"{_choices(contract)} was expected; got {shown}.")


def _choices(contract: Contract) -> str:
    known = contract.symbols
    shown = ", ".join(f"{i} ({name})" for i, name in enumerate(known[:20]))
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f"one of {shown}{more}, as an index (INT64) or a name (BYTES)"


# answers ----------------------------------------------------------------------------------------


def render(
    request: InferRequest,
    contract: Contract,
    version: int,
    quantiles: NDArray[np.float32],
) -> tuple[bytes, int | None]:
    """Encode an answer in the form that the request asked for.

    Args:
        request: whose `id` is echoed and whose `outputs` say JSON or binary.
        contract: of the model that computed.
        version: its number in the registry.
        quantiles: float32 [windows, horizon, levels].

    Returns:
        The body, and the length of its JSON header if binary data follow (for the response header
        `Inference-Header-Content-Length`), else None.
    """
    values = np.ascontiguousarray(quantiles, dtype="<f4")
    binary = any(output.binary for output in request.outputs)
    output: dict[str, Any] = {"name": OUTPUT, "datatype": "FP32", "shape": list(values.shape)}
    if binary:
        output["parameters"] = {"binary_data_size": values.nbytes}
    else:
        output["data"] = values.ravel()
    answer: dict[str, Any] = {
        "model_name": contract.forecaster,
        "model_version": str(version),
        "parameters": {"run_id": contract.run_id, "dataset_md5": contract.dataset_md5},
        "outputs": [output],
    }
    if request.id:
        answer["id"] = request.id
    header = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return (header + values.tobytes(), len(header)) if binary else (header, None)


def server_metadata(version: str) -> ServerMetadata:
    """What this server is; `version` is the package's."""
    return ServerMetadata(SERVER_NAME, version, EXTENSIONS)


def model_metadata(contract: Contract, versions: Iterable[int]) -> ModelMetadata:
    """What a model takes and gives, and which versions can be asked."""
    rows, columns = contract.context, len(contract.columns)
    steps, levels = contract.horizon, len(contract.quantile_levels)
    return ModelMetadata(
        name=contract.forecaster,
        versions=tuple(str(version) for version in versions),
        platform=PLATFORM,
        inputs=(
            TensorMetadata("ohlcv", "FP32", (-1, rows, columns)),
            TensorMetadata("dates", "INT64", (-1, rows)),
            TensorMetadata("symbol", "INT64", (-1,)),
        ),
        outputs=(TensorMetadata(OUTPUT, "FP32", (-1, steps, levels)),),
    )
