"""Which classes are computed at a time, and where in such a chunk each sample's target class is."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

DENSE_BYTES = 2**28
"""While all similarities take no more than this, forward keeps its results for backward."""

CHUNK_BYTES = 2**21
"""Size of the similarities of a chunk on a CPU: they stay in its cache."""

CHUNK_BYTES_ELSEWHERE = 2**26
"""Their size on a GPU: smaller chunks would underuse it."""


class Plan(NamedTuple):
    classes_per_chunk: int
    keep: bool
    """Whether forward keeps its results for backward; otherwise backward computes them again."""


def make_plan(classes_per_chunk: int | None, batch_size: int, proxies: Tensor, dtype: torch.dtype) -> Plan:
    """From the sizes and the kind of device; ``classes_per_chunk`` counts if it is fewer than all classes.

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


class Target:
    """Each sample's target class within a chunk, if it is there. Needs no device synchronisation.

    Values of the chunk are ``(c, B)`` or ``(c, K, B)``; values at the target classes are ``(B,)`` or ``(K, B)``.
    """

    def __init__(self, positions: Tensor, start: int, stop: int, num_classes: int) -> None:
        """The chunk holds the classes from ``start`` to before ``stop``; ``positions`` are the target classes."""
        self.position = positions
        self.inside: Tensor | None = None  # None: the chunk holds every target
        if stop - start < num_classes:
            self.inside = (positions >= start) & (positions < stop)
            self.position = (positions - start).clamp(0, stop - start - 1)  # outside: any position will do

    def gather(self, values: Tensor, elsewhere: Tensor) -> Tensor:
        """The values at the target classes; for targets outside of the chunk, the values of ``elsewhere``."""
        return self._where_inside(values.gather(0, self._index(values))[0], elsewhere)

    def put_(self, values: Tensor, at_target: Tensor | float) -> None:
        index = self._index(values)
        if self.inside is not None:
            at_target = torch.where(self.inside, at_target, values.gather(0, index))
        values.scatter_(0, index, at_target.view(index.shape) if isinstance(at_target, Tensor) else at_target)

    def add_(self, values: Tensor, at_target: Tensor) -> None:
        values.scatter_add_(0, self._index(values), self._where_inside(at_target, 0).unsqueeze(0))

    def _index(self, values: Tensor) -> Tensor:
        return self.position.expand(1, *values.shape[1:])

    def _where_inside(self, at_target: Tensor, elsewhere: Tensor | float) -> Tensor:
        return at_target if self.inside is None else torch.where(self.inside, at_target, elsewhere)


class Chunk(NamedTuple):
    target: Target
    rows: slice
    """The rows of the chunk among all proxies."""
    proxies: Tensor
    """``(c * K, D)``."""
    shape: tuple[int, int, int]
    """``(c, K, B)``."""


def chunks_of(proxies: Tensor, positions: Tensor, num_classes: int, classes_per_chunk: int) -> Iterator[Chunk]:
    """Splits the proxies ``(c', K, D)`` of some of the ``num_classes`` classes; ``positions`` are the target classes
    among these.
    """
    held, per_class, _ = proxies.shape
    for start in range(0, held, classes_per_chunk):
        stop = min(start + classes_per_chunk, held)
        rows = slice(start * per_class, stop * per_class)
        shape = stop - start, per_class, len(positions)
        yield Chunk(Target(positions, start, stop, num_classes), rows, proxies.flatten(0, 1)[rows], shape)
