"""The similarity of embeddings and proxies by a distance of PML: one rule for all of the package."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, DotProductSimilarity, LpDistance
from torch import Tensor

from . import functional

ROWS_PER_CALL = 32
"""Most distances see this many proxies at a time within classes, but at least one class: more would need fewer calls,
and memory for more similarities between classes that nobody asked for."""


def is_plain_cosine(distance: Any) -> bool:
    """Whether it is PML's cosine itself, for which faster ways give the same result."""
    # Not isinstance: a subclass may compute something else.
    return type(distance) is CosineSimilarity and bool(distance.p == 2 and distance.power == 1)


def similarities(distance: Any, embeddings: Tensor, proxies: Tensor) -> Tensor:
    """``(B, P)`` of ``(B, D)`` and ``(P, D)``: larger is nearer. At least ``float32``; under autocast, only the matrix
    product of the cosine rounds more.
    """
    dtype = functional.compute_dtype(embeddings, proxies)
    if is_plain_cosine(distance):
        queries, references = functional.normalize(embeddings, dtype), functional.normalize(proxies, dtype)
        return (queries @ references.T).to(dtype)
    embeddings, proxies = embeddings.to(dtype), proxies.to(dtype)
    if type(distance) is LpDistance:
        return -lp_distances(distance, *map(distance.maybe_normalize, (embeddings, proxies)))
    with without_autocast(embeddings.device.type):
        return _oriented(distance, _values(distance, embeddings, proxies)).to(dtype)


def lp_distances(distance: LpDistance, queries: Tensor, references: Tensor) -> Tensor:
    """The distances of vectors that are normalized already; also of batches of vectors."""
    # cdist's way by a matrix product would give near vectors a distance, and a gradient, made of rounding errors.
    distances = torch.cdist(queries, references, p=distance.p, compute_mode="donot_use_mm_for_euclid_dist")
    if distance.power == 1:
        return distances
    # A power below 1 has an infinite slope at 0.
    same = distances == 0
    powers: Tensor = distances.masked_fill(same, 1) ** distance.power
    return powers.masked_fill(same, 0)


def keep_short(distance: Any, vectors: Tensor, source: torch.dtype) -> Tensor:
    """Vectors that were cast from the dtype ``source``; :func:`functional.keep_short` where lengths do not matter."""
    return functional.keep_short(vectors, source) if is_plain_cosine(distance) else vectors


def among_samples(distance: Any, embeddings: Tensor) -> Tensor:
    """``(B, B)`` of ``(B, D)``. Embeddings that are not finite give finite values of no meaning, and get no
    gradient.
    """
    # Some distances are not finite between vectors of zeros.
    any_vector = torch.linspace(1, 2, embeddings.shape[1], dtype=embeddings.dtype, device=embeddings.device)
    embeddings = torch.where(not_finite(embeddings).unsqueeze(1), any_vector, embeddings)
    return similarities(distance, embeddings, embeddings)


def not_finite(embeddings: Tensor) -> Tensor:
    """Which embeddings are not finite, ``(B,)``."""
    return (embeddings.detach() * 0).sum(dim=1) != 0  # fewer operations than isfinite


def within_classes(distance: Any, proxies: Tensor) -> Tensor:
    """``(c, K, K)`` of ``(c, K, D)``: the similarities between the proxies of each class."""
    dtype, rows = functional.compute_dtype(proxies), proxies.flatten(0, 1)
    # Not isinstance: a subclass may compute something else.
    if type(distance) in (CosineSimilarity, DotProductSimilarity) and distance.p == 2 and distance.power == 1:
        points = functional.normalize(rows) if distance.normalize_embeddings else rows.to(dtype)
        points = points.view(proxies.shape)
        return torch.bmm(points, points.mT)
    if type(distance) is LpDistance:
        points = distance.maybe_normalize(rows.to(dtype)).view(proxies.shape)
        return -lp_distances(distance, points, points)
    blocks, per_class = [], proxies.shape[1]
    # Splitting once keeps backward from making a gradient of full size for each chunk, as slicing would.
    for some in torch.split(proxies.to(dtype), max(ROWS_PER_CALL // per_class, 1)):
        rows = some.flatten(0, 1)
        of_all_pairs = torch.unflatten(_values(distance, rows, rows), 1, some.shape[:2])
        of_all_pairs = torch.unflatten(of_all_pairs, 0, some.shape[:2])
        blocks.append(of_all_pairs.diagonal(dim1=0, dim2=2).permute(2, 0, 1))
    return _oriented(distance, torch.cat(blocks))


def _values(distance: Any, queries: Tensor, references: Tensor) -> Tensor:
    """The values of the distance for all pairs, without its statistics."""
    if type(distance).forward is not BaseDistance.forward:
        return torch.as_tensor(distance(queries, references))
    values: Tensor = distance.compute_mat(distance.maybe_normalize(queries), distance.maybe_normalize(references))
    return values if distance.power == 1 else values**distance.power


def _oriented(distance: Any, values: Tensor) -> Tensor:
    return values if distance.is_inverted else -values


@torch.no_grad()
def record_norms(distance: Any, embeddings: Tensor, proxies: Tensor) -> None:
    """Records the statistics of one call of the distance with all proxies, ``(P, D)``, if it collects any."""
    if not distance.collect_stats:
        return
    normalized = distance.maybe_normalize(embeddings), distance.maybe_normalize(proxies)
    distance.set_default_stats(embeddings, proxies, *normalized)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of autocast on a kind of device; ``None``: it is off."""
    # Some kinds of device have no autocast; PyTorch 2.5 cannot compile the question, so only those are asked.
    available = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return torch.get_autocast_dtype(device_type) if available and torch.is_autocast_enabled(device_type) else None


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    is_on = autocast_dtype(device_type) is not None
    return torch.autocast(device_type, enabled=False) if is_on else contextlib.nullcontext()
