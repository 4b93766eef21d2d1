"""Every wrong argument is refused with its name, what came and what is allowed."""

import re

import numpy as np
import pytest
import torch

from pml_multiproxy import MultiProxyEntropyLoss

nan, inf = float("nan"), float("inf")

ARGUMENTS = [
    *(
        (name, value, TypeError, f"{name} must be an int of at least 1, got {value!r} of type {type(value).__name__}")
        for name in ("num_classes", "embedding_size", "proxies_per_class")
        for value in (nan, 2.0, True, "2", None)
    ),
    *(
        (name, value, ValueError, f"{name} must be an int of at least 1, got {value}")
        for name in ("num_classes", "embedding_size", "proxies_per_class")
        for value in (0, -1)
    ),
    *(
        ("classes_per_chunk", value, error, f"classes_per_chunk must be an int of at least 1, got {value!r}")
        for value, error in ((0, ValueError), (-2, ValueError), (2.0, TypeError), (True, TypeError))
    ),
    *(
        (name, value, ValueError, f"{name} must be a finite number above 0, got {value}")
        for name in ("scale", "temperature")
        for value in (0, -1.0, nan, inf)
    ),
    *(
        (name, value, ValueError, f"{name} must be a finite number of at least 0, got {value}")
        for name in ("intra_weight", "inter_weight", "balance_weight")
        for value in (-0.1, nan, inf)
    ),
    *(("margin", value, ValueError, f"margin must be a finite number, got {value}") for value in (nan, -inf)),
    *(
        ("usage_momentum", value, ValueError, f"usage_momentum must be a number from 0 to 1, got {value}")
        for value in (-0.1, 1.1, nan)
    ),
    *(
        ("reseed_below", value, ValueError, f"reseed_below must be a number from 0 to below 1, got {value}")
        for value in (-0.1, 1.0, nan)
    ),
    *(
        (name, value, TypeError, f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}")
        for name, allowed in (
            ("scale", "a finite number above 0"),
            ("margin", "a finite number"),
            ("balance_weight", "a finite number of at least 0"),
            ("usage_momentum", "a number from 0 to 1"),
            ("reseed_below", "a number from 0 to below 1"),
        )
        for value in ("1", None, True)
    ),
    *(
        (
            "usage_group",
            value,
            TypeError,
            f"usage_group must be None, 'world' or a torch.distributed.ProcessGroup that this process is in, "
            f"got {value!r}",
        )
        for value in (0, "gloo", -100)  # the last is what new_group returns to other processes
    ),
    *(
        ("pooling", value, ValueError, f"pooling must be one of 'max', 'softmax', 'logsumexp', got {value!r}")
        for value in ("mean", "", None, 3)
    ),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), ARGUMENTS)
def test_constructor(name, value, error, message):
    arguments = {"num_classes": 3, "embedding_size": 8, name: value}
    with pytest.raises(error, match=re.escape(message)):
        MultiProxyEntropyLoss(**arguments)


def test_numpy_numbers_are_numbers():
    loss_func = MultiProxyEntropyLoss(np.int64(3), np.int32(8), scale=np.float32(2), margin=np.float64(0.5))
    assert (loss_func.num_classes, loss_func.embedding_size, loss_func.scale) == (3, 8, 2.0)


def test_unknown_argument():
    with pytest.raises(TypeError, match="sclae"):
        MultiProxyEntropyLoss(3, 8, sclae=1)


x, y = torch.zeros(4, 8), torch.tensor([0, 1, 2, 0])

CALLS = {
    "embeddings as a list": ([[0.0] * 8], y, TypeError, "embeddings must be a torch.Tensor of shape (batch_size, 8), "
        "got list"),
    "embeddings of integers": (x.long(), y, TypeError, "embeddings must be of a floating-point dtype, got torch.int64"),
    "complex embeddings": (x.to(torch.complex64), y, TypeError, "embeddings must be of a floating-point dtype, "
        "got torch.complex64"),
    "one embedding": (x[0], y, ValueError, "embeddings must be of shape (batch_size, 8), got (8,)"),
    "embeddings in three dimensions": (x[None], y, ValueError, "embeddings must be of shape (batch_size, 8), "
        "got (1, 4, 8)"),
    "embeddings of another size": (x[:, :5], y, ValueError, "embeddings must be of shape (batch_size, 8), got (4, 5)"),
    "another device": (x.to("meta"), y, ValueError, "embeddings must be on the device of the proxies, cpu, got meta"),
    "no labels": (x, None, ValueError, "labels must be given, a tensor of shape (4,), got None"),
    "labels as a list": (x, [0, 1, 2, 0], TypeError, "labels must be a torch.Tensor of shape (4,), got list"),
    "labels of bools": (x, y.bool(), TypeError, "labels must be of an integer dtype, got torch.bool"),
    "labels of floats": (x, y.float(), TypeError, "labels must be of an integer dtype, got torch.float32"),
    "too few labels": (x, y[:3], ValueError, "labels must be of shape (4,), one for each embedding, got (3,)"),
    "labels in two dimensions": (x, y[:, None], ValueError, "labels must be of shape (4,), one for each embedding, "
        "got (4, 1)"),
    "a label too large": (x, y + 1, ValueError, "labels must lie in [0, 2] (num_classes is 3), "
        "got values from 1 to 3"),
    "a negative label": (x, y - 1, ValueError, "labels must lie in [0, 2] (num_classes is 3), got values from -1 to 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_call(case, loss_func):
    embeddings, labels, error, message = CALLS[case]
    with pytest.raises(error, match=re.escape(message)):
        loss_func(embeddings, labels)


@pytest.mark.parametrize("case", CALLS)
def test_get_logits_and_assign(case, loss_func):
    embeddings, labels, error, message = CALLS[case]
    if message.startswith("embeddings"):
        with pytest.raises(error, match=re.escape(message)):
            loss_func.get_logits(embeddings)
        with pytest.raises(error, match=re.escape(message)):
            loss_func.assign(embeddings)
    elif labels is None:
        loss_func.assign(embeddings, labels)
    else:
        with pytest.raises(error, match=re.escape(message)):
            loss_func.assign(embeddings, labels)


@pytest.mark.parametrize("name", ["ref_emb", "ref_labels"])
def test_references(name, loss_func):
    with pytest.raises(ValueError, match=re.escape(f"{name} must be None, got Tensor: proxies take its place")):
        loss_func(x, y, **{name: x.clone() if name == "ref_emb" else y.clone()})


def test_references_with_views():
    loss_func = MultiProxyEntropyLoss(3, 8, views=2)
    with pytest.raises(ValueError, match=re.escape("views of the same samples go into one batch: torch.cat(")):
        loss_func(x, y, ref_emb=x.clone(), ref_labels=y)


def test_references_that_are_the_batch_itself(loss_func):
    expected = loss_func.eval()(x, y)
    assert loss_func(x, y, ref_emb=x, ref_labels=y).equal(expected)
    assert loss_func.compute_loss(embeddings=x, labels=y)["loss"]["losses"].shape == (4,)


def test_views():
    loss_func = MultiProxyEntropyLoss(3, 8, views=2)
    for value, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=re.escape(f"views must be an int of at least 1, got {value!r}")):
            MultiProxyEntropyLoss(3, 8, views=value)
    with pytest.raises(ValueError, match="the batch must be views = 2 blocks of equal length, got 3 embeddings"):
        loss_func(x[:3], y[:3])
    with pytest.raises(ValueError, match=r"labels must be the same in each of the views = 2 blocks of the batch"):
        loss_func(x, y)


i = torch.tensor([0, 1])
TUPLES = {
    "a tensor": (i, TypeError, "indices_tuple must be None or a tuple of 2 to 4 tensors, as PML's miners return, "
        "got Tensor"),
    "lists": (([0], [1], [2]), TypeError, "indices_tuple must be None or a tuple of 2 to 4 tensors, as PML's miners "
        "return, got ['list', 'list', 'list']"),
    "one tensor": ((i,), ValueError, "indices_tuple must hold 2 tensors, 3 (triplets) or 4 (pairs), got 1"),
    "floats": ((i, i, i.float()), TypeError, "indices_tuple[2] must be of an integer dtype, got torch.float32"),
    "a mask": ((i, i > 0, i), TypeError, "indices_tuple[1] must be of an integer dtype, got torch.bool"),
    "a single index": ((i[0], i, i), ValueError, "indices_tuple[0] must be in one dimension, got shape ()"),
    "an index too large": ((i, i + 3, i), ValueError, "indices_tuple[1] must lie in [0, 3] (the batch size is 4), "
        "got values from 3 to 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", TUPLES)
def test_indices_tuple(case, loss_func):
    indices_tuple, error, message = TUPLES[case]
    with pytest.raises(error, match=re.escape(message)):
        loss_func(x, y, indices_tuple)


def test_nothing_changes_when_a_call_is_refused(loss_func):
    before = {name: value.clone() for name, value in loss_func.state_dict().items()}
    with pytest.raises(ValueError, match="labels"):
        loss_func(torch.randn(4, 8), y + 1)
    assert all(value.equal(before[name]) for name, value in loss_func.state_dict().items())
