"""Some classes at a time, or all at once with the analytic gradient: the same as plain autograd."""

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from cases import computed_by, make_distance
from pytorch_metric_learning import distances

from pml_multiproxy import MultiProxyEntropyLoss, _step
from pml_multiproxy._analytic.chunks import make_plan
from pml_multiproxy._analytic.poolings import POOLINGS

DISTANCES = {
    **{name: partial(make_distance, name) for name in ("cosine", "dot product", "L2", "SNR")},
    "cosine with statistics": lambda: distances.CosineSimilarity(collect_stats=True),
    "L1 squared, not normalized": lambda: distances.LpDistance(p=1, power=2, normalize_embeddings=False),
}
# Classes, proxies per class, classes per chunk: all at once, chunks that do not divide, one proxy, one class, two.
CASES = [(7, 3, 7), (7, 3, 100), (7, 3, 3), (7, 3, 1), (7, 1, 2), (1, 3, 1), (2, 2, 1)]
SOFT = {"margin": 0.1, "scale": 3, "temperature": 0.3, "inter_weight": 0.4}


def step(loss_func, embeddings, labels, indices_tuple=None, autocast=None):
    embeddings = embeddings.detach().clone().requires_grad_()
    with torch.autocast("cpu", autocast, autocast is not None):
        loss = loss_func(embeddings, labels, indices_tuple)
    loss_func.proxies.grad = None
    loss.backward()
    return loss.detach(), embeddings.grad, loss_func.proxies.grad, loss_func.proxy_usage.clone()


def plain_step(loss_func, *arguments, **keywords):
    """The same of a copy of the loss, by plain autograd on the equations."""
    with computed_by("autograd"):
        return step(copy.deepcopy(loss_func), *arguments, **keywords)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_equals_plain_autograd(distance, pooling):
    for num_classes, per_class, per_chunk in CASES:
        options = {"pooling": pooling, "distance": DISTANCES[distance](), "classes_per_chunk": per_chunk, **SOFT}
        loss_func = MultiProxyEntropyLoss(num_classes, 6, per_class, **options).double()
        embeddings, labels = torch.randn(9, 6, dtype=torch.float64), torch.randint(num_classes, (9,))
        for indices_tuple in (None, (torch.tensor([0, 1]), torch.tensor([2, 1]), torch.tensor([5, 8]))):
            expected = plain_step(loss_func, embeddings, labels, indices_tuple)
            with computed_by("analytic"):
                actual = step(loss_func, embeddings, labels, indices_tuple)
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_which_implementation_is_chosen(monkeypatch):
    """The analytic one for the cosine, and where classes are streamed; for other distances autograd while all fits."""
    taken, choose = [], _step._implementation
    monkeypatch.setattr(_step, "_implementation", lambda step: taken.append(choose(step)) or taken[-1])
    for distance, per_chunk in (("cosine", None), ("cosine", 1), ("L2", None), ("L2", 1)):
        loss_func = MultiProxyEntropyLoss(3, 6, 2, distance=make_distance(distance), classes_per_chunk=per_chunk)
        loss_func(torch.randn(4, 6), torch.zeros(4).long())
    assert taken == ["analytic", "analytic", "autograd", "analytic"]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradcheck(pooling):
    for distance in ("cosine", "L2"):
        options = {"pooling": pooling, "distance": make_distance(distance), "classes_per_chunk": 2, **SOFT}
        loss_func = MultiProxyEntropyLoss(5, 4, 3, **options).double().eval()
        embeddings, labels = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.arange(6) % 5

        def loss(x, w, loss_func=loss_func, labels=labels):
            return torch.func.functional_call(loss_func, {"proxies": w}, (x, labels))

        assert torch.autograd.gradcheck(loss, (embeddings, loss_func.proxies))


@pytest.mark.parametrize("per_chunk", [1, 3])
@pytest.mark.parametrize("distance", ["cosine", "L2"])
def test_backward_twice_gives_the_same_gradient_twice(distance, per_chunk, batch):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, distance=make_distance(distance), classes_per_chunk=per_chunk)
    loss = loss_func(*batch)
    loss.backward(retain_graph=True)
    first = loss_func.proxies.grad.clone(), batch[0].grad.clone()
    loss.backward()
    torch.testing.assert_close((loss_func.proxies.grad, batch[0].grad), tuple(2 * gradient for gradient in first))


def test_differentiating_twice_is_refused(batch):
    for per_chunk in (1, 3):
        loss_func = MultiProxyEntropyLoss(3, 8, 4, classes_per_chunk=per_chunk)
        with pytest.raises(RuntimeError, match="cannot be differentiated: drop create_graph=True"):
            torch.autograd.grad(loss_func(*batch), batch[0], create_graph=True)


@pytest.mark.parametrize(
    ("distance", "pooling", "dtype"),
    [
        *(("cosine", pooling, torch.bfloat16) for pooling in POOLINGS),
        ("cosine", "max", torch.float16),
    ],
    ids=str,
)
def test_autocast(distance, pooling, dtype, batch):
    """The products are rounded, in backward as in forward: also where backward computes them again."""
    weights = {"intra_weight": 0.5, "inter_weight": 0.1, "balance_weight": 0.5}
    settings = {"distance": make_distance(distance), "scale": 2, "temperature": 0.05, "pooling": pooling, **weights}
    for per_chunk in (1, 2, 3):
        loss_func = MultiProxyEntropyLoss(3, 8, 4, classes_per_chunk=per_chunk, **settings).eval()
        loss_func.proxies.data *= 0.5 + torch.rand(3, 4, 1)
        expected = plain_step(loss_func, *batch, autocast=dtype)
        actual = step(loss_func, *batch, autocast=dtype)
        exact = plain_step(loss_func, *batch)
        assert [value.dtype for value in actual] == [torch.float32] * 4
        torch.testing.assert_close(actual[0], expected[0])
        for i in (1, 2):
            rounding = (exact[i] - expected[i]).abs().max()
            assert rounding > 0
            assert (actual[i] - expected[i]).abs().max() < 0.5 * rounding


def test_autocast_leaves_float64_alone(batch):
    loss_func = MultiProxyEntropyLoss(3, 8, 4).double().eval()
    exact = step(loss_func, batch[0].double(), batch[1])
    torch.testing.assert_close(step(loss_func, batch[0].double(), batch[1], autocast=torch.bfloat16), exact)


@pytest.mark.parametrize("length", [1e-9, 1e-3, 1e3, 1e18, 1e30])
def test_cosine_does_not_depend_on_lengths(length):
    for per_chunk in (2, 7):
        loss_func = MultiProxyEntropyLoss(7, 6, 3, classes_per_chunk=per_chunk).eval()
        embeddings, labels = torch.randn(9, 6), torch.randint(7, (9,))
        expected = step(loss_func, embeddings, labels)
        longer = copy.deepcopy(loss_func)
        longer.proxies.data[1:3] *= length
        loss, of_embeddings, of_proxies, _ = step(longer, embeddings * length, labels)
        torch.testing.assert_close(loss, expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(of_embeddings * length, expected[1], rtol=1e-3, atol=1e-5)
        of_proxies[1:3] *= length
        torch.testing.assert_close(of_proxies, expected[2], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("what", ["embeddings", "proxies"])
@pytest.mark.parametrize("per_chunk", [None, 1])
def test_short_vectors_of_float16(what, per_chunk):
    """Shorter than float16 can tell directions apart: normalized the same way dense, streamed and in the logits."""
    torch.manual_seed(1)
    loss_func = MultiProxyEntropyLoss(5, 16, 3, classes_per_chunk=per_chunk).half().eval()
    embeddings, labels = torch.randn(8, 16).half(), torch.arange(8) % 5
    if what == "proxies":
        loss_func.proxies.data *= 2e-4
    else:
        embeddings *= 5e-5
    assert ((embeddings if what == "embeddings" else loss_func.proxies).float().norm(dim=-1) < 2**-10).all()
    actual, expected = step(loss_func, embeddings, labels), plain_step(loss_func, embeddings, labels)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual[1:], expected[1:], rtol=2e-3, atol=1e-5)
    similarities = loss_func.get_logits(embeddings).detach() / loss_func.scale
    assert similarities.abs().max() < 0.8  # of directions of unit length, some are nearer
    dense = copy.deepcopy(loss_func)
    dense.classes_per_chunk = None
    torch.testing.assert_close(loss_func.get_logits(embeddings), dense.get_logits(embeddings))
    cross_entropy = torch.nn.functional.cross_entropy(loss_func.get_logits(embeddings), labels)
    loss_func.intra_weight = loss_func.balance_weight = 0
    torch.testing.assert_close(loss_func(embeddings, labels), cross_entropy, rtol=1e-5, atol=1e-6)
    q = loss_func.soft_assign(embeddings, labels)
    assert loss_func.assign(embeddings, labels)[1].equal(q.argmax(dim=1))


@pytest.mark.parametrize("options", [{}, {"power": 2}, {"p": 1}], ids=str)
def test_distances_of_vectors_that_are_near_but_far_from_the_origin(options):
    """By a matrix product, such distances would be made of rounding errors."""
    for per_chunk in (None, 1):
        torch.manual_seed(0)
        distance = distances.LpDistance(normalize_embeddings=False, **options)
        loss_func = MultiProxyEntropyLoss(5, 16, 3, distance=distance, classes_per_chunk=per_chunk).eval()
        loss_func.proxies.data.mul_(0.01).add_(100)
        embeddings, labels = 100 + 0.01 * torch.randn(32, 16), torch.arange(32) % 5
        actual = step(loss_func, embeddings, labels)
        exact = plain_step(copy.deepcopy(loss_func).double(), embeddings.double(), labels)
        torch.testing.assert_close(actual[0].double(), exact[0], rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(actual[1:3], exact[1:3], strict=True):
            assert (ours - theirs).norm() < 1e-2 * theirs.norm()


def test_proxies_that_are_equally_near_to_the_last_bit_share_the_gradient(monkeypatch):
    monkeypatch.setattr(
        sys.modules[make_plan.__module__], "CHUNK_BYTES", 1
    )  # also where all is kept, there are several chunks
    for per_chunk in (1, 2, 7):
        loss_func = MultiProxyEntropyLoss(7, 6, 3, pooling="max", classes_per_chunk=per_chunk).double().eval()
        loss_func.proxies.data = torch.eye(6).double()[torch.tensor([0, 0, 1])].expand(7, 3, 6).contiguous()
        batch = torch.rand(9, 6, dtype=torch.float64), torch.randint(7, (9,))
        actual = step(loss_func, *batch)
        torch.testing.assert_close(actual, plain_step(loss_func, *batch), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(actual[2][:, 0], actual[2][:, 1])


def test_proxies_too_short_for_a_direction():
    """Below 1e-12, the length is clamped as in PyTorch's normalize, and has a gradient."""
    for per_chunk in (2, 7):
        loss_func = MultiProxyEntropyLoss(7, 6, 3, classes_per_chunk=per_chunk).double().eval()
        loss_func.proxies.data[1] *= 1e-13
        loss_func.proxies.data[2] = 0
        embeddings, labels = torch.randn(9, 6, dtype=torch.float64), torch.randint(7, (9,))
        expected = plain_step(loss_func, embeddings, labels)
        torch.testing.assert_close(step(loss_func, embeddings, labels), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("distance", ["cosine", "L2"])
def test_logits_and_assignment_do_not_depend_on_chunks(distance):
    loss_func = MultiProxyEntropyLoss(7, 6, 3, distance=make_distance(distance))
    embeddings = torch.randn(9, 6)
    expected = loss_func.get_logits(embeddings), *loss_func.assign(embeddings)
    for per_chunk in (1, 2, 3, 100):
        loss_func.classes_per_chunk = per_chunk
        torch.testing.assert_close((loss_func.get_logits(embeddings), *loss_func.assign(embeddings)), expected)


@pytest.mark.parametrize("weights", [(0.0, 0.5), (0.25, 0.0), (0.25, 0.5)], ids=["balance", "intra", "both"])
def test_small_gradient_of_a_nearly_certain_assignment(weights):
    """In float32, relative to itself: it is what remains of potentials that are ten million times as large."""
    for views in (1, 2):
        options = {"temperature": 0.05, "intra_weight": weights[0], "balance_weight": weights[1], "views": views}
        loss_func = MultiProxyEntropyLoss(1, 8, 4, **options).eval()
        loss_func.proxies.data = torch.eye(4, 8)[None]
        loss_func.proxy_usage.copy_(torch.tensor([[0.3, 0.55, 0.1, 0.05]]))
        embeddings, labels = torch.eye(8)[[3, 3]] + 0.05 * torch.randn(2, 8), torch.zeros(2, dtype=torch.long)
        actual = step(loss_func, embeddings, labels)[1]
        expected = step(loss_func.double(), embeddings.double(), labels)[1]
        assert loss_func.soft_assign(embeddings, labels).amax(dim=1).min() > 1 - 1e-6
        assert (actual - expected).norm() < 1e-4 * expected.norm()


def test_chunks_are_chosen_by_the_sizes_alone():
    def plan(batch_size, *shape, chosen=None, device="cpu"):
        return make_plan(chosen, batch_size, torch.empty(1, device=device).expand(*shape, 4), torch.float32)

    in_cache = 2**21 // (256 * 5 * 4)
    assert plan(256, 11318, 5) == (in_cache, True)  # 58 MB
    assert plan(256, 100_000, 5) == (in_cache, False)  # 512 MB
    assert plan(256, 11318, 5, device="meta") == (2**26 // (256 * 5 * 4), True)
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
