"""Gather and scatter at each sample's target class within a chunk of classes."""

import torch
from torch import Tensor


class Target:
    """Where in a chunk the target class of each sample is, if it is there. Needs no device synchronisation.

    Values of the chunk are ``(c, B)`` or ``(c, K, B)``; those of the target classes ``(B,)`` or ``(K, B)``.
    """

    def __init__(self, positions: Tensor, start: int, stop: int, num_classes: int) -> None:
        """The chunk holds the classes from ``start`` to before ``stop``; ``positions`` are those of the targets."""
        self.position = positions
        self.inside: Tensor | None = None  # None: all are
        if stop - start < num_classes:
            self.inside = (positions >= start) & (positions < stop)
            self.position = (positions - start).clamp(0, stop - start - 1)  # any position for the others

    def gather(self, values: Tensor, elsewhere: Tensor) -> Tensor:
        """The values at the target classes; those of ``elsewhere`` for targets outside of the chunk."""
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
