"""Cosine similarities as matrix products, with the gradient written out."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _autocast, functional

EPS = 1e-12
"""The shortest length that a proxy is divided by, that of :func:`torch.nn.functional.normalize`."""


def prepare(embeddings: Tensor, proxies: Tensor) -> tuple["CosineProducts", Tensor]:
    """As :func:`similarities.prepare`."""
    lengths = torch.linalg.vector_norm(proxies.detach(), dim=-1)
    # Elsewhere than on a CPU, looking would be a device synchronisation.
    if lengths.device.type == "cpu" and not _sum_is_finite(lengths):
        # Squares overflow. Dividing a proxy first changes its length only.
        proxies = proxies / proxies.detach().abs().amax(dim=-1, keepdim=True).clamp_min(1)
        lengths = torch.linalg.vector_norm(proxies.detach(), dim=-1)
    embeddings, lengths = embeddings.detach(), lengths.view(-1, 1)
    saved = (*_directions(embeddings, proxies.dtype), lengths, lengths.clamp_min(EPS).reciprocal_())
    rounded = _autocast.current(embeddings.device.type).dtype
    if rounded is not None and proxies.dtype == torch.float32:  # autocast leaves float64 alone
        return RoundedCosineProducts(embeddings.dtype, *saved, rounded), proxies
    return CosineProducts(embeddings.dtype, *saved), proxies


def _directions(embeddings: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As :func:`functional.normalize`, and what they were divided by, ``(B, 1)``; faster where no square overflows."""
    converted, shortest = embeddings.to(dtype), functional.shortest(embeddings.dtype)
    if embeddings.device.type == "cpu":
        lengths = torch.linalg.vector_norm(converted, dim=1, keepdim=True)
        if _sum_is_finite(lengths):
            divisors = lengths.clamp_min_(shortest)
            return converted / divisors, divisors
    queries = functional.normalize(embeddings, dtype)
    return queries, (converted * queries).sum(dim=1, keepdim=True).clamp_min_(shortest)


def _sum_is_finite(lengths: Tensor) -> bool:
    return float(lengths.sum()) < math.inf


class CosineProducts:
    """Cosine similarities, without normalized proxies in memory.

    The rows of the product are scaled by the inverse lengths of the proxies. From the gradient of a vector, the part
    along the vector is taken away, which changes its length only.
    """

    def __init__(self, dtype: torch.dtype, queries: Tensor, divisors: Tensor, lengths: Tensor, inverse: Tensor) -> None:
        """``queries``: the embeddings, which were of this dtype, after division by ``divisors``, ``(B, 1)``;
        ``lengths`` of all proxies, ``(C * K, 1)``, and 1 over them.
        """
        self.dtype, self.queries, self.divisors = dtype, queries, divisors
        self.lengths, self.inverse = lengths, inverse
        self.parameters: tuple[Tensor, ...] = ()
        self.saved: tuple[Tensor, ...] = (queries, divisors, lengths, inverse)
        self.scratch: Tensor | None = None

    def __call__(self, proxies: Tensor, rows: slice) -> Tensor:
        return torch.mm(proxies, self.queries.T).mul_(self.inverse[rows])

    def restored(self, embeddings: Tensor, saved: Sequence[Tensor]) -> "CosineProducts":
        return CosineProducts(embeddings.dtype, *saved)

    def add_gradients(
        self, proxies: Tensor, rows: slice, gradient: Tensor, grad_queries: Tensor | None, grad_proxies: Tensor
    ) -> Tensor:
        gradient.mul_(self.inverse[rows])
        if grad_queries is None:
            grad_queries = torch.mm(gradient.T, proxies)
        else:
            grad_queries.addmm_(gradient.T, proxies)
        torch.mm(gradient, self.queries, out=grad_proxies)
        if self.scratch is None:
            self.scratch = torch.empty_like(proxies)
        along = torch.mul(grad_proxies, proxies, out=self.scratch[: len(proxies)]).sum(dim=1, keepdim=True)
        self._project_(grad_proxies, proxies, rows, along)
        return grad_queries

    def grad_embeddings(self, grad_queries: Tensor) -> Tensor:
        lengths = _or_infinite(self.divisors, functional.shortest(self.dtype))
        along = (grad_queries * self.queries).sum(dim=1, keepdim=True).div_(lengths)
        return grad_queries.div_(self.divisors).addcmul_(self.queries, along, value=-1)

    def grad_parameters(self) -> list[Tensor]:
        return []

    def _project_(self, grad_proxies: Tensor, proxies: Tensor, rows: slice, along: Tensor) -> None:
        """``along``: the products of gradients and proxies, ``(P, 1)``, which it overwrites."""
        lengths = _or_infinite(self.lengths[rows], EPS)
        grad_proxies.addcmul_(proxies, along.div_(lengths).div_(lengths), value=-1)


class RoundedCosineProducts(CosineProducts):
    """The products in a dtype of less precision, as autocast has them; everything between them is as precise as before.

    Proxies are normalized before they are rounded, since some of these dtypes hold no long ones.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        queries: Tensor,
        divisors: Tensor,
        lengths: Tensor,
        inverse: Tensor,
        to: torch.dtype,
    ) -> None:
        super().__init__(dtype, queries, divisors, lengths, inverse)
        self.rounded = queries.to(to)

    def __call__(self, proxies: Tensor, rows: slice) -> Tensor:
        directions = (proxies * self.inverse[rows]).to(self.rounded.dtype)
        return torch.mm(directions, self.rounded.T).to(proxies.dtype)

    def restored(self, embeddings: Tensor, saved: Sequence[Tensor]) -> "RoundedCosineProducts":
        queries, divisors, lengths, inverse = saved
        return RoundedCosineProducts(embeddings.dtype, queries, divisors, lengths, inverse, self.rounded.dtype)

    def add_gradients(
        self, proxies: Tensor, rows: slice, gradient: Tensor, grad_queries: Tensor | None, grad_proxies: Tensor
    ) -> Tensor:
        directions = proxies * self.inverse[rows]
        gradient = gradient.to(self.rounded.dtype)
        of_chunk = torch.mm(gradient.T, directions.to(gradient.dtype)).to(proxies.dtype)
        grad_proxies.copy_(torch.mm(gradient, self.rounded)).mul_(self.inverse[rows])
        along = (grad_proxies * proxies).sum(dim=1, keepdim=True)
        self._project_(grad_proxies, proxies, rows, along)
        return of_chunk if grad_queries is None else grad_queries.add_(of_chunk)


def _or_infinite(lengths: Tensor, shortest: float) -> Tensor:
    """Instead of lengths up to the shortest: those vectors were divided by a constant, so that their length counts."""
    return torch.threshold(lengths, shortest, math.inf)
