"""K-means over the samples of one class, by faiss where it is installed, else by scikit-learn."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from . import functional

JITTER = 0.1
"""Length of the noise on a repeated sample, relative to the sample."""

RESTARTS = 3
"""Runs of k-means from different starts, of which the best counts."""


def centroids(points: Tensor, count: int, spherical: bool) -> Tensor:
    """``(count, D)`` centroids of ``(N, D)`` points, N >= 1, the same under the same seed of torch.

    Fewer distinct points than centroids are repeated, with noise on the repetitions.

    >>> torch.manual_seed(0).initial_seed()
    0
    >>> points = torch.tensor([[0.0], [0.2], [5.0], [5.2]])
    >>> centroids(points, 2, spherical=False).sort(dim=0).values
    tensor([[0.1000],
            [5.1000]])
    """
    distinct = torch.unique(points, dim=0)
    if len(distinct) <= count:
        repeated = distinct[torch.arange(count) % len(distinct)]
        noise = F.normalize(torch.randn_like(repeated)) * repeated.norm(dim=1, keepdim=True)
        noise[: len(distinct)] = 0
        jittered: Tensor = repeated + JITTER * noise
        return jittered
    seed = int(torch.randint(2**31 - 1, ()))
    run = _by_scikit_learn if find_spec("faiss") is None else _by_faiss
    return torch.as_tensor(run(points, count, spherical, seed), dtype=points.dtype)


def _by_faiss(points: Tensor, count: int, spherical: bool, seed: int) -> Any:
    import faiss

    # Without the bounds, faiss would warn of small classes, and use only a sample of large ones.
    bounds = {"min_points_per_centroid": 1, "max_points_per_centroid": len(points)}
    kmeans = faiss.Kmeans(points.shape[1], count, nredo=RESTARTS, seed=seed, spherical=spherical, **bounds)
    kmeans.train(points.numpy())
    return kmeans.centroids


def _by_scikit_learn(points: Tensor, count: int, spherical: bool, seed: int) -> Any:
    from sklearn.cluster import KMeans

    return KMeans(count, n_init=RESTARTS, random_state=seed).fit(points.numpy()).cluster_centers_


def starts(points: Tensor, labels: Tensor, count: int, spherical: bool) -> tuple[Tensor, Tensor]:
    """Classes (P,) and centroids (P, K, D)."""
    classes = torch.unique(labels)
    found = []
    for c in tqdm(classes.tolist(), desc="k-means per class", delay=2):
        one = centroids(points[labels == c].cpu(), count, spherical)
        found.append(functional.normalize(one) if spherical else one)
    size = (0, count, points.shape[1])
    return classes, torch.stack(found).to(points.device) if found else points.new_empty(size)
