"""The agreement of trainings: against its definition, for each class and pair, and on a toy with known clusters."""

import math
import re
from itertools import combinations

import numpy as np
import pytest
import torch
from cases import ARRAYS
from scipy.special import rel_entr
from sklearn.metrics import adjusted_mutual_info_score
from torch import nn

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.agreement import assignment_agreement, proxy_agreement


def information(first, second):
    """Mutual information by its definition, in nats."""
    joint = np.histogram2d(first, second, bins=5)[0] / len(first)
    return rel_entr(joint, joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)).sum()


def test_is_the_information_beyond_chance():
    """The information expected by chance is the mean over random orders of one assignment."""
    first = torch.randint(3, (24,))
    second = torch.where(torch.rand(24) < 0.2, torch.randint(4, (24,)), first + 1)
    by_chance = np.mean([information(first, second[torch.randperm(24)]) for _ in range(4000)])
    result = assignment_agreement([first, second], torch.zeros(24).long())
    # 4,000 orders with a standard deviation of about 0.1
    assert result.mean == pytest.approx(information(first, second) - by_chance, abs=0.01)
    assert result.normalized == pytest.approx(adjusted_mutual_info_score(first, second))


def test_independent_assignments_do_not_agree():
    labels = torch.arange(100).repeat_interleave(20)
    result = assignment_agreement(torch.randint(10, (2, 2000)), labels)
    assert abs(result.mean) < 0.03  # without the correction for chance 1.2
    assert abs(result.normalized) < 0.03


def test_trivial_assignments_do_not_agree():
    one, each, five = torch.zeros(60).long(), torch.arange(60), torch.arange(60) % 5
    for runs in ([one, one], [one, each], [one, five], [each, each], [each, five]):
        result = assignment_agreement(runs, one)
        assert (result.mean, result.normalized) == pytest.approx((0, 0), abs=1e-9)


def test_each_class_is_scored_alone_and_counts_the_same():
    labels = torch.tensor([5, 2, 9, 9]).repeat(40)
    first, second = torch.randint(4, (2, 160))
    second = torch.where(labels == 2, 3 - first, second)  # the same parts, numbered otherwise
    result = assignment_agreement([first, second], labels)
    assert list(result.per_class) == [2, 5, 9]
    for label, value in result.per_class.items():
        own = labels == label
        assert assignment_agreement([first[own], second[own]], labels[own]).per_class == {label: value}
    assert result.mean == pytest.approx(np.mean(list(result.per_class.values())))


def test_three_trainings_are_three_pairs():
    runs, labels = torch.randint(3, (3, 90)), torch.arange(90) % 2
    runs[2, :60] = (runs[0, :60] + 1) % 3
    result = assignment_agreement(runs, labels)
    pairs = [assignment_agreement(pair, labels) for pair in combinations(runs, 2)]
    assert result.pairs == pytest.approx([pair.mean for pair in pairs])
    assert result.mean == pytest.approx(np.mean(result.pairs))
    assert result.normalized == pytest.approx(np.mean([pair.normalized for pair in pairs]))
    for label in (0, 1):
        assert result.per_class[label] == pytest.approx(np.mean([pair.per_class[label] for pair in pairs]))


def test_small_classes_are_left_out():
    labels = torch.tensor([0, 1, 2, 7]).repeat_interleave(torch.tensor([30, 29, 31, 1]))
    runs = torch.randint(3, (2, 91))
    result = assignment_agreement(runs, labels, min_samples=30)
    assert (list(result.per_class), result.left_out) == ([0, 2], (1, 7))
    kept = (labels == 0) | (labels == 2)
    assert result.mean == assignment_agreement(runs[:, kept], labels[kept], min_samples=1).mean
    with pytest.raises(ValueError, match="a class of at least min_samples=32 samples, got at most 31"):
        assignment_agreement(runs, labels, min_samples=32)


@pytest.fixture
def trainings():
    """Two losses, the embeddings for each, and the labels."""
    return [MultiProxyEntropyLoss(2, 8, 4) for _ in range(2)], torch.randn(2, 80, 8), torch.arange(80) % 2


def test_losses_agree_as_their_assignments_do_and_do_not_change(trainings):
    losses, embeddings, labels = trainings
    before = [loss.proxy_usage.clone() for loss in losses]
    assigned = [loss.assign(x, labels)[1] for loss, x in zip(losses, embeddings, strict=True)]
    result = proxy_agreement(losses, embeddings.requires_grad_(), labels, min_samples=40)
    assert result == assignment_agreement(assigned, labels)
    assert all(loss.training and loss.proxy_usage.equal(usage) for loss, usage in zip(losses, before, strict=True))


@pytest.mark.parametrize("make", [np.ndarray.tolist, *ARRAYS.values()], ids=["list", *ARRAYS])
def test_takes_tensors_arrays_and_lists(make, trainings):
    losses, embeddings, labels = trainings
    runs, convert = torch.randint(3, (2, 80)), lambda tensor: make(tensor.numpy())
    of_runs = assignment_agreement([convert(run) for run in runs], convert(labels))
    assert of_runs == assignment_agreement(runs, labels)
    expected = proxy_agreement(losses, embeddings, labels)
    for device in ("cpu", "meta"):  # the default device does not matter
        with torch.device(device):
            assert proxy_agreement(losses, [convert(x) for x in embeddings], convert(labels)) == expected
            assert proxy_agreement(losses, embeddings, labels) == expected


x, y, run = torch.zeros(2, 40, 8), torch.arange(40) % 2, torch.arange(40) % 3
losses = [MultiProxyEntropyLoss(2, 8, 4)] * 2
WRONG = [
    (([run], y), ValueError, "assignments must be those of at least two trainings, got 1"),
    (([run, run / 2], y), TypeError, "assignments[1] must be of an integer dtype, got torch.float32"),
    (([run, run[:30]], y), ValueError, "assignments[1] must be of shape (40,), one for each embedding, got (30,)"),
    ((losses, x[:1], y), ValueError, "embeddings must be one tensor for each of 2 losses, got 1"),
    (([nn.L1Loss()] * 2, x, y), TypeError, "loss_funcs[0] must have a method assign(embeddings, labels), got L1Loss"),
    ((losses, x / 0, y), ValueError, "embeddings[0] must be finite, got NaN or infinite values"),
    ((losses, x, y + 1), ValueError, "labels must lie in [0, 1]"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_wrong_arguments_are_refused(case):
    arguments, error, message = WRONG[case]
    with pytest.raises(error, match=re.escape(message)):
        (assignment_agreement if len(arguments) == 2 else proxy_agreement)(*arguments)


CLUSTERS = 3
"""In each of the two classes of the toy."""


def train(inputs, labels, proxies_per_class, seed):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    loss_func = MultiProxyEntropyLoss(2, 8, proxies_per_class, intra_weight=0.5, balance_weight=0.5)
    loss_func.init_proxies(network(inputs).detach(), labels)
    optimizer = torch.optim.AdamW([*network.parameters(), *loss_func.parameters()], lr=5e-3)
    for _ in range(5):
        for batch in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            loss_func(network(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    return network.eval(), loss_func


@pytest.mark.slow
def test_finds_how_many_clusters_there_are():
    cluster = torch.arange(1200) % (2 * CLUSTERS)
    inputs, labels = 3 * torch.randn(2 * CLUSTERS, 16)[cluster] + torch.randn(1200, 16), cluster // CLUSTERS
    found = {}
    for proxies_per_class in (1, 2, 3, 6, 16):
        runs = [train(inputs[:600], labels[:600], proxies_per_class, seed) for seed in range(2)]
        embeddings = [network(inputs[600:]).detach() for network, _ in runs]
        found[proxies_per_class] = proxy_agreement([loss for _, loss in runs], embeddings, labels[600:]).mean
    assert max(found, key=found.get) == CLUSTERS
    assert math.exp(found[CLUSTERS]) == pytest.approx(CLUSTERS, abs=0.2)
