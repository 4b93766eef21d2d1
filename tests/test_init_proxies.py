"""Starting the proxies by k-means."""

import copy
import functools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning import distances
from torch.nn.functional import normalize
from torch.nn.utils import parametrizations, prune
from tqdm import tqdm

from pml_multiproxy import MultiProxyEntropyLoss, _kmeans


def clusters(per_cluster=20, spread=0.05):
    """Two classes of four well separated clusters each: embeddings, labels, centers (2, 4, 8)."""
    centers = torch.linalg.qr(torch.randn(8, 8)).Q.view(2, 4, 8)
    embeddings = centers.repeat_interleave(per_cluster, dim=1) + spread * torch.randn(2, 4 * per_cluster, 8)
    return embeddings.flatten(0, 1), torch.arange(2).repeat_interleave(4 * per_cluster), centers


def not_normalized(num_classes=2, per_class=4):
    return MultiProxyEntropyLoss(num_classes, 8, per_class, distance=distances.LpDistance(normalize_embeddings=False))


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [*((scale, torch.float32) for scale in (1e-30, 1.0, 1e30)), (1, torch.float16), (1, torch.bfloat16)],
)
def test_finds_the_clusters(scale, dtype):
    embeddings, labels, centers = clusters()
    embeddings = (scale * embeddings * 100 ** torch.rand(len(labels), 1)).to(dtype)  # lengths do not matter
    loss_func = MultiProxyEntropyLoss(2, 8, 4).to(dtype)
    parameter = loss_func.proxies
    loss_func.init_proxies(embeddings.requires_grad_(), labels)
    assert loss_func.proxies is parameter  # the optimizer may hold it
    assert (parameter.dtype, parameter.grad_fn) == (dtype, None)
    similarities = parameter.float() @ centers.mT
    assert (similarities.amax(dim=2) > 0.99).all()
    assert (similarities.amax(dim=1) > 0.99).all()
    torch.testing.assert_close(parameter.norm(dim=2).float(), torch.ones(2, 4), rtol=0.01, atol=0)
    if scale > 1e-12:  # shorter ones are shortened by the loss itself
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
    before = copy.deepcopy(loss_func.state_dict())
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    loss_func.init_proxies(torch.randn(distinct, 4)[torch.randint(distinct, (len(labels),))], labels)
    torch.testing.assert_close(loss_func.proxies.norm(dim=2), torch.ones(len(counts), per_class))
    torch.testing.assert_close(loss_func.proxy_usage.sum(dim=1), torch.ones(len(counts)))
    for c, count in enumerate(counts):
        assert loss_func.proxies[c].equal(before["proxies"][c]) == (count == 0)
        assert count or loss_func.proxy_usage[c].equal(before["proxy_usage"][c])
        assert len(loss_func.proxies[c].unique(dim=0)) == per_class


def test_the_seed_decides_and_layout_dtype_of_labels_and_autocast_do_not():
    embeddings, labels = torch.randn(60, 8), torch.randint(3, (60,))

    def started(x=embeddings, y=labels, seed=1, autocast=False):
        loss_func = MultiProxyEntropyLoss(3, 8, 4)
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss_func.init_proxies(x, y)
        return loss_func.proxies.detach()

    assert not started(seed=2).equal(started())
    for options in (
        {},
        {"autocast": True},
        {"x": embeddings.T.contiguous().T, "y": labels.to(torch.uint8)},
        {"x": embeddings.repeat_interleave(2, dim=1)[:, ::2], "y": labels.repeat_interleave(2)[::2]},
    ):
        torch.testing.assert_close(started(**options), started())


def test_few_samples_are_repeated_with_noise():
    embeddings = normalize(torch.randn(3, 8))
    loss_func = MultiProxyEntropyLoss(1, 8, 5)
    loss_func.init_proxies(embeddings, torch.zeros(3, dtype=torch.long))
    similarities = loss_func.proxies[0] @ embeddings.T
    assert ((similarities > 1 - 1e-6).sum(dim=0) == 1).all()  # each sample once as it is
    assert (similarities.amax(dim=1) > 0.98).all()  # the others near one
    assert len(loss_func.proxies[0].unique(dim=0)) == 5


@pytest.mark.parametrize("samples", [torch.ones(50, 8), torch.zeros(9, 8)], ids=["the same", "zeros"])
def test_samples_that_are_all_the_same_where_lengths_count(samples):
    loss_func = not_normalized(1)
    loss_func.init_proxies(samples, torch.zeros(len(samples), dtype=torch.long))
    assert loss_func.proxies.isfinite().all()
    assert len(loss_func.proxies[0].unique(dim=0)) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_arguments(value, loss_func, batch):
    embeddings = batch[0].detach().index_fill(0, torch.tensor(1), value)
    with pytest.raises(ValueError, match="embeddings must be finite, got NaN or infinite values"):
        loss_func.init_proxies(embeddings, batch[1])


def assert_refuses_to_write(loss_func, batch, path):
    loss_func(*batch)
    before = copy.deepcopy(loss_func.state_dict())
    for write in (lambda: loss_func.init_proxies(*batch), lambda: loss_func.save(path), loss_func.reset_parameters):
        with pytest.raises(ValueError, match="proxies must be a plain parameter to be set or saved"):
            write()
    assert not path.exists()
    for name, value in loss_func.state_dict().items():
        assert value.equal(before[name]), name


@pytest.mark.parametrize(
    "compute",
    [parametrizations.weight_norm, functools.partial(prune.l1_unstructured, amount=0.3)],
    ids=["weight_norm", "pruned"],
)
def test_proxies_that_are_computed_from_others_are_refused(compute, loss_func, batch, tmp_path):
    """New values would be lost, and the usage would belong to other proxies."""
    compute(loss_func, "proxies")
    assert_refuses_to_write(loss_func, batch, tmp_path / "loss.pt")


def test_proxies_that_fully_shard_holds_are_refused(loss_func, batch, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(loss_func, mesh=init_device_mesh("cpu", (1,)))
        assert_refuses_to_write(loss_func, batch, tmp_path / "loss.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_lengths_that_the_distance_cannot_hold():
    loss_func = not_normalized()
    embeddings, labels, _ = clusters()
    loss_func.init_proxies(embeddings * 1e18, labels)
    torch.testing.assert_close(loss_func.proxy_usage, torch.full((2, 4), 0.25))
    before = copy.deepcopy(loss_func.state_dict())
    message = re.escape("embeddings must be small enough for LpDistance in torch.float32, got values up to ")
    with pytest.raises(ValueError, match=message):
        loss_func.init_proxies(embeddings * 1e25, labels)
    with pytest.raises(ValueError, match="embeddings must be small enough"):
        loss_func.half().init_proxies(embeddings * 1e18, labels)
    for name, value in loss_func.state_dict().items():
        assert value.equal(before[name].to(value.dtype)), name


def test_embeddings_without_a_direction_are_left_out():
    embeddings, labels, centers = clusters()
    loss_func = MultiProxyEntropyLoss(3, 8, 4)
    before = copy.deepcopy(loss_func)
    embeddings = torch.cat([embeddings, torch.zeros(100, 8)])
    loss_func.init_proxies(embeddings, torch.cat([labels, torch.arange(100) % 2 + 1]))
    assert ((loss_func.proxies[:2] @ centers.mT).amax(dim=2) > 0.99).all()
    torch.testing.assert_close(loss_func.proxy_usage, torch.full((3, 4), 0.25))
    assert loss_func.proxies[2].equal(before.proxies[2])


@pytest.mark.parametrize("per_class", [1, 2, 3])
def test_opposite_samples_give_proxies_of_unit_length(per_class):
    for pairs in (1, 5):
        directions = normalize(torch.randn(pairs, 8))
        loss_func = MultiProxyEntropyLoss(1, 8, per_class)
        loss_func.init_proxies(torch.cat([directions, -directions]), torch.zeros(2 * pairs, dtype=torch.long))
        torch.testing.assert_close(loss_func.proxies.norm(dim=2), torch.ones(1, per_class))
        assert len(loss_func.proxies[0].unique(dim=0)) == per_class


def test_close_samples_far_from_the_origin_are_told_apart():
    """Squared distances of 1e-6 between vectors of length 1, whose product is exact to 1e-7."""
    centers = torch.nn.functional.pad(1e-3 * torch.eye(4), (1, 3), value=0)
    centers[:, 0] = 1
    embeddings = centers.repeat_interleave(20, dim=0) + 1e-5 * torch.randn(80, 8)
    for loss_func in (not_normalized(1), MultiProxyEntropyLoss(1, 8, 4)):
        loss_func.init_proxies(embeddings, torch.zeros(80, dtype=torch.long))
        wanted = normalize(centers) if loss_func.distance.normalize_embeddings else centers
        assert (torch.cdist(wanted, loss_func.proxies[0]).amin(dim=1) < 1e-4).all()


def test_long_work_shows_progress(capsys, monkeypatch, loss_func, batch):
    monkeypatch.setattr(_kmeans, "tqdm", lambda *args, **options: tqdm(*args, **{**options, "delay": 0}))
    loss_func.init_proxies(*batch)
    assert "k-means per class: 100%" in capsys.readouterr().err
