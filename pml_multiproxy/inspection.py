r"""What the proxies of a trained loss stand for: the samples nearest to each, and how well they match fine labels.

:func:`nearest_samples` finds the samples to look at. Where fine labels are known for some samples,
:func:`cluster_scores` says how well the assignment of samples to the proxies of their class recovers them.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _check as check
from . import _nearest as nearest
from .losses import MultiProxyEntropyLoss

__all__ = ["ClusterScores", "Scores", "cluster_scores", "nearest_samples"]


@torch.no_grad()
def nearest_samples(loss_func: MultiProxyEntropyLoss, embeddings: Tensor, labels: Tensor, count: int) -> Tensor:
    """The samples that lie nearest to each proxy, among those of its class, the nearest first.

    A sample may be among the nearest of several proxies; :meth:`~pml_multiproxy.losses.MultiProxyEntropyLoss.assign`
    says which one it belongs to. Of equally near samples, the first comes first.

    Args:
        loss_func: the trained loss.
        embeddings: ``(B, D)``, finite.
        labels: ``(B,)``, integers in ``[0, C)``.
        count: how many samples of each proxy, at least 1.

    Returns:
        ``(C, K, count)``, long: indices of the samples; -1 at the end where a class has fewer.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or range.

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
    labels = _checked(loss_func, embeddings, labels)
    count = check.positive_int("count", count)
    similarities = nearest.to_target(loss_func.distance, embeddings, labels, loss_func.proxies)
    result = labels.new_full((loss_func.num_classes, loss_func.proxies_per_class, count), -1)
    order = labels.argsort(stable=True)
    classes, sizes = torch.unique_consecutive(labels[order], return_counts=True)
    for c, samples in zip(classes.tolist(), torch.split(order, sizes.tolist()), strict=True):
        nearest_first = similarities[samples].argsort(dim=0, descending=True, stable=True)[:count]
        result[c, :, : len(nearest_first)] = samples[nearest_first].T
    return result


class Scores(NamedTuple):
    """How well an assignment matches fine labels: each is 1 where they are the same partition.

    >>> Scores(accuracy=0.75, nmi=0.5, ari=0.25).nmi
    0.5
    """

    accuracy: float
    """ACC: the share of samples whose proxy has their fine label, if each proxy gets at most one fine label and each
    fine label at most one proxy, in the best way. With more proxies than fine labels it is low even for pure parts."""

    nmi: float
    """Mutual information, divided by the mean of the entropies of both; from 0. Not corrected for chance: it grows with
    the number of proxies."""

    ari: float
    """Adjusted Rand index: 0 on average for a random assignment."""


class ClusterScores(NamedTuple):
    """What :func:`cluster_scores` returns.

    >>> ClusterScores(mean=Scores(0.5, 0.5, 0.5), per_class={7: Scores(0.5, 0.5, 0.5)}).mean.ari
    0.5
    """

    mean: Scores
    """Over the classes, each counting the same."""

    per_class: dict[int, Scores]
    """Of each class that has a sample with a known fine label."""


def cluster_scores(
    loss_func: MultiProxyEntropyLoss, embeddings: Tensor, labels: Tensor, fine_labels: Tensor
) -> ClusterScores:
    """How well the nearest proxies recover fine labels, within each class.

    Each class is scored by itself, so that the coarse labels, which were given, earn nothing. The matching of ACC is
    scipy's ``linear_sum_assignment``, NMI and ARI are scikit-learn's. Where a class has one fine label alone, both are
    1 if all its samples are at one proxy, else 0.

    Args:
        loss_func: the trained loss.
        embeddings: ``(B, D)``, finite; held-out samples.
        labels: ``(B,)``, integers in ``[0, C)``: the classes of training.
        fine_labels: ``(B,)``, integers; negative where unknown: these samples are left out.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or range, and where no fine label
            is known.

    >>> loss_func = MultiProxyEntropyLoss(num_classes=2, embedding_size=8, proxies_per_class=2)
    >>> embeddings, labels = loss_func.proxies.detach().flatten(0, 1), torch.tensor([0, 0, 1, 1])
    >>> result = cluster_scores(loss_func, embeddings, labels, fine_labels=torch.tensor([5, 6, 7, 7]))
    >>> result.per_class[0]
    Scores(accuracy=1.0, nmi=1.0, ari=1.0)
    >>> result.per_class[1].accuracy
    0.5
    """
    labels = _checked(loss_func, embeddings, labels)
    fine = check.integers("fine_labels", fine_labels, len(embeddings)).to(embeddings.device)
    known = fine >= 0
    if not known.any():
        raise ValueError("fine_labels must hold a value of at least 0 (negative: unknown), got none")
    labels, fine = labels[known], fine[known]
    proxies = loss_func.assign(embeddings[known], labels)[1]
    per_class = {}
    for c in torch.unique(labels).tolist():
        of_class = labels == c
        per_class[c] = _scores(fine[of_class].cpu().numpy(), proxies[of_class].cpu().numpy())
    return ClusterScores(Scores(*np.mean(list(per_class.values()), axis=0).tolist()), per_class)


def _scores(fine: NDArray[np.int64], proxies: NDArray[np.int64]) -> Scores:
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    counts = contingency_matrix(fine, proxies)
    matched = counts[linear_sum_assignment(counts, maximize=True)].sum()
    return Scores(
        accuracy=float(matched / len(fine)),
        nmi=float(normalized_mutual_info_score(fine, proxies)),
        ari=float(adjusted_rand_score(fine, proxies)),
    )


def _checked(loss_func: object, embeddings: Tensor, labels: Tensor) -> Tensor:
    """The labels, where all three can be used."""
    if not isinstance(loss_func, MultiProxyEntropyLoss):
        raise TypeError(f"loss_func must be a MultiProxyEntropyLoss, got {type(loss_func).__name__}")
    check.embeddings(embeddings, loss_func.proxies)
    check.finite("embeddings", embeddings)
    check.finite("proxies", loss_func.proxies)
    return check.labels(labels, len(embeddings), loss_func.num_classes).to(embeddings.device)
