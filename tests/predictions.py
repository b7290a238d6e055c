"""Records of the prediction log for tests."""

from datetime import UTC, date, datetime
from uuid import uuid4

import msgspec

from forecasting.contract import QUANTILE_LEVELS
from forecasting.predictions import Prediction
from forecasting.sessions import sessions_after
from tests.models import ratios


def make_prediction(
    origin: date = date(2008, 1, 2), close: float = 100.0, **changes: object
) -> Prediction:
    """A forecast from `origin` with the tiny graph's quantiles."""
    record = Prediction(
        id=str(uuid4()),
        made_at=datetime(2008, 1, 2, 22, tzinfo=UTC),
        source="get",
        symbol="GOOG",
        forecaster="perennial-goog",
        model_version=1,
        run_id="0" * 32,
        dataset_md5="d" * 32,
        prices_md5="p" * 32,
        origin=origin,
        origin_close=close,
        targets=sessions_after(origin, 5),
        levels=list(QUANTILE_LEVELS),
        quantiles=(close * ratios(5).astype(float)).tolist(),
    )
    return msgspec.structs.replace(record, **changes)
