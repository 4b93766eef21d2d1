"""Settings at which the loss is one of PML's own: values and gradients."""

import pytest
import torch
from pytorch_metric_learning import losses as pml_losses

from pml_multiproxy import losses

WITHOUT_ENTROPIES = {"intra_weight": 0, "inter_weight": 0, "balance_weight": 0}
CASES = {  # proxies per class and settings of ours, settings of PML's
    "NormalizedSoftmaxLoss": (1, {"scale": 12.5}, {"temperature": 1 / 12.5}),
    "SoftTripleLoss": (
        4,
        {"scale": 15, "temperature": 0.2, "margin": 0.07, "pooling": "softmax"},
        {"centers_per_class": 4, "la": 15, "gamma": 0.2, "margin": 0.07},
    ),
    "SubCenterArcFaceLoss": (3, {"scale": 20, "pooling": "max"}, {"sub_centers": 3, "margin": 0, "scale": 20}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pml(case):
    per_class, settings, theirs_settings = CASES[case]
    triplets = (torch.tensor([1, 2]), torch.tensor([2, 5]), torch.tensor([9, 9]))
    for indices_tuple in (None, triplets):
        ours = losses.MultiProxyEntropyLoss(5, 8, per_class, **settings, **WITHOUT_ENTROPIES).double()
        theirs = getattr(pml_losses, case)(num_classes=5, embedding_size=8, **theirs_settings).double()
        weights = torch.randn(5 * per_class, 8, dtype=torch.float64)
        ours.proxies.data.copy_(weights.view_as(ours.proxies))
        (of_theirs,) = theirs.parameters()
        of_theirs.data.copy_(weights.T)
        labels, embeddings = torch.randint(5, (16,)), torch.randn(16, 8, dtype=torch.float64)
        results = []
        for loss_func, weights in ((ours, ours.proxies), (theirs, of_theirs)):
            x = embeddings.clone().requires_grad_()
            loss = loss_func(x, labels, indices_tuple)
            results.append((loss.detach(), *torch.autograd.grad(loss, [x, weights])))
        results[0][2].resize_(5 * per_class, 8)
        results[1] = (*results[1][:2], results[1][2].T)
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
