"""A step reads no value back from the device, for which a GPU would have to wait.

Stands in for a GPU: the meta device, whose tensors hold no values, so that whatever needs one raises.
"""

import pytest
import torch
from pytorch_metric_learning import distances
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pml_multiproxy import MultiProxyEntropyLoss, ProxyEntropyRegularizer, _autocast
from pml_multiproxy._analytic.poolings import POOLINGS

DISTANCES = (
    distances.CosineSimilarity(),
    distances.DotProductSimilarity(normalize_embeddings=False),
    distances.LpDistance(),
    distances.SNRDistance(),
)
RESEEDED_AND_REGULARIZED = {"reseed_below": 0.01, "weight_regularizer": ProxyEntropyRegularizer(3)}


class OnlyOnMeta(TorchDispatchMode):
    """No copy between devices either: one out of pageable memory makes the host wait, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        assert {tensor.device.type for tensor in tensors} <= {"meta"}, func
        return result


@pytest.fixture(params=[False, True], ids=["full precision", "autocast"])
def autocast(request, monkeypatch):
    """That of the meta device, which PyTorch has not."""
    if request.param:
        monkeypatch.setattr(_autocast, "current", lambda device_type: _autocast.Autocast(device_type, torch.bfloat16))


@pytest.mark.parametrize("options", [{}, RESEEDED_AND_REGULARIZED], ids=["defaults", "reseeding, regularizer"])
@pytest.mark.parametrize("per_chunk", [None, 7])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("distance", DISTANCES, ids=lambda distance: type(distance).__name__)
@pytest.mark.usefixtures("autocast")
def test_a_step_looks_at_no_value(distance, pooling, per_chunk, options):
    loss_func = MultiProxyEntropyLoss(
        20, 6, 3, distance=distance, pooling=pooling, classes_per_chunk=per_chunk, **options
    ).to("meta")
    embeddings = torch.empty(9, 6, device="meta", requires_grad=True)
    labels = torch.empty(9, dtype=torch.long, device="meta")
    with OnlyOnMeta():
        loss_func(embeddings, labels).backward()
    assert embeddings.grad.is_meta
    assert loss_func.proxies.grad.is_meta


@pytest.mark.parametrize(
    "look", [float, bool, torch.nonzero, torch.unique, torch.bincount, lambda x: x[x > 0], torch.Tensor.cpu]
)
def test_looking_at_a_value_would_show(look):
    with OnlyOnMeta(), pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
        look(torch.empty((), dtype=torch.long, device="meta").expand(1))
