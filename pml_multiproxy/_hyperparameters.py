"""What is constant over the calls of the loss."""

from typing import NamedTuple

from . import functional


class Hyperparameters(NamedTuple):
    num_classes: int
    proxies_per_class: int
    scale: float
    margin: float
    pooling: str
    temperature: float
    weights: functional.Weights
    usage_momentum: float
    views: int
