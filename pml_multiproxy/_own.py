"""Where the class of each sample stands in a chunk of classes."""

import torch
from torch import Tensor


class Own:
    """Reads and writes at the class of each sample, where that is in the chunk; nothing here makes a GPU wait.

    Values are ``(c, B)`` or ``(c, K, B)``; those of the own class, ``(B,)`` or ``(K, B)``.
    """

    def __init__(self, labels: Tensor, start: int, stop: int, num_classes: int) -> None:
        """The chunk holds the classes from ``start`` to before ``stop``."""
        self.place = labels
        self.inside: Tensor | None = None  # where all are
        if stop - start < num_classes:
            self.inside = (labels >= start) & (labels < stop)
            self.place = (labels - start).clamp(0, stop - start - 1)  # some place for the others

    def get(self, values: Tensor, others: Tensor) -> Tensor:
        """From ``others`` where not in the chunk."""
        return self._where_inside(values.gather(0, self._index(values))[0], others)

    def put(self, values: Tensor, own: Tensor | float) -> None:
        index = self._index(values)
        if self.inside is not None:
            own = torch.where(self.inside, own, values.gather(0, index))
        values.scatter_(0, index, own.view(index.shape) if isinstance(own, Tensor) else own)

    def add(self, values: Tensor, own: Tensor) -> None:
        values.scatter_add_(0, self._index(values), self._where_inside(own, 0).unsqueeze(0))

    def _index(self, values: Tensor) -> Tensor:
        return self.place.expand(1, *values.shape[1:])

    def _where_inside(self, own: Tensor, others: Tensor | float) -> Tensor:
        return own if self.inside is None else torch.where(self.inside, own, others)
