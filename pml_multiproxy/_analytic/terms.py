"""The terms that need no walk over the classes: over the proxies of the target class, from the similarities ``(K, B)``,
and between the samples of the batch; with the gradient of each.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import functional
from .._check import Settings


class Assignment(NamedTuple):
    q: Tensor
    """Over the proxies of the target class, ``(K, B)``."""
    log_q_other: Tensor
    """The mean logarithm of the other views' assignments, ``(K, B)``; with a single view, its own."""
    intra: Tensor
    """``(B,)``."""


class Balance(NamedTuple):
    log_usage: Tensor
    """Logarithm of the usage of the target class, ``(K, B)``."""
    balance: Tensor
    """``(B,)``."""


def assign(similarities: Tensor, temperature: float, views: int) -> Assignment:
    log_q = F.log_softmax(similarities / temperature, dim=0)
    q, other = log_q.exp(), _mean_of_other_views(log_q, views)
    return Assignment(q, other, (q * other).sum(dim=0).neg_())


def balance(q: Tensor, usage: Tensor) -> Balance:
    """``usage``: of the target class, ``(B, K)``."""
    log_usage = usage.T.clamp_min(functional.MIN_USAGE).log_()
    return Balance(log_usage, (q * log_usage).sum(dim=0))


def within_class_gradient(assignment: Assignment, balance: Balance, grad_losses: Tensor, settings: Settings) -> Tensor:
    """The gradient of the similarities, ``(K, B)``."""
    # The mean of a potential under q has the gradient q * (potential - mean). This holds for the entropy, too.
    by_intra = settings.intra_weight / settings.temperature
    by_balance = settings.balance_weight / settings.temperature
    potential = torch.sub(by_balance * balance.log_usage, assignment.log_q_other, alpha=by_intra)
    mean = torch.add(by_balance * balance.balance, assignment.intra, alpha=by_intra)
    result = potential.sub_(mean).mul_(assignment.q).mul_(grad_losses)
    if settings.views > 1:  # the assignment also stands in the terms of the other views
        weight = by_intra * grad_losses
        others = _mean_of_other_views(weight.unsqueeze(0), settings.views)
        result += others * assignment.q - _mean_of_other_views(weight * assignment.q, settings.views)
    # The gradient sums to zero over the proxies. The likeliest proxy takes up the rest that rounding left.
    return result.addcmul_(assignment.q, result.sum(dim=0), value=-1)


def _mean_of_other_views(values: Tensor, views: int) -> Tensor:
    """The mean over the other views of each sample, ``(N, B)``; with a single view, the values themselves."""
    if views == 1:
        return values
    by_view = torch.unflatten(values, 1, (views, -1))
    return (by_view.sum(dim=1, keepdim=True) - by_view).div(views - 1).flatten(1)


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


def contrast_gradient(neighbors: Neighbors, grad_losses: Tensor, settings: Settings, ranks: int) -> Tensor:
    """The gradient of the similarities, ``(B, B)``, over the number of ranks: all ranks compute it and add it up."""
    weight = (settings.neighbor_weight or 0.0) / (settings.neighbor_temperature * ranks)
    # A loss of 0 has no gradient: the sample has no neighbours, or reaches its targets.
    weights = (weight * grad_losses).mul_(neighbors.losses.sign())
    return neighbors.slopes * weights.unsqueeze(1)
