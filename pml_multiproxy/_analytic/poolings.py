r"""The poolings of :mod:`pml_multiproxy.functional` on similarities ``(c, K, B)``, with their derivative written out.

The similarities are overwritten. From them come the class similarities ``pooled``, ``(c, B)``, and the derivative of
these.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Derivative(NamedTuple):
    """Of the class similarities by the similarities."""

    by_proxy: Tensor
    """``(c, K, B)``, to be divided by the divisor; ``int8``, where all are 0 or 1, takes a quarter of the memory."""
    divisor: Tensor | float | None
    """``(c, B)``, or the same for all; ``None``: 1."""

    def times_(self, grad_pooled: Tensor) -> Tensor:
        """The gradient of the similarities, ``(c, K, B)``; overwrites ``by_proxy`` and ``grad_pooled``."""
        if self.divisor is not None:
            grad_pooled.div_(self.divisor)
        return self.by_proxy.to(grad_pooled.dtype).mul_(grad_pooled.unsqueeze(1))


class Pooling(Protocol):
    pooled: Tensor

    def __init__(self, similarities: Tensor, scale: float, temperature: float) -> None: ...

    def derivative(self, compact: bool) -> Derivative:
        """Called once at most; with ``compact``, in as little memory as it takes."""


class Max:
    """Proxies that are equally near share the gradient, so that it does not depend on their order."""

    def __init__(self, similarities: Tensor, scale: float, temperature: float) -> None:
        self.similarities = similarities
        self.pooled = similarities.amax(dim=1)

    def derivative(self, compact: bool) -> Derivative:
        nearest = self.similarities.eq_(self.pooled.unsqueeze(1))
        return Derivative(nearest.to(torch.int8) if compact else nearest, nearest.sum(dim=1))


class Softmax:
    def __init__(self, similarities: Tensor, scale: float, temperature: float) -> None:
        # Relative to the largest, so that large similarities do not swallow the temperature.
        largest = similarities.amax(dim=1)
        self.relative, self.temperature = similarities.sub_(largest.unsqueeze(1)), temperature
        powers = (self.relative * (1 / (temperature * math.log(2)))).exp2_()
        self.softmax = powers.div_(powers.sum(dim=1, keepdim=True))
        self.mean = (self.softmax * self.relative).sum(dim=1)
        self.pooled = largest.add_(self.mean)

    def derivative(self, compact: bool) -> Derivative:
        # softmax * (1 + (similarity - mean) / temperature)
        by_proxy = self.relative.sub_((self.mean - self.temperature).unsqueeze(1)).mul_(self.softmax)
        return Derivative(by_proxy, self.temperature)


class LogSumExp:
    def __init__(self, similarities: Tensor, scale: float, temperature: float) -> None:
        largest = similarities.amax(dim=1)
        self.powers = similarities.sub_(largest.unsqueeze(1)).mul_(scale / math.log(2)).exp2_()
        self.total = self.powers.sum(dim=1)
        self.pooled = largest.add_(self.total.log(), alpha=1 / scale)

    def derivative(self, compact: bool) -> Derivative:
        return Derivative(self.powers.div_(self.total.unsqueeze(1)), None)


POOLINGS: dict[str, type[Pooling]] = {"max": Max, "softmax": Softmax, "logsumexp": LogSumExp}
