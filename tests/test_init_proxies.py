"""Starting the proxies by k-means."""

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning import distances

from pml_multiproxy import MultiProxyEntropyLoss


def clusters(per_cluster=20, spread=0.05):
    """Two classes of four well separated clusters each: embeddings, labels, centers (2, 4, 8)."""
    centers = torch.linalg.qr(torch.randn(8, 8)).Q.view(2, 4, 8)
    embeddings = centers.repeat_interleave(per_cluster, dim=1) + spread * torch.randn(2, 4 * per_cluster, 8)
    return embeddings.flatten(0, 1), torch.arange(2).repeat_interleave(4 * per_cluster), centers


def test_finds_the_clusters():
    embeddings, labels, centers = clusters()
    loss_func = MultiProxyEntropyLoss(2, 8, 4)
    loss_func.init_proxies(embeddings * 100 ** torch.rand(len(labels), 1), labels)  # lengths do not matter
    similarities = loss_func.proxies @ centers.mT
    assert (similarities.amax(dim=2) > 0.99).all()
    assert (similarities.amax(dim=1) > 0.99).all()
    torch.testing.assert_close(loss_func.proxies.norm(dim=2), torch.ones(2, 4))
    torch.testing.assert_close(loss_func.proxy_usage, torch.full((2, 4), 0.25))


def test_usage_is_the_share_of_samples():
    embeddings, labels = torch.randn(90, 8), torch.randint(2, (90,))
    loss_func = MultiProxyEntropyLoss(2, 8, 4)
    loss_func.init_proxies(embeddings, labels)
    _, proxies = loss_func.assign(embeddings, labels)
    for c in range(2):
        counts = torch.tensor([(proxies[labels == c] == k).sum() for k in range(4)])
        torch.testing.assert_close(loss_func.proxy_usage[c], counts / counts.sum())
        assert (counts > 0).all()


@given(
    seed=st.integers(0, 2**31 - 1),
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    per_class=st.integers(1, 5),
    distinct=st.integers(1, 12),
)
def test_any_numbers_of_samples(seed, counts, per_class, distinct):
    torch.manual_seed(seed)
    loss_func = MultiProxyEntropyLoss(len(counts), 4, per_class)
    before = loss_func.proxies.detach().clone()
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    loss_func.init_proxies(torch.randn(distinct, 4)[torch.randint(distinct, (len(labels),))], labels)
    torch.testing.assert_close(loss_func.proxies.norm(dim=2), torch.ones(len(counts), per_class))
    torch.testing.assert_close(loss_func.proxy_usage.sum(dim=1), torch.ones(len(counts)))
    for c, count in enumerate(counts):
        assert loss_func.proxies[c].equal(before[c]) == (count == 0)
        assert len(loss_func.proxies[c].unique(dim=0)) == per_class


def test_keeps_the_lengths_where_the_distance_does():
    embeddings, labels, centers = clusters()
    loss_func = MultiProxyEntropyLoss(2, 8, 4, distance=distances.LpDistance(normalize_embeddings=False))
    loss_func.init_proxies(3 * embeddings, labels)
    assert (torch.cdist(loss_func.proxies, 3 * centers).amin(dim=2) < 0.2).all()


def test_is_the_same_under_the_same_seed():
    embeddings, labels = torch.randn(60, 8), torch.randint(3, (60,))
    results = []
    for seed in (1, 1, 2):
        loss_func = MultiProxyEntropyLoss(3, 8, 4)
        torch.manual_seed(seed)
        loss_func.init_proxies(embeddings, labels)
        results.append(loss_func.proxies.detach())
    assert results[0].equal(results[1])
    assert not results[0].equal(results[2])


def test_few_samples_are_repeated_with_noise():
    embeddings = torch.nn.functional.normalize(torch.randn(3, 8))
    loss_func = MultiProxyEntropyLoss(2, 8, 5)
    before = loss_func.proxies.detach().clone()
    loss_func.init_proxies(embeddings, torch.zeros(3, dtype=torch.long))
    similarities = loss_func.proxies[0] @ embeddings.T
    assert ((similarities > 1 - 1e-6).sum(dim=0) == 1).all()  # each sample once as it is
    assert (similarities.amax(dim=1) > 0.98).all()  # the others near one
    assert len(loss_func.proxies[0].unique(dim=0)) == 5
    assert loss_func.proxies[1].equal(before[1])  # a class without samples
    assert loss_func.proxy_usage[1].equal(torch.full((5,), 0.2))


def test_samples_that_are_all_the_same():
    loss_func = MultiProxyEntropyLoss(1, 8, 4)
    loss_func.init_proxies(torch.ones(50, 8), torch.zeros(50, dtype=torch.long))
    assert loss_func.proxies.isfinite().all()
    assert len(loss_func.proxies[0].unique(dim=0)) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype):
    embeddings, labels, centers = clusters()
    loss_func = MultiProxyEntropyLoss(2, 8, 4).to(dtype)
    loss_func.init_proxies(embeddings.to(dtype).requires_grad_(), labels.to(torch.uint8))
    assert loss_func.proxies.dtype == dtype
    assert loss_func.proxies.requires_grad
    assert loss_func.proxies.grad_fn is None
    assert ((loss_func.proxies.float() @ centers.mT).amax(dim=2) > 0.99).all()


def test_keeps_the_parameter_that_the_optimizer_holds():
    loss_func = MultiProxyEntropyLoss(2, 8, 4)
    optimizer = torch.optim.Adam(loss_func.parameters())
    embeddings, labels, _ = clusters()
    loss_func.init_proxies(embeddings, labels)
    assert optimizer.param_groups[0]["params"][0] is loss_func.proxies
    before = loss_func.proxies.detach().clone()
    loss_func(embeddings, labels).backward()
    optimizer.step()
    assert not loss_func.proxies.equal(before)


def test_lowers_the_loss_of_the_first_step():
    embeddings, labels, _ = clusters()
    loss_func = MultiProxyEntropyLoss(2, 8, 4)
    started = copy.deepcopy(loss_func)
    started.init_proxies(embeddings, labels)
    assert started(embeddings, labels) < 0.5 * loss_func(embeddings, labels)


def test_bad_arguments(loss_func, batch):
    embeddings, labels = batch
    for value in (float("nan"), float("inf")):
        bad = embeddings.detach().clone()
        bad[0, 0] = value
        with pytest.raises(ValueError, match="embeddings must be finite, got NaN or infinite values"):
            loss_func.init_proxies(bad, labels)
    with pytest.raises(ValueError, match=re.escape("labels must lie in [0, 2]")):
        loss_func.init_proxies(embeddings, labels + 1)
    with pytest.raises(ValueError, match=re.escape("labels must be given, a tensor of shape (12,), got None")):
        loss_func.init_proxies(embeddings, None)
