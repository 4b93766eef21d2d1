r"""The poolings of :mod:`pml_multiproxy.functional`, with their derivative written out.

Similarities are ``(C, K, B)``, the batch last, and are overwritten. From them come the class similarities ``pooled``,
``(C, B)``; ``differentiate`` gives the function that turns a gradient of these, ``(C, B)``, into one of the
similarities, ``(C, K, B)``, called once. Until then it holds one number per similarity, with ``compact`` one byte where
that is enough, and not the pooling.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Unpool = Callable[[Tensor], Tensor]


class Pooling(Protocol):
    pooled: Tensor

    def __init__(self, similarities: Tensor, scale: float, temperature: float) -> None: ...

    def differentiate(self, compact: bool) -> Unpool: ...


class Max:
    """Proxies that are equally near share the gradient, so that it does not depend on their order."""

    def __init__(self, similarities: Tensor, scale: float, temperature: float) -> None:
        self.similarities = similarities
        self.pooled = similarities.amax(dim=1)

    def differentiate(self, compact: bool) -> Unpool:
        nearest = self.similarities.eq_(self.pooled.unsqueeze(1))
        count = nearest.sum(dim=1)
        held = nearest.to(torch.int8) if compact else nearest
        return lambda gradient: held.to(count.dtype).mul_(gradient.div_(count).unsqueeze(1))


class Softmax:
    def __init__(self, similarities: Tensor, scale: float, temperature: float) -> None:
        self.similarities, self.temperature = similarities, temperature
        self.weights = torch.softmax(similarities / temperature, dim=1)
        self.pooled = (self.weights * similarities).sum(dim=1)

    def differentiate(self, compact: bool) -> Unpool:
        # softmax * (1 + (similarity - pooled) / temperature), without the division
        temperature = self.temperature
        derivative = self.similarities.sub_((self.pooled - temperature).unsqueeze(1)).mul_(self.weights)
        return lambda gradient: derivative.mul_(gradient.div_(temperature).unsqueeze(1))


class LogSumExp:
    def __init__(self, similarities: Tensor, scale: float, temperature: float) -> None:
        largest = similarities.amax(dim=1)
        self.powers = similarities.sub_(largest.unsqueeze(1)).mul_(scale / math.log(2)).exp2_()
        self.total = self.powers.sum(dim=1)
        self.pooled = torch.add(largest, self.total.log(), alpha=1 / scale)

    def differentiate(self, compact: bool) -> Unpool:
        derivative = self.powers.div_(self.total.unsqueeze(1))
        return lambda gradient: derivative.mul_(gradient.unsqueeze(1))


POOLINGS: dict[str, type[Pooling]] = {"max": Max, "softmax": Softmax, "logsumexp": LogSumExp}
