"""The ordinary loss with DistributedDataParallel."""

import copy
import pickle

import pytest
import torch
from distributed_helpers import CLASSES, PER_CLASS, SIZE, Model, assert_close, batches
from pytorch_metric_learning import distances
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from ranks import on
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from pml_multiproxy import MultiProxyEntropyLoss


def assert_same_on_all_ranks(tensor, group):
    of_ranks = [torch.empty_like(tensor) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(of_ranks, tensor.contiguous(), group=group)
    assert all(other.equal(tensor) for other in of_ranks)


def make_loss(**settings):
    return MultiProxyEntropyLoss(CLASSES, SIZE, PER_CLASS, **settings)


def pair_of_models(group, margin=0.0):
    """Of one process, and of this rank."""
    one, model = (Model(make_loss(margin=margin, usage_group=g)).double() for g in (None, group))
    model.load_state_dict(one.state_dict())
    return one, model


def assert_same_gradients(model, one):
    for actual, expected in zip(model.parameters(), one.parameters(), strict=True):
        assert_close(actual.grad, expected.grad, 1e-10)


@on(4)
def test_data_parallel_is_one_process_with_the_whole_batch(group):
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    one, model = pair_of_models(group, margin=0.1)
    parallel = DistributedDataParallel(model, process_group=group)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (one, parallel)]
    for inputs, labels in batches(steps=20, sizes=[6] * size):
        losses = one(torch.cat(inputs), torch.cat(labels)), parallel(inputs[rank], labels[rank])
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
        assert_same_gradients(model, one)
        for optimizer in optimizers:
            optimizer.step()
    assert_close(dict(model.named_parameters()), dict(one.named_parameters()), 1e-10)
    assert_close(model.loss_func.proxy_usage, one.loss_func.proxy_usage, 1e-10)
    assert not one.loss_func.proxy_usage.allclose(torch.tensor(1 / PER_CLASS))
    for tensor in (*model.parameters(), model.loss_func.proxy_usage):
        assert_same_on_all_ranks(tensor.detach(), group)


@on(2)
def test_network_and_loss_may_be_wrapped_apart(group):
    rank = distributed.get_rank(group)
    one, model = pair_of_models(group)
    network, loss_func = (DistributedDataParallel(m, process_group=group) for m in (model.network, model.loss_func))
    for inputs, labels in batches(steps=3, sizes=[6, 6]):
        one.zero_grad(), model.zero_grad()
        one(torch.cat(inputs), torch.cat(labels)).backward()
        loss_func(network(inputs[rank]), labels[rank]).backward()
        assert_same_gradients(model, one)


@on(4)
@pytest.mark.parametrize("distance", [distances.CosineSimilarity, distances.LpDistance])
def test_usage_is_that_of_all_batches(group, distance):
    """Of different numbers of rows, and rows that are not finite; the same to the last bit on every rank.

    By the analytic gradient and by autograd, and not in evaluation.
    """
    rank = distributed.get_rank(group)
    one, together = (make_loss(distance=distance(), usage_group=g) for g in (None, group))
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
def test_initial_proxies_are_those_of_the_first_process(group):
    torch.manual_seed(distributed.get_rank(group))  # other samples and another k-means on each
    embeddings, labels = torch.randn(60, SIZE), torch.arange(60) % CLASSES
    loss_func = make_loss(usage_group=group)
    loss_func.init_proxies(embeddings, labels)
    assert_same_on_all_ranks(loss_func.proxies.detach(), group)
    assert_same_on_all_ranks(loss_func.proxy_usage, group)
    with pytest.raises(ValueError, match='with usage_group="world", every process calls it'):
        make_loss().init_proxies(embeddings, labels)


@on(2)
def test_rank_without_samples_adds_nothing(group):
    """Its loss is zero, and so is its gradient; DistributedDataParallel divides by the number of ranks as ever."""
    rank = distributed.get_rank(group)
    one, model = pair_of_models(group)
    parallel = DistributedDataParallel(model, process_group=group)
    for inputs, labels in batches(steps=2, sizes=[6, 0]):
        one.zero_grad(), model.zero_grad()
        (one(torch.cat(inputs), torch.cat(labels)) / 2).backward()
        loss = parallel(inputs[rank], labels[rank])
        loss.backward()
        assert len(inputs[rank]) or loss == 0
        assert_same_gradients(model, one)
        assert_close(model.loss_func.proxy_usage, one.loss_func.proxy_usage, 1e-6)


@on(2)
def test_process_group_is_neither_copied_nor_pickled(group):
    loss_func = make_loss(usage_group=group)
    for make_copy in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="ProcessGroup"):
            make_copy(loss_func)
    assert copy.deepcopy(make_loss(usage_group="world")).usage_group == "world"
    make_loss().load_state_dict(copy.deepcopy(loss_func.state_dict()))


@on(4)
def test_pml_wrapper_inside_data_parallel_multiplies_the_proxies_gradient(group):
    """As docs/training.md warns."""
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
