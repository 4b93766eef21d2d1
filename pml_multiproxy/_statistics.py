"""What ``collect_stats=True`` records of every batch."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import functional
from ._analytic.loss import Result
from ._layout import Layout

IN_USE = 0.1
"""A proxy counts as in use from this part of an even share of its class."""


class Statistics(NamedTuple):
    classification_loss: float
    intra_class_entropy: float
    inter_class_entropy: float
    balance: float
    proxies_in_use: float
    usage_perplexity: float
    effective_proxies: float
    min_effective_proxies: float
    views_agree: float


@torch.no_grad()
def statistics(result: Result, labels: Tensor, usage: Tensor, views: int, layout: Layout) -> Statistics:
    """Of a batch that is not empty. Ends in one transfer from the device for all of them.

    Args:
        result: of the step, with losses ``(B,)``.
        labels: ``(B,)``.
        usage: ``(c', K)``, that of the classes of this process.
        views: of each sample.
        layout: where the classes are.
    """
    per_class = usage.shape[1]
    negative_entropy = -torch.special.entr(result.assignments).sum(dim=1)
    nearest = result.assignments.argmax(dim=1)
    of_samples = torch.stack([negative_entropy, nearest.to(negative_entropy.dtype)])
    negative_entropy, nearest = layout.reduce_samples(of_samples, layout.positions(labels))
    classification, intra, inter, balance = (term.detach() for term in result.terms)

    information = negative_entropy - balance  # KL(q_i || u)
    classes, position = torch.unique(labels, return_inverse=True)
    of_classes = information.new_zeros(len(classes)).index_add(0, position, information)
    effective = (of_classes / position.bincount()).exp()
    in_use = (usage >= IN_USE / per_class).to(usage.dtype).mean(dim=1)
    in_use, perplexity = layout.mean_over_classes(torch.stack([in_use, functional.perplexity(usage)]))
    by_view = torch.unflatten(nearest, 0, (views, -1))
    agree = (by_view == by_view[0]).all(dim=0)
    balance = math.log(per_class) + balance
    values = (classification, intra, inter, balance, in_use, perplexity, effective, effective.min(), agree)
    return Statistics(*torch.stack([value.to(intra.dtype).mean() for value in values]).tolist())
