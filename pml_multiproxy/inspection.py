r"""What the proxies of a trained loss stand for: the samples nearest to each, and how well they match fine labels.

:func:`nearest_samples` finds samples to look at. If you know fine labels of some samples, :func:`cluster_scores` says
how well the nearest proxies recover them.

Embeddings and labels may be NumPy arrays or tensors. Both functions leave the parameters, the mode and the usage of the
loss as they are.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _check as check
from . import _nearest as nearest
from .losses import MultiProxyEntropyLoss, check_loss

__all__ = ["ClusterScores", "Scores", "cluster_scores", "nearest_samples"]

Array = Tensor | NDArray[Any]


@torch.no_grad()
def nearest_samples(loss_func: MultiProxyEntropyLoss, embeddings: Array, labels: Array, count: int) -> Tensor:
    """The samples nearest to each proxy among the samples of its class, nearest first.

    A sample can be among the nearest of several proxies. To get the one proxy that it belongs to, call
    :meth:`~pml_multiproxy.losses.MultiProxyEntropyLoss.assign`.

    Args:
        loss_func: the trained loss.
        embeddings: ``(B, D)``, finite.
        labels: ``(B,)``, integers in ``[0, C)``.
        count: how many samples to find for each proxy, at least 1.

    Returns:
        ``(C, K, count)``, long: indices of the samples, padded with -1 for classes with fewer samples.

    Raises:
        TypeError, ValueError: if an argument has the wrong type, shape, dtype, device or range.

    >>> loss_func = MultiProxyEntropyLoss(num_classes=2, embedding_size=2, proxies_per_class=2)
    >>> loss_func.proxies.data = torch.eye(2).repeat(2, 1, 1)
    >>> embeddings = torch.tensor([[1.0, 0.2], [0.1, 1.0], [1.0, 0.1]])
    >>> nearest_samples(loss_func, embeddings, torch.tensor([0, 0, 0]), count=2)
    tensor([[[ 2,  0],
             [ 1,  0]],
    <BLANKLINE>
            [[-1, -1],
             [-1, -1]]])
    """
    points, classes = _checked_samples(loss_func, embeddings, labels)
    result = classes.new_full((*loss_func.proxies.shape[:2], check.positive_int("count", count)), -1)
    similarities = nearest.to_target(loss_func.distance, points, classes, loss_func.proxies)
    order = classes.argsort(stable=True)
    present, sizes = torch.unique_consecutive(classes[order], return_counts=True)
    for c, samples in zip(present.tolist(), torch.split(order, sizes.tolist()), strict=True):
        nearest_first = similarities[samples].argsort(dim=0, descending=True, stable=True)[:count]
        result[c, :, : len(nearest_first)] = samples[nearest_first].T
    return result


class Scores(NamedTuple):
    """How well an assignment matches fine labels. All scores are 1 if both split the samples alike.

    >>> Scores(accuracy=0.75, nmi=0.5, ari=0.25).nmi
    0.5
    """

    accuracy: float
    """ACC: the share of samples whose proxy is matched to their fine label, under the best one-to-one matching of
    proxies and fine labels. With more proxies than fine labels, it is low even if no proxy mixes fine labels."""

    nmi: float
    """Normalized mutual information: mutual information divided by the mean of the two entropies, from 0 to 1. It is
    not corrected for chance and grows with the number of proxies."""

    ari: float
    """Adjusted Rand index: 0 on average for a random assignment."""


class ClusterScores(NamedTuple):
    """The result of :func:`cluster_scores`.

    >>> ClusterScores(mean=Scores(0.5, 0.5, 0.5), per_class={7: Scores(0.5, 0.5, 0.5)}).mean.ari
    0.5
    """

    mean: Scores
    """Mean over the classes, all with the same weight."""

    per_class: dict[int, Scores]
    """Scores of each class that has a sample with a known fine label."""


def cluster_scores(
    loss_func: MultiProxyEntropyLoss, embeddings: Array, labels: Array, fine_labels: Array
) -> ClusterScores:
    """How well the nearest proxies recover fine labels, within each class.

    Each class is scored alone, so the coarse labels, which the training knew, do not raise the scores. scipy's
    ``linear_sum_assignment`` finds the matching for ACC; scikit-learn computes NMI and ARI. For a class with a single
    fine label, NMI and ARI are 1 if all its samples share one proxy, and 0 otherwise.

    Args:
        loss_func: the trained loss.
        embeddings: ``(B, D)``, finite; use held-out samples.
        labels: ``(B,)``, integers in ``[0, C)``: the classes of training.
        fine_labels: ``(B,)``, integers. Negative means unknown; these samples are left out.

    Raises:
        TypeError, ValueError: if an argument has the wrong type, shape, dtype, device or range, or if no fine label is
            known.

    >>> loss_func = MultiProxyEntropyLoss(num_classes=2, embedding_size=8, proxies_per_class=2)
    >>> embeddings, labels = loss_func.proxies.detach().flatten(0, 1), torch.tensor([0, 0, 1, 1])
    >>> result = cluster_scores(loss_func, embeddings, labels, fine_labels=torch.tensor([5, 6, 7, 7]))
    >>> result.per_class[0]
    Scores(accuracy=1.0, nmi=1.0, ari=1.0)
    >>> result.per_class[1].accuracy
    0.5
    """
    points, classes = _checked_samples(loss_func, embeddings, labels)
    fine = check.integers("fine_labels", _as_tensor(fine_labels), len(points)).to(points.device)
    known = fine >= 0
    if not known.any():
        raise ValueError("fine_labels must hold a value of at least 0 (negative: unknown), got none")
    proxies = loss_func.assign(points[known], classes[known])[1].cpu().numpy()
    parts, of_class = fine[known].cpu().numpy(), classes[known].cpu().numpy()
    per_class = {int(c): _scores(parts[of_class == c], proxies[of_class == c]) for c in np.unique(of_class)}
    return ClusterScores(Scores(*np.mean(list(per_class.values()), axis=0).tolist()), per_class)


def _scores(fine: NDArray[np.int64], proxies: NDArray[np.int64]) -> Scores:
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    counts = contingency_matrix(fine, proxies)
    accuracy = counts[linear_sum_assignment(counts, maximize=True)].sum() / len(fine)
    others = normalized_mutual_info_score(fine, proxies), adjusted_rand_score(fine, proxies)
    return Scores(float(accuracy), *map(float, others))


def _checked_samples(loss_func: object, embeddings: object, labels: object) -> tuple[Tensor, Tensor]:
    """Embeddings and labels as tensors on the device of the proxies; an error if the loss cannot take them."""
    proxies = check_loss(loss_func).proxies
    points = _as_tensor(embeddings, proxies.device)
    check.embeddings(points, proxies)
    check.finite("embeddings", points)
    check.finite("proxies", proxies)
    classes = check.labels(_as_tensor(labels), len(points), len(proxies))
    check.in_range("labels", classes.cpu(), len(proxies), "num_classes")  # check.labels skips those on a GPU
    return points, classes.to(points.device)


def _as_tensor(value: object, device: torch.device | str = "cpu") -> Any:
    """Copies arrays, since torch refuses negative strides and foreign byte orders. Returns tensors as they are."""
    if value is None or isinstance(value, Tensor):
        return value
    array = np.asarray(value)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C")).to(device)
