"""Hidden groups: known clusters are found, found again and ranked; bad input is refused or warned of."""

import re

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import adjusted_rand_score, silhouette_score

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy import _groups as grouping
from pml_multiproxy.inspection import Group, Groups, find_groups, list_groups, worst_groups

SIZES = ([120, 90, 60, 25], [200, 25])
"""Of the groups of two classes."""


def samples(noise=0.08, sizes=SIZES, dimensions=32):
    """Embeddings, labels and the true group, in mixed order."""
    counts = torch.tensor([size for of_class in sizes for size in of_class])
    true = torch.arange(len(counts)).repeat_interleave(counts)[torch.randperm(int(counts.sum()))]
    label = torch.arange(len(sizes)).repeat_interleave(torch.tensor(list(map(len, sizes))))[true]
    centers = torch.linalg.qr(torch.randn(dimensions, dimensions))[0][: len(counts)]
    return centers[true] + noise * torch.randn(len(true), dimensions), label, true


def started(embeddings, labels, proxies_per_class=20, **settings):
    """A loss whose proxies lie where the samples are, as after a training."""
    loss_func = MultiProxyEntropyLoss(int(labels.max()) + 1, embeddings.shape[1], proxies_per_class, **settings)
    loss_func.init_proxies(embeddings, labels)
    return loss_func


def test_known_groups_are_found_rare_ones_included():
    embeddings, labels, true = samples()
    loss_func = started(embeddings, labels)
    groups = find_groups(loss_func, embeddings, labels)
    assert adjusted_rand_score(true, groups.group) == 1
    assert [record.label for record in groups.records] == [0, 0, 0, 0, 1, 1]
    assert [record.size for record in groups.records] == [120, 90, 60, 25, 200, 25]
    assert groups.group.bincount().tolist() == [record.size for record in groups.records]
    assert (groups.group.dtype, groups.certainty.dtype) == (torch.int64, torch.float32)
    _, nearest = loss_func.assign(embeddings, labels)
    for record in groups.records:
        own = groups.group == record.group
        assert sorted(set(nearest[own].tolist())) == record.proxies
        assert record.certainty == pytest.approx(groups.certainty[own].mean().item())
        points = torch.nn.functional.normalize(embeddings)
        to_mean = (points - points[own].mean(dim=0)).norm(dim=1).masked_fill(~own, torch.inf)
        assert record.nearest == to_mean.argsort()[:10].tolist()
    assert groups.certainty.min() > 0.9
    assert groups.certainty.max() <= 1.0001


def test_the_number_of_groups_may_be_given():
    embeddings, labels, _ = samples()
    loss_func = started(embeddings, labels)
    for given, expected in ((3, [3, 3]), ({0: 2}, [2, 2]), ({0: 1, 1: 1}, [1, 1]), ({1: None}, [4, 2])):
        labels_of = [record.label for record in find_groups(loss_func, embeddings, labels, num_groups=given).records]
        assert [labels_of.count(0), labels_of.count(1)] == expected, given


def test_groups_are_found_again_by_a_second_training_of_another_size():
    embeddings, labels, true = samples()
    rotated = embeddings @ torch.linalg.qr(torch.randn(32, 32))[0] @ torch.eye(32, 40)
    first = started(embeddings, labels)
    for again in (rotated, (started(rotated, labels), rotated)):
        groups = find_groups(first, embeddings, labels, again=again)
        assert [record.found_again for record in groups.records] == [1.0] * 6
    mixed = rotated[torch.where(true < 2, torch.randperm(len(true)), torch.arange(len(true)))]
    lost = find_groups(first, embeddings, labels, again=mixed)
    assert max(record.found_again for record in lost.records[:2]) < 0.8
    assert find_groups(first, embeddings, labels).records[0].found_again is None


def test_a_class_without_groups_is_one():
    embeddings, labels = torch.randn(32) + torch.randn(300, 32) / 4, torch.zeros(300).long()
    assert len(find_groups(started(embeddings, labels), embeddings, labels).records) == 1


def test_the_silhouette_is_that_of_scikit_learn_up_to_the_distance_to_means():
    """With a cluster per sample and far groups, it is near to the silhouette by squared distances."""
    points = samples()[0].double().numpy()[:80]
    parts = np.arange(80) % 4
    points += 20 * np.eye(32)[parts]
    squared = ((points[:, None] - points) ** 2).sum(axis=2)
    clusters = grouping.Clusters(np.ones(80), points, np.zeros(80))
    joined, whole = grouping._join(clusters, parts), grouping._join(clusters, np.zeros(80, dtype=int))
    assert grouping._silhouette(clusters, parts, joined) == pytest.approx(
        silhouette_score(squared, parts, metric="precomputed"), abs=0.01
    )
    pairs = [squared[np.ix_(parts == k, parts == k)].sum() / (20 * 19) for k in range(4)]
    assert grouping._explained(joined, whole) == pytest.approx(1 - np.mean(pairs) / (squared.sum() / (80 * 79)))


def test_looking_changes_nothing():
    embeddings, labels, _ = samples()
    loss_func = started(embeddings, labels)
    before = {name: value.clone() for name, value in loss_func.state_dict().items()}
    first = find_groups(loss_func, embeddings.requires_grad_(), labels)
    second = find_groups(loss_func, embeddings.detach().numpy(), labels.numpy())
    assert first.group.equal(second.group)
    assert not first.certainty.requires_grad
    assert loss_func.training
    assert all(value.equal(before[name]) for name, value in loss_func.state_dict().items())


def two_groups():
    """Groups 0 with 30 and 1 with 10 samples, of class 5."""
    records = [Group(g, 5, size, [g], [0], 0.5, None) for g, size in ((0, 30), (1, 10))]
    return Groups(torch.arange(40) // 30, torch.full((40,), 0.5), records)


def test_the_worst_groups_come_first_with_the_intervals_of_wilson():
    """Each end is a share from which the one seen is z standard errors away, z for both groups together."""
    correct = torch.ones(40, dtype=torch.bool)
    correct[:3] = correct[30:36] = False
    rows = worst_groups(two_groups(), correct)
    assert [(row.group, row.label, row.size, row.compared) for row in rows] == [(1, 5, 10, 2), (0, 5, 30, 2)]
    for row, right in zip(rows, (4, 27), strict=True):
        assert row.mean == pytest.approx(right / row.size)
        for end in (row.low, row.high):
            errors = norm.ppf(1 - 0.0125) * (end * (1 - end) / row.size) ** 0.5
            assert abs(row.mean - end) == pytest.approx(errors)
        assert row.low < row.mean < row.high
    assert worst_groups(two_groups(), correct.int().numpy()) == rows


def test_losses_may_take_the_place_of_correctness():
    losses = torch.rand(40) + (torch.arange(40) >= 30)
    first, second = worst_groups(two_groups(), losses)
    assert (first.group, second.group) == (1, 0)
    assert first.mean == pytest.approx(losses[30:].mean().item())
    assert first.low < first.mean < first.high


def test_what_is_printed():
    groups = two_groups()
    assert str(groups).splitlines()[1].split() == ["0", "5", "30", "1", "0.50"]
    rows = worst_groups(groups, torch.arange(40) < 30)
    assert str(rows).splitlines()[0].split() == list(rows[0]._fields)
    assert len({len(line) for line in str(rows).splitlines()}) == 1
    assert list_groups(groups, ["first"] * 40, count=1).splitlines()[3] == "  first"


def test_a_class_without_samples_or_with_few_is_warned_of():
    embeddings, labels, _ = samples()
    loss_func = started(embeddings, labels)
    with pytest.warns(UserWarning, match="labels hold classes with no samples, and no groups: 1"):
        groups = find_groups(loss_func, embeddings[labels == 0], labels[labels == 0])
    assert {record.label for record in groups.records} == {0}
    few = torch.cat([(labels == 0).nonzero()[:, 0], (labels == 1).nonzero()[:3, 0]])
    with pytest.warns(UserWarning, match="labels hold classes with fewer samples than proxies: 1"):
        groups = find_groups(loss_func, embeddings[few], labels[few])
    assert sum(record.size for record in groups.records if record.label == 1) == 3


x, y, _ = samples()
WRONG = [
    (lambda loss: find_groups(loss, x[:, :5], y), "embeddings must be of shape (batch_size, 32), got (520, 5)"),
    (lambda loss: find_groups(loss, x, y + 1), "labels must lie in [0, 1] (num_classes is 2), got values from 1 to 2"),
    (lambda loss: find_groups(loss, x * torch.nan, y), "embeddings must be finite, got NaN or infinite values"),
    (lambda loss: find_groups(loss, x[:0], y[:0]), "embeddings must hold at least one sample, got none"),
    (lambda _: find_groups(MultiProxyEntropyLoss(2, 32), x, y), "loss_func must be trained, got one whose usage is as"),
    (lambda _: find_groups(torch.nn.L1Loss(), x, y), "loss_func must be a MultiProxyEntropyLoss, got L1Loss"),
    (lambda loss: find_groups(loss, x, y, num_groups=0), "num_groups must be an int of at least 1, got 0"),
    (lambda loss: find_groups(loss, x, y, count=0), "count must be an int of at least 1, got 0"),
    (
        lambda loss: find_groups(loss, x, y, again=x[:7]),
        "labels must be of shape (7,), one for each embedding, got (520,)",
    ),
    (lambda _: worst_groups(two_groups(), torch.ones(39)), "correct must be of shape (40,), one for each sample"),
    (
        lambda _: worst_groups(two_groups(), torch.full((40,), 2)),
        "correct must be bool, 0 and 1, or floating-point losses",
    ),
    (lambda _: worst_groups(two_groups(), torch.ones(40) / 0), "correct must be finite, got NaN or infinite values"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_wrong_arguments_are_refused(case):
    call, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        call(started(x, y))


@pytest.mark.slow
def test_ten_thousand_samples_and_a_thousand_proxies_take_seconds():
    import time

    sizes = [[100] * 5] * 20
    embeddings, labels, true = samples(0.03, sizes, dimensions=128)
    loss_func = started(embeddings, labels, proxies_per_class=50)
    start = time.perf_counter()
    groups = find_groups(loss_func, embeddings, labels)
    assert time.perf_counter() - start < 20
    assert adjusted_rand_score(true, groups.group) > 0.99
