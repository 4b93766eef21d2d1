"""The neighbour term beside its equation, which test_equations.py and test_fuzz.py check."""

import copy

import pytest
import torch
from cases import make_distance
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import reducers

from pml_multiproxy import MultiProxyEntropyLoss, functional


def batch(views=2):
    embeddings = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    return embeddings, (torch.arange(8 // views) % 2).repeat(views)


def test_one_proxy_per_class_is_supervised_contrast():
    embeddings, labels = batch(views=1)
    loss_func = MultiProxyEntropyLoss(3, 6, 1, neighbor_weight=1, neighbor_temperature=0.3).double()
    without = MultiProxyEntropyLoss(3, 6, 1).double()
    without.proxies = loss_func.proxies
    supervised = pml_losses.SupConLoss(temperature=0.3, reducer=reducers.MeanReducer())
    wanted = without(embeddings, labels) + supervised(embeddings, labels)
    torch.testing.assert_close(loss_func(embeddings, labels), wanted, atol=1e-10, rtol=1e-10)


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


def test_samples_left_out_are_in_no_softmax_and_nobodys_neighbours():
    similarities, assignments = torch.randn(8, 8), torch.rand(4, 3).softmax(dim=1)
    sample, labels, left_out = torch.arange(8) % 4, torch.arange(8) % 2, torch.arange(8) == 1
    found = functional.neighbor_loss(similarities, assignments, assignments, labels, 0.3, 2, left_out)
    targets = (assignments @ assignments.T).repeat(2, 2) * (labels.unsqueeze(1) == labels)
    targets[sample.unsqueeze(1) == sample] = 1
    for i in (~left_out).nonzero():
        others = (~left_out & (torch.arange(8) != i)).nonzero().squeeze(1)
        shares = targets[i, others] / targets[i, others].sum()
        wanted = -(shares * (similarities[i, others] / 0.3).log_softmax(dim=0)).sum()
        torch.testing.assert_close(found[i], wanted.view(1))


def test_targets_get_no_gradient():
    similarities, assignments = torch.randn(4, 4, requires_grad=True), torch.rand(2, 3, requires_grad=True)
    loss = functional.neighbor_loss(
        similarities, assignments, assignments * 2, torch.tensor([0, 1, 0, 1]), 0.3, views=2
    )
    of_similarities, of_assignments = torch.autograd.grad(loss.sum(), (similarities, assignments), allow_unused=True)
    assert of_similarities.any()
    assert of_assignments is None


def test_under_autocast_it_is_as_precise_as_without():
    embeddings, labels = batch()
    loss_func = MultiProxyEntropyLoss(3, 6, 4, views=2, neighbor_weight=100).eval()
    x = embeddings.detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss_func(x, labels)
    torch.testing.assert_close(rounded, loss_func(x, labels), rtol=1e-3, atol=0)
