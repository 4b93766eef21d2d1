"""The neighbour term: its equation sample by sample, on every path, and what must not change it."""

import copy
import math

import pytest
import reference
import torch
from cases import DISTANCES, computed_by, make_distance
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import reducers

from pml_multiproxy import MultiProxyEntropyLoss, functional

ON = {"neighbor_weight": 0.7, "neighbor_temperature": 0.3}
ALONE = {"intra_weight": 0, "balance_weight": 0}


def batch(count=8, size=6, classes=2, views=2):
    embeddings = torch.randn(count, size, dtype=torch.float64, requires_grad=True)
    return embeddings, (torch.arange(count // views) % classes).repeat(views)


def neighbor_losses(embeddings, labels, proxies, similarity, *, temperature, neighbor_temperature, views):
    """By samples and proxies, on scalars; the targets without a gradient."""
    count, per_class = len(labels), proxies.shape[1]
    source = [i % (count // views) for i in range(count)]
    with torch.no_grad():
        q = [
            torch.stack(reference.softmax([similarity(x, w) / temperature for w in proxies[y]]))
            for x, y in zip(embeddings, labels.tolist(), strict=True)
        ]
        mean = [sum(q[j] for j in range(count) if source[j] == source[i]) / views for i in range(count)]

        def near(c, k, m):
            own = (similarity(proxies[c, k], proxies[c, k]) + similarity(proxies[c, m], proxies[c, m])) / 2
            return math.exp((similarity(proxies[c, k], proxies[c, m]) - own) / temperature)

        def target(i, j):
            if i == j or labels[i] != labels[j]:
                return 0.0
            if source[i] == source[j]:
                return 1.0
            c, pairs = int(labels[i]), [(k, m) for k in range(per_class) for m in range(per_class)]
            return float(sum(mean[i][k] * near(c, k, m) * mean[j][m] for k, m in pairs))

    result = []
    for i in range(count):
        others = [j for j in range(count) if j != i]
        p = reference.softmax([similarity(embeddings[i], embeddings[j]) / neighbor_temperature for j in others])
        t = [target(i, j) for j in others]
        result.append(-sum(a * b.log() for a, b in zip(t, p, strict=True)) / max(sum(t), 1e-300))
    return torch.stack(result)


@pytest.mark.parametrize("path", ["analytic", "autograd", "streamed"])
@pytest.mark.parametrize("distance", ["cosine", "L2", "SNR", "dot product"])
def test_value_and_gradients(distance, path):
    embeddings, labels = batch()
    options = {"classes_per_chunk": 1 if path == "streamed" else None, "distance": make_distance(distance)}
    loss_func = MultiProxyEntropyLoss(3, 6, 4, views=2, temperature=0.2, **ON, **options).double().eval()
    without = copy.deepcopy(loss_func)
    without.neighbor_weight = 0.0
    proxies = loss_func.proxies.detach()
    wanted = (
        without(embeddings, labels)
        + 0.7
        * neighbor_losses(
            embeddings, labels, proxies, DISTANCES[distance][2], temperature=0.2, neighbor_temperature=0.3, views=2
        ).mean()
    )
    of_embeddings, of_proxies = torch.autograd.grad(wanted, [embeddings, without.proxies])
    with computed_by("autograd" if path == "autograd" else "analytic"):
        loss = loss_func(embeddings, labels)
    found = torch.autograd.grad(loss, [embeddings, loss_func.proxies])
    torch.testing.assert_close(loss, wanted, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found, (of_embeddings, of_proxies), atol=1e-10, rtol=1e-10)


def test_one_proxy_per_class_is_supervised_contrast():
    embeddings, labels = batch(views=1)
    loss_func = MultiProxyEntropyLoss(3, 6, 1, neighbor_weight=1, neighbor_temperature=0.3).double()
    without = MultiProxyEntropyLoss(3, 6, 1).double()
    without.proxies = loss_func.proxies
    supervised = pml_losses.SupConLoss(temperature=0.3, reducer=reducers.MeanReducer())
    wanted = without(embeddings, labels) + supervised(embeddings, labels)
    torch.testing.assert_close(loss_func(embeddings, labels), wanted, atol=1e-10, rtol=1e-10)


def test_equal_proxies_are_one_proxy():
    embeddings, labels = batch()
    one = MultiProxyEntropyLoss(3, 6, 1, views=2, pooling="max", **ALONE).double()
    many = MultiProxyEntropyLoss(3, 6, 5, views=2, pooling="max", **ALONE).double()
    many.proxies.data = one.proxies.data.repeat(1, 5, 1)
    torch.testing.assert_close(many(embeddings, labels), one(embeddings, labels), atol=1e-10, rtol=1e-10)


def test_order_changes_nothing():
    embeddings, labels = batch()
    loss_func = MultiProxyEntropyLoss(3, 6, 4, views=2, **ON).double().eval()
    losses = loss_func.compute_loss(embeddings, labels)["loss"]["losses"]
    order, of_classes, of_proxies = torch.randperm(4), torch.tensor([2, 0, 1]), torch.randperm(4)
    rows = torch.cat([order, order + 4])
    permuted = copy.deepcopy(loss_func)
    permuted.proxies.data[of_classes] = loss_func.proxies.data[:, of_proxies]
    permuted.proxy_usage[of_classes] = loss_func.proxy_usage[:, of_proxies]
    found = permuted.compute_loss(embeddings[rows], of_classes[labels[rows]])["loss"]["losses"]
    torch.testing.assert_close(found, losses[rows], atol=1e-10, rtol=1e-10)


def test_on_with_views_and_off_with_one_view_unless_given():
    embeddings, labels = batch()
    for options, weight in (({"views": 2}, 1.0), ({"views": 1}, 0.0), ({"views": 1, "neighbor_weight": 2.0}, 2.0)):
        loss_func = MultiProxyEntropyLoss(3, 6, 4, **options).double().eval()
        off = copy.deepcopy(loss_func)
        off.neighbor_weight = 0
        loss_func.neighbor_weight = weight
        given = copy.deepcopy(loss_func)
        given.neighbor_weight = options.get("neighbor_weight")
        assert given(embeddings, labels).equal(loss_func(embeddings, labels))
        assert (loss_func(embeddings, labels) == off(embeddings, labels)) == (weight == 0)


def test_the_targets_get_no_gradient():
    embeddings, labels = batch()
    loss_func = MultiProxyEntropyLoss(3, 6, 4, views=2).double().eval()
    with_term = torch.autograd.grad(loss_func(embeddings, labels), loss_func.proxies)[0]
    loss_func.neighbor_weight = 0
    assert torch.autograd.grad(loss_func(embeddings, labels), loss_func.proxies)[0].equal(with_term)


@pytest.mark.parametrize("distance", ["cosine", "L2", "SNR"])
def test_a_row_that_is_not_finite_changes_no_other(distance):
    embeddings, labels = batch()
    loss_func = MultiProxyEntropyLoss(3, 6, 4, views=2, distance=make_distance(distance)).double().eval()
    broken = embeddings.detach().clone()
    broken[1, 0] = torch.nan
    broken.requires_grad_()
    losses = loss_func.compute_loss(broken, labels)["loss"]["losses"]
    others = (torch.arange(8) % 4) != 1  # its other view has no cross-entropy between views
    assert losses[1].isnan()
    assert losses[others].isfinite().all()
    assert torch.autograd.grad(losses[others].sum(), broken)[0][others].isfinite().all()


def test_a_sample_without_neighbours_has_no_term():
    similarities, ones = torch.zeros(3, 3), torch.ones(3, 1)
    found = functional.neighbor_loss(similarities, ones, ones, torch.arange(3), temperature=0.2, views=1)
    assert found.equal(torch.zeros(3))
    assert functional.neighbor_loss(similarities[:1, :1], ones[:1], ones[:1], torch.zeros(1).long(), 0.2, 1) == 0


def test_under_autocast_it_is_as_precise_as_without():
    embeddings, labels = batch()
    loss_func = MultiProxyEntropyLoss(3, 6, 4, views=2, neighbor_weight=100).eval()
    x = embeddings.detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss_func(x, labels)
    torch.testing.assert_close(rounded, loss_func(x, labels), rtol=1e-3, atol=0)


def test_it_is_recorded():
    embeddings, labels = batch()
    loss_func = MultiProxyEntropyLoss(3, 6, 4, views=2, collect_stats=True).double().eval()
    with_term = loss_func(embeddings, labels)
    recorded = loss_func.neighbor_loss
    loss_func.neighbor_weight = 0
    assert math.isclose((with_term - loss_func(embeddings, labels)).item(), recorded, rel_tol=1e-9)
    assert loss_func.neighbor_loss == 0
