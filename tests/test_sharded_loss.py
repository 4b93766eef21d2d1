"""The sharded loss against the ordinary one in one process."""

import copy
import inspect
import pickle
import re

import pytest
import torch
from cases import memory_full_of_nan
from distributed_helpers import (
    CLASSES,
    DISTANCES,
    PER_CLASS,
    SIZE,
    UNEVEN,
    Model,
    assert_close,
    batches,
    local,
    make_optimizer,
    pair_of_losses,
)
from pytorch_metric_learning import distances, reducers, regularizers
from ranks import on
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from pml_multiproxy._analytic.poolings import POOLINGS
from pml_multiproxy._data_parallel import SYNC_BUFFERS
from pml_multiproxy.distributed import ShardedMultiProxyEntropyLoss
from pml_multiproxy.miners import MultiProxyMiner


def own_slice(sharded, tensor):
    return tensor[sharded.classes.start : sharded.classes.stop].detach()


def assert_same_proxies(sharded, one, tolerance=1e-8):
    assert_close(local(sharded.proxies), own_slice(sharded, one.proxies), tolerance)
    assert_close(local(sharded.proxy_usage), own_slice(sharded, one.proxy_usage), tolerance)


def rows(sizes, steps=1, num_classes=CLASSES):
    """Embeddings and labels of each rank, for each step."""
    for inputs, labels in batches(steps, sizes, num_classes):
        yield [torch.nn.functional.pad(x, (0, 1), value=0.5) for x in inputs], labels


def assert_same_step(one, sharded, embeddings, labels, tuples=None, tolerance=1e-10):
    """Loss and gradients of one call and backward on each."""
    rank, size = distributed.get_rank(sharded._layout.ranks.group), len(embeddings)
    everything, own = torch.cat(embeddings).requires_grad_(), embeddings[rank].clone().requires_grad_()
    expected = one(everything, torch.cat(labels), tuples and union(tuples, embeddings))
    actual = sharded(own, labels[rank], tuples and tuples[rank])
    assert_close(actual, expected, tolerance)
    one.zero_grad()
    sharded.zero_grad()
    expected.backward()
    actual.backward()
    assert_close(own.grad, size * everything.grad.split([len(x) for x in embeddings])[rank], tolerance)
    assert_close(local(sharded.proxies.grad), own_slice(sharded, one.proxies.grad), tolerance)
    for of_rank, of_one in zip(sharded.distance.parameters(), one.distance.parameters(), strict=True):
        assert_close(of_rank.grad, of_one.grad, tolerance)
    assert_same_proxies(sharded, one)


def union(tuples, embeddings):
    """The tuple of a miner that saw all samples at once."""
    starts = torch.tensor([0, *(len(x) for x in embeddings)]).cumsum(0)
    given = [(start, indices) for start, indices in zip(starts.tolist(), tuples, strict=False) if indices is not None]
    return tuple(torch.cat([start + indices[i] for start, indices in given]) for i in range(len(given[0][1])))


@on(4)
@pytest.mark.parametrize("distance", DISTANCES)
def test_sharded_equals_one_process(group, distance):
    """Every pooling, all at once or some classes at a time, the last rank with fewer classes, ranks without samples."""
    for pooling in POOLINGS:
        for per_chunk in (None, 2, 1):
            one, sharded = pair_of_losses(group, distance=distance, pooling=pooling, classes_per_chunk=per_chunk)
            assert len(sharded.classes) == (3 if distributed.get_rank(group) < 3 else 2)
            for embeddings, labels in rows(UNEVEN, steps=4):
                assert_same_step(one, sharded, embeddings, labels)


@on(2)
@pytest.mark.parametrize("settings", [{}, {"classes_per_chunk": 1}, {"distance": "L2"}])
def test_proxies_of_any_strides(group, settings):
    one, sharded = pair_of_losses(group, **settings)
    strange = local(sharded.proxies).transpose(0, 1).contiguous().transpose(0, 1)
    assert not strange.is_contiguous()
    sharded.proxies = torch.nn.Parameter(sharded._layout.sharded(strange))
    assert not local(sharded.proxies).is_contiguous()
    for embeddings, labels in rows([4, 9], steps=2):
        with memory_full_of_nan():
            assert_same_step(one, sharded, embeddings, labels)


@on(1, 4)
@pytest.mark.parametrize("settings", [{}, {"distance": "learned", "classes_per_chunk": 1}, {"collect_stats": True}])
@pytest.mark.parametrize("views", [2, 3])
def test_views_lie_on_the_same_rank(group, views, settings):
    """The loss of one process whose batch holds the first views of all ranks, then the second ones, and so on."""
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    one, sharded = pair_of_losses(group, views=views, **settings)
    for of_samples, labels in rows(UNEVEN[-size:], steps=3):
        of_views = [[x + 0.1 * view * x.flip(1) for x in of_samples] for view in range(views)]
        everything = torch.cat([torch.cat(of_ranks) for of_ranks in of_views]).requires_grad_()
        own = torch.cat([of_ranks[rank] for of_ranks in of_views]).requires_grad_()
        expected = one(everything, torch.cat(labels).repeat(views))
        actual = sharded(own, labels[rank].repeat(views))
        assert_close(actual, expected, 1e-10)
        one.zero_grad()
        sharded.zero_grad()
        expected.backward()
        actual.backward()
        by_view = everything.grad.split([len(y) for _ in range(views) for y in labels])
        assert_close(own.grad, size * torch.cat(by_view[rank::size]), 1e-10)
        assert_close(local(sharded.proxies.grad), own_slice(sharded, one.proxies.grad), 1e-10)
        assert_same_proxies(sharded, one)
        if "collect_stats" in settings:
            for name in one._record_these_stats:
                assert getattr(sharded, name) == pytest.approx(getattr(one, name), rel=1e-6), name


@on(1, 2, 4)
def test_sharded_trains_as_one_process(group):
    """Under DistributedDataParallel around the network, over many steps of Adam."""
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    one, sharded = pair_of_losses(group, num_classes=7)
    one_network, network = torch.nn.Linear(5, SIZE).double(), torch.nn.Linear(5, SIZE).double()
    network.load_state_dict(one_network.state_dict())
    parallel = DistributedDataParallel(network, process_group=group)
    optimizers = [make_optimizer(one_network, one), make_optimizer(network, sharded)]
    for inputs, labels in batches(60, UNEVEN[:size], num_classes=7):
        expected = one(one_network(torch.cat(inputs)), torch.cat(labels))
        actual = sharded(parallel(inputs[rank]), labels[rank])
        assert_close(actual, expected, 1e-8)
        for optimizer, loss in zip(optimizers, (expected, actual), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_close(network.weight.grad, one_network.weight.grad, 1e-8)
    assert_close(network.state_dict(), one_network.state_dict(), 1e-8)
    assert_same_proxies(sharded, one)
    assert not one.proxy_usage.allclose(torch.tensor(1 / PER_CLASS))


@on(4)
@pytest.mark.parametrize("tuples", ["on all ranks", "on some ranks", "all empty"])
def test_weights_of_mined_samples(group, tuples):
    def mined(rank, size):
        empty = torch.tensor([], dtype=torch.long)
        if tuples == "all empty" or size == 0:
            return (empty,) * 3
        if tuples == "on some ranks" and rank % 2:
            return None
        return tuple(torch.randint(size, (2 + rank,)) for _ in range(3))

    one, sharded = pair_of_losses(group)
    for embeddings, labels in rows(UNEVEN, steps=3):
        indices = [mined(rank, len(x)) for rank, x in enumerate(embeddings)]
        assert_same_step(one, sharded, embeddings, labels, indices)


@on(2)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
def test_indices_of_mined_samples_of_any_integer_dtype(group, dtype):
    one, sharded = pair_of_losses(group)
    for embeddings, labels in rows([4, 9]):
        none_at_all = (torch.tensor([]),) * 3
        assert_same_step(one, sharded, embeddings, labels, [none_at_all, none_at_all])
        tuples = [tuple(torch.tensor(i, dtype=dtype) for i in ([0, 1], [2, 1], [3, 0])) for _ in embeddings]
        assert_same_step(one, sharded, embeddings, labels, tuples)


@on(2)
@pytest.mark.parametrize(
    "name",
    ["MeanReducer", "SumReducer", "AvgNonZeroReducer", "ThresholdReducer", "DivisorReducer", "PerAnchorReducer"],
)
def test_reducers_see_all_samples(group, name):
    reducer = reducers.ThresholdReducer(low=1) if name == "ThresholdReducer" else getattr(reducers, name)()
    one, sharded = pair_of_losses(group, reducer=reducer)
    for embeddings, labels in rows([4, 9], steps=2):
        assert_same_step(one, sharded, embeddings, labels)


@on(2)
def test_embedding_regularizer_gets_its_gradient_once(group):
    settings = {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.3}
    one, sharded = pair_of_losses(group, **settings)
    for embeddings, labels in rows([4, 9], steps=2):
        assert_same_step(one, sharded, embeddings, labels)


@on(4)
@pytest.mark.parametrize(
    ("num_classes", "sizes"), [(9, [3, 3, 3, 0]), (5, [2, 2, 1, 0]), (2, [1, 1, 0, 0]), (1, [1, 0, 0, 0])]
)
def test_ranks_may_hold_no_class(group, num_classes, sizes):
    for settings in ({}, {"pooling": "softmax", "classes_per_chunk": 1}, {"distance": "L2"}):
        one, sharded = pair_of_losses(group, num_classes, **settings)
        assert len(sharded.classes) == sizes[distributed.get_rank(group)]
        assert len(local(sharded.proxies)) == len(local(sharded.proxy_usage)) == len(sharded.classes)
        for embeddings, labels in rows(UNEVEN, 4, num_classes):
            assert_same_step(one, sharded, embeddings, labels)


@on()
@pytest.mark.parametrize(("size", "num_classes"), [(2, CLASSES), (4, 5)])
def test_statistics_are_those_of_all_samples(group, num_classes):
    one, sharded = pair_of_losses(group, num_classes, collect_stats=True)
    for embeddings, labels in rows([4, 9, 2, 3][: distributed.get_world_size(group)], 2, num_classes):
        assert_same_step(one, sharded, embeddings, labels)
        for name in one._record_these_stats:
            assert getattr(sharded, name) == pytest.approx(getattr(one, name), rel=1e-6), name


@on(4)
def test_evaluation_updates_nothing(group):
    one, sharded = pair_of_losses(group)
    one.eval(), sharded.eval()
    ((embeddings, labels),) = rows(UNEVEN)
    assert_same_step(one, sharded, embeddings, labels)
    assert local(sharded.proxy_usage).allclose(torch.tensor(1 / PER_CLASS))
    with torch.no_grad():
        rank = distributed.get_rank(group)
        assert_close(
            sharded(embeddings[rank], labels[rank]), one(torch.cat(embeddings), torch.cat(labels)).detach(), 1e-10
        )


@on(2)
def test_rows_that_are_not_finite_never_enter_the_usage(group):
    one, sharded = pair_of_losses(group)
    ((embeddings, labels),) = rows([6, 6])
    embeddings[0][1], embeddings[1][2] = float("nan"), float("inf")
    rank = distributed.get_rank(group)
    one(torch.cat(embeddings), torch.cat(labels))
    assert sharded(embeddings[rank], labels[rank]).isnan()
    assert_same_proxies(sharded, one)


@on(2)
def test_embeddings_of_less_precision(group):
    """Are sent as they are; what is summed over the ranks is not rounded to them."""
    rank = distributed.get_rank(group)
    one, sharded = pair_of_losses(group)
    one.float(), sharded.float()
    ((embeddings, labels),) = rows([4, 9])
    embeddings = [x.bfloat16() for x in embeddings]
    everything, own = torch.cat(embeddings).requires_grad_(), embeddings[rank].clone().requires_grad_()
    one(everything, torch.cat(labels)).backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sharded(own, labels[rank])
    loss.backward()
    assert loss.dtype == torch.float32
    assert own.grad.dtype == torch.bfloat16
    torch.testing.assert_close(own.grad, 2 * everything.grad.split([4, 9])[rank], rtol=0.1, atol=0.01)


@on(4)
@pytest.mark.parametrize("num_classes", [CLASSES, 5])
def test_assignments_are_those_of_one_process(group, num_classes):
    one, sharded = pair_of_losses(group, num_classes)
    ((embeddings, labels),) = rows(UNEVEN, 1, num_classes)
    rank = distributed.get_rank(group)
    for given in (None, labels[rank]):
        for actual, expected in zip(
            sharded.assign(embeddings[rank], given), one.assign(embeddings[rank], given), strict=True
        ):
            assert actual.equal(expected)
    logits = one.get_logits(embeddings[rank])[:, sharded.classes.start : sharded.classes.stop]
    assert_close(sharded.get_logits(embeddings[rank]), logits, 1e-12)


@on()
@pytest.mark.parametrize(("size", "num_classes"), [(2, CLASSES), (4, 5)])
def test_start_by_kmeans(group, num_classes):
    _, sharded = pair_of_losses(group, num_classes)
    before = local(sharded.proxies).clone()
    embeddings, labels = torch.randn(200, SIZE), torch.arange(200) % (num_classes - 1)
    sharded.init_proxies(embeddings, labels)
    moved = (local(sharded.proxies) != before).flatten(1).any(dim=1)
    assert moved.tolist() == [c < num_classes - 1 for c in sharded.classes]
    lengths = local(sharded.proxies)[moved].norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    torch.testing.assert_close(local(sharded.proxy_usage).sum(dim=1), torch.ones(len(sharded.classes)))


@on()
@pytest.mark.parametrize(("size", "num_classes"), [(2, CLASSES), (4, 5)])
def test_dead_proxies_are_moved_where_they_lie(group, num_classes):
    _, sharded = pair_of_losses(group, num_classes, reseed_below=0.1)
    usage = local(sharded.proxy_usage)
    usage.copy_(torch.tensor([0.6, 0.4, 0.0]))
    dead = local(sharded.proxies)[:, 2].clone()
    everything = torch.randn(2 * num_classes, SIZE, dtype=torch.float64)
    labels = torch.arange(2 * num_classes) % num_classes
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    sharded(everything[rank::size], labels[rank::size])
    assert not (local(sharded.proxies)[:, 2] == dead).any()
    points = torch.nn.functional.normalize(everything)
    for c, proxy in zip(sharded.classes, local(sharded.proxies)[:, 2], strict=True):
        assert min((proxy - point).abs().max() for point in points[labels == c]) < 1e-12


@on(4)
def test_every_rank_draws_proxies_of_its_own(group):
    torch.manual_seed(distributed.get_rank(group))  # a seed of its own changes nothing
    first, second = (ShardedMultiProxyEntropyLoss(8, SIZE, PER_CLASS, process_group=group) for _ in range(2))
    everything = first.proxies.full_tensor()
    assert everything.shape == (8, PER_CLASS, SIZE)
    torch.testing.assert_close(everything.norm(dim=-1), torch.ones(8, PER_CLASS))
    assert len(everything.flatten(0, 1).unique(dim=0)) == 8 * PER_CLASS
    assert not everything.equal(second.proxies.full_tensor())
    assert sorted(first.state_dict()) == ["proxies", "proxy_usage"]


@on(2)
def test_settings_that_differ_are_refused_on_every_rank(group):
    rank = distributed.get_rank(group)

    def make(num_classes=8, **settings):
        return ShardedMultiProxyEntropyLoss(num_classes, SIZE, process_group=group, **settings)

    for name, values in {
        "num_classes": (8, 9),
        "scale": (10.0, 20.0),
        "pooling": ("max", "softmax"),
        "collect_stats": (False, True),
        "proxies_per_class": (3, 4),
        "embedding_reg_weight": (1.0, 0.5),
    }.items():
        message = re.escape(f"{name} must be the same on all ranks, got {list(values)}, from rank 0 on")
        with pytest.raises(ValueError, match=message):
            make(embedding_regularizer=regularizers.LpRegularizer(), **{name: values[rank]})
    for name, kinds in {
        "distance": (lambda: distances.LpDistance(p=1), lambda: distances.LpDistance(p=2)),
        "reducer": (reducers.MeanReducer, reducers.SumReducer),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be the same on all ranks"):
            make(**{name: kinds[rank]()})


@on(4)
def test_arguments_that_cannot_be_are_refused(group):
    def make(num_classes=8, **settings):
        return ShardedMultiProxyEntropyLoss(num_classes, SIZE, **{"process_group": group, **settings})

    with pytest.raises(ValueError, match="usage_group must be None for proxies that are spread over processes"):
        make(usage_group=group)
    with pytest.raises(ValueError, match="weight_regularizer must be None"):
        make(weight_regularizer=regularizers.RegularFaceRegularizer())
    with pytest.raises(TypeError, match=r"process_group must be None or a torch\.distributed\.ProcessGroup"):
        make(process_group=4)
    loss_func = make()
    with pytest.raises(TypeError, match="loss_func must be a MultiProxyEntropyLoss, got Sharded"):
        MultiProxyMiner(loss_func)
    for make_copy in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="can be neither copied nor pickled"):
            make_copy(loss_func)
    with pytest.raises(ValueError, match="must stay on the kind of device that they were made on, cpu, got meta"):
        loss_func.to("meta")


@on(2)
def test_calls_that_do_not_fit_together_are_refused_on_every_rank(group):
    rank = distributed.get_rank(group)
    _, sharded = pair_of_losses(group)
    embeddings, labels = torch.randn(4, SIZE), torch.arange(4)
    with pytest.raises(ValueError, match="the dtype of the embeddings must be the same on all ranks"):
        sharded(embeddings.double() if rank else embeddings, labels)
    with pytest.raises(ValueError, match="requires_grad of the embeddings must be the same on all ranks"):
        sharded(embeddings.clone().requires_grad_(bool(rank)), labels)
    sharded.train(bool(rank))
    with pytest.raises(ValueError, match="training with gradients enabled must be the same on all ranks"):
        sharded(embeddings, labels)


@on(2)
def test_data_parallel_around_the_sharded_loss_is_refused(group):
    """By PyTorch, since the proxies are a DTensor: even where it is told not to send parameters at the start."""
    rank = distributed.get_rank(group)
    _, sharded = pair_of_losses(group, num_classes=8)
    model = Model(sharded).double()
    message = "sharding strategy|mixed torch.Tensor and DTensor|found no DeviceMesh"  # the last: torch 2.5
    for wrapped in (sharded, model):
        with pytest.raises((RuntimeError, AssertionError), match=message):
            DistributedDataParallel(wrapped, process_group=group)
    if "init_sync" not in inspect.signature(DistributedDataParallel).parameters:  # as in torch 2.5
        return
    unasked = DistributedDataParallel(model, process_group=group, init_sync=False, **{SYNC_BUFFERS: False})
    (inputs, labels), *_ = batches(steps=1, sizes=[6, 6], num_classes=8)
    loss = unasked(inputs[rank], labels[rank])
    with pytest.raises(RuntimeError, match=message):
        loss.backward()
