"""Similarities of a batch to some of the proxies, and the gradient back through them.

They are ``(P, B)``, the batch last: what runs over the proxies of a class then runs along rows of the memory, and the
matrix products are faster, too.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

EPS = 1e-12
"""The shortest length that a proxy is divided by, that of :func:`torch.nn.functional.normalize`."""


class Similarity(Protocol):
    def __call__(self, queries: Tensor, proxies: Tensor, rows: slice) -> Tensor:
        """``(P, B)``, new memory, for queries ``(B, D)`` and the proxies ``(P, D)`` that are ``rows`` of all."""

    def add_gradients(
        self, queries: Tensor, proxies: Tensor, rows: slice, gradient: Tensor, of_queries: Tensor, of_proxies: Tensor
    ) -> None:
        """Adds to ``of_queries`` and fills ``of_proxies``; may overwrite ``gradient``, ``(P, B)``."""


class CosineProducts:
    """Cosine similarities of queries of unit length, without normalized proxies in memory.

    The rows of the product are scaled by the inverse lengths of the proxies. From the gradient of a proxy, the part
    along the proxy is taken away, which changes its length only.
    """

    def __init__(self, lengths: Tensor) -> None:
        """``lengths`` of all proxies, ``(C * K,)``."""
        self.inverse = lengths.clamp_min(EPS).reciprocal().unsqueeze(1)
        # Shorter proxies are divided by a constant, so that their length counts.
        self.projection = torch.where(lengths > EPS, -1, 0).unsqueeze(1) * self.inverse**2

    def __call__(self, queries: Tensor, proxies: Tensor, rows: slice) -> Tensor:
        return torch.mm(proxies, queries.T).mul_(self.inverse[rows])

    def add_gradients(
        self, queries: Tensor, proxies: Tensor, rows: slice, gradient: Tensor, of_queries: Tensor, of_proxies: Tensor
    ) -> None:
        gradient.mul_(self.inverse[rows])
        of_queries.addmm_(gradient.T, proxies)
        torch.mm(gradient, queries, out=of_proxies)
        along = (of_proxies * proxies).sum(dim=1, keepdim=True)
        of_proxies.addcmul_(proxies, along.mul_(self.projection[rows]))


class DistanceCalls:
    """Similarities by any distance of PML, differentiated through its own autograd graph."""

    def __init__(self, similarity: Callable[[Tensor, Tensor], Tensor], device_type: str) -> None:
        """``similarity`` of ``(B, D)`` and ``(P, D)`` gives ``(B, P)``."""
        self.similarity = similarity
        # Backward runs outside of the autocast of forward, but has to compute the same.
        self.device_type = device_type
        self.enabled, self.dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

    def __call__(self, queries: Tensor, proxies: Tensor, rows: slice) -> Tensor:
        with torch.autocast(self.device_type, self.dtype, self.enabled):
            return self.similarity(queries, proxies).T.contiguous()

    def add_gradients(
        self, queries: Tensor, proxies: Tensor, rows: slice, gradient: Tensor, of_queries: Tensor, of_proxies: Tensor
    ) -> None:
        with torch.enable_grad():
            inputs = queries.detach().requires_grad_(), proxies.detach().requires_grad_()
            for_queries, for_proxies = torch.autograd.grad(self(*inputs, rows), inputs, gradient)
        of_queries.add_(for_queries)
        of_proxies.copy_(for_proxies)
