"""Proxies start at the centroids of the samples of their class, by scikit-learn's k-means."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from . import _nearest, functional

JITTER = 0.1
"""Length of the noise on a repeated sample, relative to the sample."""

RESTARTS = 3
"""K-means runs from so many starts and keeps the best."""


@torch.no_grad()
def start_(proxies: Tensor, usage: Tensor, embeddings: Tensor, labels: Tensor, distance: Any) -> None:
    """Sets, in place, the proxies of the classes that have samples, and their usage: the share of samples of each.

    Args:
        proxies: ``(C, K, D)``.
        usage: ``(C, K)``.
        embeddings: ``(N, D)``, finite.
        labels: ``(N,)``, long, in ``[0, C)``.
        distance: of PML. If it normalizes, embeddings of zeros are left out and proxies get unit length.
    """
    points = embeddings.double()
    if distance.normalize_embeddings:
        has_direction = points.any(dim=1)
        embeddings, labels, points = embeddings[has_direction], labels[has_direction], points[has_direction]
        points = functional.normalize(points / points.abs().amax(dim=1, keepdim=True))
    classes, places = torch.unique(labels, return_inverse=True)
    centroids = proxies.new_empty(len(classes), *proxies.shape[1:])
    for place in tqdm(range(len(classes)), desc="k-means per class", delay=2):
        samples = points[places == place]
        found = torch.from_numpy(_centroids(samples.cpu().numpy(), proxies.shape[1])).to(points)
        if distance.normalize_embeddings:  # opposite samples have no mean direction
            has_direction = found.norm(dim=1, keepdim=True) > 1e-6
            found = functional.normalize(torch.where(has_direction, found, samples[0]))
        centroids[place] = found
    own = _nearest.to_target(distance, embeddings, places, centroids)
    if not own.isfinite().all():
        kind, largest = type(distance).__name__, float(embeddings.abs().max())
        raise ValueError(f"embeddings must be small enough for {kind} in {own.dtype}, got values up to {largest:.3g}")
    counts = usage.new_zeros(centroids.shape[:2])
    counts.index_put_((places, own.argmax(dim=1)), usage.new_ones(()), accumulate=True)
    usage[classes] = counts / counts.sum(dim=1, keepdim=True)
    proxies[classes] = centroids


def _centroids(points: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """``(K, D)``. Fewer distinct samples than centroids are repeated, with noise on the repetitions."""
    from sklearn.cluster import KMeans  # slow to import

    seed = int(torch.randint(2**31, ()))
    distinct = np.unique(points, axis=0)
    if len(distinct) > count:
        found: NDArray[np.float64] = KMeans(count, n_init=RESTARTS, random_state=seed).fit(points).cluster_centers_
        return found
    repeated = distinct[np.arange(count) % len(distinct)]
    noise = np.random.default_rng(seed).normal(size=repeated.shape)
    lengths = np.linalg.norm(repeated, axis=1, keepdims=True)
    noise *= JITTER * np.where(lengths > 0, lengths, 1) / np.linalg.norm(noise, axis=1, keepdims=True)
    noise[: len(distinct)] = 0
    return repeated + noise
