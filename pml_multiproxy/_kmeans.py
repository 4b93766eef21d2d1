"""K-means over the samples of each class, for many classes at a time."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from . import _autocast
from .functional import compute_dtype

JITTER = 0.1
"""Length of the noise on a repeated sample, relative to the sample."""

RESTARTS = 3
"""Runs of k-means from different starts, of which the best counts."""

MAX_STEPS = 100
"""Steps of one run at most."""

TOLERANCE = 1e-4
"""A run ends when a step lowers the inertia of no class by more than this part of it."""

NUMBERS_PER_BATCH = 2**18
"""So many coordinates of samples are held at a time, but at least one class: about what fits into a CPU's cache."""


@torch.no_grad()
def start(points: Tensor, labels: Tensor, count: int, spherical: bool) -> tuple[Tensor, Tensor]:
    """The centroids of the samples of each class, by k-means; the same under the same seed of torch.

    Starts from greedy k-means++, the best of :data:`RESTARTS`. Fewer distinct samples than centroids are repeated, with
    noise on the repetitions. Time is linear in the samples, since classes of similar size are done together.

    Args:
        points: ``(N, D)``, finite; with ``spherical``, no row is all zero.
        labels: ``(N,)``, long.
        count: :math:`K`, centroids per class.
        spherical: lengths of samples do not matter, and centroids get unit length.

    Returns:
        The classes that have samples, ``(P,)``, sorted, and their centroids, ``(P, K, D)``, in
        :func:`~pml_multiproxy.functional.compute_dtype` of the points.

    >>> torch.manual_seed(0).initial_seed()
    0
    >>> points = torch.tensor([[0.0], [7.0], [0.2], [5.0], [5.2]])
    >>> classes, centroids = start(points, torch.tensor([0, 3, 0, 0, 0]), count=2, spherical=False)
    >>> classes
    tensor([0, 3])
    >>> centroids[0].sort(dim=0).values
    tensor([[0.1000],
            [5.1000]])
    """
    rows = labels.argsort(stable=True)
    classes, sizes = torch.unique_consecutive(labels[rows], return_counts=True)
    firsts = sizes.cumsum(0) - sizes
    dtype = compute_dtype(points)
    centroids = points.new_empty((len(classes), count, points.shape[1]), dtype=dtype)
    with tqdm(total=len(classes), desc="k-means per class", delay=2) as bar, _autocast.without(points.device.type):
        for batch in _batches(sizes, NUMBERS_PER_BATCH // max(points.shape[1], 1)):
            places = torch.arange(int(sizes[batch[-1]]), device=labels.device)
            last = (sizes[batch] - 1).unsqueeze(1)
            # Shorter classes are padded by their last sample.
            samples = points[rows[firsts[batch].unsqueeze(1) + places.minimum(last)]].to(dtype)
            centroids[batch] = _centroids(samples, places <= last, count, spherical)
            bar.update(len(batch))
    return classes, centroids


def _batches(sizes: Tensor, rows: int) -> Iterator[Tensor]:
    """Positions of classes of similar size, ascending: as many as have at most so many rows when padded."""
    by_size = sizes.argsort(stable=True)
    first = 0
    for stop, size in enumerate(sizes[by_size].tolist()):
        if stop > first and (stop + 1 - first) * size > rows:
            yield by_size[first:stop]
            first = stop
    if first < len(sizes):
        yield by_size[first:]


def _centroids(samples: Tensor, real: Tensor, count: int, spherical: bool) -> Tensor:
    """``(G, K, D)`` of samples ``(G, n, D)``, of which those count that are ``real``, ``(G, n)``."""
    # Squares of large numbers would overflow, and those of small ones vanish.
    scale = _not_zero(samples.abs().amax(dim=(2,) if spherical else (1, 2), keepdim=True))
    samples = samples / scale
    if spherical:
        samples, scale = samples / samples.norm(dim=2, keepdim=True), samples.new_ones(())
    # From the mean of the class, distances by way of a product are as precise as the samples are.
    origin = (samples * real.unsqueeze(2)).sum(dim=1, keepdim=True) / real.sum(dim=1).view(-1, 1, 1)
    samples = samples - origin

    best, least = None, samples.new_full((len(samples),), math.inf)
    for _ in range(RESTARTS):
        centers, distinct = _plus_plus(samples, real, count)
        few = distinct < count
        moved, inertia = _lloyd(samples, real & ~few.unsqueeze(1), centers, origin, spherical)
        if few.any():
            moved = torch.where(few.view(-1, 1, 1), _repeated(centers, distinct, origin), moved)
        best = moved if best is None else torch.where((inertia < least).view(-1, 1, 1), moved, best)
        least = least.minimum(inertia)
        if not least.any():
            break
    assert best is not None
    best = best + origin
    return _directions(best, best) if spherical else best * scale


def _plus_plus(samples: Tensor, real: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Greedy k-means++: centers, ``(G, K, D)``, and how many, the first, are distinct samples: ``(G,)``."""
    classes = torch.arange(len(samples), device=samples.device)
    candidates = min(2 + int(math.log(count)), samples.shape[1])
    # Squared distances to the nearest center so far; at first, all samples are equally likely.
    nearest = real.to(samples.dtype)
    centers = samples[:, :1].repeat(1, count, 1)
    distinct = torch.zeros_like(classes)
    for k in range(min(count, samples.shape[1])):
        # Exponential variables of rate w: the sample of the least is drawn with a probability proportional to w.
        drawn = (torch.empty_like(nearest).exponential_() / nearest).topk(candidates, largest=False).indices
        drawn_samples = samples[classes.unsqueeze(1), drawn]
        # Without a product: only so is a sample at a distance of exactly 0 from its copies.
        distances = torch.cdist(samples, drawn_samples, compute_mode="donot_use_mm_for_euclid_dist").square()
        distances = distances * real.unsqueeze(2) if k == 0 else distances.minimum(nearest.unsqueeze(2))
        # A sample that cannot be drawn comes in where too few can.
        allowed = nearest.gather(1, drawn) > 0
        chosen = distances.sum(dim=1).masked_fill(~allowed, math.inf).argmin(dim=1)
        found = nearest.any(dim=1)
        centers[:, k] = torch.where(found.unsqueeze(1), drawn_samples[classes, chosen], centers[:, k])
        nearest = torch.where(found.unsqueeze(1), distances[classes, :, chosen], 0)
        distinct += found
    return centers, distinct


def _lloyd(samples: Tensor, real: Tensor, centers: Tensor, origin: Tensor, spherical: bool) -> tuple[Tensor, Tensor]:
    """The centers after k-means from there, and the inertia of each class, ``(G,)``; those without samples stay."""
    classes = torch.arange(len(samples), device=samples.device)
    before = samples.new_full((len(samples),), math.inf)
    squares = samples.square().sum(dim=2)
    numbers = torch.arange(centers.shape[1], device=samples.device).view(1, -1, 1)
    for _ in range(MAX_STEPS):
        products = torch.baddbmm(centers.square().sum(dim=2).unsqueeze(1), samples, centers.mT, alpha=-2)
        least, nearest = products.min(dim=2)
        distances = (least + squares).clamp_min(0) * real
        inertia = distances.sum(dim=1)
        members = (nearest.unsqueeze(1) == numbers) & real.unsqueeze(1)
        sizes = members.sum(dim=2)
        empty = sizes == 0
        strays = empty.any(dim=1) & (inertia > 0)
        if not ((inertia < before * (1 - TOLERANCE)) | strays).any():
            break
        before = inertia
        means = torch.bmm(members.to(samples.dtype), samples) / sizes.clamp_min(1).unsqueeze(2)
        if spherical:
            means = _directions(means + origin, centers + origin) - origin
        centers = torch.where(empty.unsqueeze(2), centers, means)
        # One center that lost all samples goes onto the sample that is farthest from its own.
        center = empty.to(torch.uint8).argmax(dim=1)
        farthest = samples[classes, distances.argmax(dim=1)]
        centers[classes, center] = torch.where(strays.unsqueeze(1), farthest, centers[classes, center])
    return centers, inertia


def _repeated(centers: Tensor, distinct: Tensor, origin: Tensor) -> Tensor:
    """The first centers, which are distinct, and instead of the others repetitions of those with noise."""
    number = torch.arange(centers.shape[1], device=centers.device)
    distinct = distinct.unsqueeze(1)
    repeated = centers.gather(1, (number % distinct).unsqueeze(2).expand_as(centers))
    noise = torch.randn_like(repeated)
    noise = noise * _not_zero((repeated + origin).norm(dim=2, keepdim=True)) / noise.norm(dim=2, keepdim=True)
    return torch.where((number < distinct).unsqueeze(2), repeated, repeated + JITTER * noise)


def _directions(vectors: Tensor, otherwise: Tensor) -> Tensor:
    """Of unit length; ``otherwise`` where the vector has none, as the mean of opposite samples."""
    lengths = vectors.norm(dim=-1, keepdim=True)
    return torch.where(lengths > 0, vectors / _not_zero(lengths), otherwise)


def _not_zero(lengths: Tensor) -> Tensor:
    return torch.where(lengths > 0, lengths, 1)
