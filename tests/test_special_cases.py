"""Settings at which the loss is one of PML's own: values and gradients."""

import inspect

import pytest
import torch
from pytorch_metric_learning import losses as pml_losses

from pml_multiproxy import losses
from pml_multiproxy.distributed import ShardedMultiProxyEntropyLoss

CLASSES, SIZE, BATCH = 5, 8, 16
WITHOUT_ENTROPIES = {"intra_weight": 0, "inter_weight": 0, "balance_weight": 0}


def normalized_softmax():
    return (
        losses.MultiProxyEntropyLoss(CLASSES, SIZE, 1, scale=12.5, **WITHOUT_ENTROPIES),
        pml_losses.NormalizedSoftmaxLoss(CLASSES, SIZE, temperature=1 / 12.5),
        "W",
    )


def soft_triple():
    return (
        losses.MultiProxyEntropyLoss(
            CLASSES, SIZE, 4, scale=15, temperature=0.2, margin=0.07, pooling="softmax", **WITHOUT_ENTROPIES
        ),
        pml_losses.SoftTripleLoss(CLASSES, SIZE, centers_per_class=4, la=15, gamma=0.2, margin=0.07),
        "fc",
    )


def sub_center_arcface():
    return (
        losses.MultiProxyEntropyLoss(CLASSES, SIZE, 3, scale=20, pooling="max", **WITHOUT_ENTROPIES),
        pml_losses.SubCenterArcFaceLoss(num_classes=CLASSES, embedding_size=SIZE, sub_centers=3, margin=0, scale=20),
        "W",
    )


@pytest.mark.parametrize("case", [normalized_softmax, soft_triple, sub_center_arcface])
@pytest.mark.parametrize("mined", [False, True])
def test_equals_pml(case, mined):
    ours, theirs, name = case()
    weights = torch.randn(ours.proxies.flatten(0, 1).shape, dtype=torch.float64)
    ours.double().proxies.data.copy_(weights.view_as(ours.proxies))
    theirs.double().get_parameter(name).data.copy_(weights.T)
    labels = torch.randint(CLASSES, (BATCH,))
    indices_tuple = (torch.tensor([1, 2]), torch.tensor([2, 5]), torch.tensor([9, 9])) if mined else None

    gradients = []
    for loss_func in (ours, theirs):
        torch.manual_seed(1)
        embeddings = torch.randn(BATCH, SIZE, dtype=torch.float64, requires_grad=True)
        loss = loss_func(embeddings, labels, indices_tuple)
        loss.backward()
        gradients.append((loss.detach(), embeddings.grad))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    wanted = theirs.get_parameter(name).grad.T
    torch.testing.assert_close(ours.proxies.grad.flatten(0, 1), wanted, rtol=1e-10, atol=1e-12)


def test_the_sharded_loss_has_the_defaults_of_the_ordinary_one():
    ordinary, sharded = (
        {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
        for cls in (losses.MultiProxyEntropyLoss, ShardedMultiProxyEntropyLoss)
    )
    assert ordinary.pop("usage_group") is sharded.pop("process_group") is None
    assert sharded == ordinary
