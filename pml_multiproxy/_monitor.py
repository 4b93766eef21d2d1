"""The statistics of ``collect_stats=True``, and a warning if nothing trains the proxies."""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from . import _shard as sharding
from . import functional
from ._shard import Shard
from ._step import Result

IN_USE = 0.1
"""A proxy counts as in use from this part of an even share of its class."""

PATIENCE = 50
"""Training calls with gradients on unchanged proxies before the warning."""


class Statistics(NamedTuple):
    classification_loss: float
    intra_class_entropy: float
    inter_class_entropy: float
    balance: float
    neighbor_loss: float
    proxies_in_use: float
    usage_perplexity: float
    effective_proxies: float
    min_effective_proxies: float
    views_agree: float


@torch.no_grad()
def statistics(result: Result, labels: Tensor, usage: Tensor, views: int, shard: Shard) -> Statistics:
    """Of a batch that is not empty, in one transfer from the device.

    Args:
        result: of the step, with losses ``(B,)``.
        labels: ``(B,)``.
        usage: ``(c', K)``, of the classes of this process.
        views: of each sample.
        shard: the classes of this process.
    """
    per_class = usage.shape[1]
    negative_entropy = -torch.special.entr(result.assignments).sum(dim=1)
    nearest = result.assignments.argmax(dim=1)
    of_samples = torch.stack([negative_entropy, nearest.to(negative_entropy.dtype)])
    negative_entropy, nearest = sharding.from_target(of_samples, labels - shard.start, shard)
    classification, intra, inter, balance = (term.detach() for term in result.terms)

    information = negative_entropy - balance  # KL(q_i || u)
    classes, position = torch.unique(labels, return_inverse=True)
    of_classes = information.new_zeros(len(classes)).index_add(0, position, information)
    effective = (of_classes / position.bincount()).exp()
    in_use = (usage >= IN_USE / per_class).to(usage.dtype).mean(dim=1)
    of_usage = torch.stack([in_use, functional.perplexity(usage)])
    in_use, perplexity = sharding.mean_over_classes(of_usage, shard)
    by_view = torch.unflatten(nearest, 0, (views, -1))
    agree = (by_view == by_view[0]).all(dim=0)
    balance = math.log(per_class) + balance
    neighbors = torch.zeros_like(intra) if result.neighbors is None else result.neighbors.detach()
    values = (classification, intra, inter, balance, neighbors, in_use, perplexity, effective, effective.min(), agree)
    return Statistics(*torch.stack([value.to(intra.dtype).mean() for value in values]).tolist())


class UntrainedProxies:
    """Notices proxies that get gradients but are in no optimizer, a common mistake; warns once.

    PyTorch counts the in-place changes of a tensor: so a look reads no value.
    """

    def __init__(self) -> None:
        self.calls, self.version, self.first = 0, -1, torch.empty(0)
        self.warned = False

    def look(self, proxies: Tensor, gradient: Tensor | None) -> None:
        """Once in each training call. ``gradient``: of the proxies, ``None`` before the first backward pass."""
        if self.warned or proxies.numel() == 0:
            return
        if proxies._version != self.version or gradient is None:
            self.calls, self.version = 0, proxies._version
            return
        if self.calls == 0:
            self.first = proxies.detach()[0, 0].clone()
        self.calls += 1
        # Optimizers that write to param.data are not counted: so the values decide. Trained proxies seldom get here,
        # where a device synchronises.
        if self.calls == PATIENCE and self.first.to(proxies).equal(proxies.detach()[0, 0]):
            self.warned = True
            warnings.warn(
                f"the proxies have had gradients in {PATIENCE} training calls, but never changed: they seem to be in "
                "no optimizer. Give loss_func.parameters() to one, in PML's trainers as metric_loss_optimizer; or "
                "freeze them with loss_func.proxies.requires_grad_(False). If you accumulate gradients over more calls "
                "than that, ignore this",
                stacklevel=6,
            )
