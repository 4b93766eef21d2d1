"""The usage buffer: when it moves, by how much, and what it does to the loss."""

import copy

import pytest
import torch

from pml_multiproxy import functional


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_not_count(value, loss_func, batch):
    q = torch.tensor([[0.25, 0.75], [value, value], [1.0, 0.0]])
    assert functional.usage_sums(q, torch.tensor([0, 0, 1]), 2).tolist() == [[0.25, 0.75], [1.0, 0.0]]
    for columns in (1, 8):
        embeddings, labels = batch[0].detach().clone(), batch[1]
        embeddings[[0, 3, 6, 9]] = value  # all of class 0
        embeddings[[1], :columns] = value  # one of class 1
        good = ~torch.isin(torch.arange(12), torch.tensor([0, 1, 3, 6, 9]))
        alone, moved = copy.deepcopy(loss_func), copy.deepcopy(loss_func)
        moved(embeddings, labels)
        alone(embeddings[good], labels[good])
        torch.testing.assert_close(moved.proxy_usage, alone.proxy_usage)
        assert moved.proxy_usage[0].equal(torch.full((4,), 0.25))


def test_balance_gives_the_usage_no_gradient():
    q, u = torch.rand(2, 3).softmax(dim=1).requires_grad_(), torch.rand(2, 3).softmax(dim=1).requires_grad_()
    functional.balance(q, u).sum().backward()
    assert u.grad is None
    torch.testing.assert_close(q.grad, u.detach().log())


def test_stays_as_it_is_outside_training(loss_func, batch):
    x, y = batch
    for call in (
        lambda: loss_func.get_logits(x),
        lambda: loss_func.assign(x),
        lambda: loss_func.assign(x, y),
        lambda: loss_func.soft_assign(x, y),
        lambda: torch.no_grad()(loss_func)(x, y),
        lambda: torch.inference_mode()(loss_func)(x.detach(), y),
        lambda: loss_func.eval()(x, y),
    ):
        call()
        assert loss_func.proxy_usage.equal(torch.full((3, 4), 0.25))


def test_zero_usage_has_a_finite_logarithm(loss_func, batch):
    loss_func.proxy_usage.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert loss_func.eval()(*batch).isfinite()
    balance = functional.balance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert balance.item() == pytest.approx(-13.8155, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_stays_float32_whatever_comes_in(dtype, loss_func, batch):
    usage = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).expand(3, 4)
    loss_func.proxy_usage.copy_(usage)
    for convert in (lambda m: m.to(dtype), lambda m: m.half(), lambda m: m.double(), lambda m: m.float()):
        convert(loss_func)
        assert loss_func.proxy_usage.dtype == torch.float32
        assert loss_func.proxy_usage.equal(usage)
    with torch.autocast("cpu", torch.bfloat16):
        loss_func(batch[0].to(dtype), batch[1])
    assert loss_func.proxy_usage.dtype == torch.float32
    assert "proxy_usage" in dict(loss_func.named_buffers())
    on_meta = loss_func.to("meta", torch.float16)
    assert (on_meta.proxy_usage.device.type, on_meta.proxy_usage.dtype) == ("meta", torch.float32)
