"""The similarity of embeddings and proxies by a distance of PML: one rule for all of the package."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
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
    """``(B, P)`` of ``(B, D)`` and ``(P, D)``: larger is nearer. At least ``float32``, also under autocast."""
    dtype = functional.compute_dtype(embeddings, proxies)
    if is_plain_cosine(distance):
        queries, references = functional.normalize(embeddings, dtype), functional.normalize(proxies, dtype)
        return (queries @ references.T).to(dtype)
    embeddings, proxies = embeddings.to(dtype), proxies.to(dtype)
    if type(distance) is LpDistance:
        return -lp_distances(distance, *map(distance.maybe_normalize, (embeddings, proxies)))
    return oriented(distance, distance(embeddings, proxies)).to(dtype)


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
        of_all_pairs = torch.unflatten(distance(some.flatten(0, 1)), 1, some.shape[:2])
        of_all_pairs = torch.unflatten(of_all_pairs, 0, some.shape[:2])
        blocks.append(of_all_pairs.diagonal(dim1=0, dim2=2).permute(2, 0, 1))
    return oriented(distance, torch.cat(blocks))


def oriented(distance: Any, values: Tensor) -> Tensor:
    """Values that the distance returned, negated if needed: larger is nearer."""
    return values if distance.is_inverted else -values


def is_recorded_at_once(distance: Any) -> bool:
    """Whether :func:`similarities` leaves the statistics of the distance to :func:`record_norms`."""
    return is_plain_cosine(distance) or type(distance) is LpDistance


@torch.no_grad()
def record_norms(distance: Any, embeddings: Tensor, proxies: Tensor) -> None:
    """Records the statistics of one call of the distance with all proxies, ``(P, D)``."""
    normalized = distance.maybe_normalize(embeddings), distance.maybe_normalize(proxies)
    distance.set_default_stats(embeddings, proxies, *normalized)


class Autocast(NamedTuple):
    """The autocast of a kind of device."""

    device_type: str
    dtype: torch.dtype | None
    """``None``: autocast is off."""

    @staticmethod
    def now(device_type: str) -> "Autocast":
        enabled = _has_autocast(device_type) and torch.is_autocast_enabled(device_type)
        return Autocast(device_type, torch.get_autocast_dtype(device_type) if enabled else None)

    def again(self) -> AbstractContextManager[object]:
        if not _has_autocast(self.device_type):
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    is_on = Autocast.now(device_type).dtype is not None
    return Autocast(device_type, None).again() if is_on else contextlib.nullcontext()


def _has_autocast(device_type: str) -> bool:
    # Some kinds of device have none; PyTorch 2.5 cannot compile the question, so only those others are asked.
    return device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
