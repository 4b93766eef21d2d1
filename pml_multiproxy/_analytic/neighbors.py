"""The contrast between the samples of a batch, and the gradient of their similarities."""

from typing import NamedTuple

from torch import Tensor

from .. import functional
from .._check import Settings


class Neighbors(NamedTuple):
    losses: Tensor
    """``(B,)``."""
    slopes: Tensor
    """The derivative of each loss by its logits, the similarities to all samples over the temperature, ``(B, B)``; of
    no meaning for a sample without neighbours.
    """


def contrast(similarities: Tensor, targets: Tensor, left_out: Tensor | None, settings: Settings) -> Neighbors:
    """:func:`functional.neighbor_loss`, from its targets."""
    log_softmax = functional.neighbor_log_softmax(similarities, settings.neighbor_temperature, left_out)
    losses = (targets * log_softmax).sum(dim=1).neg_()
    return Neighbors(losses, log_softmax.exp_().sub_(targets))


def gradient(neighbors: Neighbors, grad_losses: Tensor, settings: Settings, ranks: int) -> Tensor:
    """The gradient of the similarities, ``(B, B)``, over the number of ranks: all ranks compute it and add it up."""
    weight = (settings.neighbor_weight or 0.0) / (settings.neighbor_temperature * ranks)
    # A loss of 0 has no gradient: the sample has no neighbours, or reaches its targets.
    weights = (weight * grad_losses).mul_(neighbors.losses.sign())
    return neighbors.slopes * weights.unsqueeze(1)
