"""The poolings: the equation of each, and beside it value and derivative for similarities ``(c, K, B)``.

The classes here overwrite the similarities, and give the class similarities ``pooled``, ``(c, B)``, and their
derivative.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import functional


class Derivative(NamedTuple):
    """The derivative of the class similarities by the similarities: ``by_proxy / divisor``."""

    by_proxy: Tensor
    """``(c, K, B)``; zeros and ones may be ``int8``, in a quarter of the memory."""
    divisor: Tensor | float | None
    """``(c, B)``, or one number; ``None``: 1."""

    def times_(self, grad_pooled: Tensor) -> Tensor:
        """The gradient of the similarities, ``(c, K, B)``; overwrites ``by_proxy`` and ``grad_pooled``."""
        if self.divisor is not None:
            grad_pooled.div_(self.divisor)
        return self.by_proxy.to(grad_pooled.dtype).mul_(grad_pooled.unsqueeze(1))


class Max:
    """Similarities that are equal to the last bit share the gradient."""

    def __init__(self, similarities: Tensor, scale: float, temperature: float) -> None:
        self.similarities = similarities
        self.pooled = similarities.amax(dim=1)

    def derivative(self, compact: bool) -> Derivative:
        """Call it once at most. ``compact``: it will be kept, so it takes as little memory as possible."""
        nearest = self.similarities.eq_(self.pooled.unsqueeze(1))
        return Derivative(nearest.to(torch.int8) if compact else nearest, nearest.sum(dim=1))


class Softmax:
    def __init__(self, similarities: Tensor, scale: float, temperature: float) -> None:
        # Relative to the largest: large similarities would lose digits when divided by the temperature.
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


Analytic = Max | Softmax | LogSumExp


class Pooling(NamedTuple):
    equation: Callable[[Tensor, float, float], Tensor]
    analytic: type[Analytic]


POOLINGS = {
    "max": Pooling(functional.pool_max, Max),
    "softmax": Pooling(functional.pool_softmax, Softmax),
    "logsumexp": Pooling(functional.pool_logsumexp, LogSumExp),
}
