"""The similarity of embeddings and proxies by a distance of PML: one rule for all of the package."""

from typing import Any

from pytorch_metric_learning.distances import CosineSimilarity
from torch import Tensor

from . import functional


def is_plain_cosine(distance: Any) -> bool:
    """Whether it is PML's cosine itself, which can be computed in other ways to the same result."""
    # Not isinstance: a subclass may compute something else.
    return type(distance) is CosineSimilarity and bool(distance.p == 2 and distance.power == 1)


def similarities(distance: Any, embeddings: Tensor, proxies: Tensor) -> Tensor:
    """``(B, P)`` of ``(B, D)`` and ``(P, D)``: larger is nearer, in at least ``float32``, also where autocast has the
    products in less.
    """
    dtype = functional.compute_dtype(embeddings, proxies)
    if is_plain_cosine(distance):
        queries, references = functional.normalize(embeddings, dtype), functional.normalize(proxies, dtype)
        distance.set_default_stats(embeddings, proxies, queries, references)
        return (queries @ references.T).to(dtype)
    return oriented(distance, distance(embeddings.to(dtype), proxies.to(dtype))).to(dtype)


def oriented(distance: Any, values: Tensor) -> Tensor:
    """Of what the distance returns: larger is nearer."""
    return values if distance.is_inverted else -values


def points(distance: Any, embeddings: Tensor) -> Tensor:
    """Where proxies should lie that stand for these embeddings."""
    return functional.normalize(embeddings) if distance.normalize_embeddings else embeddings
