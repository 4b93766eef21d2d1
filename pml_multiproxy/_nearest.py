"""The nearest proxies of embeddings, with memory for a few similarities at a time."""

import math
from typing import Any

import torch
from torch import Tensor

from . import _shard as sharding
from . import functional
from ._shard import Shard
from ._similarity import similarities

MOST_SIMILARITIES = 2**20
"""So many similarities are computed at a time."""


def nearest_of_all(distance: Any, embeddings: Tensor, proxies: Tensor, shard: Shard) -> Tensor:
    """The position of the proxy nearest to each embedding among those of all processes, ``(B,)``."""
    count, (held, per_class, _) = len(embeddings), proxies.shape
    position = torch.full((count,), shard.start * per_class, device=embeddings.device)
    largest = embeddings.new_full((count,), -torch.inf, dtype=functional.compute_dtype(embeddings, proxies))
    step = max(MOST_SIMILARITIES // max(count * per_class, 1), 1)
    for start in range(0, held, step):
        block = similarities(distance, embeddings, proxies[start : start + step].flatten(0, 1))
        values, places = block.max(dim=1)
        position = torch.where(values > largest, (shard.start + start) * per_class + places, position)
        largest = torch.maximum(values, largest)
    return sharding.of_largest(largest, position, shard)


def nearest_of_target(distance: Any, embeddings: Tensor, labels: Tensor, proxies: Tensor, shard: Shard) -> Tensor:
    """The position of the nearest proxy of each embedding's class, ``(B,)``."""
    positions = labels - shard.start
    local = sharding.is_local(positions, shard)
    rows = torch.arange(len(labels), device=labels.device) if local is None else local.nonzero().squeeze(1)
    proxy = to_target(distance, embeddings[rows], positions[rows], proxies).argmax(dim=1)
    found = labels.new_zeros(len(labels)).index_copy(0, rows, labels[rows] * proxies.shape[1] + proxy)
    return sharding.from_target(found, positions, shard)


def to_target(distance: Any, embeddings: Tensor, labels: Tensor, proxies: Tensor) -> Tensor:
    """The similarities to the proxies of each embedding's class, ``(B, K)``; ``labels`` are positions in ``proxies``.

    Time and memory are linear in the number of embeddings, and do not depend on the number of classes.
    """
    count, per_class, _ = proxies.shape
    result = embeddings.new_empty(len(labels), per_class, dtype=functional.compute_dtype(embeddings, proxies))
    # A chunk compares all of its samples with all proxies of its classes, and has no more classes than samples.
    step = max(MOST_SIMILARITIES // max(count * per_class, 1), math.isqrt(MOST_SIMILARITIES // per_class), 1)
    order = labels.argsort()
    for start in range(0, len(order), step):
        samples = order[start : start + step]
        classes, places = torch.unique_consecutive(labels[samples], return_inverse=True)
        block = similarities(distance, embeddings[samples], proxies[classes].flatten(0, 1))
        block = torch.unflatten(block, 1, (len(classes), per_class))
        result[samples] = block[torch.arange(len(samples), device=labels.device), places]
    return result


def outliers(
    distance: Any, embeddings: Tensor, labels: Tensor, proxies: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """Samples at more than ``threshold`` degrees from the dominant proxy of their class, in the order of their classes;
    and the dominant proxies, ``(D, C)``.
    """
    count, per_class, _ = proxies.shape
    cosines = to_target(distance, embeddings, labels, proxies)
    votes = torch.bincount(labels * per_class + cosines.argmax(dim=1), minlength=count * per_class)
    votes = votes.view(count, per_class)
    dominant = votes.argmax(dim=1)
    to_dominant = cosines.gather(1, dominant[labels].unsqueeze(1)).squeeze(1)
    order = labels.argsort(stable=True)
    found = order[(to_dominant < math.cos(math.radians(threshold)))[order]]
    centers = proxies[torch.arange(count, device=proxies.device), dominant]
    return found, torch.where(votes.any(dim=1, keepdim=True), centers, torch.nan).T
