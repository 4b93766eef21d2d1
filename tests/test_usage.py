"""The usage buffer: when it moves, by how much, and what it does to the loss."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pml_multiproxy import MultiProxyEntropyLoss, functional


def usage_by_hand(usage, q, labels, momentum):
    """One class at a time, in float64."""
    usage = usage.double().clone()
    for c in range(len(usage)):
        rows = q[labels == c].double()
        rows = rows[rows.isfinite().all(dim=1)]
        n = len(rows)
        if n:
            usage[c] = momentum**n * usage[c] + (1 - momentum**n) * rows.mean(dim=0)
    return usage


def assignments_of(loss_func, embeddings, labels):
    s = functional.normalize(embeddings.detach()) @ functional.normalize(loss_func.proxies.detach().flatten(0, 1)).T
    own = s.unflatten(1, loss_func.proxies.shape[:2])[torch.arange(len(labels)), labels]
    return functional.assignment(own, loss_func.temperature)


def test_starts_even_and_in_float32(loss_func):
    assert loss_func.proxy_usage.equal(torch.full((3, 4), 0.25))
    assert loss_func.proxy_usage.dtype == torch.float32


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("labels", [[0], [0, 0, 0], [0, 2, 0, 2, 2], [1, 1, 0, 1, 2, 2, 1]], ids=str)
def test_moves_by_each_sample_of_a_class(momentum, labels):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, usage_momentum=momentum)
    loss_func.proxy_usage.copy_(torch.rand(3, 4).softmax(dim=1))
    embeddings, labels = torch.randn(len(labels), 8), torch.tensor(labels)
    expected = usage_by_hand(
        loss_func.proxy_usage, assignments_of(loss_func, embeddings, labels), labels, momentum
    ).float()
    loss_func(embeddings, labels)
    torch.testing.assert_close(loss_func.proxy_usage, expected)


@given(data=st.data(), seed=st.integers(0, 2**31 - 1), momentum=st.floats(0, 1))
def test_rows_stay_distributions(data, seed, momentum):
    torch.manual_seed(seed)
    loss_func = MultiProxyEntropyLoss(3, 4, 5, usage_momentum=momentum)
    for _ in range(10):
        labels = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=6)))
        loss_func(torch.randn(len(labels), 4), labels)
    assert (loss_func.proxy_usage >= 0).all()
    torch.testing.assert_close(loss_func.proxy_usage.sum(dim=1), torch.ones(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_not_count(value):
    q = torch.tensor([[0.25, 0.75], [value, value], [1.0, 0.0]])
    sums = functional.usage_sums(q, torch.tensor([0, 0, 1]), 2)
    assert sums.tolist() == [[0.25, 0.75], [1.0, 0.0]]


def test_is_updated_before_it_is_used(loss_func, batch):
    """Two losses that differ only in the usage that they start from must differ less after the update than before."""
    embeddings, labels = batch
    expected = usage_by_hand(loss_func.proxy_usage, assignments_of(loss_func, embeddings, labels), labels, 0.9).float()
    training = loss_func(embeddings, labels)
    assert not torch.allclose(expected, torch.full((3, 4), 0.25), atol=0.01)
    other = MultiProxyEntropyLoss(3, 8, 4)
    other.load_state_dict({"proxies": loss_func.proxies, "proxy_usage": expected})
    torch.testing.assert_close(training, other.eval()(embeddings, labels))


def test_balance_gives_the_usage_no_gradient():
    q, u = torch.rand(2, 3).softmax(dim=1).requires_grad_(), torch.rand(2, 3).softmax(dim=1).requires_grad_()
    functional.balance(q, u).sum().backward()
    assert u.grad is None
    torch.testing.assert_close(q.grad, u.detach().log())


def test_gradient_treats_usage_as_constant(loss_func, batch):
    embeddings, labels = batch
    loss_func(embeddings, labels).backward()
    after_update = copy.deepcopy(loss_func).eval()
    x = embeddings.detach().clone().requires_grad_()
    after_update.proxies.grad = None
    after_update(x, labels).backward()
    torch.testing.assert_close(embeddings.grad, x.grad)
    torch.testing.assert_close(loss_func.proxies.grad, after_update.proxies.grad)
    assert not loss_func.proxy_usage.requires_grad


@pytest.mark.parametrize(
    "call",
    [
        lambda loss_func, x, y: loss_func.get_logits(x),
        lambda loss_func, x, y: loss_func.assign(x),
        lambda loss_func, x, y: loss_func.assign(x, y),
        lambda loss_func, x, y: loss_func.eval()(x, y),
        lambda loss_func, x, y: torch.no_grad()(loss_func)(x, y),
        lambda loss_func, x, y: torch.inference_mode()(loss_func)(x.detach(), y),
    ],
    ids=["get_logits", "assign", "assign with labels", "eval", "no_grad", "inference_mode"],
)
def test_stays_as_it_is_outside_training(loss_func, batch, call):
    call(loss_func, *batch)
    assert loss_func.proxy_usage.equal(torch.full((3, 4), 0.25))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("whole_row", [False, True])
def test_rows_that_are_not_finite_count_as_none(bad, whole_row, loss_func, batch):
    embeddings, labels = batch[0].detach(), batch[1]
    embeddings[[0, 3, 6, 9]] = bad  # all of class 0
    embeddings[[1], : 8 if whole_row else 1] = bad  # one of class 1
    good = ~torch.isin(torch.arange(12), torch.tensor([0, 1, 3, 6, 9]))
    alone = copy.deepcopy(loss_func)
    loss_func(embeddings, labels)
    alone(embeddings[good], labels[good])
    torch.testing.assert_close(loss_func.proxy_usage, alone.proxy_usage)
    assert loss_func.proxy_usage[0].equal(torch.full((4,), 0.25))


def test_rows_that_are_not_finite_do_not_touch_the_losses_of_others(loss_func, batch):
    embeddings, labels = batch[0].detach(), batch[1]
    good = torch.arange(12) != 4
    expected = copy.deepcopy(loss_func).compute_loss(embeddings[good], labels[good], None)["loss"]["losses"]
    embeddings[4] = float("nan")
    losses = loss_func.compute_loss(embeddings, labels, None)["loss"]["losses"]
    torch.testing.assert_close(losses[good], expected)
    assert losses[4].isnan()


def test_miner_weights_do_not_affect_it(loss_func, batch):
    other = copy.deepcopy(loss_func)
    loss_func(*batch)
    other(*batch, (torch.tensor([0]), torch.tensor([3]), torch.tensor([1])))
    assert loss_func.proxy_usage.equal(other.proxy_usage)


def test_zero_usage_has_a_finite_logarithm(loss_func, batch):
    loss_func.proxy_usage.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert loss_func.eval()(*batch).isfinite()
    q = torch.tensor([[1.0, 0.0]])
    assert functional.balance(q, torch.tensor([[0.0, 1.0]])).item() == pytest.approx(-13.8155, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_stays_float32_whatever_comes_in(dtype, loss_func, batch):
    usage = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).expand(3, 4)
    loss_func.proxy_usage.copy_(usage)
    for convert in (lambda m: m.to(dtype), lambda m: m.half(), lambda m: m.double(), lambda m: m.float()):
        convert(loss_func)
        assert loss_func.proxy_usage.dtype == torch.float32
        assert loss_func.proxy_usage.equal(usage)
    loss_func(batch[0].to(dtype), batch[1])
    assert loss_func.proxy_usage.dtype == torch.float32
    assert "proxy_usage" in dict(loss_func.named_buffers())


def test_moves_to_another_device_with_the_loss(loss_func):
    assert loss_func.to("meta", torch.float16).proxy_usage.device.type == "meta"
    assert loss_func.proxies.dtype == torch.float16
    assert loss_func.proxy_usage.dtype == torch.float32


def test_is_the_same_under_autocast(loss_func, batch):
    """Only the products of embeddings and proxies may run in bfloat16."""
    q = torch.rand(12, 4).softmax(dim=1)

    def updated_usage():
        return functional.moved_usage(loss_func.proxy_usage, functional.usage_sums(q, batch[1], 3), 0.9)

    expected = updated_usage()
    with torch.autocast("cpu", torch.bfloat16):
        assert updated_usage().equal(expected)


def test_mean_balance_of_a_class_is_not_negative():
    """Where the usage is the mean of the assignment, the constants keep the mean of every term at 0 or more."""
    loss_func = MultiProxyEntropyLoss(2, 8, 4, usage_momentum=0.0, collect_stats=True)
    for _ in range(20):
        loss_func(torch.randn(30, 8), torch.arange(30) % 2)
        assert loss_func.balance >= -1e-6
