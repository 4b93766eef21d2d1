"""Groups in the samples of one class: clusters around its proxies, merged until they are far apart.

All distances are squared and follow from the size, mean and variance of each cluster, so that no matrix of all pairs of
samples is needed.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.spatial.distance import cdist

Floats = NDArray[np.float64]
Integers = NDArray[Any]

LEAST_EXPLAINED = 0.6
"""The groups have to explain at least this share of the spread that the proxies explain. Chosen on validation parts:
without such a bound, kinds of tomato leaves are joined; at 0.8, pepper leaves fall apart."""

LEAST_OF_PROXIES = 0.3
"""Where all proxies together explain less, there is nothing to tell apart, and the class is one group."""


class Clusters(NamedTuple):
    sizes: Floats
    means: Floats
    variances: Floats


class Found(NamedTuple):
    """The groups of one class, numbered from 0, the largest first."""

    group: Integers
    """``(N,)``"""
    of_proxy: Integers
    """``(K,)``: the group that most samples of each proxy are in, -1 for proxies that are nearest to no sample."""
    nearest: list[Integers]
    """The places of the samples of each group, those nearest to its mean first."""


def find(points: Floats, proxies: Integers, per_class: int, number: int | None) -> Found:
    """The groups of the samples of one class.

    Args:
        points: ``(N, D)``.
        proxies: ``(N,)``, in ``[0, K)``: the proxy that each is nearest to.
        per_class: ``K``.
        number: of groups; ``None``: where the silhouette is highest among those that explain enough.
    """
    from sklearn.cluster import KMeans  # slow to import

    clusters = _join(Clusters(np.ones(len(points)), points, np.zeros(len(points))), proxies)
    steps = list(_merge(clusters))
    centers = _join(clusters, _best(clusters, steps) if number is None else steps[-number:][0]).means
    # Proxies cut groups at boundaries of their own, so samples move to the nearest group.
    fitted = KMeans(len(centers), init=centers, n_init=1).fit(points)
    names, sizes = np.unique(fitted.labels_, return_counts=True)
    names = names[np.argsort(-sizes, kind="stable")]
    group = np.argsort(names)[np.unique(fitted.labels_, return_inverse=True)[1]]
    votes = np.zeros((per_class, len(names)))
    np.add.at(votes, (proxies, group), 1)
    to_center = np.linalg.norm(points - fitted.cluster_centers_[fitted.labels_], axis=1)
    order = np.argsort(to_center, kind="stable")
    nearest = [order[group[order] == place] for place in range(len(names))]
    return Found(group, np.where(votes.any(axis=1), votes.argmax(axis=1), -1), nearest)


def _best(clusters: Clusters, steps: list[Integers]) -> Integers:
    joined = [_join(clusters, step) for step in steps]  # the last step joins the whole class
    shares = np.array([_explained(groups, joined[-1]) for groups in joined])
    if shares.max() < LEAST_OF_PROXIES:
        return steps[-1]
    enough = np.flatnonzero(shares >= LEAST_EXPLAINED * shares.max())
    return steps[max(enough, key=lambda i: _silhouette(clusters, steps[i], joined[i]))]


def _merge(clusters: Clusters) -> Iterator[Integers]:
    """Ward's linkage: which cluster each is part of, ``(K,)``, before and after each merger, from ``K`` to one."""
    sizes, parts = clusters.sizes.copy(), np.arange(len(clusters.sizes))
    costs = cdist(clusters.means, clusters.means, "sqeuclidean") * sizes[:, None] * sizes / (sizes[:, None] + sizes)
    np.fill_diagonal(costs, np.inf)
    yield parts
    for _ in sizes[1:]:
        kept, gone = np.unravel_index(costs.argmin(), costs.shape)
        of_both = (sizes[kept] + sizes) * costs[kept] + (sizes[gone] + sizes) * costs[gone] - sizes * costs[kept, gone]
        row = of_both / (sizes[kept] + sizes[gone] + sizes)
        row[[kept, gone]] = np.inf
        costs[kept], costs[:, kept] = row, row
        costs[gone], costs[:, gone] = np.inf, np.inf
        sizes[kept] += sizes[gone]
        parts = np.where(parts == gone, kept, parts)
        yield parts


def _explained(joined: Clusters, whole: Clusters) -> float:
    """By which share the mean squared distance of two samples falls from the whole class to a single group."""
    several = joined.sizes > 1
    if not several.any():
        return 0.0  # no pairs to look at
    pairs = joined.variances[several] * joined.sizes[several] / (joined.sizes[several] - 1)
    of_class = whole.variances * whole.sizes / (whole.sizes - 1)
    return float(1 - np.average(pairs, weights=joined.sizes[several]) / max(of_class[0], np.finfo(float).tiny))


def _silhouette(clusters: Clusters, parts: Integers, joined: Clusters) -> float:
    """Mean over the samples of how much nearer they are to the others of their group than to the next group."""
    own = np.unique(parts, return_inverse=True)[1]
    if len(joined.sizes) == 1:
        return -1.0
    distances = cdist(clusters.means, joined.means, "sqeuclidean") + clusters.variances[:, None]
    places, sizes = np.arange(len(own)), joined.sizes[own]
    to_own = distances[places, own] * sizes / np.maximum(sizes - 1, 1)  # without the sample itself
    distances[places, own] = np.inf
    to_next = distances.min(axis=1)
    values = (to_next - to_own) / np.maximum(np.maximum(to_next, to_own), np.finfo(float).tiny)
    return float(np.average(np.where(sizes > 1, values, 0), weights=clusters.sizes))


def _join(clusters: Clusters, parts: Integers) -> Clusters:
    """The clusters that those with the same number in ``parts`` form together, in the order of the numbers."""
    own = np.unique(parts, return_inverse=True)[1]
    sizes: Floats = np.bincount(own, clusters.sizes).astype(np.float64)
    means = csr_array((clusters.sizes, (own, np.arange(len(own))))) @ clusters.means / sizes[:, None]
    spread = clusters.variances + ((clusters.means - means[own]) ** 2).sum(axis=1)
    return Clusters(sizes, means, np.bincount(own, clusters.sizes * spread) / sizes)
