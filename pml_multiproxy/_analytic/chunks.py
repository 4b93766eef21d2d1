"""Which classes are computed at a time."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .similarities import Similarity
from .target import Target

DENSE_BYTES = 2**28
"""While all similarities would take no more than this, backward finds kept what it needs of them."""

CHUNK_BYTES = 2**21
"""What the similarities of a chunk take on a CPU, in whose cache they stay."""

CHUNK_BYTES_ELSEWHERE = 2**26
"""What they take on a GPU, which less would not keep busy."""


class Plan(NamedTuple):
    classes_per_chunk: int
    keep: bool
    """Whether backward finds what forward computed, or computes it once more."""


def make_plan(classes_per_chunk: int | None, batch_size: int, proxies: Tensor, dtype: torch.dtype) -> Plan:
    """By the sizes and the kind of device alone, and by ``classes_per_chunk`` where it asks for fewer than all.

    >>> make_plan(None, 256, torch.empty(11318, 5, 512), torch.float32)
    Plan(classes_per_chunk=409, keep=True)
    >>> make_plan(None, 256, torch.empty(100_000, 10, 128), torch.float32)
    Plan(classes_per_chunk=204, keep=False)
    """
    num_classes, per_class, _ = proxies.shape
    if classes_per_chunk is not None and classes_per_chunk < num_classes:
        return Plan(classes_per_chunk, keep=False)
    bytes_per_class = max(batch_size, 1) * per_class * dtype.itemsize
    chunk_bytes = CHUNK_BYTES if proxies.device.type == "cpu" else CHUNK_BYTES_ELSEWHERE
    keep = classes_per_chunk is not None or num_classes * bytes_per_class <= DENSE_BYTES
    return Plan(max(chunk_bytes // bytes_per_class, 1), keep)


class Chunk(NamedTuple):
    target: Target
    rows: slice
    """Of all proxies, those of the chunk."""
    proxies: Tensor
    """``(c * K, D)``."""
    shape: tuple[int, int, int]
    """``(c, K, B)``."""

    def similarities(self, similarity: Similarity) -> Tensor:
        return similarity(self.proxies, self.rows).view(self.shape)


def chunks(proxies: Tensor, positions: Tensor, num_classes: int, classes_per_chunk: int) -> Iterator[Chunk]:
    """Of the proxies ``(c', K, D)`` of some of the ``num_classes`` classes, with each sample's target among these."""
    held, per_class, _ = proxies.shape
    for start in range(0, held, classes_per_chunk):
        stop = min(start + classes_per_chunk, held)
        rows = slice(start * per_class, stop * per_class)
        shape = stop - start, per_class, len(positions)
        yield Chunk(Target(positions, start, stop, num_classes), rows, proxies.flatten(0, 1)[rows], shape)
