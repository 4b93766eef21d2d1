"""A fuzz of the loss against the reference, in memory full of NaN.

``FUZZ_CASES`` is how many cases the slow test draws, ``FUZZ_START`` the seed of the first. Where a case fails, it
prints how to run it alone.
"""

import os
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from cases import computed_by, memory_full_of_nan
from fuzz import Expected, autocast, draw, make

from pml_multiproxy._analytic import chunks
from pml_multiproxy._monitor import Statistics

pytestmark = pytest.mark.filterwarnings("ignore:var\\(\\). degrees of freedom")


def run(seed):
    case = draw(seed)
    try:
        check(case)
    except BaseException:
        print(f"\nFUZZ_START={seed} FUZZ_CASES=1 pytest -m slow tests/test_fuzz.py\n{case}")
        raise


def test_fixed_cases():
    for seed in range(20):
        run(seed)


@pytest.mark.slow
def test_random_cases():
    start = int(os.environ.get("FUZZ_START", "20"))
    for seed in range(start, start + int(os.environ.get("FUZZ_CASES", "380"))):
        run(seed)


def check(case):
    expected = Expected(case, make(case))
    # Also where all similarities are kept, there are several chunks.
    with memory_full_of_nan(), mock.patch.object(chunks, "CHUNK_BYTES", 1 if case.seed % 2 else chunks.CHUNK_BYTES):
        for chunk, implementation in ((case.chunk, None), (None, "autograd"), (None, "analytic")):
            with computed_by(implementation) if implementation else nullcontext():
                check_call(case, expected, *make(case, chunk))


def check_call(case, expected, loss_func, source, view, labels, mined):
    inputs = source, labels, loss_func.proxies
    before, usage_before = [tensor.detach().clone() for tensor in inputs], loss_func.proxy_usage.clone()
    with autocast(case), torch.set_grad_enabled(case.mode != "no_grad"):
        loss = loss_func(view(source), labels, mined)
    assert loss.dtype == (case.dtype if case.regularized else case.precise)
    torch.testing.assert_close([tensor.detach() for tensor in inputs], before, rtol=0, atol=0, equal_nan=True)
    usage, recorded = loss_func.proxy_usage.clone(), recorded_by(case, expected, loss_func)
    assert case.mode == "train" or usage.equal(usage_before)
    loss_func.distance.reset_stats()
    with autocast(case), torch.no_grad():
        logits, assignments = loss_func.get_logits(view(source)), loss_func.soft_assign(view(source), labels)
    assert loss_func.proxy_usage.equal(usage)
    assert recorded_by(case, expected, loss_func) == recorded  # get_logits records the same norms
    values = {"usage": usage, "logits": logits, "assignments": assignments}
    values |= {name: torch.tensor(value) for name, value in recorded.items()}
    values |= {"loss": loss} if expected.is_clear else {}
    for name, value in values.items():
        assert_near(name, value, *expected.values[name])
    if loss.requires_grad:
        check_gradients(case, expected, loss, loss_func, source, view)
    loss_func.temperature = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(TypeError, match="temperature must be a finite number above 0"):
        loss_func(view(source), labels, mined)


def recorded_by(case, expected, loss_func):
    """The statistics of the loss and its distance."""
    names = [(loss_func, name) for name in Statistics._fields if expected.is_clear]
    # The lengths of all samples together may be out of range.
    if case.vectors != "any length" and not case.not_finite:
        names += [(loss_func.distance, name) for name in expected.values if name.endswith("_norm")]
    return {name: getattr(owner, name) for owner, name in names if case.statistics and case.batch}


def check_gradients(case, expected, loss, loss_func, source, view):
    (gradient, allowed), (of_proxies, allowed_of_proxies) = expected.gradients
    shape, wide = loss_func.proxies.shape, source.detach().double().requires_grad_(case.layout != "inference")
    leaves = [(loss_func.proxies, of_proxies.view(shape), allowed_of_proxies.reshape(shape))]
    if source.requires_grad:
        leaves += [(source, *(torch.autograd.grad(view(wide), wide, g)[0] for g in (gradient, allowed)))]
    for keep in (True, False):
        with autocast(case, case.autocast_backward):
            loss.backward(retain_graph=keep)
        for leaf, gradient, allowed in leaves:
            if leaf.requires_grad and expected.is_clear:
                actual = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                assert_near(f"gradient of {tuple(leaf.shape)}", actual, gradient.to(leaf.dtype), allowed)
            leaf.grad = None


def assert_near(name, actual, expected, allowed):
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"{name} is of shape {tuple(actual.shape)}"
    near = ((actual - expected).abs() <= allowed) | (actual == expected) | (actual.isnan() & expected.isnan())
    assert near.all(), f"{name} is {actual}, not {expected}; allowed is {allowed}"
