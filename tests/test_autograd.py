"""The loss as a part of a graph: edited, computed again, transformed, or asked for in other ways."""

import pytest
import torch
from cases import computed_by, make_distance
from pytorch_metric_learning import distances
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
    "embeddings through detach": lambda x, loss_func, labels: x.detach().mul_(2),
    "embeddings without gradient": lambda x, loss_func, labels: torch.no_grad()(x.add_)(1),
    "one element": lambda x, loss_func, labels: x.detach()[0, 0].zero_(),
    "proxies": lambda x, loss_func, labels: loss_func.proxies.detach().mul_(2),
    "labels": lambda x, loss_func, labels: labels.add_(1).remainder_(5),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_edit_before_backward_is_noticed(way):
    for edit in EDITS.values():
        leaf, labels = batch()
        loss_func, embeddings = make(way), leaf * 1
        loss = loss_func(embeddings, labels)
        edit(embeddings, loss_func, labels)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class Learned(distances.BaseDistance):
    def __init__(self):
        super().__init__(normalize_embeddings=False)
        self.factors = torch.nn.Parameter(torch.rand(6) + 0.5)

    def compute_mat(self, query_emb, ref_emb):
        return torch.cdist(query_emb * self.factors, ref_emb * self.factors).square()


class Stray(distances.CosineSimilarity):
    def __init__(self, weight):
        super().__init__()
        self.weight = [weight]

    def compute_mat(self, query_emb, ref_emb):
        return super().compute_mat(query_emb * self.weight[0].exp(), ref_emb)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_distances_that_learn_get_their_gradient_where_all_fits(pooling):
    loss_func = make(distance=Learned(), pooling=pooling, scale=2, temperature=0.5).eval()
    inputs = batch()
    assert len(gradients(loss_func, *inputs)) == 3

    def loss(x, w, factors):
        tensors = {"proxies": w, "distance.factors": factors}
        return torch.func.functional_call(loss_func, tensors, (x, inputs[1]))

    assert torch.autograd.gradcheck(loss, (inputs[0], *loss_func.parameters()))
    weight = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    make(distance=Stray(weight))(*batch()).backward()
    assert weight.grad.any()


def test_distances_that_learn_are_refused_where_classes_are_streamed():
    weight = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    for distance in (Learned(), Stray(weight)):
        with pytest.raises(ValueError, match="distance must not use tensors with requires_grad=True"):
            make(distance=distance, classes_per_chunk=2)(*batch())
    for distance in (Learned().requires_grad_(False), Stray(weight.detach())):
        loss_func, inputs = make(distance=distance, classes_per_chunk=2).eval(), batch()
        wanted = [inputs[0], loss_func.proxies]
        found = torch.autograd.grad(loss_func(*inputs), wanted)
        with computed_by("autograd"):
            expected = torch.autograd.grad(loss_func(*inputs), wanted)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_large_similarities_do_not_swallow_the_temperature(pooling):
    """In float32, streamed and dense are as near to float64 as each other."""
    errors = {2: 0.0, None: 0.0}
    for seed, per_chunk in [(seed, per_chunk) for seed in range(5) for per_chunk in errors]:
        torch.manual_seed(seed)
        options = {"distance": make_distance("dot product"), "pooling": pooling, "scale": 1, "temperature": 1}
        loss_func, (_, labels) = make(classes_per_chunk=per_chunk, **options).float().eval(), batch()
        embeddings = (300 * torch.nn.functional.normalize(torch.randn(8, 6))).requires_grad_()
        got = gradients(loss_func, embeddings, labels)
        with computed_by("autograd"):
            exact = gradients(loss_func.double(), embeddings.detach().double().requires_grad_(), labels)
        errors[per_chunk] += max((a - b).abs().max() / b.abs().max() for a, b in zip(got, exact, strict=True))
    assert errors[2] <= 2 * errors[None] + 1e-5
    assert errors[None] <= 2 * errors[2] + 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_around_the_loss_is_refused_in_training(reentrant):
    loss_func, (embeddings, labels) = make(), batch()
    loss = checkpoint(loss_func, embeddings, labels, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="must not be called within a backward pass while training"):
        loss.backward()
    loss_func.eval()
    expected = gradients(loss_func, embeddings, labels)
    checkpoint(loss_func, embeddings, labels, use_reentrant=reentrant).backward()
    torch.testing.assert_close((embeddings.grad, loss_func.proxies.grad), expected)


@pytest.mark.parametrize("way", WAYS)
def test_backward_within_autocast_is_that_without(way):
    loss_func, (embeddings, labels) = make(way).float().eval(), batch()
    embeddings = embeddings.detach().float().requires_grad_()
    expected = gradients(loss_func, embeddings, labels)
    for dtype in (torch.bfloat16, torch.float16):
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


def test_batched_gradients_are_refused():
    for way in ("analytic", "streamed"):
        losses = make(way).eval().compute_loss(*(inputs := batch()))["loss"]["losses"]
        with pytest.raises(RuntimeError, match="cannot be batched: drop is_grads_batched=True"):
            torch.autograd.grad(losses, inputs[0], torch.eye(8, dtype=torch.float64), is_grads_batched=True)


@pytest.mark.parametrize("way", WAYS)
def test_proxies_that_are_parametrized(way):
    loss_func, (embeddings, labels) = make(way).eval(), batch()
    parametrizations.orthogonal(loss_func, "proxies")
    with computed_by("autograd"):
        expected = gradients(loss_func, embeddings, labels)
    torch.testing.assert_close(gradients(loss_func, embeddings, labels), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"classes_per_chunk": 2}, {"views": 2}, {"views": 3}], ids=str)
def test_rows_that_are_not_finite_poison_no_other_sample(options):
    loss_func = make(**options).eval()
    views = options.get("views", 1)
    embeddings, labels = torch.randn(4, 6, dtype=torch.float64).repeat(views, 1), torch.arange(4).repeat(views)
    embeddings += 0.1 * torch.randn_like(embeddings)
    loss_func.neighbor_weight = 0  # that term contrasts with all samples: see test_neighbors.py
    expected = loss_func.compute_loss(embeddings, labels)["loss"]["losses"]
    embeddings[1] = torch.nan  # the first view of the second sample
    losses = loss_func.compute_loss(embeddings, labels)["loss"]["losses"]
    of_others = torch.arange(4 * views) % 4 != 1
    torch.testing.assert_close(losses[of_others], expected[of_others])
    assert losses[1::4].isnan().all()
