"""Similarities of a batch to some of the proxies, ``(P, B)``, and the gradient back through them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import functional
from .._similarity import among_samples, autocast_dtype, is_plain_cosine, similarities, within_classes

EPS = functional.norm_eps(torch.float32)


def prepare(distance: Any, embeddings: Tensor, proxies: Tensor) -> "tuple[Products, Tensor, Tensor]":
    """The products, and the embeddings and proxies in the dtype to compute in.

    Args:
        distance: of PML.
        embeddings: ``(B, D)``.
        proxies: ``(c', K, D)``.
    """
    dtype = functional.compute_dtype(embeddings, proxies)
    if is_plain_cosine(distance):
        embeddings = functional.keep_short(embeddings.to(dtype), embeddings.dtype)
        proxies, lengths = _lengths(functional.keep_short(proxies.to(dtype), proxies.dtype).contiguous())
        return _cosine_products(embeddings.detach(), lengths), embeddings, proxies
    embeddings, proxies = embeddings.to(dtype), proxies.to(dtype).contiguous()
    _refuse_learned(distance, embeddings.detach(), proxies.detach().flatten(0, 1))
    return DistanceCalls(embeddings.detach(), distance), embeddings, proxies


def _lengths(proxies: Tensor) -> tuple[Tensor, Tensor]:
    """The proxies, so short that no square overflows, and their lengths, ``(c' * K, 1)``."""
    lengths = torch.linalg.vector_norm(proxies.detach(), dim=-1)
    # On other devices, looking would be a device synchronisation.
    if lengths.device.type == "cpu" and not _sum_is_finite(lengths):
        # Dividing a proxy first changes its length only.
        proxies = proxies / proxies.detach().abs().amax(dim=-1, keepdim=True).clamp_min(1)
        lengths = torch.linalg.vector_norm(proxies.detach(), dim=-1)
    return proxies, lengths.view(-1, 1)


def _cosine_products(embeddings: Tensor, lengths: Tensor) -> "CosineProducts":
    queries, divisors, are_finite = _directions(embeddings)
    rounded = autocast_dtype(embeddings.device.type)
    if embeddings.dtype != torch.float32:  # autocast leaves float64 alone
        rounded = None
    kind = CosineProducts if rounded is None else RoundedCosineProducts
    inverse = lengths.clamp_min(EPS).reciprocal_()
    return kind(queries, divisors, lengths, inverse, are_finite, rounded or queries.dtype)


def _directions(embeddings: Tensor) -> tuple[Tensor, Tensor, bool]:
    """:func:`functional.normalize`, its divisors, ``(B, 1)``, and whether all is known to be finite; a faster way on a
    CPU unless squares overflow.
    """
    if embeddings.device.type == "cpu":
        lengths = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
        if _sum_is_finite(lengths):
            divisors = lengths.clamp_min_(EPS)
            return embeddings / divisors, divisors, True
    queries = functional.normalize(embeddings)
    return queries, (embeddings * queries).sum(dim=1, keepdim=True).clamp_min_(EPS), False


def _sum_is_finite(lengths: Tensor) -> bool:
    return float(lengths.sum()) < math.inf


@dataclass
class CosineProducts:
    """Cosine similarities, without normalized proxies in memory.

    The rows of the product are scaled by the inverse lengths of the proxies. The gradient of a vector has no part along
    the vector, since the cosine does not depend on lengths.
    """

    queries: Tensor
    """The embeddings after division by the divisors, ``(B, D)``."""
    divisors: Tensor
    """``(B, 1)``"""
    lengths: Tensor
    """Of all proxies, ``(C * K, 1)``."""
    inverse: Tensor
    """1 over the lengths."""
    are_finite: bool
    """Whether the embeddings are known to be finite."""
    dtype: torch.dtype
    """Of the matrix products with proxies."""
    scratch: Tensor | None = None

    @property
    def saved(self) -> tuple[Tensor, ...]:
        """For autograd to save beside the embeddings."""
        return self.queries, self.divisors, self.lengths, self.inverse

    def __call__(self, proxies: Tensor, rows: slice) -> Tensor:
        """The similarities ``(P, B)``, in new memory, to the proxies ``(P, D)``; ``rows``: their rows among all."""
        return torch.mm(proxies, self.queries.T).mul_(self.inverse[rows])

    def restored(self, embeddings: Tensor, saved: Sequence[Tensor]) -> "CosineProducts":
        """The same products, from the tensors that autograd saved."""
        queries, divisors, lengths, inverse = saved
        return type(self)(queries, divisors, lengths, inverse, self.are_finite, self.dtype)

    def add_gradients(
        self, proxies: Tensor, rows: slice, gradient: Tensor, grad_queries: Tensor | None, grad_proxies: Tensor
    ) -> Tensor:
        """Fills ``grad_proxies``; may overwrite ``gradient``, ``(P, B)``, and ``grad_queries``.

        Returns ``grad_queries``, the sum over the chunks so far (``None``: no chunk yet), with this chunk added.
        """
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
        """The gradient of the embeddings from the sum over all chunks; may overwrite it."""
        along = (grad_queries * self.queries).sum(dim=1, keepdim=True).div_(_or_infinite(self.divisors))
        return grad_queries.div_(self.divisors).addcmul_(self.queries, along, value=-1)

    def within_classes(self, proxies: Tensor, positions: Tensor | None = None) -> Tensor:
        """The similarities between the proxies of each class, ``(c', K, K)`` of ``(c', K, D)``, or of those at the
        positions, ``(n, K, K)``.
        """
        inverse = self.inverse.view(*proxies.shape[:2], 1)
        if positions is not None:
            inverse, proxies = inverse.index_select(0, positions), proxies.index_select(0, positions)
        directions = proxies * inverse
        return torch.bmm(directions, directions.mT)

    def among_samples(self) -> Tensor:
        """The similarities of the embeddings to each other, ``(B, B)``; 0 for those that are not finite."""
        queries = self._finite_queries()
        return torch.mm(queries, queries.T)

    def add_gradients_among_samples(self, gradient: Tensor, grad_queries: Tensor) -> Tensor:
        """``grad_queries``, which it may overwrite, with the gradient of :meth:`among_samples`, ``(B, B)``, added."""
        return grad_queries.addmm_(gradient + gradient.T, self._finite_queries())

    def _finite_queries(self) -> Tensor:
        return self.queries if self.are_finite else self.queries.nan_to_num()

    def _project_(self, grad_proxies: Tensor, proxies: Tensor, rows: slice, along: Tensor) -> None:
        """``along``: the products of gradients and proxies, ``(P, 1)``, overwritten."""
        lengths = _or_infinite(self.lengths[rows])
        grad_proxies.addcmul_(proxies, along.div_(lengths).div_(lengths), value=-1)


class RoundedCosineProducts(CosineProducts):
    """The matrix products in a less precise dtype, as under autocast; everything between them as precise as before.

    Proxies are normalized before they are rounded, since float16 cannot hold long ones.
    """

    @cached_property
    def rounded(self) -> Tensor:
        return self.queries.to(self.dtype)

    def __call__(self, proxies: Tensor, rows: slice) -> Tensor:
        directions = (proxies * self.inverse[rows]).to(self.dtype)
        return torch.mm(directions, self.rounded.T).to(proxies.dtype)

    def add_gradients(
        self, proxies: Tensor, rows: slice, gradient: Tensor, grad_queries: Tensor | None, grad_proxies: Tensor
    ) -> Tensor:
        directions = (proxies * self.inverse[rows]).to(self.dtype)
        gradient = gradient.to(self.dtype)
        of_chunk = torch.mm(gradient.T, directions).to(proxies.dtype)
        grad_proxies.copy_(torch.mm(gradient, self.rounded)).mul_(self.inverse[rows])
        along = (grad_proxies * proxies).sum(dim=1, keepdim=True)
        self._project_(grad_proxies, proxies, rows, along)
        return of_chunk if grad_queries is None else grad_queries.add_(of_chunk)


def _or_infinite(lengths: Tensor) -> Tensor:
    """Infinity instead of lengths up to EPS: such vectors are divided by a constant, and keep their whole gradient."""
    return torch.threshold(lengths, EPS, math.inf)


class DistanceCalls:
    """Similarities by any other distance of PML, differentiated by autograd; methods as above."""

    saved: tuple[Tensor, ...] = ()
    are_finite = False

    def __init__(self, queries: Tensor, distance: Any) -> None:
        self.queries, self.distance = queries, distance

    def __call__(self, proxies: Tensor, rows: slice) -> Tensor:
        return similarities(self.distance, self.queries, proxies).T.contiguous()

    def restored(self, embeddings: Tensor, saved: Sequence[Tensor]) -> "DistanceCalls":
        return DistanceCalls(embeddings, self.distance)

    def add_gradients(
        self, proxies: Tensor, rows: slice, gradient: Tensor, grad_queries: Tensor | None, grad_proxies: Tensor
    ) -> Tensor:
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in (self.queries, proxies)]
            similarity = similarities(self.distance, *inputs).T
        of_chunk, of_proxies = torch.autograd.grad(similarity, inputs, gradient, materialize_grads=True)
        grad_proxies.copy_(of_proxies)
        return of_chunk if grad_queries is None else grad_queries + of_chunk

    def grad_embeddings(self, grad_queries: Tensor) -> Tensor:
        return grad_queries

    def within_classes(self, proxies: Tensor, positions: Tensor | None = None) -> Tensor:
        return within_classes(self.distance, proxies if positions is None else proxies[positions])

    def among_samples(self) -> Tensor:
        return among_samples(self.distance, self.queries)

    def add_gradients_among_samples(self, gradient: Tensor, grad_queries: Tensor) -> Tensor:
        with torch.enable_grad():
            queries = self.queries.detach().requires_grad_()
            similarity = among_samples(self.distance, queries)
        (of_queries,) = torch.autograd.grad(similarity, queries, gradient, materialize_grads=True)
        return grad_queries + of_queries


Products = CosineProducts | DistanceCalls


def _refuse_learned(distance: Any, embeddings: Tensor, proxies: Tensor) -> None:
    learns = any(parameter.requires_grad for parameter in distance.parameters())
    if not type(distance).__module__.startswith("pytorch_metric_learning."):  # may hold tensors that are no parameters
        with torch.enable_grad():
            learns = learns or similarities(distance, embeddings[:1], proxies[:1]).requires_grad
    if learns:
        raise ValueError(
            "distance must not use tensors with requires_grad=True where the classes are computed some at a time, got "
            f"a {type(distance).__name__}: on one process, classes_per_chunk=num_classes computes all at once"
        )
