"""The terms over the proxies of the target class, out of the similarities to them, ``(K, B)``, and their gradient."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import functional


class Assignment(NamedTuple):
    q: Tensor
    """Over the proxies of the target class, ``(K, B)``."""
    log_q_compared: Tensor
    """What the assignment is compared with: the mean logarithm of the other views' assignments, ``(K, B)``; of a single
    view, its own.
    """
    intra: Tensor
    """``(B,)``."""


class Balance(NamedTuple):
    log_usage: Tensor
    """That of the target class, ``(K, B)``."""
    balance: Tensor
    """``(B,)``."""


def assign(similarities: Tensor, temperature: float, views: int) -> Assignment:
    log_q = F.log_softmax(similarities / temperature, dim=0)
    q, compared = log_q.exp(), _mean_of_other_views(log_q, views)
    return Assignment(q, compared, (q * compared).sum(dim=0).neg_())


def balance(q: Tensor, usage: Tensor) -> Balance:
    """``usage``: that of the target class, ``(B, K)``."""
    log_usage = usage.T.clamp_min(functional.MIN_USAGE).log_()
    return Balance(log_usage, (q * log_usage).sum(dim=0))


def gradient(
    assignment: Assignment,
    balance: Balance,
    grad_losses: Tensor,
    weights: functional.Weights,
    temperature: float,
    views: int,
) -> Tensor:
    """Of the similarities, ``(K, B)``."""
    # That of the mean of a potential under q is q * (potential - mean). This holds for the entropy, too.
    by_intra, by_balance = weights.intra / temperature, weights.balance / temperature
    potential = torch.sub(by_balance * balance.log_usage, assignment.log_q_compared, alpha=by_intra)
    mean = torch.add(by_balance * balance.balance, assignment.intra, alpha=by_intra)
    result = potential.sub_(mean).mul_(assignment.q).mul_(grad_losses)
    if views > 1:  # as what the other views are compared with
        weight = by_intra * grad_losses
        others = _mean_of_other_views(weight.unsqueeze(0), views)
        result += others * assignment.q - _mean_of_other_views(weight * assignment.q, views)
    # Over the proxies, it sums to zero. What is left is rounding where large numbers cancel, at the likeliest proxy.
    return result.addcmul_(assignment.q, result.sum(dim=0), value=-1)


def _mean_of_other_views(values: Tensor, views: int) -> Tensor:
    """Of the same sample, ``(N, B)``; of a single view, its own."""
    if views == 1:
        return values
    by_view = torch.unflatten(values, 1, (views, -1))
    return (by_view.sum(dim=1, keepdim=True) - by_view).div(views - 1).flatten(1)
