"""Similarities of a batch to some of the proxies, and the gradient back through them.

They are ``(P, B)``, the batch last: what runs over the proxies of a class then runs along rows of the memory, and the
matrix products are faster, too.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from . import functional

EPS = 1e-12
"""The shortest length that a proxy is divided by, that of :func:`torch.nn.functional.normalize`."""


class Similarity(Protocol):
    def __call__(self, proxies: Tensor, rows: slice) -> Tensor:
        """``(P, B)``, new memory, to the proxies ``(P, D)`` that are ``rows`` of all."""

    def add_gradients(
        self, proxies: Tensor, rows: slice, gradient: Tensor, of_queries: Tensor, of_proxies: Tensor
    ) -> None:
        """Adds to ``of_queries`` and fills ``of_proxies``; may overwrite ``gradient``, ``(P, B)``."""

    def of_embeddings(self, of_queries: Tensor) -> Tensor:
        """The gradient of the embeddings, out of that of what :meth:`__call__` makes of them; may overwrite it."""


class CosineProducts:
    """Cosine similarities, without normalized proxies in memory.

    The rows of the product are scaled by the inverse lengths of the proxies. From the gradient of a vector, the part
    along the vector is taken away, which changes its length only.
    """

    def __init__(self, embeddings: Tensor, lengths: Tensor) -> None:
        """``lengths`` of all proxies, ``(C * K, 1)``; the dtype is theirs."""
        self.embeddings = embeddings.detach()
        self.queries = functional.normalize(self.embeddings, lengths.dtype)
        self.inverse = lengths.clamp_min(EPS).reciprocal()
        self.projection = _or_infinite(lengths, EPS).reciprocal_().square_()
        self.scratch: Tensor | None = None

    def __call__(self, proxies: Tensor, rows: slice) -> Tensor:
        return torch.mm(proxies, self.queries.T).mul_(self.inverse[rows])

    def add_gradients(
        self, proxies: Tensor, rows: slice, gradient: Tensor, of_queries: Tensor, of_proxies: Tensor
    ) -> None:
        gradient.mul_(self.inverse[rows])
        of_queries.addmm_(gradient.T, proxies)
        torch.mm(gradient, self.queries, out=of_proxies)
        if self.scratch is None:
            self.scratch = torch.empty_like(proxies)
        along = torch.mul(of_proxies, proxies, out=self.scratch[: len(proxies)]).sum(dim=1, keepdim=True)
        of_proxies.addcmul_(proxies, along.mul_(self.projection[rows]), value=-1)

    def of_embeddings(self, of_queries: Tensor) -> Tensor:
        shortest = functional.shortest(self.embeddings.dtype)
        length = (self.embeddings * self.queries).sum(dim=1, keepdim=True)
        along = (of_queries * self.queries).sum(dim=1, keepdim=True).div_(_or_infinite(length, shortest))
        return of_queries.div_(length.clamp_min(shortest)).addcmul_(self.queries, along, value=-1)


class RoundedCosineProducts(CosineProducts):
    """The products in a dtype of less precision, as autocast has them; everything between them is as precise as before.

    Proxies are normalized before they are rounded, since some of these dtypes hold no long ones.
    """

    def __init__(self, embeddings: Tensor, lengths: Tensor, dtype: torch.dtype) -> None:
        super().__init__(embeddings, lengths)
        self.rounded = self.queries.to(dtype)

    def __call__(self, proxies: Tensor, rows: slice) -> Tensor:
        directions = (proxies * self.inverse[rows]).to(self.rounded.dtype)
        return torch.mm(directions, self.rounded.T).to(proxies.dtype)

    def add_gradients(
        self, proxies: Tensor, rows: slice, gradient: Tensor, of_queries: Tensor, of_proxies: Tensor
    ) -> None:
        directions = proxies * self.inverse[rows]
        gradient = gradient.to(self.rounded.dtype)
        of_queries.add_(torch.mm(gradient.T, directions.to(gradient.dtype)))
        of_proxies.copy_(torch.mm(gradient, self.rounded)).mul_(self.inverse[rows])
        along = (of_proxies * proxies).sum(dim=1, keepdim=True)
        of_proxies.addcmul_(proxies, along.mul_(self.projection[rows]), value=-1)


class DistanceCalls:
    """Similarities by any distance of PML, differentiated through its own autograd graph."""

    def __init__(self, embeddings: Tensor, similarity: Callable[[Tensor, Tensor], Tensor]) -> None:
        """``similarity`` of ``(B, D)`` and ``(P, D)`` gives ``(B, P)``."""
        self.queries, self.similarity = embeddings.detach(), similarity
        # Backward runs outside of the autocast of forward, but has to compute the same.
        self.device_type = device_type = embeddings.device.type
        self.enabled, self.dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

    def __call__(self, proxies: Tensor, rows: slice) -> Tensor:
        return self._call(self.queries, proxies).contiguous()

    def add_gradients(
        self, proxies: Tensor, rows: slice, gradient: Tensor, of_queries: Tensor, of_proxies: Tensor
    ) -> None:
        with torch.enable_grad():
            inputs = self.queries.detach().requires_grad_(), proxies.detach().requires_grad_()
            for_queries, for_proxies = torch.autograd.grad(self._call(*inputs), inputs, gradient)
        of_queries.add_(for_queries)
        of_proxies.copy_(for_proxies)

    def of_embeddings(self, of_queries: Tensor) -> Tensor:
        return of_queries

    def _call(self, queries: Tensor, proxies: Tensor) -> Tensor:
        with torch.autocast(self.device_type, self.dtype, self.enabled):
            return self.similarity(queries, proxies).T


def _or_infinite(lengths: Tensor, shortest: float) -> Tensor:
    """Instead of lengths up to the shortest: those vectors were divided by a constant, so that their length counts."""
    return F.threshold(lengths, shortest, math.inf)
