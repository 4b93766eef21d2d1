"""All contact with the inner parts of PyTorch Metric Learning: only this file imports them."""

import inspect
from typing import Any

import torch
from pytorch_metric_learning.losses.base_metric_loss_function import BaseMetricLossFunction
from pytorch_metric_learning.losses.mixins import WeightRegularizerMixin
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from ._similarity import without_autocast


class ProxyLoss(WeightRegularizerMixin, BaseMetricLossFunction):  # type: ignore[misc]
    """A loss with one value per sample and weights to regularize."""

    def loss_dict(
        self, losses: Tensor, labels: Tensor, indices_tuple: tuple[Tensor, ...] | None, proxies: Tensor
    ) -> dict[str, dict[str, Any]]:
        """The dict of PML's ``compute_loss``: the losses ``(B,)`` times the miner's weights, and the regularization of
        the proxies ``(C, K, D)``.
        """
        if indices_tuple is not None:
            losses = losses * lmu.convert_to_weights(indices_tuple, labels, dtype=losses.dtype)
        result: dict[str, dict[str, Any]] = {"loss": element_losses(losses) | {"divisor": len(losses)}}
        if len(losses) == 0:  # the mean of none would be NaN
            result["loss"] |= {"losses": losses.sum(), "indices": None, "reduction_type": "already_reduced"}
        if self.weight_regularizer is not None:  # PML asks, too, but after autograd has recorded the view
            with without_autocast(proxies.device.type):
                self.add_weight_regularization_to_loss_dict(result, proxies.flatten(0, 1))
        return result

    def reduced(self, loss_dict: dict[str, dict[str, Any]], embeddings: Tensor, labels: Tensor) -> Tensor:
        """The result of the reducer, a scalar for most reducers."""
        if len(embeddings):
            with without_autocast(embeddings.device.type):
                self.add_embedding_regularization_to_loss_dict(loss_dict, embeddings)
        loss: Tensor = self.reducer(loss_dict, embeddings, labels)
        return loss


ARGUMENTS = [
    name for base in ProxyLoss.__mro__ for name in inspect.signature(base.__init__).parameters if name != "self"
]
"""The keyword arguments of PML's losses with weights."""


def element_losses(losses: Tensor) -> dict[str, Any]:
    """One loss per row, as PML's reducers take them."""
    indices = torch.arange(len(losses), device=losses.device)
    return {"losses": losses, "indices": indices, "reduction_type": "element"}
