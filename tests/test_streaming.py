"""Some classes at a time, or all at once with the analytic gradient: the same as plain autograd."""

import copy
import gc
import subprocess
import sys
from functools import partial

import pytest
import torch
from cases import computed_by, make_distance
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning import distances

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy._analytic import chunks, poolings
from pml_multiproxy._analytic.poolings import POOLINGS

DISTANCES = {
    **{name: partial(make_distance, name) for name in ("cosine", "dot product", "L2", "SNR")},
    "cosine with statistics": lambda: distances.CosineSimilarity(collect_stats=True),
    "L1 squared, not normalized": lambda: distances.LpDistance(p=1, power=2, normalize_embeddings=False),
}
CASES = {  # classes, proxies per class, classes per chunk
    "all at once": (7, 3, 7),
    "more than all": (7, 3, 100),
    "chunks that do not divide": (7, 3, 3),
    "one class per chunk": (7, 3, 1),
    "one proxy": (7, 1, 2),
    "one class": (1, 3, 1),
    "two classes": (2, 2, 1),
}


def step(loss_func, embeddings, labels, indices_tuple=None, autocast=None):
    embeddings = embeddings.detach().clone().requires_grad_()
    with torch.autocast("cpu", autocast, autocast is not None):
        loss = loss_func(embeddings, labels, indices_tuple)
    loss.backward()
    return loss.detach(), embeddings.grad, loss_func.proxies.grad, loss_func.proxy_usage.clone()


def plain_step(loss_func, *arguments, **keywords):
    """The same of a copy of the loss, by plain autograd on the equations."""
    with computed_by("autograd"):
        return step(copy.deepcopy(loss_func), *arguments, **keywords)


@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_equals_plain_autograd(distance, pooling, case, mined):
    num_classes, per_class, per_chunk = CASES[case]
    loss_func = MultiProxyEntropyLoss(
        num_classes,
        6,
        per_class,
        pooling=pooling,
        margin=0.1,
        scale=3,
        temperature=0.3,
        inter_weight=0.4,
        distance=DISTANCES[distance](),
        classes_per_chunk=per_chunk,
    ).double()
    embeddings, labels = torch.randn(9, 6, dtype=torch.float64), torch.randint(num_classes, (9,))
    indices_tuple = (torch.tensor([0, 1]), torch.tensor([2, 1]), torch.tensor([5, 8])) if mined else None
    expected = plain_step(loss_func, embeddings, labels, indices_tuple)
    actual = step(loss_func, embeddings, labels, indices_tuple)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("per_chunk", [2, 7])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_float32_is_no_worse_than_plain_autograd(pooling, per_chunk):
    """Up to the noise of rounding: mean error against float64, over several batches, with large logits."""
    errors = {"ours": torch.zeros(3), "plain": torch.zeros(3)}
    for seed in range(100):
        torch.manual_seed(seed)
        loss_func = MultiProxyEntropyLoss(7, 16, 3, pooling=pooling, scale=64, classes_per_chunk=per_chunk)
        embeddings, labels = torch.randn(32, 16), torch.randint(7, (32,))
        exact = plain_step(copy.deepcopy(loss_func).double(), embeddings.double(), labels)
        for name, take in (("plain", plain_step), ("ours", step)):
            values = take(loss_func, embeddings, labels)
            errors[name] += torch.stack([(v - e).abs().mean() for v, e in zip(values[:3], exact[:3], strict=True)])
    assert (errors["ours"] <= 1.6 * errors["plain"]).all(), errors


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("distance", ["cosine", "L2"])
def test_gradcheck(distance, pooling):
    loss_func = MultiProxyEntropyLoss(
        5,
        4,
        3,
        pooling=pooling,
        margin=0.1,
        scale=3,
        temperature=0.3,
        inter_weight=0.4,
        distance=DISTANCES[distance](),
        classes_per_chunk=2,
    )
    loss_func.double().eval()
    embeddings, labels = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.arange(6) % 5

    def loss(x, w):
        return torch.func.functional_call(loss_func, {"proxies": w}, (x, labels))

    assert torch.autograd.gradcheck(loss, (embeddings, loss_func.proxies))


@pytest.mark.parametrize("per_chunk", [1, 3])
@pytest.mark.parametrize("distance", ["cosine", "L2"])
def test_backward_twice_gives_the_same_gradient_twice(distance, per_chunk, batch):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, distance=DISTANCES[distance](), classes_per_chunk=per_chunk)
    loss = loss_func(*batch)
    loss.backward(retain_graph=True)
    first = loss_func.proxies.grad.clone(), batch[0].grad.clone()
    loss.backward()
    torch.testing.assert_close((loss_func.proxies.grad, batch[0].grad), tuple(2 * gradient for gradient in first))


@pytest.mark.parametrize("per_chunk", [1, 3])
def test_differentiating_twice_is_refused(per_chunk, batch):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, classes_per_chunk=per_chunk)
    with pytest.raises(RuntimeError, match="cannot be differentiated: drop create_graph=True"):
        torch.autograd.grad(loss_func(*batch), batch[0], create_graph=True)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("distance", ["cosine", "dot product"])
@pytest.mark.parametrize("per_chunk", [1, 2, 3])
def test_autocast(per_chunk, distance, dtype, pooling, batch):
    """The products are rounded, in backward as in forward: also where backward computes them again."""
    weights = {"intra_weight": 0.5, "inter_weight": 0.1, "balance_weight": 0.5}
    settings = {"distance": DISTANCES[distance](), "scale": 2, "temperature": 0.05, "pooling": pooling, **weights}
    loss_func = MultiProxyEntropyLoss(3, 8, 4, classes_per_chunk=per_chunk, **settings)
    loss_func.eval()
    loss_func.proxies.data *= 0.5 + torch.rand(3, 4, 1)
    expected = plain_step(loss_func, *batch, autocast=dtype)
    actual = step(loss_func, *batch, autocast=dtype)
    exact = plain_step(loss_func, *batch)
    assert [value.dtype for value in actual] == [torch.float32] * 4
    torch.testing.assert_close(actual[0], expected[0])
    for i in (1, 2):
        error = (actual[i] - expected[i]).abs().max()
        assert (exact[i] - expected[i]).abs().max() > 0
        assert error < 0.5 * (exact[i] - expected[i]).abs().max()


def test_autocast_leaves_float64_alone(batch):
    loss_func = MultiProxyEntropyLoss(3, 8, 4).double().eval()
    exact = step(loss_func, batch[0].double(), batch[1])
    torch.testing.assert_close(step(loss_func, batch[0].double(), batch[1], autocast=torch.bfloat16), exact)


@pytest.mark.parametrize("per_chunk", [2, 7])
@pytest.mark.parametrize("length", [1e-9, 1e-3, 1e3, 1e18, 1e30])
def test_cosine_does_not_depend_on_lengths(length, per_chunk):
    loss_func = MultiProxyEntropyLoss(7, 6, 3, classes_per_chunk=per_chunk).eval()
    embeddings, labels = torch.randn(9, 6), torch.randint(7, (9,))
    expected = step(loss_func, embeddings, labels)
    longer = copy.deepcopy(loss_func)
    longer.proxies.grad = None
    longer.proxies.data[1:3] *= length
    loss, of_embeddings, of_proxies, _ = step(longer, embeddings * length, labels)
    torch.testing.assert_close(loss, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_embeddings * length, expected[1], rtol=1e-3, atol=1e-5)
    of_proxies[1:3] *= length
    torch.testing.assert_close(of_proxies, expected[2], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("per_chunk", [1, 2, 7])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_equally_near_proxies_share_the_gradient(pooling, per_chunk, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)  # also where all is kept, there are several chunks
    loss_func = MultiProxyEntropyLoss(7, 6, 3, pooling=pooling, classes_per_chunk=per_chunk).double().eval()
    loss_func.proxies.data[:, 1] = loss_func.proxies.data[:, 0]
    batch = torch.randn(9, 6, dtype=torch.float64), torch.randint(7, (9,))
    actual = step(loss_func, *batch)
    torch.testing.assert_close(actual, plain_step(loss_func, *batch), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(actual[2][:, 0], actual[2][:, 1])


@pytest.mark.parametrize("per_chunk", [2, 7])
def test_proxies_too_short_for_a_direction(per_chunk):
    """Below 1e-12, the length is clamped as in PyTorch's normalize, and has a gradient."""
    loss_func = MultiProxyEntropyLoss(7, 6, 3, classes_per_chunk=per_chunk).double().eval()
    loss_func.proxies.data[1] *= 1e-13
    loss_func.proxies.data[2] = 0
    embeddings, labels = torch.randn(9, 6, dtype=torch.float64), torch.randint(7, (9,))
    expected = plain_step(loss_func, embeddings, labels)
    torch.testing.assert_close(step(loss_func, embeddings, labels), expected, rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 2**31 - 1), exponent=st.integers(-30, 30), pooling=st.sampled_from(list(POOLINGS)))
def test_is_finite_where_similarities_are_large(seed, exponent, pooling):
    torch.manual_seed(seed)
    loss_func = MultiProxyEntropyLoss(
        5, 4, 3, pooling=pooling, distance=DISTANCES["dot product"](), classes_per_chunk=2, scale=2, temperature=1
    )
    values = step(loss_func, torch.randn(6, 4) * 10.0**exponent, torch.randint(5, (6,)))
    assert all(value.isfinite().all() for value in values)


def test_rows_that_are_not_finite_do_not_touch_the_losses_of_others():
    loss_func = MultiProxyEntropyLoss(5, 4, 3, classes_per_chunk=2).eval()
    embeddings, labels = torch.randn(6, 4), torch.randint(5, (6,))
    expected = loss_func.compute_loss(embeddings, labels, None)["loss"]["losses"]
    embeddings[2] = float("nan")
    losses = loss_func.compute_loss(embeddings, labels, None)["loss"]["losses"]
    assert losses[2].isnan()
    torch.testing.assert_close(losses[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("per_chunk", [1, 2, 3, 100])
@pytest.mark.parametrize("distance", ["cosine", "L2"])
def test_logits_and_assignment_do_not_depend_on_chunks(distance, per_chunk):
    loss_func = MultiProxyEntropyLoss(7, 6, 3, distance=DISTANCES[distance]())
    # The first of equally near proxies is taken. Unit vectors are equally near in whatever order products are summed.
    loss_func.proxies.data[[1, 5]] = torch.eye(3, 6)
    embeddings = torch.cat([torch.randn(9, 6), loss_func.proxies.detach()[5]])
    expected = loss_func.get_logits(embeddings), *loss_func.assign(embeddings)
    loss_func.classes_per_chunk = per_chunk
    torch.testing.assert_close((loss_func.get_logits(embeddings), *loss_func.assign(embeddings)), expected)
    assert (loss_func.assign(embeddings)[0] != 5).all()


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("weights", [(0.0, 0.5), (0.25, 0.0), (0.25, 0.5)], ids=["balance", "intra", "both"])
def test_small_gradient_of_a_nearly_certain_assignment(weights, views):
    """In float32, relative to itself: it is what remains of potentials that are ten million times as large."""
    intra, balance = weights
    options = {"temperature": 0.05, "intra_weight": intra, "balance_weight": balance, "views": views}
    loss_func = MultiProxyEntropyLoss(1, 8, 4, **options).eval()
    loss_func.proxies.data = torch.eye(4, 8)[None]
    loss_func.proxy_usage.copy_(torch.tensor([[0.3, 0.55, 0.1, 0.05]]))
    embeddings = torch.eye(8)[[3, 3]] + 0.05 * torch.randn(2, 8)
    labels = torch.zeros(2, dtype=torch.long)

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(loss_func(x, labels), x)[0]

    actual = gradient(embeddings)
    loss_func.double()
    expected = gradient(embeddings.double())
    assert loss_func.soft_assign(embeddings, labels).amax(dim=1).min() > 1 - 1e-6
    assert (actual - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("pooling", poolings.POOLINGS)
def test_keeps_one_number_per_similarity(pooling):
    gc.collect()
    others = {id(thing) for thing in gc.get_objects()}
    made = poolings.POOLINGS[pooling](torch.randn(5, 7, 11), 10.0, 0.1)
    derivative = made.derivative(compact=False)
    del made
    gc.collect()
    held = [
        x for x in gc.get_objects() if id(x) not in others and isinstance(x, torch.Tensor) and x.numel() >= 5 * 7 * 11
    ]
    assert len(held) == 1
    assert derivative.times_(torch.ones(5, 11)).shape == (5, 7, 11)


def test_empty_batch():
    loss_func = MultiProxyEntropyLoss(5, 4, 3, classes_per_chunk=2)
    losses = loss_func.compute_loss(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), None)["loss"]["losses"]
    losses.sum().backward()
    assert losses.shape == (0,)
    assert loss_func.proxies.grad.eq(0).all()


def test_chunks_are_chosen_by_the_sizes_alone():
    def plan(batch_size, *shape, chosen=None, device="cpu"):
        proxies = torch.empty(*shape, 4, device="meta")
        if device == "cpu":
            proxies = torch.empty(1, device="cpu").expand(*shape, 4)
        return chunks.make_plan(chosen, batch_size, proxies, torch.float32)

    in_cache = 2**21 // (256 * 5 * 4)
    assert plan(256, 11318, 5) == (in_cache, True)  # 58 MB
    assert plan(256, 100_000, 5) == (in_cache, False)  # 512 MB
    assert plan(256, 11318, 5, device="another") == (2**26 // (256 * 5 * 4), True)
    assert plan(256, 100, 5, chosen=100) == plan(256, 100, 5, chosen=101) == (in_cache, True)
    assert plan(256, 100_000, 5, chosen=100_000) == (in_cache, True)
    assert plan(256, 100, 5, chosen=99) == (99, False)
    assert plan(10**9, 10, 10) == (1, False)
    assert plan(0, 10, 10).keep


MEMORY = """
import torch
from pml_multiproxy import MultiProxyEntropyLoss

def peak(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(what))

torch.set_num_threads(2)
MultiProxyEntropyLoss(10, 64, 10)(torch.randn(256, 64, requires_grad=True), torch.zeros(256).long()).backward()
loss_func = MultiProxyEntropyLoss(40_000, 64, 10)
embeddings, labels = torch.randn(256, 64, requires_grad=True), torch.randint(40_000, (256,))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = peak("VmRSS")
loss_func(embeddings, labels).backward()
print(peak("VmHWM") - before - loss_func.proxies.numel() * 4 / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_streaming():
    """400,000 proxies, whose similarities to the batch take 390 MB: beyond one gradient of 98 MB, under 40 MB."""
    extra = float(subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True).stdout)
    assert 0 < extra < 40
