"""A step reads no value back from the device, for which a GPU would have to wait.

Stands in for a GPU: the meta device, whose tensors hold no values, so that whatever needs one raises.
"""

import pytest
import torch
from cases import make_distance
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pml_multiproxy import MultiProxyEntropyLoss, ProxyEntropyRegularizer
from pml_multiproxy._analytic import products
from pml_multiproxy._analytic.poolings import POOLINGS


class OnlyOnMeta(TorchDispatchMode):
    """No copy between devices either: one out of pageable memory makes the host wait, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        assert {tensor.device.type for tensor in tensors} <= {"meta"}, func
        return result


def check(distance="cosine", **options):
    for per_chunk in (None, 7):
        options |= {"distance": make_distance(distance), "classes_per_chunk": per_chunk}
        loss_func = MultiProxyEntropyLoss(20, 6, 3, **options).to("meta")
        embeddings = torch.empty(10, 6, device="meta", requires_grad=True)
        labels = torch.empty(10, dtype=torch.long, device="meta")
        with OnlyOnMeta():
            loss_func(embeddings, labels).backward()
            loss_func(embeddings, labels).backward()
        assert embeddings.grad.is_meta
        assert loss_func.proxies.grad.is_meta


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("distance", ["cosine", "dot product", "L2", "SNR"])
def test_a_step_looks_at_no_value(distance, pooling):
    check(distance, pooling=pooling)


def test_nor_under_autocast(monkeypatch):
    """The meta device has no autocast of its own."""
    monkeypatch.setattr(products, "autocast_dtype", lambda device_type: torch.bfloat16)
    check()


@pytest.mark.parametrize("options", [{"weight_regularizer": ProxyEntropyRegularizer(3)}, {"views": 2}], ids=str)
def test_nor_with_more_terms(options):
    check(**options)


def test_looking_at_a_value_would_show():
    looks = (float, bool, torch.nonzero, torch.unique, torch.bincount, lambda x: x[x > 0], torch.Tensor.cpu)
    for look in looks:
        with OnlyOnMeta(), pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
            look(torch.empty((), dtype=torch.long, device="meta").expand(1))
