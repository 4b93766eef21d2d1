"""Similarities by any distance of PML, differentiated through its own autograd graph."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _autocast
from .._similarity import oriented, similarities


def prepare(distance: Any, embeddings: Tensor, proxies: Tensor) -> tuple["DistanceCalls", Tensor]:
    """As :func:`similarities.prepare`."""
    autocast = _autocast.current(embeddings.device.type)
    named = {name: parameter for name, parameter in distance.named_parameters() if parameter.requires_grad}
    queries = embeddings.detach().to(proxies.dtype)
    calls = DistanceCalls(queries, distance, autocast, list(named), list(named.values()))
    calls.refuse_other_tensors(proxies.detach().flatten(0, 1))
    return calls, proxies


class DistanceCalls:
    """Similarities by calls of the distance; its parameters get a gradient, too."""

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
        self, proxies: Tensor, rows: slice, gradient: Tensor, grad_queries: Tensor | None, grad_proxies: Tensor
    ) -> Tensor:
        similarity, inputs = self._with_graph(self.queries, proxies)
        for_queries, for_proxies, *rest = torch.autograd.grad(
            similarity, inputs, gradient, allow_unused=True, materialize_grads=True
        )
        grad_proxies.copy_(for_proxies)
        for i, more in enumerate(rest):
            before = self.gradients[i]
            self.gradients[i] = more if before is None else before + more
        return for_queries if grad_queries is None else grad_queries + for_queries

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
