"""The nearest proxies of embeddings, with memory for a few similarities at a time."""

from typing import Any

import torch
from torch import Tensor

from . import functional
from ._layout import Layout
from ._similarity import similarities

MOST_SIMILARITIES = 2**20
"""How many are computed at a time."""


def nearest_of_all(distance: Any, embeddings: Tensor, proxies: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The largest similarity of each embedding to the proxies ``(c', K, D)`` of this process, and the position of the
    first one that has it, among the proxies of all processes: each ``(B,)``. With none, it is minus infinity.
    """
    count, (held, per_class, _) = len(embeddings), proxies.shape
    position = torch.full((count,), layout.classes.start * per_class, device=embeddings.device)
    largest = embeddings.new_full((count,), -torch.inf, dtype=functional.compute_dtype(embeddings, proxies))
    step = max(MOST_SIMILARITIES // max(count * per_class, 1), 1)
    for start in range(0, held, step):
        block = similarities(distance, embeddings, proxies[start : start + step].flatten(0, 1))
        values, places = block.max(dim=1)
        position = torch.where(values > largest, (layout.classes.start + start) * per_class + places, position)
        largest = torch.maximum(values, largest)
    return largest, position


def nearest_of_target(
    distance: Any, embeddings: Tensor, labels: Tensor, proxies: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """The same among the proxies of each embedding's class alone. Where that is a class of another process, similarity
    and position are such that those of the other come first.
    """
    positions = layout.positions(labels)
    is_local = layout.is_local(positions)
    rows = torch.arange(len(labels), device=labels.device) if is_local is None else is_local.nonzero().squeeze(1)
    own, proxy = to_target(distance, embeddings[rows], positions[rows], proxies).max(dim=1)
    largest = own.new_full((len(labels),), -torch.inf).index_copy(0, rows, own)
    last = torch.full_like(labels, torch.iinfo(labels.dtype).max)
    return largest, last.index_copy(0, rows, labels[rows] * proxies.shape[1] + proxy)


def to_target(distance: Any, embeddings: Tensor, labels: Tensor, proxies: Tensor) -> Tensor:
    """The similarities to the proxies of each embedding's class, ``(B, K)``; ``labels`` are positions in ``proxies``.

    Time and memory are linear in the number of embeddings, whatever the number of classes.
    """
    per_class = proxies.shape[1]
    result = embeddings.new_empty(len(labels), per_class, dtype=functional.compute_dtype(embeddings, proxies))
    order = labels.argsort()
    classes, counts = torch.unique_consecutive(labels[order], return_counts=True)
    for of_classes, rows in _blocks(counts.tolist(), per_class):
        samples = order[rows]
        block = similarities(distance, embeddings[samples], proxies[classes[of_classes]].flatten(0, 1))
        block = torch.unflatten(block, 1, (-1, per_class))
        place = torch.arange(len(counts[of_classes]), device=labels.device).repeat_interleave(counts[of_classes])
        result[samples] = block[torch.arange(len(samples), device=labels.device), place]
    return result


def _blocks(counts: list[int], per_class: int) -> list[tuple[slice, slice]]:
    """Runs of classes, and of their samples, of which every sample is compared with every proxy of the run."""
    blocks, first, begin, end = [], 0, 0, 0
    for i, count in enumerate(counts):
        if i > first and (i + 1 - first) * (end + count - begin) * per_class > MOST_SIMILARITIES:
            blocks.append((slice(first, i), slice(begin, end)))
            first, begin = i, end
        end += count
    if counts:
        blocks.append((slice(first, len(counts)), slice(begin, end)))
    return blocks
