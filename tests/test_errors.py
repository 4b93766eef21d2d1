"""Every wrong argument is refused with its name, what came and what is allowed."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch

from pml_multiproxy import MultiProxyEntropyLoss

nan, inf = float("nan"), float("inf")
INT, POSITIVE, NOT_NEGATIVE = "an int of at least 1", "a finite number above 0", "a finite number of at least 0"
WRONG_SETTINGS = [
    *((name, value, INT) for name in ("num_classes", "embedding_size", "proxies_per_class") for value in (0, -1)),
    *((name, 0, INT) for name in ("classes_per_chunk", "views")),
    *(("scale", value, POSITIVE) for value in (0, -1.0, nan, inf)),
    ("temperature", 0.0, POSITIVE),
    *((name, -0.1, NOT_NEGATIVE) for name in ("intra_weight", "inter_weight", "balance_weight", "neighbor_weight")),
    *(("margin", value, "a finite number") for value in (nan, -inf)),
    *(("usage_momentum", value, "a number from 0 to 1") for value in (-0.1, 1.1, nan)),
    *(("pooling", value, "one of 'max', 'softmax', 'logsumexp'") for value in ("mean", None)),
]
WRONG_KINDS = [
    *(("num_classes", value, INT) for value in (2.0, True, None)),
    *((name, 2.0, INT) for name in ("classes_per_chunk", "views")),
    *(("scale", value, POSITIVE) for value in (None, True)),
    ("margin", "1", "a finite number"),
    ("balance_weight", torch.nn.Parameter(torch.ones(())), NOT_NEGATIVE),
]


@pytest.mark.parametrize(
    ("name", "value", "allowed", "error"),
    [*((*case, ValueError) for case in WRONG_SETTINGS), *((*case, TypeError) for case in WRONG_KINDS)],
    ids=str,
)
def test_settings(name, value, allowed, error):
    message = f"{name} must be {allowed}, got {value!r}"
    message += f" of type {type(value).__name__}" if error is TypeError else ""
    with pytest.raises(error, match=re.escape(message)):
        MultiProxyEntropyLoss(**{"num_classes": 3, "embedding_size": 8, name: value})


def test_usage_group():
    for value in (0, "gloo", -100):  # the last is what new_group returns to other processes
        message = f"usage_group must be None, 'world' or a ProcessGroup that .* got {value!r}"
        with pytest.raises(TypeError, match=message):
            MultiProxyEntropyLoss(3, 8, usage_group=value)


x, y = torch.zeros(4, 8), torch.tensor([0, 1, 2, 0])
CALLS = {
    "the loss": lambda loss_func: loss_func(x, y),
    "compute_loss": lambda loss_func: loss_func.compute_loss(x, y),
    "get_logits": lambda loss_func: loss_func.get_logits(x),
    "soft_assign": lambda loss_func: loss_func.soft_assign(x, y),
}
SET_LATER = [
    *((name, torch.nn.Parameter(torch.ones(())), TypeError) for name in ("scale", "temperature", "margin")),
    *((name, torch.ones(()), TypeError) for name in ("temperature", "intra_weight")),
    ("temperature", 0.0, ValueError),
    ("scale", -10, ValueError),
    ("pooling", "median", ValueError),
    ("views", 0, ValueError),
]


@pytest.mark.parametrize(("name", "value", "error"), SET_LATER, ids=str)
def test_settings_that_are_set_later(name, value, error):
    """A tensor would get no gradient; so it is refused even if it wants none."""
    for call in CALLS.values():
        loss_func = MultiProxyEntropyLoss(3, 8, 4)
        call(loss_func)
        setattr(loss_func, name, value)
        with pytest.raises(error, match=f"{name} must be "):
            call(loss_func)


def test_a_valid_number_that_is_set_later_is_used(batch):
    values = {"scale": 3, "temperature": 0.5, "margin": 0.2, "pooling": "max", "usage_momentum": 0.1}
    values |= {"intra_weight": 1.0, "inter_weight": 1.0, "balance_weight": 2.0}
    for name, value in values.items():
        loss_func, expected = MultiProxyEntropyLoss(3, 8, 4), MultiProxyEntropyLoss(3, 8, 4, **{name: value})
        expected.load_state_dict(dict(loss_func.state_dict()))
        before = copy.deepcopy(loss_func)(*batch)
        setattr(loss_func, name, value)
        assert loss_func.settings() == expected.settings()
        changed = loss_func(*batch)
        assert changed.equal(expected(*batch)), name
        assert not changed.equal(before), name
        assert loss_func.get_logits(batch[0]).equal(expected.get_logits(batch[0])), name
        assert loss_func.soft_assign(*batch).equal(expected.soft_assign(*batch)), name


def test_numpy_numbers_are_numbers():
    loss_func = MultiProxyEntropyLoss(np.int64(3), np.int32(8), scale=np.float32(2), margin=np.float64(0.5))
    assert (loss_func.num_classes, loss_func.embedding_size, loss_func.scale) == (3, 8, 2.0)


def test_mistyped_arguments_get_a_hint():
    message = r"MultiProxyEntropyLoss got an unexpected argument 'proxy_per_class': did you mean 'proxies_per_class'\?"
    with pytest.raises(TypeError, match=message):
        MultiProxyEntropyLoss(3, 8, proxy_per_class=3)
    with pytest.raises(TypeError, match="unexpected argument 'weight_regularise': did you mean 'weight_regularizer'"):
        MultiProxyEntropyLoss(3, 8, weight_regularise=None)
    with pytest.raises(TypeError, match=r"unexpected argument 'xyz'$"):
        MultiProxyEntropyLoss(3, 8, xyz=1)


def test_statistics_that_are_not_collected(loss_func, batch):
    loss_func(*batch)
    with pytest.raises(AttributeError, match="balance is recorded by calls of a loss that was made with collect_stats"):
        _ = loss_func.balance
    with pytest.raises(AttributeError, match="'MultiProxyEntropyLoss' object has no attribute 'nothing'"):
        _ = loss_func.nothing
    for same in (loss_func, copy.deepcopy(loss_func), copy.copy(loss_func), pickle.loads(pickle.dumps(loss_func))):
        assert not hasattr(same, "classification_loss")
        assert getattr(same, "balance", None) is None
        assert same.eval()(*batch).equal(loss_func.eval()(*batch))


SHAPE = "embeddings must be of shape (batch_size, 8), got"
OUTSIDE = "labels must lie in [0, 2] (num_classes is 3), got values from"
BAD_CALLS = {
    "embeddings as a list": ([[0.0] * 8], y, "embeddings must be a torch.Tensor of shape (batch_size, 8), got list"),
    "embeddings of integers": (x.long(), y, "embeddings must be of a floating-point dtype, got torch.int64"),
    "one embedding": (x[0], y, f"{SHAPE} (8,)"),
    "embeddings of another size": (x[:, :5], y, f"{SHAPE} (4, 5)"),
    "another device": (x.to("meta"), y, "embeddings must be on the device of the proxies, cpu, got meta"),
    "no labels": (x, None, "labels must be given, a tensor of shape (4,), got None"),
    "labels as a list": (x, [0, 1, 2, 0], "labels must be a torch.Tensor of shape (4,), got list"),
    "labels of bools": (x, y.bool(), "labels must be of an integer dtype, got torch.bool"),
    "labels of floats": (x, y.float(), "labels must be of an integer dtype, got torch.float32"),
    "too few labels": (x, y[:3], "labels must be of shape (4,), one for each embedding, got (3,)"),
    "a label too large": (x, y + 1, f"{OUTSIDE} 1 to 3"),
    "a negative label": (x, y - 1, f"{OUTSIDE} -1 to 1"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_calls(case, loss_func):
    embeddings, labels, message = BAD_CALLS[case]
    error = TypeError if "must be a torch.Tensor" in message or "dtype" in message else ValueError
    before = copy.deepcopy(loss_func.state_dict())
    methods = [loss_func, loss_func.soft_assign, loss_func.get_outliers, loss_func.init_proxies]
    methods += [] if labels is None else [loss_func.assign]
    for method in methods:
        with pytest.raises(error, match=re.escape(message)):
            method(embeddings, labels)
    if message.startswith("embeddings"):
        for method in (loss_func.get_logits, loss_func.assign):
            with pytest.raises(error, match=re.escape(message)):
                method(embeddings)
    assert all(value.equal(before[name]) for name, value in loss_func.state_dict().items())


def test_references(loss_func):
    for name, value in (("ref_emb", x.clone()), ("ref_labels", y.clone())):
        for call in (loss_func, loss_func.compute_loss):
            with pytest.raises(ValueError, match=f"{name} must be None, got Tensor: proxies take its place"):
                call(x, y, **{name: value})
    with pytest.raises(ValueError, match=re.escape("views of the same samples go into one batch: torch.cat(")):
        MultiProxyEntropyLoss(3, 8, views=2)(x, y, ref_emb=x.clone(), ref_labels=y)
    expected = loss_func.eval()(x, y)
    assert loss_func(x, y, ref_emb=x, ref_labels=y).equal(expected)
    assert loss_func.compute_loss(embeddings=x, labels=y)["loss"]["losses"].shape == (4,)


def test_views():
    loss_func = MultiProxyEntropyLoss(3, 8, views=2)
    with pytest.raises(ValueError, match="the batch must be views = 2 blocks of equal length, got 3 embeddings"):
        loss_func(x[:3], y[:3])
    with pytest.raises(ValueError, match="labels must be the same in each of the views = 2 blocks of the batch"):
        loss_func(x, y)


i = torch.tensor([0, 1])
KIND = "indices_tuple must be None or a tuple of 2 to 4 tensors, as PML's miners return, got"
TUPLES = {
    "a tensor": (i, TypeError, f"{KIND} Tensor"),
    "lists": (([0], [1], [2]), TypeError, f"{KIND} ['list', 'list', 'list']"),
    "one tensor": ((i,), ValueError, "indices_tuple must hold 2 tensors, 3 (triplets) or 4 (pairs), got 1"),
    "floats": ((i, i, i.float()), TypeError, "indices_tuple[2] must be of an integer dtype, got torch.float32"),
    "a mask": ((i, i > 0, i), TypeError, "indices_tuple[1] must be of an integer dtype, got torch.bool"),
    "a single index": ((i[0], i, i), ValueError, "indices_tuple[0] must be in one dimension, got shape ()"),
    "too large": ((i, i + 3, i), ValueError, "indices_tuple[1] must lie in [0, 3] (the batch size is 4), got values"),
}


@pytest.mark.parametrize("case", TUPLES)
def test_indices_tuple(case, loss_func):
    indices_tuple, error, message = TUPLES[case]
    with pytest.raises(error, match=re.escape(message)):
        loss_func(x, y, indices_tuple)
