"""Values and gradients of the loss against the naive reference, over everything that it can be combined with."""

import itertools

import pytest
import reference
import torch
from cases import DISTANCES, make_distance, memory_full_of_nan

from pml_multiproxy import MultiProxyEntropyLoss, functional
from pml_multiproxy._analytic.poolings import POOLINGS

SETTINGS = {"scale": 3.0, "temperature": 0.3, "margin": 0.1}
WEIGHTS = {"intra": 0.7, "inter": 0.4, "balance": 0.6}

SHAPES = [(3, 4, 5), (4, 1, 3), (1, 3, 2), (2, 2, 1)]  # classes, proxies per class, batch
TUPLES = {
    "no miner": lambda batch: None,
    "triplets": lambda batch: (torch.tensor([0, 0]), torch.tensor([batch - 1, 0]), torch.tensor([0, batch // 2])),
    "pairs": lambda batch: (torch.tensor([batch - 1]), torch.tensor([0]), torch.tensor([0, 0]), torch.tensor([0, 0])),
    "nothing mined": lambda batch: (torch.tensor([], dtype=torch.long),) * 3,
}
LAYOUTS = [  # three, so that the four miner tuples meet all of them
    lambda x: x,
    lambda x: x.T.contiguous().T,
    lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
]
# What the gradients may differ by, relative to the largest of them. Embeddings and their gradients are rounded to
# their dtype; everything between runs in float32 or more.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def uninitialised_memory_shows():
    with memory_full_of_nan():
        yield


def make(distance, shape=SHAPES[0], pooling="max", dtype=torch.float64, size=6, views=1, **options):
    torch.manual_seed(1)
    num_classes, per_class, batch = shape
    weights = {f"{name}_weight": weight for name, weight in WEIGHTS.items()}
    settings = {"pooling": pooling, "distance": make_distance(distance), "views": views, **weights, **SETTINGS}
    loss_func = MultiProxyEntropyLoss(num_classes, size, per_class, **settings, **options)
    loss_func.to(torch.float64 if dtype == torch.float64 else torch.float32)
    loss_func.proxy_usage.copy_(torch.rand(num_classes, per_class).softmax(dim=1))
    embeddings = torch.randn(views * batch, size).to(dtype)
    return loss_func, DISTANCES[distance][2], embeddings, (torch.arange(batch) % num_classes).repeat(views)


def reference_gradients(loss_func, similarity, embeddings, labels, indices_tuple):
    """The mean of the weighted losses and its gradients, all in float64."""
    x = embeddings.detach().double().requires_grad_()
    w = loss_func.proxies.detach().double().requires_grad_()
    settings = {"similarity": similarity, "pooling": loss_func.pooling, "views": loss_func.views, **SETTINGS, **WEIGHTS}
    losses = reference.losses(x, labels, w, loss_func.proxy_usage, **settings)
    loss = (losses * reference.miner_weights(indices_tuple, len(labels))).mean()
    return loss, *torch.autograd.grad(loss, [x, w])


def reference_usage(loss_func, similarity, embeddings, labels):
    settings = {"temperature": loss_func.temperature, "momentum": loss_func.usage_momentum}
    proxies = loss_func.proxies.detach().double()
    usage = loss_func.proxy_usage
    return reference.updated_usage(embeddings.double(), labels, proxies, usage, similarity=similarity, **settings)


def assert_equals_reference(loss_func, similarity, embeddings, labels, indices_tuple=None):
    usage = loss_func.proxy_usage
    expected_usage = reference_usage(loss_func, similarity, embeddings, labels) if loss_func.training else usage.clone()
    embeddings.requires_grad_()
    loss = loss_func(embeddings, labels, indices_tuple)
    loss.backward()
    torch.testing.assert_close(usage, expected_usage, atol=2e-6, rtol=0)
    # The reference reads the usage after the update, as the loss has to.
    expected = reference_gradients(loss_func, similarity, embeddings, labels, indices_tuple)
    assert loss.dtype == loss_func.proxies.dtype
    for name, actual, wanted in zip(
        ("loss", "embeddings", "proxies"), (loss, embeddings.grad, loss_func.proxies.grad), expected, strict=True
    ):
        error = (actual.double() - wanted).abs().max() / wanted.abs().max().clamp_min(0.1)
        assert error < TOLERANCES[embeddings.dtype], f"{name}: {error}"


LOW_PRECISION = itertools.product([("cosine", "logsumexp"), ("L2", "max")], list(TOLERANCES)[1:])


@pytest.mark.parametrize(
    ("distance", "pooling", "dtype"),
    [*itertools.product(DISTANCES, POOLINGS, [torch.float64]), *((*kind, dtype) for kind, dtype in LOW_PRECISION)],
    ids=str,
)
def test_every_combination(distance, pooling, dtype):
    """Also over shapes, miner tuples and memory layouts."""
    layouts = itertools.cycle(LAYOUTS)
    for shape, indices in itertools.product(SHAPES, TUPLES.values()):
        loss_func, similarity, embeddings, labels = make(distance, shape, pooling, dtype)
        assert_equals_reference(loss_func, similarity, next(layouts)(embeddings), labels, indices(shape[2]))


@pytest.mark.parametrize("per_chunk", [None, 2])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_views(pooling, per_chunk):
    for distance, views, shape in itertools.product(["cosine", "L2"], [2, 3], SHAPES[:2]):
        settings = {"views": views, "classes_per_chunk": per_chunk, "neighbor_weight": 0}
        assert_equals_reference(*make(distance, shape, pooling, **settings))


STRIDES = {
    "classes last": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "proxies last": lambda w: w.transpose(1, 2).contiguous().transpose(1, 2),
    "every other": lambda w: w.repeat_interleave(2, dim=1)[:, ::2],
    "one value for all": lambda w: w[:, :1, :1].expand_as(w),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_proxies_of_any_strides(strides):
    for distance, per_chunk in itertools.product(["cosine", "L2"], [None, 1]):
        # Softmax pooling has a gradient also where proxies are equal.
        loss_func, *rest = make(distance, pooling="softmax", classes_per_chunk=per_chunk)
        loss_func.proxies.data = STRIDES[strides](loss_func.proxies.data)
        assert strides == "one value for all" or not loss_func.proxies.is_contiguous()
        assert_equals_reference(loss_func, *rest)


def test_eval_mode():
    loss_func, *rest = make("cosine")
    assert_equals_reference(loss_func.eval(), *rest)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_labels_and_indices_of_any_integer_dtype(dtype):
    """An index of uint8 would be taken for a mask."""
    loss_func, _, embeddings, labels = make("cosine")
    loss_func.eval()
    mined = torch.tensor([0, 1, 1]), torch.tensor([2, 1, 0]), torch.tensor([1, 2, 2])
    expected = loss_func(embeddings, labels, mined)
    assert loss_func(embeddings, labels.to(dtype), tuple(indices.to(dtype) for indices in mined)).equal(expected)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("distance", DISTANCES)
@torch.no_grad()
def test_logits_and_assignment(distance, pooling):
    for shape in SHAPES[:2]:
        loss_func, similarity, embeddings, labels = make(distance, shape, pooling)
        s = [[[similarity(x, w) for w in of_class] for of_class in loss_func.proxies] for x in embeddings]
        expected = [[3.0 * reference.pool(values, pooling, 3.0, 0.3) for values in row] for row in s]
        s = torch.tensor(s)
        torch.testing.assert_close(loss_func.get_logits(embeddings), torch.tensor(expected, dtype=torch.float64))
        classes, proxies = loss_func.assign(embeddings)
        assert (classes * shape[1] + proxies).equal(s.flatten(1).argmax(dim=1))
        classes, proxies = loss_func.assign(embeddings, labels)
        assert classes.equal(labels)
        own = s[torch.arange(len(labels)), labels]
        assert proxies.equal(own.argmax(dim=1))
        assert classes.dtype == proxies.dtype == torch.long
        q = (own.double() / 0.3).softmax(dim=1)
        torch.testing.assert_close(loss_func.soft_assign(embeddings, labels), q, atol=1e-6, rtol=1e-6)


def test_class_distribution_is_the_softmax_of_the_logits():
    similarities = torch.randn(5, 3, dtype=torch.float64)
    expected = torch.tensor([[p.item() for p in reference.softmax(4.0 * row)] for row in similarities])
    torch.testing.assert_close(functional.class_distribution(similarities, 4.0), expected.double())
