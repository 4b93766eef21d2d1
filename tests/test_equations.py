"""Values and gradients of the loss against the reference, over everything that it can be combined with."""

import pytest
import reference
import torch
from cases import DISTANCES, make_distance, memory_full_of_nan

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy._analytic.poolings import POOLINGS

SETTINGS = {"scale": 3.0, "temperature": 0.3, "margin": 0.1, "intra_weight": 0.7, "inter_weight": 0.4}
SHAPES = [(3, 4, 5, 1), (4, 1, 3, 1), (1, 3, 2, 1), (2, 2, 1, 1), (3, 4, 5, 2), (2, 3, 2, 3)]
"""Classes, proxies per class, samples, views."""
TUPLES = [
    lambda last: None,
    lambda last: (torch.tensor([0, 0]), torch.tensor([last, 0]), torch.tensor([0, last // 2])),
    lambda last: (torch.tensor([last]), torch.tensor([0]), torch.tensor([0, 0]), torch.tensor([0, 0])),
    lambda last: (torch.tensor([], dtype=torch.long),) * 3,
]
"""Of no miner, of miners of triplets and of pairs, and of one that found nothing; by the last sample."""


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_every_combination(distance, pooling):
    """Over shapes, views and miner tuples; fuzz.py has dtypes, memory layouts and modes."""
    for shape, mined in zip(2 * SHAPES, 3 * TUPLES, strict=True):
        num_classes, per_class, count, views = shape
        options = {"pooling": pooling, "distance": make_distance(distance), "views": views, **SETTINGS}
        loss_func = MultiProxyEntropyLoss(num_classes, 6, per_class, **options).double()
        loss_func.proxy_usage.copy_(torch.rand(num_classes, per_class).softmax(dim=1))
        embeddings = torch.randn(views * count, 6, dtype=torch.float64, requires_grad=True)
        labels, mined = (torch.arange(count) % num_classes).repeat(views), mined(views * count - 1)
        expected = reference.evaluate(loss_func, DISTANCES[distance][2], embeddings, labels)
        wanted = (expected.losses * reference.miner_weights(mined, len(labels))).mean()
        with memory_full_of_nan():
            loss = loss_func(embeddings, labels, mined)
            found = torch.autograd.grad(loss, [embeddings, loss_func.proxies])
        torch.testing.assert_close(loss_func.proxy_usage, expected.usage.float())
        torch.testing.assert_close(loss, wanted, rtol=1e-7, atol=1e-7)
        gradients = torch.autograd.grad(wanted, [expected.x, expected.w])
        torch.testing.assert_close(found, gradients, rtol=1e-7, atol=1e-8)
