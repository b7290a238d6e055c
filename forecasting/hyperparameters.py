"""Hyperparameters of the network, apart from it: a cached search is read back without torch."""

from dataclasses import dataclass

METRIC = "validation_crps_bp"
"""What a search minimises: mean CRPS on validation windows, basis points of log return."""


@dataclass(frozen=True)
class ModelConfig:
    """Hyperparameters of the network and of its training.

    Attributes:
        hidden: width of the LSTM.
        layers: stacked LSTM layers.
        dropout: share of the last hidden state dropped in training.
        reach: largest correction, in log units, of a horizon's scale.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        batch_size: windows a step.
        seed: of initial weights, order of windows and dropout.
    """

    hidden: int = 16
    layers: int = 1
    dropout: float = 0.1
    reach: float = 0.4
    lr: float = 3e-3
    weight_decay: float = 1e-2
    batch_size: int = 64
    seed: int = 7
