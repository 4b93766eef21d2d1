"""What looks at trained proxies: outliers, soft assignments, nearest samples, and scores against fine labels."""

import re
from itertools import permutations

import pytest
import reference
import torch
from cases import DISTANCES, make_distance
from pytorch_metric_learning import distances, losses
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from pml_multiproxy import MultiProxyEntropyLoss, functional
from pml_multiproxy.inspection import cluster_scores, nearest_samples

CLASSES, SIZE, PROXIES = 4, 6, 3


def make_loss(**settings):
    return MultiProxyEntropyLoss(CLASSES, SIZE, PROXIES, **settings)


def samples(count=60):
    """Of all classes but the last, in mixed order."""
    return torch.randn(count, SIZE), torch.randint(CLASSES - 1, (count,))


@pytest.mark.parametrize("settings", [{}, {"threshold": 60}, {"threshold": 90}], ids=str)
def test_outliers_are_those_of_pml(settings):
    loss_func, (embeddings, labels) = make_loss(), samples()
    pml = losses.SubCenterArcFaceLoss(num_classes=CLASSES, embedding_size=SIZE, sub_centers=PROXIES)
    pml.W.data = loss_func.proxies.detach().flatten(0, 1).T.clone()
    expected, expected_centers = pml.get_outliers(embeddings, labels, **settings)
    found, centers = loss_func.get_outliers(embeddings, labels, **settings)
    assert 0 < len(found) < len(labels)
    assert found.equal(expected)
    torch.testing.assert_close(centers[:, :-1], expected_centers[:, :-1])
    assert centers[:, -1].isnan().all()  # no samples; PML returns memory that it did not write to
    assert loss_func.get_outliers(embeddings, labels, return_dominant_centers=False, **settings).equal(found)


def test_no_samples_have_no_outliers_and_are_near_no_proxy():
    nothing = torch.empty(0, SIZE), torch.empty(0).long()
    found, centers = make_loss().get_outliers(*nothing)
    assert found.tolist() == []
    assert centers.isnan().all()
    assert (nearest_samples(make_loss(), *nothing, 2) == -1).all()


@pytest.mark.parametrize("name", DISTANCES)
def test_soft_assignments_and_nearest_samples_are_those_by_hand(name):
    loss_func, (embeddings, labels) = make_loss(distance=make_distance(name), temperature=0.3), samples(30)
    proxies, similarity = loss_func.proxies.detach(), DISTANCES[name][2]
    by_hand = [[similarity(x, w).item() for w in proxies[y]] for x, y in zip(embeddings, labels, strict=True)]
    expected = torch.tensor([reference.softmax([s / 0.3 for s in row]) for row in by_hand])
    torch.testing.assert_close(loss_func.soft_assign(embeddings, labels), expected)
    found = nearest_samples(loss_func, embeddings, labels, count=8).tolist()
    for c in range(CLASSES):
        members = (labels == c).nonzero().flatten().tolist()
        for k in range(PROXIES):
            nearest = sorted(members, key=lambda i: -by_hand[i][k])[:8]
            assert found[c][k] == nearest + [-1] * (8 - len(nearest))


def test_soft_assignment_is_what_the_usage_is_the_mean_of():
    loss_func, (embeddings, labels) = make_loss(usage_momentum=0.0), samples()
    sums = functional.usage_sums(loss_func.soft_assign(embeddings, labels), labels, CLASSES)[:-1]
    loss_func(embeddings, labels)
    torch.testing.assert_close(loss_func.proxy_usage[:-1], sums / sums.sum(dim=1, keepdim=True))


def test_looking_changes_nothing_and_has_no_gradient():
    loss_func, (embeddings, labels) = make_loss().half(), samples()
    before = {name: value.clone() for name, value in loss_func.state_dict().items()}
    batch = embeddings.half().requires_grad_(), labels
    q, (_, centers) = loss_func.soft_assign(*batch), loss_func.get_outliers(*batch)
    nearest_samples(loss_func, *batch, 2), cluster_scores(loss_func, *batch, labels)
    assert (q.dtype, q.requires_grad, centers.requires_grad) == (torch.float32, False, False)
    assert loss_func.training
    assert all(value.equal(before[name]) for name, value in loss_func.state_dict().items())


def test_scores_within_classes_are_those_by_hand_and_of_scikit_learn():
    """The accuracy is that of the best of all matchings of three fine labels and three proxies."""
    loss_func, (embeddings, labels) = make_loss(), samples()
    fine = torch.randint(3, (len(labels),))
    proxies = loss_func.assign(embeddings, labels)[1]
    result = cluster_scores(loss_func, embeddings, labels, 100 - fine)
    assert list(result.per_class) == [0, 1, 2]
    for c, scores in result.per_class.items():
        own = labels == c
        agree = [(torch.tensor(to)[proxies] == fine)[own].double().mean().item() for to in permutations(range(3))]
        of_sklearn = [score(fine[own], proxies[own]) for score in (normalized_mutual_info_score, adjusted_rand_score)]
        assert scores == pytest.approx((max(agree), *of_sklearn))
    assert result.mean == pytest.approx(tuple(torch.tensor(list(result.per_class.values())).mean(dim=0).tolist()))


def test_samples_without_a_fine_label_are_left_out():
    loss_func, (embeddings, labels) = make_loss(), samples()
    fine = torch.randint(3, (len(labels),))
    known = (torch.rand(len(labels)) < 0.5) & (labels != 1)
    result = cluster_scores(loss_func, embeddings, labels, torch.where(known, fine, -1))
    assert result == cluster_scores(loss_func, embeddings[known], labels[known], fine[known])
    assert list(result.per_class) == [0, 2]


def test_takes_arrays_whatever_the_default_device():
    loss_func, (embeddings, labels) = make_loss(), samples()
    arrays = [tensor.numpy()[::-1].astype(tensor.numpy().dtype.newbyteorder(">")) for tensor in (embeddings, labels)]
    expected = nearest_samples(loss_func, embeddings.flip(0), labels.flip(0), 3)
    scores = cluster_scores(loss_func, embeddings.flip(0), labels.flip(0), labels.flip(0))
    with torch.device("meta"):
        assert nearest_samples(loss_func, *arrays, 3).equal(expected)
        assert cluster_scores(loss_func, *arrays, arrays[1]) == scores


x, y = torch.zeros(5, SIZE), torch.zeros(5).long()
broken = make_loss()
broken.proxies.data[1, 0, 0] = torch.nan
WRONG = [
    (lambda: nearest_samples(make_loss(), x, y, 0), "count must be an int of at least 1, got 0"),
    (lambda: nearest_samples(torch.nn.L1Loss(), x, y, 1), "loss_func must be a MultiProxyEntropyLoss, got L1Loss"),
    (lambda: nearest_samples(make_loss(), x / 0, y, 1), "embeddings must be finite, got NaN or infinite values"),
    (lambda: nearest_samples(make_loss(), x, y + CLASSES, 1), "labels must lie in [0, 3]"),
    (lambda: nearest_samples(broken, x, y, 1), "proxies must be finite, got NaN or infinite values"),
    (lambda: cluster_scores(make_loss(), x, y, y / 2), "fine_labels must be of an integer dtype, got torch.float32"),
    (lambda: cluster_scores(make_loss(), x, y, y - 1), "fine_labels must hold a value of at least 0"),
    (lambda: broken.get_outliers(x, y), "proxies must be finite, got NaN or infinite values"),
    (lambda: make_loss().get_outliers(x, y, threshold=181), "threshold must be a number of degrees from 0 to 180"),
    (lambda: make_loss(distance=distances.LpDistance()).get_outliers(x, y), "distance must be CosineSimilarity"),
    (lambda: make_loss().soft_assign(torch.zeros(5, 7), y), "embeddings must be of shape (batch_size, 6), got (5, 7)"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_wrong_arguments_are_refused(case):
    call, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        call()
