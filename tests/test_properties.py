"""What holds for all inputs: bounds of the entropies, symmetries, finite numbers."""

import copy
import math

import pytest
import torch
from cases import make_distance
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning import distances

from pml_multiproxy import MultiProxyEntropyLoss, functional
from pml_multiproxy._analytic.poolings import POOLINGS

seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(1, 6)
poolings = st.sampled_from(list(POOLINGS))


@given(seed=seeds, batch=sizes, count=sizes, magnitude=st.floats(0, 1e30), setting=st.floats(1e-3, 1e3))
def test_entropies_lie_within_their_bounds(seed, batch, count, magnitude, setting):
    similarities = magnitude * torch.randn(batch, count, generator=torch.Generator().manual_seed(seed))
    for entropy in (functional.intra_class_entropy, functional.inter_class_entropy):
        values = entropy(similarities, setting)
        assert (values >= 0).all()
        assert (values <= math.log(count) + 1e-6).all()


@given(seed=seeds, batch=sizes, classes=sizes, per_class=sizes, pooling=poolings, training=st.booleans())
def test_order_of_classes_proxies_and_samples_does_not_matter(seed, batch, classes, per_class, pooling, training):
    torch.manual_seed(seed)
    options = {"pooling": pooling, "margin": 0.1, "neighbor_weight": 0.7}
    loss_func = MultiProxyEntropyLoss(classes, 4, per_class, **options).double().train(training)
    loss_func.proxy_usage.copy_(torch.rand(classes, per_class).softmax(dim=1))
    permuted = copy.deepcopy(loss_func)
    of_classes, of_samples = torch.randperm(classes), torch.randperm(batch)
    of_proxies = torch.stack([torch.randperm(per_class) for _ in range(classes)])

    def permute(x):
        return x.data[of_classes.unsqueeze(1), of_proxies[of_classes]]

    permuted.proxies.data, permuted.proxy_usage = permute(loss_func.proxies), permute(loss_func.proxy_usage)
    embeddings, labels = torch.randn(batch, 4, dtype=torch.float64), torch.randint(classes, (batch,))
    position = of_classes.argsort()
    loss = loss_func(embeddings, labels)
    loss.backward()
    permuted_loss = permuted(embeddings[of_samples], position[labels[of_samples]])
    permuted_loss.backward()
    torch.testing.assert_close(permuted_loss, loss)
    torch.testing.assert_close(permuted.proxies.grad, permute(loss_func.proxies.grad))
    torch.testing.assert_close(permuted.proxy_usage, permute(loss_func.proxy_usage))
    logits = permuted.get_logits(embeddings)[:, position]
    torch.testing.assert_close(logits, loss_func.get_logits(embeddings), rtol=1e-10, atol=1e-10)


def rows(dtype, count, size):
    """Directions with zero, tiny, ordinary and huge lengths, up to the ends of the dtype's range."""
    largest, smallest = torch.finfo(dtype).max / 2, torch.finfo(dtype).smallest_normal / 2
    lengths = st.sampled_from([0.0, smallest, 1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e18, largest])

    def with_lengths(chosen):
        directions = torch.empty(count, size).uniform_(-1, 1).double()
        return (directions * torch.tensor(chosen).unsqueeze(1).double()).clamp(-largest, largest).to(dtype)

    return st.lists(lengths, min_size=count, max_size=count).map(with_lengths)


def assert_finite(loss_func, embeddings, labels):
    loss = loss_func(embeddings.requires_grad_(), labels)
    loss.backward()
    values = {"loss": loss, "of embeddings": embeddings.grad, "of proxies": loss_func.proxies.grad}
    for name, value in {**values, "usage": loss_func.proxy_usage}.items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@given(data=st.data(), seed=seeds, pooling=poolings, collect_stats=st.booleans())
def test_cosine_is_finite_for_every_finite_input(dtype, data, seed, pooling, collect_stats):
    torch.manual_seed(seed)
    distance = distances.CosineSimilarity(collect_stats=collect_stats)
    loss_func = MultiProxyEntropyLoss(2, 5, 3, pooling=pooling, distance=distance)
    loss_func.proxies.data.copy_(data.draw(rows(torch.float32, 6, 5)).view(2, 3, 5))
    assert_finite(loss_func, data.draw(rows(dtype, 4, 5)), torch.tensor([0, 1, 1, 0]))


@pytest.mark.parametrize("distance", ["dot product", "L2", "L1 squared", "SNR"])
@given(data=st.data(), seed=seeds, pooling=poolings)
def test_other_distances_are_finite_where_pml_is(distance, data, seed, pooling):
    torch.manual_seed(seed)
    loss_func = MultiProxyEntropyLoss(2, 5, 3, pooling=pooling, distance=make_distance(distance))
    embeddings = data.draw(rows(torch.float32, 4, 5))
    x, w = embeddings.clone().requires_grad_(), loss_func.proxies.detach().flatten(0, 1).requires_grad_()
    matrix = loss_func.distance(x, w)
    gradients = torch.autograd.grad(matrix.sum(), [x, w])
    # The scale and 1 / temperature multiply similarities by 10, gradients by no more than the square of that.
    if all((values.abs() < 1e35).all() for values in (matrix, *gradients)):
        assert_finite(loss_func, embeddings, torch.tensor([0, 1, 1, 0]))
