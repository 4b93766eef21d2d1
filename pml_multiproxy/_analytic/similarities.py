"""Similarities of a batch to some of the proxies, ``(P, B)``, and the gradient back through them.

``saved`` are the tensors that backward needs; ``restored`` makes the same of what autograd gives back of them. Among
them, ``parameters`` of the distance get a gradient.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from .._similarity import is_plain_cosine
from . import cosine_products, distance_calls


class Similarity(Protocol):
    parameters: tuple[Tensor, ...]
    saved: tuple[Tensor, ...]

    def __call__(self, proxies: Tensor, rows: slice) -> Tensor:
        """``(P, B)``, new memory, to the proxies ``(P, D)`` that are ``rows`` of all."""

    def restored(self, embeddings: Tensor, saved: Sequence[Tensor]) -> "Similarity": ...

    def add_gradients(
        self, proxies: Tensor, rows: slice, gradient: Tensor, grad_queries: Tensor | None, grad_proxies: Tensor
    ) -> Tensor:
        """Fills ``grad_proxies``; may overwrite ``gradient``, ``(P, B)``, and ``grad_queries``.

        Returns ``grad_queries``, the sum over the chunks before (``None``: there was none), with that of this one.
        """

    def grad_embeddings(self, grad_queries: Tensor) -> Tensor:
        """From the gradient of what :meth:`__call__` makes of the embeddings; may overwrite it."""

    def grad_parameters(self) -> list[Tensor]:
        """The gradients of the parameters of the distance, after those of all proxies were added."""


def prepare(distance: Any, embeddings: Tensor, proxies: Tensor) -> tuple[Similarity, Tensor]:
    """The similarity by the distance and what is going on around it, and the proxies that it is to be called with.

    Args:
        distance: of PML.
        embeddings: ``(B, D)``.
        proxies: ``(c', K, D)``, of the dtype to compute in.
    """
    if has_products(distance):
        return cosine_products.prepare(embeddings, proxies)
    return distance_calls.prepare(distance, embeddings, proxies)


def has_products(distance: Any) -> bool:
    """Whether the similarities are cosines, of which nothing is recorded that takes normalized proxies in memory."""
    return is_plain_cosine(distance) and not distance.collect_stats
