"""Similarities of a batch to some of the proxies, ``(P, B)``, and the gradient back through them.

``saved`` are the tensors that backward needs; ``restored`` makes the same of what autograd gives back of them. Among
them, ``parameters`` of the distance get a gradient.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _autocast, functional
from .._similarity import is_plain_cosine, oriented, similarities

EPS = 1e-12
"""The shortest length that a proxy is divided by, that of :func:`torch.nn.functional.normalize`."""


class Similarity(Protocol):
    parameters: tuple[Tensor, ...]
    saved: tuple[Tensor, ...]

    def __call__(self, proxies: Tensor, rows: slice) -> Tensor:
        """``(P, B)``, new memory, to the proxies ``(P, D)`` that are ``rows`` of all."""

    def restored(self, embeddings: Tensor, saved: Sequence[Tensor]) -> "Similarity": ...

    def add_gradients(
        self, proxies: Tensor, rows: slice, gradient: Tensor, grad_queries: Tensor, grad_proxies: Tensor
    ) -> None:
        """Adds to ``grad_queries`` and fills ``grad_proxies``; may overwrite ``gradient``, ``(P, B)``."""

    def grad_embeddings(self, grad_queries: Tensor) -> Tensor:
        """From the gradient of what :meth:`__call__` makes of the embeddings; may overwrite it."""

    def grad_parameters(self) -> list[Tensor]:
        """The gradients of the parameters of the distance, after those of all proxies were added."""


class CosineProducts:
    """Cosine similarities, without normalized proxies in memory.

    The rows of the product are scaled by the inverse lengths of the proxies. From the gradient of a vector, the part
    along the vector is taken away, which changes its length only.
    """

    def __init__(self, embeddings: Tensor, queries: Tensor, lengths: Tensor, inverse: Tensor) -> None:
        """``queries``: the embeddings at unit length; ``lengths`` of all proxies, ``(C * K, 1)``, and 1 over them."""
        self.embeddings, self.queries, self.lengths, self.inverse = embeddings, queries, lengths, inverse
        self.parameters: tuple[Tensor, ...] = ()
        self.saved: tuple[Tensor, ...] = (queries, lengths, inverse)
        self.scratch: Tensor | None = None

    def __call__(self, proxies: Tensor, rows: slice) -> Tensor:
        return torch.mm(proxies, self.queries.T).mul_(self.inverse[rows])

    def restored(self, embeddings: Tensor, saved: Sequence[Tensor]) -> "CosineProducts":
        return CosineProducts(embeddings, *saved)

    def add_gradients(
        self, proxies: Tensor, rows: slice, gradient: Tensor, grad_queries: Tensor, grad_proxies: Tensor
    ) -> None:
        gradient.mul_(self.inverse[rows])
        grad_queries.addmm_(gradient.T, proxies)
        torch.mm(gradient, self.queries, out=grad_proxies)
        if self.scratch is None:
            self.scratch = torch.empty_like(proxies)
        along = torch.mul(grad_proxies, proxies, out=self.scratch[: len(proxies)]).sum(dim=1, keepdim=True)
        grad_proxies.addcmul_(proxies, along.mul_(self._projection(rows)), value=-1)

    def grad_embeddings(self, grad_queries: Tensor) -> Tensor:
        shortest = functional.shortest(self.embeddings.dtype)
        length = (self.embeddings * self.queries).sum(dim=1, keepdim=True)
        along = (grad_queries * self.queries).sum(dim=1, keepdim=True).div_(_or_infinite(length, shortest))
        return grad_queries.div_(length.clamp_min(shortest)).addcmul_(self.queries, along, value=-1)

    def grad_parameters(self) -> list[Tensor]:
        return []

    def _projection(self, rows: slice) -> Tensor:
        return _or_infinite(self.lengths[rows], EPS).reciprocal_().square_()


class RoundedCosineProducts(CosineProducts):
    """The products in a dtype of less precision, as autocast has them; everything between them is as precise as before.

    Proxies are normalized before they are rounded, since some of these dtypes hold no long ones.
    """

    def __init__(
        self, embeddings: Tensor, queries: Tensor, lengths: Tensor, inverse: Tensor, dtype: torch.dtype
    ) -> None:
        super().__init__(embeddings, queries, lengths, inverse)
        self.rounded = queries.to(dtype)

    def __call__(self, proxies: Tensor, rows: slice) -> Tensor:
        directions = (proxies * self.inverse[rows]).to(self.rounded.dtype)
        return torch.mm(directions, self.rounded.T).to(proxies.dtype)

    def restored(self, embeddings: Tensor, saved: Sequence[Tensor]) -> "RoundedCosineProducts":
        queries, lengths, inverse = saved
        return RoundedCosineProducts(embeddings, queries, lengths, inverse, self.rounded.dtype)

    def add_gradients(
        self, proxies: Tensor, rows: slice, gradient: Tensor, grad_queries: Tensor, grad_proxies: Tensor
    ) -> None:
        directions = proxies * self.inverse[rows]
        gradient = gradient.to(self.rounded.dtype)
        grad_queries.add_(torch.mm(gradient.T, directions.to(gradient.dtype)))
        grad_proxies.copy_(torch.mm(gradient, self.rounded)).mul_(self.inverse[rows])
        along = (grad_proxies * proxies).sum(dim=1, keepdim=True)
        grad_proxies.addcmul_(proxies, along.mul_(self._projection(rows)), value=-1)


class DistanceCalls:
    """Similarities by any distance of PML, differentiated through its own autograd graph, its parameters included."""

    def __init__(
        self,
        queries: Tensor,
        distance: Any,
        autocast: _autocast.Autocast,
        names: Sequence[str],
        values: Sequence[Tensor],
    ) -> None:
        """``names`` and ``values`` of the parameters of the distance that want a gradient."""
        self.queries, self.distance, self.autocast, self.names = queries, distance, autocast, names
        self.parameters = self.saved = tuple(values)
        self.gradients: list[Tensor | None] = [None] * len(self.saved)

    def __call__(self, proxies: Tensor, rows: slice) -> Tensor:
        return self._call(self.queries, proxies, self.saved).contiguous()

    def restored(self, embeddings: Tensor, saved: Sequence[Tensor]) -> "DistanceCalls":
        # Not the parameters that the distance has now: torch.func.functional_call may have lent it others.
        return DistanceCalls(embeddings.to(self.queries.dtype), self.distance, self.autocast, self.names, saved)

    def add_gradients(
        self, proxies: Tensor, rows: slice, gradient: Tensor, grad_queries: Tensor, grad_proxies: Tensor
    ) -> None:
        similarity, inputs = self._with_graph(self.queries, proxies)
        for_queries, for_proxies, *rest = torch.autograd.grad(
            similarity, inputs, gradient, allow_unused=True, materialize_grads=True
        )
        grad_queries.add_(for_queries)
        grad_proxies.copy_(for_proxies)
        for i, more in enumerate(rest):
            before = self.gradients[i]
            self.gradients[i] = more if before is None else before + more

    def grad_embeddings(self, grad_queries: Tensor) -> Tensor:
        return grad_queries

    def grad_parameters(self) -> list[Tensor]:
        pairs = zip(self.gradients, self.saved, strict=True)
        return [torch.zeros_like(value) if gradient is None else gradient for gradient, value in pairs]

    def refuse_other_tensors(self, proxies: Tensor) -> None:
        """An error where the distance depends on a tensor whose gradient would silently be lost."""
        if type(self.distance).__module__.startswith("pytorch_metric_learning."):
            return
        similarity, inputs = self._with_graph(self.queries[:1], proxies[:1])
        if _leaves(similarity) - {id(tensor) for tensor in inputs}:
            raise ValueError(
                "distance must hold the tensors that it learns as its parameters, got a "
                f"{type(self.distance).__name__} that uses another tensor with requires_grad=True, which would get no "
                "gradient where classes are computed some at a time: make it a torch.nn.Parameter of the distance"
            )

    def _with_graph(self, queries: Tensor, proxies: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in (queries, proxies, *self.saved)]
            return self._call(inputs[0], inputs[1], inputs[2:]), inputs

    def _call(self, queries: Tensor, proxies: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        # Backward runs outside of the autocast of forward, but has to compute the same.
        with self.autocast.again():
            if not parameters:
                return similarities(self.distance, queries, proxies).T
            lent = dict(zip(self.names, parameters, strict=True))
            values = torch.func.functional_call(self.distance, lent, (queries, proxies))
            return oriented(self.distance, values).to(queries.dtype).T


def _leaves(tensor: Tensor) -> set[int]:
    """The identities of the tensors that a backward pass would end at."""
    found, seen, nodes = set(), set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes.extend(parent for parent, _ in node.next_functions)
    return found


def _or_infinite(lengths: Tensor, shortest: float) -> Tensor:
    """Instead of lengths up to the shortest: those vectors were divided by a constant, so that their length counts."""
    return F.threshold(lengths, shortest, math.inf)


def prepare(distance: Any, embeddings: Tensor, proxies: Tensor) -> tuple[Similarity, Tensor]:
    """The similarity by the distance and what is going on around it, and the proxies that it is to be called with.

    Args:
        distance: of PML.
        embeddings: ``(B, D)``.
        proxies: ``(c', K, D)``, of the dtype to compute in.
    """
    dtype, autocast = proxies.dtype, _autocast.current(embeddings.device.type)
    if not has_products(distance):
        named = [(name, parameter) for name, parameter in distance.named_parameters() if parameter.requires_grad]
        names, values = [name for name, _ in named], [parameter for _, parameter in named]
        calls = DistanceCalls(embeddings.detach().to(dtype), distance, autocast, names, values)
        calls.refuse_other_tensors(proxies.detach().flatten(0, 1))
        return calls, proxies
    lengths = _lengths(proxies)
    # Elsewhere than on a CPU, looking would be a device synchronisation.
    if lengths.device.type == "cpu" and not float(lengths.sum()) < math.inf:
        # Squares overflow. Dividing a proxy first changes its length only.
        proxies = proxies / proxies.detach().abs().amax(dim=-1, keepdim=True).clamp_min(1)
        lengths = _lengths(proxies)
    embeddings = embeddings.detach()
    queries, inverse = functional.normalize(embeddings, dtype), lengths.clamp_min(EPS).reciprocal_()
    if autocast.dtype is not None and dtype == torch.float32:  # autocast leaves float64 alone
        return RoundedCosineProducts(embeddings, queries, lengths, inverse, autocast.dtype), proxies
    return CosineProducts(embeddings, queries, lengths, inverse), proxies


def has_products(distance: Any) -> bool:
    """Whether the similarities are cosines, of which nothing is recorded that takes normalized proxies in memory."""
    return is_plain_cosine(distance) and not distance.collect_stats


def _lengths(proxies: Tensor) -> Tensor:
    """``(C * K, 1)``."""
    lengths: Tensor = torch.linalg.vector_norm(proxies.detach(), dim=-1)
    return lengths.view(-1, 1)
