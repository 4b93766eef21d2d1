"""Proxies start at the centroids of the samples of their class, by k-means."""

from typing import Any

import torch
from torch import Tensor

from . import _kmeans, _nearest


@torch.no_grad()
def start_(proxies: Tensor, usage: Tensor, embeddings: Tensor, labels: Tensor, distance: Any) -> None:
    """Sets, in place, the proxies of the classes that have samples, and their usage: the share of samples of each.

    Args:
        proxies: ``(C, K, D)``.
        usage: ``(C, K)``.
        embeddings: ``(N, D)``, finite.
        labels: ``(N,)``, long, in ``[0, C)``.
        distance: of PML.
    """
    directions = distance.normalize_embeddings
    if directions:
        has_one = embeddings.any(dim=1)
        embeddings, labels = embeddings[has_one], labels[has_one]
    classes, centroids = _kmeans.start(embeddings, labels, proxies.shape[1], spherical=directions)
    centroids, places = centroids.to(proxies.dtype), torch.searchsorted(classes, labels)
    own = _nearest.to_target(distance, embeddings, places, centroids)
    if not own.isfinite().all():
        raise ValueError(
            f"embeddings must be small enough for {type(distance).__name__} in {own.dtype}, got values up to "
            f"{float(embeddings.abs().max()):.3g}, whose distances to proxies in {centroids.dtype} overflow"
        )
    counts = usage.new_zeros(centroids.shape[:2])
    counts.index_put_((places, own.argmax(dim=1)), usage.new_ones(()), accumulate=True)
    usage[classes] = counts / counts.sum(dim=1, keepdim=True)
    proxies[classes] = centroids
