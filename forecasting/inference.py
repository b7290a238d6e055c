"""A model version ready to answer: load it, check that it is what it says, predict.

The only room that knows ONNX Runtime; free of pandas, since the web workers import it.
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from forecasting.contract import (
    GOLDEN_FILE,
    MODEL_FILE,
    Contract,
    Golden,
    decode,
    read_contract,
    verify_files,
)
from forecasting.errors import ContractError, ModelError

GOLDEN_TOLERANCE = 1e-5
"""Largest relative difference to the golden output."""

_INPUT_TYPES = {"ohlcv": "tensor(float)", "dates": "tensor(int64)", "symbol": "tensor(int64)"}
_ORT_ERRORS: tuple[type[Exception], ...] = (
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoModel,
    ort_state.NoSuchFile,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
    ValueError,
)


class Forecaster:
    """One verified model version. Safe to call from several threads.

    Attributes:
        contract: what the version is and how to call it.
        version: its number in the registry.
    """

    def __init__(self, contract: Contract, version: int, session: ort.InferenceSession) -> None:
        self.contract = contract
        self.version = version
        self._session = session

    @classmethod
    def load(cls, folder: Path, version: int, threads: int = 1) -> "Forecaster":
        """Load a model folder: every sha256 must match and the golden output must come out again.

        Args:
            folder: holds `contract.json` and the files it names.
            version: number of the version in the registry.
            threads: of ONNX Runtime, for one call.

        Raises:
            ContractError: incomplete, altered, not loadable, or it computes something else.
        """
        contract = read_contract(folder)
        verify_files(folder, contract)
        forecaster = cls(contract, version, _open_session(folder / MODEL_FILE, threads))
        forecaster._check_signature(folder)
        forecaster._check_golden(folder)
        return forecaster

    def predict(
        self, ohlcv: NDArray[np.float32], dates: NDArray[np.int64], symbol: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Price quantiles of each window.

        Args:
            ohlcv: float32 [batch, context, 5], oldest row first.
            dates: int64 [batch, context], days since 1970-01-01.
            symbol: int64 [batch], indices into `contract.symbols`.

        Returns:
            float32 [batch, horizon, levels], prices in the units of the last row.

        Raises:
            ModelError: the shapes are not those of the contract, or the output is not finite.
        """
        contract, batch = self.contract, len(ohlcv)
        expected = (batch, contract.context, len(contract.columns))
        if ohlcv.shape != expected or dates.shape != expected[:2] or symbol.shape != (batch,):
            raise ModelError(
                f"{contract.forecaster} version {self.version} expects ohlcv {expected}, dates "
                f"{expected[:2]} and symbol {(batch,)}; got {ohlcv.shape}, {dates.shape} and "
                f"{symbol.shape}."
            )
        feed = {"ohlcv": ohlcv, "dates": dates, "symbol": symbol}
        try:
            quantiles: NDArray[np.float32] = self._session.run(["quantiles"], feed)[0]
        except _ORT_ERRORS as error:
            raise ModelError(
                f"{contract.forecaster} version {self.version} could not compute: {error}"
            ) from error
        wanted = (batch, contract.horizon, len(contract.quantile_levels))
        if quantiles.shape != wanted or not np.isfinite(quantiles).all():
            raise ModelError(
                f"{contract.forecaster} version {self.version} should give finite quantiles of "
                f"shape {wanted}; got shape {quantiles.shape} with "
                f"{int((~np.isfinite(quantiles)).sum())} values that are not finite. "
                "Check the rows for extreme prices."
            )
        return quantiles

    def _check_signature(self, folder: Path) -> None:
        found = {item.name: item.type for item in self._session.get_inputs()}
        outputs = [item.name for item in self._session.get_outputs()]
        if found != _INPUT_TYPES or "quantiles" not in outputs:
            raise ContractError(
                f"{folder / MODEL_FILE}: inputs {_INPUT_TYPES} and output quantiles expected; "
                f"got inputs {found} and outputs {outputs}. Export the model again."
            )

    def _check_golden(self, folder: Path) -> None:
        path = folder / GOLDEN_FILE
        if not path.is_file():
            raise ContractError(f"{folder} lacks {GOLDEN_FILE}; it is not a complete version.")
        golden = decode(path.read_bytes(), Golden, str(path))
        try:
            expected = np.array(golden.quantiles, dtype=np.float64)
            got = self.predict(
                np.array(golden.ohlcv, dtype=np.float32),
                np.array(golden.dates, dtype=np.int64),
                np.array(golden.symbol, dtype=np.int64),
            )
        except (ModelError, ValueError) as error:
            raise ContractError(f"{path} cannot be computed: {error}") from error
        if expected.shape != got.shape:
            raise ContractError(f"{path} has shape {expected.shape}; the model gives {got.shape}.")
        off = float(np.max(np.abs(got - expected) / np.maximum(np.abs(expected), 1e-12)))
        if not off <= GOLDEN_TOLERANCE:
            raise ContractError(
                f"{folder} does not reproduce {GOLDEN_FILE}: relative difference {off:.2e}, at "
                f"most {GOLDEN_TOLERANCE:.0e} expected. Train or download this version again."
            )


def _open_session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _ORT_ERRORS as error:
        raise ContractError(f"{path} is not a graph that can run: {error}") from error
