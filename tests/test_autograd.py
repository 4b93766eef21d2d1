"""The loss as a part of a graph: what is edited, computed again, transformed or asked for in other ways."""

import copy

import pytest
import torch
from cases import LearnedDistance, computed_by, make_distance
from pytorch_metric_learning.distances import CosineSimilarity
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy._analytic.poolings import POOLINGS

WAYS = {"analytic": {}, "streamed": {"classes_per_chunk": 2}, "autograd": {"distance": make_distance("L2")}}


def make(way="analytic", **options):
    return MultiProxyEntropyLoss(5, 6, 3, **{**WAYS[way], **options}).double()


def batch(count=8):
    return torch.randn(count, 6, dtype=torch.float64, requires_grad=True), torch.arange(count) % 5


def gradients(loss_func, embeddings, labels):
    loss = loss_func(embeddings, labels)
    return torch.autograd.grad(loss, [embeddings, *loss_func.parameters()])


EDITS = {
    "through detach": lambda x: x.detach().mul_(2),
    "through detach and cpu": lambda x: x.detach().cpu().div_(3),
    "without gradient": lambda x: torch.no_grad()(x.add_)(1),
    "one element": lambda x: x.detach()[0, 0].zero_(),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("way", WAYS)
def test_an_edit_of_the_embeddings_before_backward_is_noticed(way, edit):
    leaf, labels = batch()
    embeddings = leaf * 1
    loss = make(way)(embeddings, labels)
    EDITS[edit](embeddings)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("way", WAYS)
def test_an_edit_of_proxies_or_labels_before_backward_is_noticed(way):
    for edit in (
        lambda loss_func, labels: loss_func.proxies.detach().mul_(2),
        lambda loss_func, labels: labels.add_(1).remainder_(5),
    ):
        embeddings, labels = batch()
        loss_func = make(way)
        loss = loss_func(embeddings, labels)
        edit(loss_func, labels)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_parameters_of_a_distance_get_their_gradient(pooling):
    loss_func = make(distance=LearnedDistance(), pooling=pooling, scale=2, temperature=0.5).eval()
    inputs = batch()
    with computed_by("autograd"):
        expected = gradients(loss_func, *inputs)
    assert all(gradient.any() for gradient in expected)
    assert len(expected) == 4
    loss_func.classes_per_chunk = 2
    torch.testing.assert_close(gradients(loss_func, *inputs), expected, rtol=1e-10, atol=1e-10)


def test_parameters_of_a_distance_lent_by_functional_call_get_their_gradient():
    loss_func = make(distance=LearnedDistance(), classes_per_chunk=2).eval()
    inputs = batch()
    lent = {name: p.detach().clone().requires_grad_() for name, p in loss_func.named_parameters()}
    lent["distance.factor"] = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    by_chunks = torch.autograd.grad(torch.func.functional_call(loss_func, lent, inputs), list(lent.values()))
    loss_func.classes_per_chunk = None
    at_once = torch.autograd.grad(torch.func.functional_call(loss_func, lent, inputs), list(lent.values()))
    torch.testing.assert_close(by_chunks, at_once, rtol=1e-10, atol=1e-10)


class Stray(CosineSimilarity):
    def __init__(self, weight):
        super().__init__()
        self.weight = [weight]

    def compute_mat(self, query_emb, ref_emb):
        return super().compute_mat(query_emb * self.weight[0].exp(), ref_emb)


def test_tensors_of_a_distance_that_would_get_no_gradient_are_refused():
    weight = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    make(distance=Stray(weight))(*batch()).backward()
    assert weight.grad.any()
    with pytest.raises(
        ValueError, match=r"distance must hold the tensors that it learns as its parameters, got a Stray"
    ):
        make(distance=Stray(weight), classes_per_chunk=2)(*batch())
    make(distance=Stray(weight.detach()), classes_per_chunk=2)(*batch()).backward()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", ["dot product", "L3, not normalized"])
def test_large_similarities_do_not_swallow_the_temperature(pooling, name):
    """In float32, streamed and dense are as near to float64 as each other."""
    errors = {2: 0.0, None: 0.0}
    for seed in range(5):
        for per_chunk in errors:
            torch.manual_seed(seed)
            options = {"distance": make_distance(name), "pooling": pooling, "scale": 1, "temperature": 1}
            loss_func = make(classes_per_chunk=per_chunk, **options).float().eval()
            embeddings = (300 * torch.nn.functional.normalize(torch.randn(8, 6))).requires_grad_()
            labels = torch.arange(8) % 5
            got = gradients(loss_func, embeddings, labels)
            with computed_by("autograd"):
                exact = gradients(loss_func.double(), embeddings.detach().double().requires_grad_(), labels)
            errors[per_chunk] += max((a - b).abs().max() / b.abs().max() for a, b in zip(got, exact, strict=True))
    assert errors[2] <= 2 * errors[None] + 1e-5
    assert errors[None] <= 2 * errors[2] + 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_around_the_loss_is_refused_in_training(reentrant):
    loss_func, (embeddings, labels) = make(reseed_below=0.1), batch()
    loss = checkpoint(loss_func, embeddings, labels, use_reentrant=reentrant)
    with pytest.raises(
        RuntimeError, match=r"torch.utils.checkpoint may go around the network, but not around the loss"
    ):
        loss.backward()
    loss_func.eval()
    expected = gradients(loss_func, embeddings, labels)
    checkpoint(loss_func, embeddings, labels, use_reentrant=reentrant).backward()
    torch.testing.assert_close((embeddings.grad, loss_func.proxies.grad), expected)


@pytest.mark.parametrize("way", WAYS)
def test_activation_checkpointing_around_the_network(way):
    loss_func, (embeddings, labels) = make(way), batch()
    network = torch.nn.Linear(6, 6).double()
    other = copy.deepcopy(loss_func)
    expected = torch.autograd.grad(other(network(embeddings), labels), [embeddings, other.proxies])
    loss = loss_func(checkpoint(network, embeddings, use_reentrant=False), labels)
    torch.testing.assert_close(torch.autograd.grad(loss, [embeddings, loss_func.proxies]), expected)
    assert loss_func.proxy_usage.equal(other.proxy_usage)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_backward_within_autocast_is_that_without(way, dtype):
    loss_func, (embeddings, labels) = make(way).float().eval(), batch()
    embeddings = embeddings.detach().float().requires_grad_()
    expected = gradients(loss_func, embeddings, labels)
    loss = loss_func(embeddings, labels)
    with torch.autocast("cpu", dtype):
        found = torch.autograd.grad(loss, [embeddings, loss_func.proxies])
    tolerance = 0.05 if way == "autograd" else 1e-6  # PyTorch's own backward rounds its products
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
def test_transforms_of_torch_func_and_forward_mode(way):
    loss_func, (embeddings, labels) = make(way).eval(), batch()
    expected = gradients(loss_func, embeddings, labels)
    torch.testing.assert_close(torch.func.grad(loss_func)(embeddings, labels), expected[0])
    one_by_one = torch.func.vmap(lambda x: loss_func(x, labels))(torch.stack([embeddings, 2 * embeddings]))
    torch.testing.assert_close(one_by_one[1], loss_func(2 * embeddings, labels))
    if way != "autograd":  # PyTorch's cdist has no forward mode
        direction = torch.randn_like(embeddings)
        _, slope = torch.func.jvp(lambda x: loss_func(x, labels), (embeddings,), (direction,))
        torch.testing.assert_close(slope, (expected[0] * direction).sum())
    with pytest.raises(RuntimeError, match=r"a transform of torch\.func must not call the loss while training"):
        torch.func.grad(loss_func.train())(embeddings, labels)


@pytest.mark.parametrize("way", ["analytic", "streamed"])
def test_batched_gradients_are_refused(way):
    losses = make(way).eval().compute_loss(*(inputs := batch()))["loss"]["losses"]
    with pytest.raises(RuntimeError, match="cannot be batched: drop is_grads_batched=True"):
        torch.autograd.grad(losses, inputs[0], torch.eye(8, dtype=torch.float64), is_grads_batched=True)


@pytest.mark.parametrize("way", WAYS)
def test_a_parametrization_of_the_proxies(way):
    loss_func, (embeddings, labels) = make(way).eval(), batch()
    parametrizations.orthogonal(loss_func, "proxies")
    parameter = loss_func.parametrizations.proxies.original
    with computed_by("autograd"):
        expected = torch.autograd.grad(loss_func(embeddings, labels), [embeddings, parameter])
    found = torch.autograd.grad(loss_func(embeddings, labels), [embeddings, parameter])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_a_state_that_is_assigned(way):
    loss_func, (embeddings, labels) = make(way).eval(), batch()
    state = loss_func.state_dict()
    state["proxies"] = torch.randn(3, 5, 6, dtype=torch.float64).transpose(0, 1)
    loss_func.load_state_dict(state, assign=True)
    with computed_by("autograd"):
        expected = gradients(loss_func, embeddings, labels)
    torch.testing.assert_close(gradients(loss_func, embeddings, labels), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("views", [2, 3])
def test_views_that_are_not_finite_poison_no_other_sample(views):
    loss_func = make(views=views).eval()
    embeddings, labels = torch.randn(4, 6, dtype=torch.float64).repeat(views, 1), torch.arange(4).repeat(views)
    embeddings += 0.1 * torch.randn_like(embeddings)
    expected = loss_func.compute_loss(embeddings, labels)["loss"]["losses"]
    embeddings[1] = torch.nan  # the first view of the second sample
    losses = loss_func.compute_loss(embeddings, labels)["loss"]["losses"]
    of_others = torch.arange(4 * views) % 4 != 1
    torch.testing.assert_close(losses[of_others], expected[of_others])
    assert losses[1::4].isnan().all()
