"""A fuzz of the loss against a reference of its own, in memory full of NaN.

``FUZZ_CASES`` is how many cases the slow test draws. Where a case fails, it prints the seed of that case:
``FUZZ_SEED=<seed> pytest -m slow tests/test_fuzz.py`` runs it alone.
"""

import os
from contextlib import nullcontext

import pytest
import torch
from cases import computed_by, memory_full_of_nan
from fuzz import DISTANCES, Expected, autocast, draw, make
from pytorch_metric_learning import distances

pytestmark = pytest.mark.filterwarnings("ignore:var\\(\\). degrees of freedom")

FEW, MANY = 100, int(os.environ.get("FUZZ_CASES", "300"))


NORMS = [f"{when}_avg_{of}_norm" for when in ("initial", "final") for of in ("query", "ref")]
STATISTICS = ["classification_loss", "intra_class_entropy", "inter_class_entropy", "balance", "proxies_in_use"]
STATISTICS += ["usage_perplexity", "effective_proxies", "min_effective_proxies", "views_agree"]


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only wait for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(seed):
    case = draw(seed)
    try:
        check(case)
    except BaseException:
        print(f"\nFUZZ_SEED={seed} pytest -m slow tests/test_fuzz.py\n{case}")
        raise


def test_fixed_cases():
    for seed in range(FEW):
        run(seed)


@pytest.mark.slow
def test_random_cases():
    if "FUZZ_SEED" in os.environ:
        return run(int(os.environ["FUZZ_SEED"]))
    start = int(os.environ.get("FUZZ_START", FEW))
    for seed in range(start, start + MANY):
        run(seed)
    return None


def check(case):
    expected = Expected(case, make(case))
    with memory_full_of_nan():
        check_way(case, expected, None, None)
        check_way(case, expected, case.chunk, None)
        check_way(case, expected, None, "autograd" if case.distance == "cosine" else "analytic")
        if case.seed % 4 == 0:
            check_refusals(case)


def check_way(case, expected, chunk, implementation):
    """A call of the loss: its value, its effects and its gradient."""
    made = loss_func, source, view, labels, mined = make(case, chunk)
    before = source.detach().clone(), labels.clone(), loss_func.proxies.detach().clone()
    embeddings = view(source)
    with computed_by(implementation) if implementation else nullcontext():
        try:
            with autocast(case), torch.set_grad_enabled(case.mode != "no_grad"):
                loss = loss_func(embeddings, labels, mined)
        except ValueError as error:  # for a distance that records statistics of every call
            is_recorded = case.distance == "cosine" or DISTANCES[case.distance][0] is distances.LpDistance
            if is_recorded or not case.distance_statistics or "collect_stats of the distance" not in str(error):
                raise
            assert loss_func.proxy_usage.equal(make(case)[0].proxy_usage), "a refused call changed the usage"
            return
    assert all(a.equal(b) for a, b in zip(before, (source, labels, loss_func.proxies), strict=True)), "input changed"
    check_values(case, expected, loss, *made)
    must_notice = case.distance == "cosine" and not case.extreme and case.proxy_dtype == case.precise
    must_notice = must_notice and not case.strided_proxies  # which are copied
    must_notice = must_notice and not implementation and case.reducer not in ("positive", "threshold")
    check_gradients(case, expected, loss, embeddings, must_notice, *made)


def check_values(case, expected, loss, loss_func, source, view, labels, mined):
    usage, regularized = loss_func.proxy_usage, case.weight_regularizer or case.embedding_regularizer
    assert usage.dtype == torch.float32
    if case.mode != "train":
        assert usage.equal(make(case)[0].proxy_usage), "usage updated"
    if case.reducer not in ("positive", "threshold"):  # where nothing is left, PML's zero is of the embeddings
        assert loss.dtype == (case.dtype if regularized else case.precise)
    values = {"usage": usage} | ({"loss": loss} if expected.is_clear else {})
    if case.distance_statistics and case.batch and not case.extreme:
        values |= {name: torch.tensor(getattr(loss_func.distance, name)) for name in NORMS}
    if case.statistics and case.batch and expected.is_clear:
        values |= {name: torch.tensor(getattr(loss_func, name)) for name in STATISTICS}
    with autocast(case), torch.no_grad():
        values["logits"] = loss_func.get_logits(view(source))
        values["assignments"] = loss_func.soft_assign(view(source), labels)
    assert loss_func.proxy_usage.equal(usage)
    for name, value in values.items():
        assert_near(name, value, *expected.values[name])


def check_gradients(case, expected, loss, embeddings, must_notice, loss_func, source, view, labels, mined):
    total = loss + 0.1 * source.mean() if case.alias else loss
    if case.mode == "no_grad" or not total.requires_grad:
        return
    (of_embeddings, allowed), of_proxies = expected.gradients
    leaves = {"proxies": (loss_func.proxies, *of_proxies)}
    if source.requires_grad:
        wide = source.detach().double().requires_grad_()
        gradient, allowed = (torch.autograd.grad(view(wide), wide, g)[0] for g in (of_embeddings, allowed))
        alias = 0.1 / max(source.numel(), 1) if case.alias else 0.0
        allowed = allowed + 4 * alias * torch.finfo(case.dtype).eps
        leaves["embeddings"] = source, gradient + alias, allowed
    if case.edit == "proxies":
        loss_func.proxies.detach().add_(1)
    elif case.edit == "embeddings":
        (embeddings if case.layout == "not a leaf" else source).detach().add_(1)
    for keep in (True, False):
        try:
            with autocast(case, case.autocast_backward):
                total.backward(retain_graph=keep)
        except RuntimeError as error:
            if not case.edit or "modified by an inplace operation" not in str(error):
                raise
            return
        for name, (leaf, gradient, allowed) in leaves.items():
            if leaf.requires_grad and expected.is_clear:
                actual = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                assert_near(f"gradient of {name}", actual, gradient.to(leaf.dtype), allowed)
            leaf.grad = None
    assert not (case.edit == "proxies" and must_notice), "an edit of the proxies was not noticed"


def check_refusals(case):
    """Calls that are not valid raise, and change nothing."""
    loss_func, source, view, labels, _ = make(case)
    state = {name: value.clone() for name, value in loss_func.state_dict().items()}
    embeddings, labels = view(source), labels.long()
    refused = [
        (TypeError, (embeddings, labels.float())),
        (TypeError, (embeddings, labels.bool())),
        (TypeError, (embeddings.long(), labels)),
        (ValueError, (embeddings, None)),
        (ValueError, (embeddings, torch.zeros(case.batch + 1, dtype=torch.long))),
        (ValueError, (embeddings[:, 1:], labels)),
        (ValueError, (embeddings, labels, (labels[:0],))),
        (ValueError, (embeddings, labels, None, embeddings * 1)),
    ]
    if case.batch:
        refused += [(ValueError, (embeddings, labels + case.num_classes)), (ValueError, (embeddings, -1 - labels))]
        refused += [(ValueError, (embeddings, labels, (torch.tensor([case.batch]),) * 3))]
    for error, args in refused:
        with pytest.raises(error):
            loss_func(*args)
    assert all(value.equal(state[name]) for name, value in loss_func.state_dict().items()), "a refused call changed it"


def assert_near(name, actual, expected, allowed):
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"{name} is of shape {tuple(actual.shape)}"
    error = (actual - expected).abs()
    off = (error <= allowed).logical_not() & (actual != expected)
    assert not off.any(), f"{name} is off by {error[off]}, allowed is {allowed}: {actual}, not {expected}"
