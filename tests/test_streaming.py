"""Some classes at a time, or all at once with the analytic gradient, beside what test_fuzz.py checks."""

import subprocess
import sys

import pytest
import torch
from cases import computed_by, make_distance

from pml_multiproxy import MultiProxyEntropyLoss, _step
from pml_multiproxy._analytic.chunks import make_plan
from pml_multiproxy._analytic.poolings import POOLINGS


def step(loss_func, embeddings, labels, autocast=None):
    embeddings = embeddings.detach().clone().requires_grad_()
    with torch.autocast("cpu", autocast, autocast is not None):
        loss = loss_func(embeddings, labels)
    return loss.detach(), *torch.autograd.grad(loss, [embeddings, loss_func.proxies])


def test_which_implementation_is_chosen(monkeypatch):
    """The analytic one for the cosine, and where classes are streamed; for other distances autograd while all fits."""
    taken, choose = [], _step._implementation
    monkeypatch.setattr(_step, "_implementation", lambda step: taken.append(choose(step)) or taken[-1])
    for distance, per_chunk in (("cosine", None), ("cosine", 1), ("L2", None), ("L2", 1)):
        loss_func = MultiProxyEntropyLoss(3, 6, 2, distance=make_distance(distance), classes_per_chunk=per_chunk)
        loss_func(torch.randn(4, 6), torch.zeros(4).long())
    assert taken == ["analytic", "analytic", "autograd", "analytic"]


def test_differentiating_twice_is_refused(batch):
    for per_chunk in (1, 3):
        loss_func = MultiProxyEntropyLoss(3, 8, 4, classes_per_chunk=per_chunk)
        with pytest.raises(RuntimeError, match="cannot be differentiated: drop create_graph=True"):
            torch.autograd.grad(loss_func(*batch), batch[0], create_graph=True)


@pytest.mark.parametrize(
    ("pooling", "dtype"), [*((pooling, torch.bfloat16) for pooling in POOLINGS), ("max", torch.float16)]
)
def test_autocast(pooling, dtype, batch):
    """The products are rounded, in backward as in forward: also where backward computes them again."""
    settings = {"scale": 2, "temperature": 0.05, "pooling": pooling, "intra_weight": 0.5, "inter_weight": 0.1}
    for per_chunk in (1, 2, 3):
        loss_func = MultiProxyEntropyLoss(3, 8, 4, classes_per_chunk=per_chunk, **settings).eval()
        loss_func.proxies.data *= 0.5 + torch.rand(3, 4, 1)
        actual = step(loss_func, *batch, dtype)
        with computed_by("autograd"):
            expected, exact = step(loss_func, *batch, dtype), step(loss_func, *batch)
        assert [value.dtype for value in actual] == [torch.float32] * 3
        torch.testing.assert_close(actual[0], expected[0])
        for i in (1, 2):
            rounding = (exact[i] - expected[i]).abs().max()
            assert rounding > 0
            assert (actual[i] - expected[i]).abs().max() < 0.5 * rounding


def test_autocast_leaves_float64_alone(batch):
    loss_func = MultiProxyEntropyLoss(3, 8, 4).double().eval()
    exact = step(loss_func, batch[0].double(), batch[1])
    torch.testing.assert_close(step(loss_func, batch[0].double(), batch[1], autocast=torch.bfloat16), exact)


@pytest.mark.parametrize(("intra", "balance"), [(0.0, 0.5), (0.25, 0.0), (0.25, 0.5)])
def test_small_gradient_of_a_nearly_certain_assignment(intra, balance):
    """In float32, relative to itself: it remains of potentials that are ten million times as large."""
    for views in (1, 2):
        options = {"temperature": 0.05, "intra_weight": intra, "balance_weight": balance, "views": views}
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
