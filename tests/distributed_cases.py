"""What has to hold on several processes; each case runs on every rank of a group, see :mod:`ranks`."""

import copy
import inspect
import pickle
import re
import tempfile
from pathlib import Path

import pytest
import torch
from pytorch_metric_learning import distances, reducers, regularizers
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from ranks import on
from torch import distributed
from torch.distributed.checkpoint import FileSystemWriter
from torch.nn.parallel import DistributedDataParallel

from pml_multiproxy import MultiProxyEntropyLoss, functional
from pml_multiproxy.distributed import ShardedMultiProxyEntropyLoss, load_checkpoint, save_checkpoint
from pml_multiproxy.miners import MultiProxyMiner

CLASSES, SIZE, PER_CLASS = 11, 6, 3


class Model(torch.nn.Module):
    """Network and loss in one, as for DistributedDataParallel."""

    def __init__(self, loss_func):
        super().__init__()
        self.network, self.loss_func = torch.nn.Linear(5, SIZE), loss_func

    def forward(self, inputs, labels):
        return self.loss_func(self.network(inputs), labels)


def batches(steps, sizes, num_classes=CLASSES):
    """Inputs and labels of each rank, for each step."""
    generator = torch.Generator().manual_seed(7)
    for step in range(steps):
        turned = sizes[step % len(sizes) :] + sizes[: step % len(sizes)]
        inputs = [torch.randn(size, 5, dtype=torch.float64, generator=generator) for size in turned]
        labels = [torch.randint(num_classes, (size,), generator=generator) for size in turned]
        yield inputs, labels


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_same_on_all_ranks(tensor, group):
    of_ranks = [torch.empty_like(tensor) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(of_ranks, tensor.contiguous(), group=group)
    assert all(other.equal(tensor) for other in of_ranks)


def make_loss(**settings):
    return MultiProxyEntropyLoss(CLASSES, SIZE, PER_CLASS, **settings)


# Data parallel


BROADCAST_BUFFERS = "broadcast_buffers"
"""The option of DistributedDataParallel, by its name in this version of PyTorch."""
if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:
    BROADCAST_BUFFERS = "forward_sync_buffers"


@on(2, 4)
def data_parallel_is_one_process_with_the_whole_batch(group, broadcasts=True):
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    one = Model(make_loss(margin=0.1)).double()
    model = Model(make_loss(margin=0.1, usage_group=group)).double()
    model.load_state_dict(one.state_dict())
    parallel = DistributedDataParallel(model, process_group=group, **{BROADCAST_BUFFERS: broadcasts})
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (one, parallel)]
    for inputs, labels in batches(steps=60, sizes=[6] * size):
        for optimizer, loss in zip(
            optimizers,
            (one(torch.cat(inputs), torch.cat(labels)), parallel(inputs[rank], labels[rank])),
            strict=True,
        ):
            optimizer.zero_grad()
            loss.backward()
        for expected, actual in zip(one.parameters(), model.parameters(), strict=True):
            assert_close(actual.grad, expected.grad, 1e-10)
        for optimizer in optimizers:
            optimizer.step()
    assert_close(dict(model.named_parameters()), dict(one.named_parameters()), 1e-10)
    assert_close(model.loss_func.proxy_usage, one.loss_func.proxy_usage, 1e-10)
    assert not one.loss_func.proxy_usage.allclose(torch.tensor(1 / PER_CLASS))
    for tensor in (*model.parameters(), model.loss_func.proxy_usage):
        assert_same_on_all_ranks(tensor.detach(), group)


on(2, broadcasts=False)(data_parallel_is_one_process_with_the_whole_batch)


@on(2)
def without_usage_group_it_is_not(group):
    """So that the test above can fail."""
    rank = distributed.get_rank(group)
    one = Model(make_loss()).double()
    parallel = DistributedDataParallel(copy.deepcopy(one), process_group=group)
    for inputs, labels in batches(steps=2, sizes=[6, 6]):
        one.zero_grad()
        one(torch.cat(inputs), torch.cat(labels)).backward()
        parallel(inputs[rank], labels[rank]).backward()
    assert not parallel.module.loss_func.proxies.grad.allclose(one.loss_func.proxies.grad, atol=1e-4)


@on(2)
def network_and_loss_may_be_wrapped_apart(group):
    rank = distributed.get_rank(group)
    one = Model(make_loss()).double()
    model = Model(make_loss(usage_group=group)).double()
    model.load_state_dict(one.state_dict())
    network = DistributedDataParallel(model.network, process_group=group)
    loss_func = DistributedDataParallel(model.loss_func, process_group=group)
    for inputs, labels in batches(steps=3, sizes=[6, 6]):
        one.zero_grad()
        model.zero_grad()
        one(torch.cat(inputs), torch.cat(labels)).backward()
        loss_func(network(inputs[rank]), labels[rank]).backward()
        for expected, actual in zip(one.parameters(), model.parameters(), strict=True):
            assert_close(actual.grad, expected.grad, 1e-10)


@on(4)
def usage_is_that_of_all_batches(group):
    """Of different numbers of rows, and rows that are not finite; the same to the last bit on every rank."""
    rank = distributed.get_rank(group)
    one, together = make_loss(), make_loss(usage_group=group)
    together.load_state_dict(one.state_dict())
    for inputs, labels in batches(steps=5, sizes=[5, 0, 12, 1]):
        embeddings = [torch.nn.functional.pad(x.float(), (0, 1), value=0.5) for x in inputs]
        embeddings[0][:1] = float("nan")
        one(torch.cat(embeddings), torch.cat(labels))
        together(embeddings[rank], labels[rank])
        torch.testing.assert_close(together.proxy_usage, one.proxy_usage)
        assert_same_on_all_ranks(together.proxy_usage, group)
    before = together.proxy_usage.clone()
    together.eval()(embeddings[rank], labels[rank])
    assert together.proxy_usage.equal(before)


@on(2)
def usage_group_compiles_down_to_plain_equations_too(group):
    """Other distances go by plain autograd, which takes the usage from the same place."""
    rank = distributed.get_rank(group)
    one, together = (make_loss(distance=distances.LpDistance(), usage_group=g) for g in (None, group))
    together.load_state_dict(one.state_dict())
    for inputs, labels in batches(steps=2, sizes=[3, 4]):
        embeddings = [torch.nn.functional.pad(x.float(), (0, 1), value=0.5) for x in inputs]
        one(torch.cat(embeddings), torch.cat(labels))
        together(embeddings[rank], labels[rank])
        torch.testing.assert_close(together.proxy_usage, one.proxy_usage)


@on(2)
def usage_group_is_refused_where_it_cannot_work(group):
    with pytest.raises(ValueError, match=r"reseed_below must be 0 with a usage_group, got 0\.1: each process would"):
        make_loss(usage_group=group, reseed_below=0.1)
    loss_func = make_loss(usage_group=group)
    with pytest.raises(TypeError, match="process group as its usage_group cannot be pickled"):
        pickle.dumps(loss_func)
    assert copy.deepcopy(loss_func).usage_group is group
    make_loss().load_state_dict(copy.deepcopy(loss_func.state_dict()))


@on(4)
def pml_wrapper_inside_data_parallel_multiplies_the_proxies_gradient(group):
    """What the README warns of."""
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    assert size == distributed.get_world_size()  # PML's wrapper knows no other group
    one = Model(make_loss()).double().eval()
    (inputs, labels), *_ = batches(steps=1, sizes=[6] * size)
    one(torch.cat(inputs), torch.cat(labels)).backward()
    wrapped = Model(DistributedLossWrapper(make_loss())).double().eval()
    wrapped.network.load_state_dict(one.network.state_dict())
    wrapped.loss_func.loss.load_state_dict(one.loss_func.state_dict())
    parallel = DistributedDataParallel(wrapped, process_group=group)
    parallel(inputs[rank], labels[rank]).backward()
    assert_close(wrapped.network.weight.grad, one.network.weight.grad, 1e-10)
    assert_close(wrapped.loss_func.loss.proxies.grad, size * one.loss_func.proxies.grad, 1e-10)

    efficient = DistributedLossWrapper(make_loss().double(), efficient=True)
    with pytest.raises(ValueError, match="ref_emb must be None"):
        efficient(wrapped.network(inputs[rank]), labels[rank])


# Sharded

DISTANCES = {
    "cosine": distances.CosineSimilarity,
    "dot product": lambda: distances.DotProductSimilarity(normalize_embeddings=False),
    "L2": distances.LpDistance,
    "L1 squared": lambda: distances.LpDistance(p=1, power=2),
    "SNR": distances.SNRDistance,
}
UNEVEN = [5, 0, 12, 1]


def pair_of_losses(group, num_classes=CLASSES, **settings):
    """The ordinary loss and the sharded one, from the same start, in float64; a distance is given by its name."""
    settings = {"scale": 3, "temperature": 0.3, "margin": 0.1, "inter_weight": 0.4, **settings}
    distance = DISTANCES[settings.pop("distance", "cosine")]
    one = MultiProxyEntropyLoss(num_classes, SIZE, PER_CLASS, distance=distance(), **settings).double()
    sharded = ShardedMultiProxyEntropyLoss(
        num_classes, SIZE, PER_CLASS, distance=distance(), process_group=group, **settings
    ).double()
    sharded.load_state_dict(one.state_dict())
    return one, sharded


def local(tensor):
    return tensor.to_local().detach()


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
    assert_same_proxies(sharded, one)


def union(tuples, embeddings):
    """The tuple of a miner that saw all samples at once."""
    starts = torch.tensor([0, *(len(x) for x in embeddings)]).cumsum(0)
    given = [(start, indices) for start, indices in zip(starts.tolist(), tuples, strict=False) if indices is not None]
    return tuple(torch.cat([start + indices[i] for start, indices in given]) for i in range(len(given[0][1])))


@on(4, distance="cosine")
@on(4, distance="dot product")
@on(4, distance="L2")
@on(4, distance="L1 squared")
@on(4, distance="SNR")
def sharded_equals_one_process(group, distance):
    """Every pooling, all at once or some classes at a time, the last rank with fewer classes, ranks without samples."""
    for pooling in functional.POOLINGS:
        for per_chunk in (None, 2, 1):
            one, sharded = pair_of_losses(group, distance=distance, pooling=pooling, classes_per_chunk=per_chunk)
            assert len(sharded.classes) == (3 if distributed.get_rank(group) < 3 else 2)
            for embeddings, labels in rows(UNEVEN, steps=4):
                assert_same_step(one, sharded, embeddings, labels)


@on(1, 2, 4)
def sharded_trains_as_one_process(group):
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


def make_optimizer(network, loss_func):
    return torch.optim.Adam([{"params": network.parameters()}, {"params": loss_func.parameters(), "lr": 0.01}])


@on(4, tuples="on all ranks")
@on(4, tuples="on some ranks")
@on(4, tuples="all empty")
def weights_of_mined_samples(group, tuples):
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


@on(2, name="MeanReducer")
@on(2, name="SumReducer")
@on(2, name="AvgNonZeroReducer")
@on(2, name="ThresholdReducer")
@on(2, name="DivisorReducer")
@on(2, name="PerAnchorReducer")
def reducers_see_all_samples(group, name):
    reducer = reducers.ThresholdReducer(low=1) if name == "ThresholdReducer" else getattr(reducers, name)()
    one, sharded = pair_of_losses(group, reducer=reducer)
    for embeddings, labels in rows([4, 9], steps=2):
        assert_same_step(one, sharded, embeddings, labels)


@on(2)
def embedding_regularizer_gets_its_gradient_once(group):
    settings = {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.3}
    one, sharded = pair_of_losses(group, **settings)
    for embeddings, labels in rows([4, 9], steps=2):
        assert_same_step(one, sharded, embeddings, labels)


@on(4, num_classes=9, sizes=[3, 3, 3, 0])
@on(4, num_classes=5, sizes=[2, 2, 1, 0])
@on(4, num_classes=2, sizes=[1, 1, 0, 0])
@on(4, num_classes=1, sizes=[1, 0, 0, 0])
def ranks_may_hold_no_class(group, num_classes, sizes):
    for settings in ({}, {"pooling": "softmax", "classes_per_chunk": 1}, {"distance": "L2"}):
        one, sharded = pair_of_losses(group, num_classes, **settings)
        assert len(sharded.classes) == sizes[distributed.get_rank(group)]
        assert len(local(sharded.proxies)) == len(local(sharded.proxy_usage)) == len(sharded.classes)
        for embeddings, labels in rows(UNEVEN, 4, num_classes):
            assert_same_step(one, sharded, embeddings, labels)


@on(2, num_classes=CLASSES)
@on(4, num_classes=5)
def statistics_are_those_of_all_samples(group, num_classes):
    one, sharded = pair_of_losses(group, num_classes, collect_stats=True)
    for embeddings, labels in rows([4, 9, 2, 3][: distributed.get_world_size(group)], 2, num_classes):
        assert_same_step(one, sharded, embeddings, labels)
        for name in one._record_these_stats:
            assert getattr(sharded, name) == pytest.approx(getattr(one, name), rel=1e-6), name


@on(4)
def evaluation_updates_nothing(group):
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
def rows_that_are_not_finite_never_enter_the_usage(group):
    one, sharded = pair_of_losses(group)
    ((embeddings, labels),) = rows([6, 6])
    embeddings[0][1], embeddings[1][2] = float("nan"), float("inf")
    rank = distributed.get_rank(group)
    one(torch.cat(embeddings), torch.cat(labels))
    assert sharded(embeddings[rank], labels[rank]).isnan()
    assert_same_proxies(sharded, one)


@on(2)
def embeddings_of_less_precision(group):
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


@on(4, num_classes=CLASSES)
@on(4, num_classes=5)
def assignments_are_those_of_one_process(group, num_classes):
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


@on(2, num_classes=CLASSES)
@on(4, num_classes=5)
def start_by_kmeans(group, num_classes):
    _, sharded = pair_of_losses(group, num_classes)
    before = local(sharded.proxies).clone()
    embeddings, labels = torch.randn(200, SIZE), torch.arange(200) % (num_classes - 1)
    sharded.init_proxies(embeddings, labels)
    moved = (local(sharded.proxies) != before).flatten(1).any(dim=1)
    assert moved.tolist() == [c < num_classes - 1 for c in sharded.classes]
    lengths = local(sharded.proxies)[moved].norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    torch.testing.assert_close(local(sharded.proxy_usage).sum(dim=1), torch.ones(len(sharded.classes)))


@on(2, num_classes=CLASSES)
@on(4, num_classes=5)
def dead_proxies_are_moved_where_they_lie(group, num_classes):
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
def every_rank_draws_proxies_of_its_own(group):
    torch.manual_seed(distributed.get_rank(group))  # a seed of its own changes nothing
    first, second = (ShardedMultiProxyEntropyLoss(8, SIZE, PER_CLASS, process_group=group) for _ in range(2))
    everything = first.proxies.full_tensor()
    assert everything.shape == (8, PER_CLASS, SIZE)
    torch.testing.assert_close(everything.norm(dim=-1), torch.ones(8, PER_CLASS))
    assert len(everything.flatten(0, 1).unique(dim=0)) == 8 * PER_CLASS
    assert not everything.equal(second.proxies.full_tensor())
    assert sorted(first.state_dict()) == ["proxies", "proxy_usage"]


@on(2)
def settings_that_differ_are_refused_on_every_rank(group):
    rank = distributed.get_rank(group)

    def make(num_classes=8, **settings):
        return ShardedMultiProxyEntropyLoss(num_classes, SIZE, process_group=group, **settings)

    for name, values in {
        "num_classes": (8, 9),
        "scale": (10.0, 20.0),
        "pooling": ("max", "softmax"),
        "collect_stats": (False, True),
        "proxies_per_class": (3, 4),
    }.items():
        message = re.escape(f"{name} must be the same on all ranks, got {list(values)}, from rank 0 on")
        with pytest.raises(ValueError, match=message):
            make(**{name: values[rank]})
    for name, kinds in {
        "distance": (lambda: distances.LpDistance(p=1), lambda: distances.LpDistance(p=2)),
        "reducer": (reducers.MeanReducer, reducers.SumReducer),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be the same on all ranks"):
            make(**{name: kinds[rank]()})


@on(4)
def arguments_that_cannot_be_are_refused(group):
    def make(num_classes=8, **settings):
        return ShardedMultiProxyEntropyLoss(num_classes, SIZE, **{"process_group": group, **settings})

    with pytest.raises(ValueError, match="usage_group must be None for proxies that are spread over processes"):
        make(usage_group=group)
    with pytest.raises(ValueError, match="weight_regularizer must be None"):
        make(weight_regularizer=regularizers.RegularFaceRegularizer())
    with pytest.raises(TypeError, match=r"process_group must be None or a torch\.distributed\.ProcessGroup"):
        make(process_group=4)
    loss_func = make()
    with pytest.raises(TypeError, match="loss_func must hold all of its proxies in this process, got a Sharded"):
        MultiProxyMiner(loss_func)
    for make_copy in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="can be neither copied nor pickled"):
            make_copy(loss_func)
    with pytest.raises(ValueError, match="must stay on the kind of device that they were made on, cpu, got meta"):
        loss_func.to("meta")


@on(2)
def calls_that_do_not_fit_together_are_refused_on_every_rank(group):
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
def data_parallel_around_the_sharded_loss_is_refused(group):
    """By PyTorch, since the proxies are a DTensor: even where it is told not to send parameters at the start."""
    rank = distributed.get_rank(group)
    _, sharded = pair_of_losses(group, num_classes=8)
    model = Model(sharded).double()
    message = "sharding strategy|mixed torch.Tensor and DTensor"
    for wrapped in (sharded, model):
        with pytest.raises(RuntimeError, match=message):
            DistributedDataParallel(wrapped, process_group=group)
    unasked = DistributedDataParallel(model, process_group=group, init_sync=False, **{BROADCAST_BUFFERS: False})
    (inputs, labels), *_ = batches(steps=1, sizes=[6, 6], num_classes=8)
    loss = unasked(inputs[rank], labels[rank])
    with pytest.raises(RuntimeError, match=message):
        loss.backward()


# Checkpoints


def shared_folder(group):
    """A folder that all ranks see, of rank 0."""
    name = [tempfile.mkdtemp() if distributed.get_rank(group) == 0 else None]
    distributed.broadcast_object_list(name, distributed.get_global_rank(group, 0), group)
    return Path(name[0])


def make_training(group, num_classes=7, sharded=True):
    """Network and loss in one module, with an optimizer. A start of its own on each rank, which is not to matter."""
    torch.manual_seed(100 + distributed.get_rank())
    settings = {"margin": 0.1, "balance_weight": 1.0}
    network = DistributedDataParallel(torch.nn.Linear(5, SIZE).double(), process_group=group)
    if sharded:
        loss_func = ShardedMultiProxyEntropyLoss(num_classes, SIZE, PER_CLASS, process_group=group, **settings)
    else:
        loss_func = MultiProxyEntropyLoss(num_classes, SIZE, PER_CLASS, **settings)
    model = torch.nn.ModuleDict({"network": network, "loss_func": loss_func.double()})
    return model, make_optimizer(network, loss_func)


def train(group, model, optimizer, steps):
    """Some of the steps over the samples of four ranks, of which this rank has its share, in order."""
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    share = slice(rank * 4 // size, (rank + 1) * 4 // size)
    for step, (inputs, labels) in enumerate(batches(max(steps) + 1, UNEVEN, model["loss_func"].num_classes)):
        if step in steps:
            optimizer.zero_grad()
            embeddings = model["network"](torch.cat(inputs[share]))
            model["loss_func"](embeddings, torch.cat(labels[share])).backward()
            optimizer.step()


def whole_state(model):
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        for name, value in model.state_dict().items()
    }


@on(4, num_classes=7)
@on(4, num_classes=5)
def training_resumes_on_any_number_of_ranks(group, num_classes):
    folder = shared_folder(group)
    model, optimizer = make_training(group, num_classes)
    train(group, model, optimizer, range(3))
    save_checkpoint(folder, 3, model, optimizer, group)
    train(group, model, optimizer, range(3, 10))
    expected = whole_state(model)

    for size in (4, 2, 1):
        some = distributed.new_group(list(range(size)))
        if distributed.get_rank() >= size:
            continue
        for sharded in (True, False) if size == 1 else (True,):
            model, optimizer = make_training(some, num_classes, sharded)
            assert load_checkpoint(folder, model, optimizer, some) == 3
            train(some, model, optimizer, range(3, 10))
            actual = whole_state(model)
            assert list(actual) == list(expected)
            for name, value in actual.items():
                if size == 4:
                    assert value.equal(expected[name]), name
                assert_close(value, expected[name], 1e-8)
            if not sharded:  # and on
                again = folder / "ordinary"
                save_checkpoint(again, 10, model, optimizer, some)
                train(some, model, optimizer, range(10, 12))
                expected_end = whole_state(model)
                model, optimizer = make_training(some, num_classes)
                assert load_checkpoint(again, model, optimizer, some) == 10
                train(some, model, optimizer, range(10, 12))
                assert_close(whole_state(model), expected_end, 1e-8)


@on(4)
def checkpoint_that_is_not_whole_is_never_taken(group):
    folder = shared_folder(group)
    model, optimizer = make_training(group)
    assert load_checkpoint(folder, model, optimizer, group) is None
    train(group, model, optimizer, range(2))
    save_checkpoint(folder, 2, model, optimizer, group)
    expected = whole_state(model)
    train(group, model, optimizer, range(2, 3))
    cut_off(folder, 3, model, optimizer, group)
    model, optimizer = make_training(group)
    assert load_checkpoint(folder, model, optimizer, group) == 2
    assert_close(whole_state(model), expected, 0)
    # What was left of it does not stand in the way.
    save_checkpoint(folder, 3, model, optimizer, group)
    assert load_checkpoint(folder, model, optimizer, group) == 3
    with pytest.raises(FileExistsError, match="step-000000003 is there already"):
        save_checkpoint(folder, 3, model, optimizer, group)


def cut_off(folder, step, model, optimizer, group):
    """As if the disk of one rank were full: its file is not written."""
    write = FileSystemWriter.write_data

    def fail(self, *arguments):
        raise OSError("No space left on device")

    if distributed.get_rank(group) == 1:
        FileSystemWriter.write_data = fail
    try:
        with pytest.raises(RuntimeError, match=r"(?s)could not be written.*No space left on device"):
            save_checkpoint(folder, step, model, optimizer, group)
    finally:
        FileSystemWriter.write_data = write
    assert (folder / f"step-{step:09d}.partial").exists()
