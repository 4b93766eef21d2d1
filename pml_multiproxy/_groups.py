"""Groups in the samples of one class: its proxies are merged step by step, and one of the steps is chosen.

Distances are mean squared distances between all samples of two clusters. They follow from the mean and the variance of
each cluster, so that no matrix of all pairs of samples is needed.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[Any]


def find(points: Floats, proxies: Integers, number: int | None) -> list[Integers]:
    """The places of the samples of each group, the largest group first.

    Args:
        points: ``(N, D)``, samples of one class.
        proxies: ``(N,)``, the proxy that each is nearest to.
        number: of groups; ``None``: the step with the highest silhouette.
    """
    steps = list(merge(points, proxies))
    chosen = max(steps, key=lambda step: silhouette(points, step)) if number is None else steps[-number:][0]
    groups = [np.flatnonzero(chosen == name) for name in np.unique(chosen)]
    return sorted(groups, key=len, reverse=True)


def wilson(mean: float, size: int, z: float) -> tuple[float, float]:
    """The interval of a share around ``mean`` of ``size`` samples."""
    center = (mean + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z * np.sqrt(mean * (1 - mean) / size + z**2 / (4 * size**2)) / (1 + z**2 / size)
    return float(max(center - half, 0)), float(min(center + half, 1))


def normal_interval(values: Floats, z: float) -> tuple[float, float]:
    """The interval of the mean of ``values``; unbounded for a single one."""
    half = z * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.inf
    return float(values.mean() - half), float(values.mean() + half)


def merge(points: Floats, clusters: Integers) -> Iterator[Integers]:
    """Average linkage: the cluster of each sample before and after each merger, ``(N,)``, from all clusters to one."""
    names, clusters = np.unique(clusters, return_inverse=True)
    sizes, means, variances = _summaries(points, clusters)
    distances = _between(means, variances, means, variances)
    np.fill_diagonal(distances, np.inf)
    yield clusters
    for _ in names[1:]:
        kept, gone = sorted(np.unravel_index(distances.argmin(), distances.shape))
        clusters = np.where(clusters == gone, kept, clusters)
        total = sizes[kept] + sizes[gone]
        row = (sizes[kept] * distances[kept] + sizes[gone] * distances[gone]) / total
        sizes[kept] = total
        distances[kept], distances[:, kept] = row, row
        distances[gone], distances[:, gone] = np.inf, np.inf
        distances[kept, kept] = np.inf
        yield clusters


def silhouette(points: Floats, clusters: Integers) -> float:
    """Mean silhouette by squared distances, from -1 to 1. -1 for a single cluster, which has none."""
    names, clusters = np.unique(clusters, return_inverse=True)
    if len(names) == 1:
        return -1.0
    sizes, means, variances = _summaries(points, clusters)
    distances = _between(points, np.zeros(len(points)), means, variances)
    samples = np.arange(len(points))
    others = sizes[clusters] - 1
    own = distances[samples, clusters] * sizes[clusters] / np.maximum(others, 1)
    distances[samples, clusters] = np.inf
    nearest = distances.min(axis=1)
    values = (nearest - own) / np.maximum(np.maximum(nearest, own), np.finfo(float).tiny)
    return float(np.where(others > 0, values, 0).mean())


def _summaries(points: Floats, clusters: Integers) -> tuple[Floats, Floats, Floats]:
    """Sizes, means and variances of clusters that are numbered without gaps."""
    sizes = np.bincount(clusters).astype(float)
    sums = np.zeros((len(sizes), points.shape[1]))
    np.add.at(sums, clusters, points)
    means = sums / sizes[:, None]
    squares = np.bincount(clusters, (points**2).sum(axis=1)) / sizes
    return sizes, means, np.maximum(squares - (means**2).sum(axis=1), 0)


def _between(means: Floats, variances: Floats, others: Floats, of_others: Floats) -> Floats:
    """Mean squared distances between the samples of clusters with these means and variances."""
    squared = (means**2).sum(axis=1)[:, None] - 2 * means @ others.T + (others**2).sum(axis=1)
    result: Floats = np.maximum(squared, 0) + variances[:, None] + of_others
    return result
