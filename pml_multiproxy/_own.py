"""Where the class of each sample stands in a chunk of classes."""

import torch
from torch import Tensor


class Own:
    """Reads and writes at the class of each sample, where that is in the chunk; nothing here makes a GPU wait."""

    def __init__(self, labels: Tensor, samples: Tensor, start: int, stop: int, num_classes: int) -> None:
        """``samples`` counts them, ``(B,)``; the chunk holds the classes from ``start`` to before ``stop``."""
        self.samples, self.place = samples, labels
        self.inside: Tensor | None = None  # where all are
        if stop - start < num_classes:
            self.inside = (labels >= start) & (labels < stop)
            self.place = (labels - start).clamp(0, stop - start - 1)  # some place for the others

    def get(self, values: Tensor, others: Tensor) -> Tensor:
        """``(B,)`` of ``(c, B)`` values, or ``(B, K)`` of ``(c, K, B)``, from ``others`` where not in the chunk."""
        own = values[self._index(values)]
        return own if self.inside is None else self._where_inside(own, others)

    def put(self, values: Tensor, own: Tensor | float) -> None:
        """``own``, ``(B,)``, into ``(c, B)`` values; or ``(B, K)`` into ``(c, K, B)``."""
        index = self._index(values)
        values[index] = self._where_inside(own, values[index]) if self.inside is not None else own

    def add(self, values: Tensor, own: Tensor) -> None:
        """As :meth:`put`, but adds."""
        self.put(values, values[self._index(values)] + own)

    def _index(self, values: Tensor) -> tuple[Tensor | slice, ...]:
        return (self.place, self.samples) if values.ndim == 2 else (self.place, slice(None), self.samples)

    def _where_inside(self, own: Tensor | float, others: Tensor) -> Tensor:
        assert self.inside is not None
        return torch.where(self.inside if others.ndim == 1 else self.inside.unsqueeze(1), own, others)
