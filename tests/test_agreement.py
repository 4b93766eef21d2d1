"""The agreement of trainings: against the equations, what is trivial, what is left out, and what it finds."""

import math
import re
from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score
from torch import nn

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.agreement import assignment_agreement, proxy_agreement


def information(first, second):
    """Mutual information by its definition, in nats."""
    total = 0.0
    for a in set(first):
        for b in set(second):
            both = sum(x == a and y == b for x, y in zip(first, second, strict=True)) / len(first)
            if both:
                total += both * math.log(both * len(first) ** 2 / first.count(a) / second.count(b))
    return total


def beyond_chance(first, second, draws=4000):
    """The agreement by its definition; what chance would give is the mean over random orders of one of the two."""
    generator = np.random.default_rng(0)
    by_chance = np.mean([information(first, generator.permutation(second).tolist()) for _ in range(draws)])
    return information(first, second) - by_chance


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.5])
def test_is_the_information_beyond_chance(noise):
    first = torch.randint(3, (24,))
    second = torch.where(torch.rand(24) < noise, torch.randint(4, (24,)), first + 1)
    result = assignment_agreement([first, second], torch.zeros(24, dtype=torch.long))
    # 4,000 orders with a standard deviation of about 0.1
    assert result.mean == pytest.approx(beyond_chance(first.tolist(), second.tolist()), abs=0.01)


def test_the_same_parts_in_another_order_agree_wholly():
    first = torch.arange(4000) % 4
    result = assignment_agreement([first, torch.tensor([2, 0, 3, 1])[first]], torch.zeros(4000, dtype=torch.long))
    assert result.mean == pytest.approx(math.log(4), abs=0.01)
    assert result.normalized == pytest.approx(1)


@pytest.mark.parametrize("samples", [20, 200])
def test_independent_assignments_agree_by_nothing(samples):
    labels = torch.arange(100).repeat_interleave(samples)
    result = assignment_agreement(torch.randint(10, (2, 100 * samples)), labels)
    # Without the correction for chance, it would be 1.2 for 20 samples.
    assert abs(result.mean) < 0.03
    assert abs(result.normalized) < 0.03


@pytest.mark.parametrize("trivial", [torch.zeros(60), torch.arange(60)], ids=["one for all", "one for each"])
@pytest.mark.parametrize("other", [torch.zeros(60), torch.arange(60), torch.arange(60) % 5])
def test_trivial_assignments_agree_by_nothing(trivial, other):
    result = assignment_agreement([trivial.long(), other.long()], torch.zeros(60, dtype=torch.long))
    assert result.mean == pytest.approx(0, abs=1e-9)
    assert result.normalized == pytest.approx(0, abs=1e-9)


def test_one_dominating_proxy_is_worth_less_than_half_found_clusters():
    """Both runs have the same two outliers in a proxy of their own; or they find five clusters again, with errors."""
    labels = torch.zeros(200, dtype=torch.long)
    dominated = (torch.arange(200) < 2).long()
    clusters = torch.arange(200) % 5
    noisy = torch.where(torch.rand(200) < 0.3, torch.randint(5, (200,)), clusters)
    trivial = assignment_agreement([dominated, dominated], labels)
    found = assignment_agreement([clusters, noisy], labels)
    assert trivial.normalized > found.normalized  # which is why one must not choose by it
    assert 10 * trivial.mean < found.mean


def test_of_each_class_alone():
    labels = torch.tensor([5, 2, 9]).repeat(40)
    first, second = torch.randint(4, (2, 120))
    second = torch.where(labels == 2, 3 - first, second)
    result = assignment_agreement([first, second], labels)
    assert list(result.per_class) == [2, 5, 9]
    for label, value in result.per_class.items():
        one = assignment_agreement([first[labels == label], second[labels == label]], labels[labels == label])
        assert value == pytest.approx(one.mean)
        assert list(one.per_class) == [label]
    assert result.mean == pytest.approx(np.mean(list(result.per_class.values())))
    assert result.per_class[2] > 1 > 0.3 > result.per_class[5]


def test_classes_weigh_the_same_however_many_samples_they_have():
    labels = torch.cat([torch.zeros(400), torch.ones(100)]).long()
    first = torch.arange(500) % 2
    result = assignment_agreement([first, torch.where(labels == 0, first, 0)], labels)
    assert result.mean == pytest.approx(result.per_class[0] / 2)


def test_three_trainings_are_three_pairs():
    runs, labels = torch.randint(3, (3, 90)), torch.arange(90) % 2
    runs[2] = (runs[0] + 1) % 3
    result = assignment_agreement(runs, labels)
    pairs = [assignment_agreement(pair, labels) for pair in combinations(runs, 2)]
    assert result.pairs == pytest.approx([pair.mean for pair in pairs])
    assert result.pairs[1] == max(result.pairs)
    assert result.mean == pytest.approx(np.mean(result.pairs))
    assert result.normalized == pytest.approx(np.mean([pair.normalized for pair in pairs]))
    for label in (0, 1):
        assert result.per_class[label] == pytest.approx(np.mean([pair.per_class[label] for pair in pairs]))


def test_normalized_is_the_adjusted_mutual_information_of_scikit_learn():
    first, second = torch.randint(4, (2, 80))
    second[:40] = first[:40]
    result = assignment_agreement([first, second], torch.zeros(80, dtype=torch.long))
    assert result.normalized == pytest.approx(adjusted_mutual_info_score(first, second))


def test_small_classes_are_left_out():
    labels = torch.cat([torch.zeros(30), torch.ones(29), torch.full((31,), 2), torch.full((1,), 7)]).long()
    runs = torch.randint(3, (2, 91))
    result = assignment_agreement(runs, labels, min_samples=30)
    assert list(result.per_class) == [0, 2]
    assert result.left_out == (1, 7)
    kept = (labels == 0) | (labels == 2)
    assert result.mean == assignment_agreement(runs[:, kept], labels[kept], min_samples=1).mean
    assert assignment_agreement(runs, labels, min_samples=1).left_out == ()


@pytest.mark.parametrize("kind", ["tensor", "int32", "array", "unsigned", "list"])
def test_takes_tensors_arrays_and_lists(kind):
    convert = {
        "tensor": lambda value: value,
        "int32": lambda value: value.int(),
        "array": torch.Tensor.numpy,
        "unsigned": lambda value: value.numpy().astype(np.uint8),
        "list": torch.Tensor.tolist,
    }[kind]
    runs, labels = torch.randint(3, (2, 60)), torch.arange(60) % 2
    result = assignment_agreement([convert(run) for run in runs], convert(labels))
    assert result == assignment_agreement(runs, labels)
    assert all(type(label) is int and type(value) is float for label, value in result.per_class.items())


def two_losses(**settings):
    return [MultiProxyEntropyLoss(2, 8, 4, **settings) for _ in range(2)]


def test_of_losses_is_that_of_what_they_assign():
    losses, embeddings, labels = two_losses(), torch.randn(2, 80, 8), torch.arange(80) % 2
    assigned = [loss.assign(x, labels)[1] for loss, x in zip(losses, embeddings, strict=True)]
    expected = assignment_agreement(assigned, labels)
    assert proxy_agreement(losses, embeddings, labels) == expected
    assert proxy_agreement(losses, embeddings.numpy(), labels.numpy()) == expected
    assert proxy_agreement(losses, embeddings, labels.int(), min_samples=40) == expected
    assert len(proxy_agreement(losses, embeddings, labels - labels, min_samples=80).per_class) == 1


def test_one_proxy_per_class_is_no_agreement():
    losses = [MultiProxyEntropyLoss(2, 8, 1) for _ in range(2)]
    result = proxy_agreement(losses, torch.randn(2, 80, 8), torch.arange(80) % 2)
    assert (result.mean, result.normalized) == (0, 0)


def test_looking_changes_nothing():
    losses, embeddings = two_losses(), torch.randn(2, 80, 8, requires_grad=True)
    before = [loss.proxy_usage.clone() for loss in losses]
    proxy_agreement(losses, embeddings, torch.arange(80) % 2)
    assert all(loss.proxy_usage.equal(usage) for loss, usage in zip(losses, before, strict=True))
    assert all(loss.training for loss in losses)


x, y, run = torch.zeros(2, 40, 8), torch.arange(40) % 2, torch.arange(40) % 3
ASSIGNMENTS = {
    "one run": ([run], y, {}, ValueError, "assignments must be those of at least two trainings, got 1"),
    "floats": ([run, run / 2], y, {}, TypeError, "assignments[1] must be integers, got float32"),
    "two dimensions": ([run[None], run], y, {}, ValueError, "assignments[0] must be of shape (40,), got (1, 40)"),
    "other lengths": ([run, run[:30]], y, {}, ValueError, "assignments[1] must be of shape (40,), got (30,)"),
    "labels of bools": ([run, run], y.bool(), {}, TypeError, "labels must be integers, got bool"),
    "labels in two dimensions": ([run, run], y[None], {}, ValueError, "labels must be of shape (N,), got (1, 40)"),
    "min_samples": ([run, run], y, {"min_samples": 0}, ValueError, "min_samples must be an int of at least 1, got 0"),
    "only small classes": (
        [run, run],
        y,
        {"min_samples": 21},
        ValueError,
        "labels must hold a class of at least min_samples=21 samples, got at most 20",
    ),
    "no samples": (
        [run[:0], run[:0]],
        y[:0],
        {"min_samples": 5},
        ValueError,
        "labels must hold a class of at least min_samples=5 samples, got at most 0",
    ),
}


@pytest.mark.parametrize("case", ASSIGNMENTS)
def test_wrong_assignments_are_refused(case):
    assignments, labels, settings, error, message = ASSIGNMENTS[case]
    with pytest.raises(error, match=re.escape(message)):
        assignment_agreement(assignments, labels, **settings)


def test_wrong_losses_and_embeddings_are_refused():
    losses = two_losses()
    with pytest.raises(ValueError, match=re.escape("embeddings must be one tensor for each of the 2 losses, got 1")):
        proxy_agreement(losses, x[:1], y)
    with pytest.raises(
        TypeError, match=re.escape("loss_funcs[1] must have a method assign(embeddings, labels), got L")
    ):
        proxy_agreement([losses[0], nn.L1Loss()], x, y)
    with pytest.raises(ValueError, match=re.escape("embeddings[1] must be finite, got NaN or infinite values")):
        proxy_agreement(losses, torch.stack([x[0], x[0] / 0]), y)
    with pytest.raises(ValueError, match=re.escape("embeddings must be of shape (batch_size, 8), got (40, 5)")):
        proxy_agreement(losses, x[..., :5], y)
    with pytest.raises(ValueError, match=re.escape("labels must lie in [0, 1]")):
        proxy_agreement(losses, x, y + 1)


CLUSTERS = 3
"""In each of the two classes of the toy."""


def toy(samples):
    generator = torch.Generator().manual_seed(1)
    centers = 3 * torch.randn(2 * CLUSTERS, 16, generator=generator)
    cluster = torch.arange(samples) % len(centers)
    return centers[cluster] + torch.randn(samples, 16, generator=generator), cluster // CLUSTERS


def train(inputs, labels, proxies_per_class, seed):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    loss_func = MultiProxyEntropyLoss(
        2, 8, proxies_per_class, scale=10, temperature=0.1, pooling="logsumexp", intra_weight=0.5, balance_weight=0.5
    )
    loss_func.init_proxies(network(inputs).detach(), labels)
    optimizer = torch.optim.AdamW(
        [{"params": network.parameters(), "lr": 3e-3}, {"params": loss_func.parameters(), "lr": 1e-2}]
    )
    for _ in range(5):
        for batch in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            loss_func(network(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    return network.eval(), loss_func


def test_finds_how_many_clusters_there_are():
    inputs, labels = toy(1200)
    found = {}
    for proxies_per_class in (1, 2, 3, 6, 16):
        runs = [train(inputs[:600], labels[:600], proxies_per_class, seed) for seed in range(2)]
        embeddings = [network(inputs[600:]).detach() for network, _ in runs]
        found[proxies_per_class] = proxy_agreement([loss for _, loss in runs], embeddings, labels[600:]).mean
    assert max(found, key=found.get) == CLUSTERS
    assert math.exp(found[CLUSTERS]) == pytest.approx(CLUSTERS, abs=0.2)
    assert found[1] == 0
