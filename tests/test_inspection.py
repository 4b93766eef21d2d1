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
from pml_multiproxy.inspection import Scores, cluster_scores, nearest_samples

CLASSES, SIZE, PROXIES = 4, 6, 3


def make_loss(**settings):
    return MultiProxyEntropyLoss(CLASSES, SIZE, PROXIES, **settings)


def samples(count=60):
    """Of all classes but the last, in mixed order."""
    return torch.randn(count, SIZE), torch.randint(CLASSES - 1, (count,))


@pytest.mark.parametrize("threshold", [50, 60, 75, 90])
def test_outliers_are_those_of_pml(threshold):
    loss_func, (embeddings, labels) = make_loss(), samples()
    pml = losses.SubCenterArcFaceLoss(num_classes=CLASSES, embedding_size=SIZE, sub_centers=PROXIES)
    pml.W.data = loss_func.proxies.detach().flatten(0, 1).T.clone()
    expected, expected_centers = pml.get_outliers(embeddings, labels, threshold=threshold)
    found, centers = loss_func.get_outliers(embeddings, labels, threshold=threshold)
    assert 0 < len(found) < len(labels)
    assert found.tolist() == expected.tolist()
    torch.testing.assert_close(centers[:, :-1], expected_centers[:, :-1])
    assert centers.shape == (SIZE, CLASSES)
    assert centers[:, -1].isnan().all()  # PML's is memory that nothing wrote to


def test_outliers_by_default_as_pml_has_them():
    loss_func, (embeddings, labels) = make_loss(), samples()
    found, _ = loss_func.get_outliers(embeddings, labels)
    assert found.equal(loss_func.get_outliers(embeddings, labels, threshold=75)[0])


def test_outliers_alone():
    loss_func, (embeddings, labels) = make_loss(), samples()
    found = loss_func.get_outliers(embeddings, labels.int(), return_dominant_centers=False)
    assert found.equal(loss_func.get_outliers(embeddings, labels)[0])
    assert found.dtype == torch.long


def test_no_samples_have_no_outliers():
    found, centers = make_loss().get_outliers(torch.empty(0, SIZE), torch.empty(0, dtype=torch.long))
    assert found.tolist() == []
    assert centers.isnan().all()


@pytest.mark.parametrize("distance", [distances.LpDistance(), distances.CosineSimilarity(power=2)], ids=["L2", "power"])
def test_outliers_need_an_angle(distance):
    with pytest.raises(
        ValueError, match=r"distance must be PML's CosineSimilarity .* got \w+ with p=2 and power=[12]$"
    ):
        make_loss(distance=distance).get_outliers(*samples())


def test_wrong_arguments_of_outliers_are_refused():
    loss_func, (embeddings, labels) = make_loss(), samples()
    with pytest.raises(ValueError, match="threshold must be a number of degrees from 0 to 180, got 181"):
        loss_func.get_outliers(embeddings, labels, threshold=181)
    with pytest.raises(ValueError, match="embeddings must be finite, got NaN or infinite values"):
        loss_func.get_outliers(embeddings / 0, labels)
    with pytest.raises(ValueError, match=re.escape("labels must lie in [0, 3]")):
        loss_func.get_outliers(embeddings, labels + CLASSES)


@pytest.mark.parametrize("name", DISTANCES)
def test_soft_assignment_is_that_of_the_equations(name):
    loss_func, (embeddings, labels) = make_loss(distance=make_distance(name), temperature=0.3), samples(20)
    similarity = DISTANCES[name][2]
    proxies = loss_func.proxies.detach()
    expected = [
        reference.softmax([similarity(x, w) / 0.3 for w in proxies[y]]) for x, y in zip(embeddings, labels, strict=True)
    ]
    torch.testing.assert_close(loss_func.soft_assign(embeddings, labels), torch.tensor(expected))


def test_soft_assignment_is_what_the_usage_is_the_mean_of():
    loss_func, (embeddings, labels) = make_loss(usage_momentum=0.0), samples()
    expected = functional.usage_sums(loss_func.soft_assign(embeddings, labels), labels, CLASSES)[:-1]
    loss_func(embeddings, labels)
    torch.testing.assert_close(loss_func.proxy_usage[:-1], expected / expected.sum(dim=1, keepdim=True))


def test_looking_changes_nothing():
    loss_func, (embeddings, labels) = make_loss(), samples()
    usage, proxies = loss_func.proxy_usage.clone(), loss_func.proxies.detach().clone()
    q = loss_func.soft_assign(embeddings.requires_grad_(), labels)
    _, centers = loss_func.get_outliers(embeddings, labels)
    assert not q.requires_grad
    assert not centers.requires_grad
    assert loss_func.training
    assert loss_func.proxy_usage.equal(usage)
    assert loss_func.proxies.equal(proxies)


def test_soft_assignment_of_half_precision():
    loss_func, (embeddings, labels) = make_loss(), samples()
    q = loss_func.half().soft_assign(embeddings.half(), labels)
    assert q.dtype == torch.float32
    torch.testing.assert_close(q.sum(dim=1), torch.ones(len(q)))


def test_wrong_arguments_of_soft_assign_are_refused():
    with pytest.raises(ValueError, match=re.escape("embeddings must be of shape (batch_size, 6), got (5, 7)")):
        make_loss().soft_assign(torch.zeros(5, 7), torch.zeros(5).long())
    with pytest.raises(ValueError, match=re.escape("labels must be given, a tensor of shape (5,), got None")):
        make_loss().soft_assign(torch.zeros(5, 6), None)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("count", [1, 5, 40])
def test_nearest_samples_are_those_of_a_search_by_hand(name, count):
    loss_func, (embeddings, labels) = make_loss(distance=make_distance(name)), samples(30)
    found = nearest_samples(loss_func, embeddings, labels, count)
    assert found.shape == (CLASSES, PROXIES, count)
    similarity, proxies = DISTANCES[name][2], loss_func.proxies.detach()
    for c in range(CLASSES):
        members = (labels == c).nonzero().flatten().tolist()
        for k in range(PROXIES):
            expected = sorted(members, key=lambda i: -similarity(embeddings[i], proxies[c, k]).item())[:count]
            assert found[c, k].tolist() == expected + [-1] * (count - len(expected))


def test_of_equally_near_samples_the_first_comes_first():
    embeddings, labels = torch.ones(50, SIZE), torch.zeros(50).long()
    assert nearest_samples(make_loss(), embeddings, labels, 50)[0, 0].tolist() == list(range(50))


def test_nearest_samples_of_none():
    assert (nearest_samples(make_loss(), torch.empty(0, SIZE), torch.empty(0).long(), 2) == -1).all()


def test_accuracy_is_that_of_the_best_matching():
    """Tried are all matchings; three fine labels and three proxies in each class."""
    loss_func, (embeddings, labels) = make_loss(), samples()
    fine = torch.randint(3, (len(labels),))
    proxies = loss_func.assign(embeddings, labels)[1]
    result = cluster_scores(loss_func, embeddings, labels, fine)
    assert sorted(result.per_class) == [0, 1, 2]
    for c, scores in result.per_class.items():
        of_class = labels == c
        agree = [(torch.tensor(to)[proxies] == fine)[of_class].double().mean().item() for to in permutations(range(3))]
        assert scores.accuracy == pytest.approx(max(agree))


def test_scores_are_those_of_scikit_learn_within_classes():
    loss_func, (embeddings, labels) = make_loss(), samples()
    fine = torch.randint(5, (len(labels),))
    proxies = loss_func.assign(embeddings, labels)[1]
    result = cluster_scores(loss_func, embeddings, labels.int(), fine.int())
    for c, scores in result.per_class.items():
        of_class = labels == c
        assert scores.nmi == pytest.approx(normalized_mutual_info_score(fine[of_class], proxies[of_class]))
        assert scores.ari == pytest.approx(adjusted_rand_score(fine[of_class], proxies[of_class]))
    for name in Scores._fields:
        of_classes = [getattr(scores, name) for scores in result.per_class.values()]
        assert getattr(result.mean, name) == pytest.approx(sum(of_classes) / len(of_classes))


def test_true_parts_score_1_whatever_their_numbers():
    loss_func = make_loss()
    proxies = loss_func.proxies.detach().repeat_interleave(4, dim=0).flatten(0, 1)  # four samples at each
    labels = torch.arange(CLASSES).repeat_interleave(4 * PROXIES)
    fine = 100 - torch.arange(PROXIES).repeat(4 * CLASSES)
    assert cluster_scores(loss_func, proxies, labels, fine).mean == pytest.approx((1, 1, 1))


def test_samples_without_a_fine_label_are_left_out():
    loss_func, (embeddings, labels) = make_loss(), samples()
    fine = torch.randint(3, (len(labels),))
    known = (torch.rand(len(labels)) < 0.5) & (labels != 1)
    result = cluster_scores(loss_func, embeddings, labels, torch.where(known, fine, -1))
    assert result == cluster_scores(loss_func, embeddings[known], labels[known], fine[known])
    assert sorted(result.per_class) == [0, 2]


x, y = torch.zeros(5, SIZE), torch.zeros(5).long()
WRONG = {
    "count": (nearest_samples, (make_loss(), x, y, 0), ValueError, "count must be an int of at least 1, got 0"),
    "loss": (
        nearest_samples,
        (torch.nn.L1Loss(), x, y, 1),
        TypeError,
        "loss_func must be a MultiProxyEntropyLoss, got L",
    ),
    "not finite": (nearest_samples, (make_loss(), x / 0, y, 1), ValueError, "embeddings must be finite, got NaN"),
    "labels": (nearest_samples, (make_loss(), x, y + CLASSES, 1), ValueError, "labels must lie in [0, 3]"),
    "fine labels of floats": (
        cluster_scores,
        (make_loss(), x, y, y / 2),
        TypeError,
        "fine_labels must be of an integer dtype, got torch.float32",
    ),
    "fine labels of another length": (
        cluster_scores,
        (make_loss(), x, y, y[:3]),
        ValueError,
        "fine_labels must be of shape (5,), one for each embedding, got (3,)",
    ),
    "no fine label": (
        cluster_scores,
        (make_loss(), x, y, y - 1),
        ValueError,
        "fine_labels must hold a value of at least 0 (negative: unknown), got none",
    ),
}


@pytest.mark.parametrize(
    "look",
    [
        lambda loss_func: nearest_samples(loss_func, *samples(), count=2),
        lambda loss_func: cluster_scores(loss_func, *samples(), samples()[1]),
        lambda loss_func: loss_func.get_outliers(*samples()),
    ],
    ids=["nearest_samples", "cluster_scores", "get_outliers"],
)
def test_proxies_of_a_training_that_diverged_are_refused(look):
    """A proxy that is not a number would be the nearest to all samples, and sort before any other."""
    loss_func = make_loss()
    loss_func.proxies.data[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="proxies must be finite, got NaN or infinite values"):
        look(loss_func)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused(case):
    function, arguments, error, message = WRONG[case]
    with pytest.raises(error, match=re.escape(message)):
        function(*arguments)
