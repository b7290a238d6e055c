"""MLServer: a runtime of its own for the model; `model-settings.json` names the folder.

MLServer has no runtime for ONNX. Its MLflow runtime (mlserver-mlflow) would put MLflow's scoring,
data frames and checks of the signature in between; calling ONNX Runtime directly is the faster one.
"""

from pathlib import Path

import onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class OnnxForecaster(MLModel):
    """Answers `POST /v2/models/<name>/infer`."""

    async def load(self) -> bool:
        """Open the model with one thread."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = Path(self.settings.parameters.uri) / "model.onnx"
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Price quantiles of each window."""
        feed = {each.name: NumpyCodec.decode_input(each) for each in payload.inputs}
        quantiles = self.session.run(["quantiles"], feed)[0]
        return InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output("quantiles", quantiles)]
        )
