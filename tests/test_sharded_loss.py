"""The sharded loss against the ordinary one in one process."""

import copy
import pickle
import re

import pytest
import torch
from distributed_helpers import (
    PER_CLASS,
    SIZE,
    UNEVEN,
    Model,
    assert_close,
    batches,
    local,
    pair_of_losses,
)
from pytorch_metric_learning import distances, reducers, regularizers
from ranks import on
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from pml_multiproxy._analytic.poolings import POOLINGS
from pml_multiproxy.distributed import ShardedMultiProxyEntropyLoss
from pml_multiproxy.miners import MultiProxyMiner


def rows(loss_func, sizes, steps=1):
    """Embeddings and labels of each rank, for each step; the views of a sample differ."""
    views = range(loss_func.views)
    for inputs, labels in batches(steps, sizes, loss_func.num_classes):
        samples = [torch.nn.functional.pad(x, (0, 1), value=0.5) for x in inputs]
        embeddings = [torch.cat([x + 0.1 * view * x.flip(1) for view in views]) for x in samples]
        yield embeddings, [y.repeat(len(views)) for y in labels]


def by_view(of_ranks, views):
    """The batch of one process: the first views of all ranks, then the second ones, and so on."""
    return torch.cat([x.tensor_split(views)[view] for view in range(views) for x in of_ranks])


def own_slice(sharded, tensor):
    return tensor[sharded.classes.start : sharded.classes.stop].detach()


def assert_same_proxies(sharded, one, tolerance=1e-8):
    assert_close(local(sharded.proxies), own_slice(sharded, one.proxies), tolerance)
    assert_close(local(sharded.proxy_usage), own_slice(sharded, one.proxy_usage), tolerance)


def assert_same_step(one, sharded, embeddings, labels, tuples=None, tolerance=1e-10):
    """Loss, gradients, usage and statistics of one call and backward on each."""
    rank, size, views = sharded.proxies.device_mesh.get_local_rank(), len(embeddings), one.views
    of_one, own = [x.clone().requires_grad_() for x in embeddings], embeddings[rank].clone().requires_grad_()
    expected = one(by_view(of_one, views), by_view(labels, views), tuples and union(tuples, embeddings))
    actual = sharded(own, labels[rank], tuples and tuples[rank])
    assert_close(actual, expected, tolerance)
    for loss_func, loss in ((one, expected), (sharded, actual)):
        loss_func.zero_grad()
        loss.backward()
    assert_close(own.grad, size * of_one[rank].grad, tolerance)
    assert_close(local(sharded.proxies.grad), own_slice(sharded, one.proxies.grad), tolerance)
    for of_rank, parameter in zip(sharded.distance.parameters(), one.distance.parameters(), strict=True):
        assert_close(of_rank.grad, parameter.grad, tolerance)
    assert_same_proxies(sharded, one)
    for name in one._record_these_stats if one.collect_stats else []:
        assert getattr(sharded, name) == pytest.approx(getattr(one, name), rel=1e-6), name


def union(tuples, embeddings):
    """The tuple of a miner that saw all samples at once."""
    starts = torch.tensor([0, *(len(x) for x in embeddings)]).cumsum(0)
    given = [(start, indices) for start, indices in zip(starts.tolist(), tuples, strict=False) if indices is not None]
    return tuple(torch.cat([start + indices[i] for start, indices in given]) for i in range(len(given[0][1])))


@on(4)
@pytest.mark.parametrize(
    "distance",
    ["cosine", "dot product", "L2", *(pytest.param(of, marks=pytest.mark.slow) for of in ("L1 squared", "SNR"))],
)
def test_sharded_equals_one_process(group, distance):
    """Every pooling, all classes at once or some at a time, ranks with fewer classes or none, ranks without samples."""
    for num_classes, sizes, per_chunk in ((11, [3, 3, 3, 2], None), (9, [3, 3, 3, 0], 2), (1, [1, 0, 0, 0], 1)):
        for pooling in POOLINGS:
            settings = {"pooling": pooling, "classes_per_chunk": per_chunk, "collect_stats": True}
            one, sharded = pair_of_losses(group, num_classes, distance=distance, **settings)
            assert len(sharded.classes) == len(local(sharded.proxy_usage)) == sizes[distributed.get_rank(group)]
            for embeddings, labels in rows(one, UNEVEN, steps=2):
                assert_same_step(one, sharded, embeddings, labels)


@on(4)
@pytest.mark.parametrize("kind", ["views", "one view", "threshold", "divisor", "regularizer", "evaluation"])
def test_settings_of_the_ordinary_loss(group, kind):
    """Views of a sample lie on the same rank; the reducer and the regularizer see the samples of all ranks."""
    settings = {
        "views": {"views": 2, "collect_stats": True},
        "one view": {"neighbor_weight": 0.5, "distance": "L2", "classes_per_chunk": 1},
        "threshold": {"reducer": reducers.ThresholdReducer(low=1)},
        "divisor": {"reducer": reducers.DivisorReducer()},
        "regularizer": {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.3},
    }
    one, sharded = pair_of_losses(group, **settings.get(kind, {}))
    one.train(kind != "evaluation"), sharded.train(kind != "evaluation")
    for embeddings, labels in rows(one, UNEVEN, steps=2):
        assert_same_step(one, sharded, embeddings, labels)


@on(2)
def test_sharded_trains_as_one_process(group):
    """Under DistributedDataParallel around the network, over many steps of Adam."""
    rank = distributed.get_rank(group)
    one, sharded = (Model(loss_func).double() for loss_func in pair_of_losses(group, num_classes=7))
    sharded.network.load_state_dict(one.network.state_dict())
    parallel = DistributedDataParallel(sharded.network, process_group=group)
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in (one, sharded)]
    for inputs, labels in batches(20, [5, 12], num_classes=7):
        expected = one(torch.cat(inputs), torch.cat(labels))
        actual = sharded.loss_func(parallel(inputs[rank]), labels[rank])
        assert_close(actual, expected, 1e-8)
        for optimizer, loss in zip(optimizers, (expected, actual), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_close(sharded.network.weight.grad, one.network.weight.grad, 1e-8)
    assert_same_proxies(sharded.loss_func, one.loss_func)
    assert not one.loss_func.proxy_usage.allclose(torch.tensor(1 / PER_CLASS))


@on(4)
@pytest.mark.parametrize("tuples", ["on all ranks", "on some ranks", "all empty"])
def test_weights_of_mined_samples(group, tuples):
    def mined(rank, size):
        if tuples == "all empty":
            return (torch.tensor([]),) * 3
        if tuples == "on some ranks" and rank % 2:
            return None
        return torch.randint(max(size, 1), (3, (2 + rank) * (size > 0)), dtype=torch.int32).unbind()

    one, sharded = pair_of_losses(group)
    for embeddings, labels in rows(one, UNEVEN, steps=3):
        indices = [mined(rank, len(x)) for rank, x in enumerate(embeddings)]
        assert_same_step(one, sharded, embeddings, labels, indices)


@on(2)
def test_rows_that_are_not_finite_never_enter_the_usage(group):
    one, sharded = pair_of_losses(group)
    ((embeddings, labels),) = rows(one, [6, 6])
    embeddings[0][1], embeddings[1][2] = float("nan"), float("inf")
    rank = distributed.get_rank(group)
    one(torch.cat(embeddings), torch.cat(labels))
    assert sharded(embeddings[rank], labels[rank]).isnan()
    assert_same_proxies(sharded, one)


@on(2)
def test_embeddings_of_less_precision(group):
    """Are sent as they are; sums over the ranks are not rounded to them."""
    rank = distributed.get_rank(group)
    one, sharded = (loss_func.float() for loss_func in pair_of_losses(group))
    ((embeddings, labels),) = rows(one, [4, 9])
    of_one, own = ([x.bfloat16().requires_grad_() for x in embeddings] for _ in range(2))
    one(torch.cat(of_one), torch.cat(labels)).backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sharded(own[rank], labels[rank])
    loss.backward()
    torch.testing.assert_close(own[rank].grad, 2 * of_one[rank].grad, rtol=0.1, atol=0.01)


@on(4)
def test_assignments_are_those_of_one_process(group):
    one, sharded = pair_of_losses(group, num_classes=5)
    ((embeddings, labels),) = rows(one, UNEVEN)
    own, own_labels = embeddings[distributed.get_rank(group)], labels[distributed.get_rank(group)]
    for given in (None, own_labels):
        assert_close(sharded.assign(own, given), one.assign(own, given), 0)
    assert_close(sharded.get_logits(own).T, own_slice(sharded, one.get_logits(own).T), 1e-12)


@on(4)
def test_start_by_kmeans(group):
    """Of the classes that have samples; each rank takes those of its own classes."""
    _, sharded = pair_of_losses(group, num_classes=5)
    before = local(sharded.proxies).clone()
    sharded.init_proxies(torch.randn(200, SIZE), torch.arange(200) % 4)
    moved = (local(sharded.proxies) != before).flatten(1).any(dim=1)
    assert moved.tolist() == [c < 4 for c in sharded.classes]
    assert local(sharded.proxies).norm(dim=-1)[moved].allclose(torch.ones(()).double())
    assert local(sharded.proxy_usage).sum(dim=1).allclose(torch.ones(()))


@on(4)
def test_every_rank_draws_proxies_of_its_own(group):
    torch.manual_seed(distributed.get_rank(group))  # a seed of its own changes nothing
    first, second = (ShardedMultiProxyEntropyLoss(8, SIZE, PER_CLASS, process_group=group) for _ in range(2))
    everything = first.proxies.full_tensor()
    torch.testing.assert_close(everything.norm(dim=-1), torch.ones(8, PER_CLASS))
    assert len(everything.flatten(0, 1).unique(dim=0)) == 8 * PER_CLASS
    assert not everything.equal(second.proxies.full_tensor())
    assert sorted(first.state_dict()) == ["proxies", "proxy_usage"]


@on(2)
@pytest.mark.parametrize("name", ["scale", "embedding_reg_weight", "distance"])
def test_settings_that_differ_are_refused_on_every_rank(group, name):
    values = [distances.LpDistance(p=p) for p in (1, 2)] if name == "distance" else [1.0, 0.5]
    settings = {"embedding_regularizer": regularizers.LpRegularizer(), name: values[distributed.get_rank(group)]}
    got = "" if name == "distance" else re.escape(f", got {values}, from rank 0 on")
    with pytest.raises(ValueError, match=f"{name} must be the same on all ranks{got}"):
        ShardedMultiProxyEntropyLoss(8, SIZE, process_group=group, **settings)


@on(4)
def test_arguments_that_cannot_be_are_refused(group):
    for settings, error, message in [
        ({"usage_group": group}, ValueError, "usage_group must be None for proxies that are spread over processes"),
        ({"weight_regularizer": regularizers.RegularFaceRegularizer()}, ValueError, "weight_regularizer must be None"),
        ({"process_group": 4}, TypeError, r"process_group must be None or a ProcessGroup"),
    ]:
        with pytest.raises(error, match=message):
            ShardedMultiProxyEntropyLoss(8, SIZE, **{"process_group": group, **settings})
    loss_func = ShardedMultiProxyEntropyLoss(8, SIZE, process_group=group)
    for needs_all in (
        lambda: MultiProxyMiner(loss_func),
        lambda: loss_func.soft_assign(torch.randn(1, SIZE), torch.zeros(1).long()),
        lambda: loss_func.get_outliers(torch.randn(1, SIZE), torch.zeros(1).long()),
        lambda: loss_func.save("loss.pt"),
    ):
        with pytest.raises(ValueError, match="all classes"):
            needs_all()
    for make_copy in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="neither copied nor pickled"):
            make_copy(loss_func)
    with pytest.raises(ValueError, match="must stay on the kind of device that they were made on, cpu, got meta"):
        loss_func.to("meta")


@on(2)
def test_calls_that_do_not_fit_together_are_refused_on_every_rank(group):
    rank = distributed.get_rank(group)
    _, sharded = pair_of_losses(group)
    embeddings = torch.randn(4, SIZE)
    for name, of_ranks, training in [
        ("the dtype of the embeddings", (embeddings, embeddings.double()), True),
        ("requires_grad of the embeddings", (embeddings, embeddings.clone().requires_grad_()), True),
        ("training with gradients enabled", (embeddings, embeddings), bool(rank)),
    ]:
        sharded.train(training)
        with pytest.raises(ValueError, match=f"{name} must be the same on all ranks"):
            sharded(of_ranks[rank], torch.arange(4))


@on(2)
def test_data_parallel_around_the_sharded_loss_is_refused(group):
    """By PyTorch, since the proxies are a DTensor."""
    _, sharded = pair_of_losses(group, num_classes=8)
    message = "sharding strategy|mixed torch.Tensor and DTensor|found no DeviceMesh"  # the last: torch 2.5
    with pytest.raises((RuntimeError, AssertionError), match=message):
        DistributedDataParallel(Model(sharded).double(), process_group=group)
