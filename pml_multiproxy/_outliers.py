"""Samples far from the dominant proxy of their class, as PML's SubCenterArcFaceLoss finds them."""

import math
from typing import Any

import torch
from torch import Tensor

from . import _nearest as nearest


def outliers(
    distance: Any, embeddings: Tensor, labels: Tensor, proxies: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """The indices of the outliers, in the order of their classes, and the dominant proxies, ``(D, C)``."""
    count, per_class, _ = proxies.shape
    cosines = nearest.to_target(distance, embeddings, labels, proxies)
    votes = torch.bincount(labels * per_class + cosines.argmax(dim=1), minlength=count * per_class)
    votes = votes.view(count, per_class)
    dominant = votes.argmax(dim=1)
    to_dominant = cosines.gather(1, dominant[labels].unsqueeze(1)).squeeze(1)
    order = labels.argsort(stable=True)
    found = order[(to_dominant < math.cos(math.radians(threshold)))[order]]
    centers = proxies[torch.arange(count, device=proxies.device), dominant]
    return found, torch.where(votes.any(dim=1, keepdim=True), centers, torch.nan).T
