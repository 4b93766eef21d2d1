r"""Look into a trained loss: its hidden groups, the samples nearest to each proxy, and the match with fine labels.

:func:`find_groups` merges the proxies of each class into the groups that its samples form, and :func:`worst_groups`
says on which of them a model fails. :func:`nearest_samples` finds samples to look at. If you know fine labels of some
samples, :func:`cluster_scores` says how well the nearest proxies recover them.

Embeddings and labels may be NumPy arrays or tensors. All functions leave the parameters, the mode and the usage of the
loss as they are.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import binomtest, norm
from torch import Tensor

from . import _check as check
from . import _groups as grouping
from . import _nearest as nearest
from . import functional
from .losses import MultiProxyEntropyLoss, check_loss

__all__ = [
    "ClusterScores",
    "Group",
    "Groups",
    "Scores",
    "WorstGroup",
    "WorstGroups",
    "cluster_scores",
    "find_groups",
    "list_groups",
    "nearest_samples",
    "worst_groups",
]

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


class Group(NamedTuple):
    """One group of :func:`find_groups`.

    >>> Group(group=0, label=2, size=40, proxies=[1, 7], nearest=[5, 3], certainty=0.9, found_again=None).size
    40
    """

    group: int
    """Its number among the groups of all classes."""

    label: int
    """Its class."""

    size: int
    """How many samples it has."""

    proxies: list[int]
    """The numbers of its proxies within the class."""

    nearest: list[int]
    """The samples nearest to its mean, nearest first."""

    certainty: float
    """Mean certainty of its samples."""

    found_again: float | None
    """Its overlap with the most similar group of a second training: samples in both, divided by samples in either."""


class Groups(NamedTuple):
    """The result of :func:`find_groups`. Printing it shows a table of the groups.

    >>> record = Group(0, 2, 40, [1, 7], [5, 3], 0.9, 0.8)
    >>> print(Groups(torch.zeros(40).long(), torch.full((40,), 0.9), [record]))
    group  label  size  proxies  certainty  found again
        0      2    40        2       0.90         0.80
    """

    group: Tensor
    """``(N,)``, long: the group of each sample, numbered over all classes from 0, in each class the largest first."""

    certainty: Tensor
    """``(N,)``, from 0 to 1: how much of the soft assignment of each sample goes to the proxies of its group."""

    records: list[Group]
    """One for each group, in the order of their numbers."""

    def __str__(self) -> str:
        lines = [
            (r.group, r.label, r.size, len(r.proxies), r.certainty, "" if r.found_again is None else r.found_again)
            for r in self.records
        ]
        return _table(("group", "label", "size", "proxies", "certainty", "found again"), lines)


@torch.no_grad()
def find_groups(
    loss_func: MultiProxyEntropyLoss,
    embeddings: Array,
    labels: Array,
    *,
    num_groups: int | Mapping[int, int] | None = None,
    again: Array | tuple[MultiProxyEntropyLoss, Array] | None = None,
    count: int = 10,
) -> Groups:
    """The hidden groups of each class: its proxies, merged where their samples lie near each other.

    Args:
        loss_func: the trained loss, with rather more proxies per class than groups.
        embeddings: ``(N, D)``, finite, of the network that was trained with the loss, in ``eval()`` mode.
        labels: ``(N,)``, integers in ``[0, C)``.
        num_groups: how many groups to find in each class, or in some classes, by label. ``None``: as many as the
            samples form. A class has at most as many groups as proxies that are nearest to a sample.
        again: the same samples, embedded by a second training: its loss and the embeddings, or the embeddings alone,
            in which k-means then finds the proxies. ``None``: groups are not compared.
        count: how many nearest samples of each group to find, at least 1.

    Raises:
        TypeError, ValueError: if an argument has the wrong type, shape, dtype, device or range, or if the loss was
            never trained.

    Warns:
        UserWarning: if a class has no samples, and so no group, or fewer samples than proxies.

    >>> loss_func = MultiProxyEntropyLoss(num_classes=1, embedding_size=8, proxies_per_class=6)
    >>> embeddings, labels = torch.eye(8)[:3].repeat(20, 1) + 0.1 * torch.randn(60, 8), torch.zeros(60).long()
    >>> loss_func.init_proxies(embeddings, labels)  # in place of a training
    >>> groups = find_groups(loss_func, embeddings, labels)
    >>> [record.size for record in groups.records]
    [20, 20, 20]
    """
    points, classes = _checked_samples(loss_func, embeddings, labels)
    check.positive_int("count", count)
    _check_trained(loss_func, classes)
    numbers = (
        num_groups if isinstance(num_groups, Mapping) else dict.fromkeys(range(len(loss_func.proxies)), num_groups)
    )
    numbers = {label: check.positive_int_or_none("num_groups", number) for label, number in numbers.items()}
    scaled = functional.normalize(points) if loss_func.distance.normalize_embeddings else points
    proxies = loss_func.assign(points, classes)[1]
    group, of_proxy = torch.empty_like(classes), torch.full_like(loss_func.proxy_usage, -1, dtype=torch.long)
    records: list[Group] = []
    for c in torch.unique(classes).tolist():
        samples = (classes == c).nonzero().squeeze(1)
        own, of_samples = scaled[samples].double().cpu().numpy(), proxies[samples].cpu().numpy()
        found = grouping.find(own, of_samples, loss_func.proxies_per_class, numbers.get(c))
        group[samples] = len(records) + torch.from_numpy(found.group).to(group)
        of_proxy[c] = torch.from_numpy(np.where(found.of_proxy < 0, -1, len(records) + found.of_proxy)).to(group)
        for place, members in enumerate(found.nearest):
            own_proxies = np.flatnonzero(found.of_proxy == place).tolist()
            nearest_first = samples.cpu()[members[:count]].tolist()
            records.append(Group(len(records), c, len(members), own_proxies, nearest_first, 0.0, None))
    shares = loss_func.soft_assign(points, classes)
    certainty = (shares * (of_proxy[classes] == group[:, None])).sum(dim=1).float()
    means = certainty.new_zeros(len(records)).index_add(0, group, certainty) / group.bincount()
    overlaps = [None] * len(records) if again is None else _overlaps(group, _second(again, loss_func, classes, numbers))
    rows = zip(records, means.tolist(), overlaps, strict=True)
    return Groups(group, certainty, [r._replace(certainty=mean, found_again=overlap) for r, mean, overlap in rows])


class WorstGroup(NamedTuple):
    """One row of :func:`worst_groups`.

    >>> WorstGroup(group=3, label=0, size=40, mean=0.5, low=0.3, high=0.7, compared=10).mean
    0.5
    """

    group: int
    label: int
    size: int
    mean: float
    """Accuracy, or mean loss, of the samples of the group."""

    low: float
    high: float
    """The interval around it. With a probability of 95 %, the intervals of all groups hold together."""

    compared: int
    """How many groups were compared, for which the intervals are widened."""


class WorstGroups(list[WorstGroup]):
    """A list of rows that prints as a table; ``pandas.DataFrame`` takes it.

    >>> print(WorstGroups([WorstGroup(group=3, label=0, size=40, mean=0.5, low=0.3, high=0.7, compared=10)]))
    group  label  size  mean   low  high  compared
        3      0    40  0.50  0.30  0.70        10
    """

    def __str__(self) -> str:
        return _table(WorstGroup._fields, self)


def worst_groups(groups: Groups, correct: Array) -> WorstGroups:
    """On which groups a model fails: the accuracy of each group, the lowest first, or its mean loss, the highest first.

    The model may be any: a classifier of the coarse labels, a detector. Judge it on samples it was not trained with.
    The lowest of many accuracies is low by chance, too, above all in small groups. So the intervals are those of the
    level 1 - 0.05 / groups (Bonferroni): if the upper end of a group lies below the accuracy over all samples, the
    model fails there. Accuracies get Wilson intervals; losses get intervals from their standard deviation.

    Args:
        groups: of the samples.
        correct: ``(N,)``, of each sample: whether the model is right (bool, or integers 0 and 1), or its loss (floating
            point, finite).

    Raises:
        TypeError, ValueError: if ``correct`` has the wrong type, shape, dtype or values.

    Source of the interval: Wilson, *Probable Inference, the Law of Succession, and Statistical Inference*, JASA 22,
    1927.

    >>> groups = Groups(torch.arange(40) % 2, torch.ones(40), [Group(g, 0, 20, [g], [], 1.0, None) for g in range(2)])
    >>> print(worst_groups(groups, torch.arange(40) % 2 == 0))
    group  label  size  mean   low  high  compared
        1      0    20  0.00  0.00  0.20         2
        0      0    20  1.00  0.80  1.00         2
    """
    values = _as_tensor(correct)
    if not isinstance(values, Tensor) or values.shape != groups.group.shape:
        raise ValueError(f"correct must be of shape ({len(groups.group)},), one for each sample, got {correct!r:.80}")
    is_loss = values.is_floating_point()
    values = values.detach().cpu().double().numpy()
    if is_loss:
        check.finite("correct", torch.from_numpy(values))
    elif not np.isin(values, (0, 1)).all():
        raise ValueError(f"correct must be bool, 0 and 1, or floating-point losses, got integers up to {values.max()}")
    compared, rows = len(groups.records), WorstGroups()
    interval = _mean_interval if is_loss else _wilson_interval
    for record in groups.records:
        own = values[(groups.group == record.group).cpu().numpy()]
        rows.append(WorstGroup(*record[:3], float(own.mean()), *interval(own, 1 - 0.05 / compared), compared))
    rows.sort(key=lambda row: (-row.mean if is_loss else row.mean, -row.size))
    return rows


def _wilson_interval(correct: NDArray[np.float64], level: float) -> tuple[float, float]:
    low, high = binomtest(round(correct.sum()), len(correct)).proportion_ci(level, method="wilson")
    return float(low), float(high)


def _mean_interval(losses: NDArray[np.float64], level: float) -> tuple[float, float]:
    """Unbounded for a single loss."""
    error = losses.std(ddof=1) / len(losses) ** 0.5 if len(losses) > 1 else np.inf
    low, high = norm.interval(level, losses.mean(), max(error, np.finfo(float).tiny))
    return float(low), float(high)


def list_groups(groups: Groups, texts: Sequence[str], *, count: int = 3) -> str:
    """The texts nearest to the mean of each group, to be printed.

    >>> groups = Groups(torch.zeros(3).long(), torch.ones(3), [Group(0, 1, 3, [2], [2, 0, 1], 1.0, None)])
    >>> print(list_groups(groups, ["pay my bill", "pay it", "pay the bill"], count=2))
    group 0 of class 1: 3 samples, certainty 1.00
      pay the bill
      pay my bill
    """
    lines = []
    for record in groups.records:
        lines.append(
            f"group {record.group} of class {record.label}: {record.size} samples, certainty {record.certainty:.2f}"
        )
        lines += [f"  {texts[sample]}" for sample in record.nearest[:count]]
    return "\n".join(lines)


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


def _check_trained(loss_func: MultiProxyEntropyLoss, classes: Tensor) -> None:
    """An error if no groups can be found, a warning if some are missing."""
    num_classes, per_class = loss_func.proxy_usage.shape
    if len(classes) == 0:
        raise ValueError("embeddings must hold at least one sample, got none")
    if per_class > 1 and (loss_func.proxy_usage == 1 / per_class).all():
        raise ValueError("loss_func must be trained, got one whose usage is as at the start: no proxy found its place")
    sizes = classes.bincount(minlength=num_classes)
    few = {"no samples, and no groups": sizes == 0, "fewer samples than proxies": (sizes > 0) & (sizes < per_class)}
    for what, mask in few.items():
        if found := mask.nonzero().squeeze(1).tolist():
            shown = ", ".join(map(str, found[:5])) + ", ..." * (len(found) > 5)
            warnings.warn(f"labels hold classes with {what}: {shown}", stacklevel=3)


def _second(
    again: Array | tuple[MultiProxyEntropyLoss, Array], loss_func: MultiProxyEntropyLoss, labels: Tensor, numbers: Any
) -> Tensor:
    """The groups of a second training."""
    if isinstance(again, tuple):
        other, embeddings = again
    else:
        embeddings = _as_tensor(again, labels.device)
        size = embeddings.shape[-1]
        other = MultiProxyEntropyLoss(**loss_func.settings() | {"embedding_size": size}, distance=loss_func.distance)
        other.to(labels.device, embeddings.dtype).init_proxies(embeddings, labels)
    return find_groups(other, embeddings, labels, num_groups=numbers).group


def _overlaps(first: Tensor, second: Tensor) -> list[float]:
    """For each group, its largest Jaccard index with a group of the second training."""
    from sklearn.metrics.cluster import contingency_matrix

    both = contingency_matrix(first.cpu(), second.cpu())
    either = both.sum(axis=1, keepdims=True) + both.sum(axis=0) - both
    return list((both / either).max(axis=1).tolist())


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = [tuple(header), *(tuple(f"{v:.2f}" if isinstance(v, float) else f"{v}" for v in row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def _scores(fine: NDArray[np.int64], proxies: NDArray[np.int64]) -> Scores:
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
