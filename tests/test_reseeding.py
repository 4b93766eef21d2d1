"""Dead proxies move onto samples of their class, and nothing else moves."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning import distances
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy._reseeding import reseed_

BELOW = 0.1
"""Of an even share of four proxies: dead below 0.025."""


@pytest.fixture
def loss_func():
    """Classes with no dead proxy, with one, and with three."""
    loss_func = MultiProxyEntropyLoss(3, 8, 4, reseed_below=BELOW, usage_momentum=1.0)
    usage = [[0.25, 0.25, 0.25, 0.25], [0.5, 0.026, 0.474, 0.0], [0.01, 0.98, 0.0, 0.01]]
    loss_func.proxy_usage.copy_(torch.tensor(usage))
    return loss_func


def which(samples, proxy):
    """The numbers of the samples whose direction is that of the proxy."""
    return (normalize(samples.detach()) @ proxy.detach() > 1 - 1e-6).nonzero().flatten().tolist()


def moved(before, after):
    """Of each class, the proxies that moved."""
    return [set(row.nonzero().flatten().tolist()) for row in (before.proxies != after.proxies).any(dim=2)]


def test_moves_one_dead_proxy_of_each_class_onto_a_sample_of_it(loss_func, batch):
    embeddings, labels = batch
    before = copy.deepcopy(loss_func)
    loss_func(embeddings, labels)
    none, one, another = moved(before, loss_func)
    assert (none, one) == (set(), {3})
    assert len(another) == 1
    assert another < {0, 2, 3}
    for c, (k,) in ((1, one), (2, another)):
        assert len(which(embeddings[labels == c], loss_func.proxies[c, k])) == 1
        torch.testing.assert_close(loss_func.proxies[c, k].norm(), torch.tensor(1.0))
        expected = 0.75 * before.proxy_usage[c] + 0.25 * (torch.arange(4) == k)
        torch.testing.assert_close(loss_func.proxy_usage[c], expected)
    assert loss_func.proxy_usage[0].equal(before.proxy_usage[0])


def test_the_loss_is_that_after_the_move(loss_func, batch):
    loss = loss_func(*batch)
    torch.testing.assert_close(loss_func.eval()(*batch), loss)


def test_every_sample_and_every_dead_proxy_may_be_drawn(loss_func, batch):
    embeddings, labels = batch
    pairs = set()
    for _ in range(300):
        trial = copy.deepcopy(loss_func)
        trial(embeddings, labels)
        (k,) = moved(loss_func, trial)[2]
        (sample,) = which(embeddings[labels == 2], trial.proxies[2, k])
        pairs.add((k, sample))
    assert pairs == set(itertools.product((0, 2, 3), range(4)))


def test_classes_that_are_not_in_the_batch_stay(loss_func, batch):
    embeddings, _ = batch
    before = copy.deepcopy(loss_func)
    loss_func(embeddings, torch.ones(12, dtype=torch.long))
    assert moved(before, loss_func) == [set(), {3}, set()]
    assert loss_func.proxy_usage[2].equal(before.proxy_usage[2])


@pytest.mark.parametrize(
    "how", ["off", "eval", "no_grad", "frozen", "get_logits", "assign", "one proxy", "empty batch"]
)
def test_leaves_everything_alone(how, loss_func, batch):
    embeddings, labels = batch
    if how == "off":
        loss_func.reseed_below = 0.0
    if how == "one proxy":
        loss_func = MultiProxyEntropyLoss(3, 8, 1, reseed_below=0.999)
    if how == "eval":
        loss_func.eval()
    if how == "frozen":
        loss_func.requires_grad_(False)
    if how == "empty batch":
        embeddings, labels = embeddings[:0], labels[:0]
    before = copy.deepcopy(loss_func.state_dict())
    with torch.set_grad_enabled(how != "no_grad"):
        {"get_logits": loss_func.get_logits, "assign": loss_func.assign}.get(how, loss_func)(
            *([embeddings] if how == "get_logits" else [embeddings, labels])
        )
    for name, value in loss_func.state_dict().items():
        assert value.equal(before[name]), name


def test_off_by_default():
    assert MultiProxyEntropyLoss(3, 8).reseed_below == 0


def test_samples_that_are_no_place_for_a_proxy_are_not_drawn(loss_func, batch):
    embeddings, labels = batch
    embeddings = embeddings.detach().clone()
    of_class = (labels == 1).nonzero().flatten()
    embeddings[of_class[0]] = float("nan")
    embeddings[of_class[1], 3] = float("inf")
    embeddings[of_class[2]] = 0
    embeddings[labels == 2] = float("nan")
    for _ in range(30):
        trial = copy.deepcopy(loss_func)
        trial(embeddings, labels)
        assert moved(loss_func, trial) == [set(), {3}, set()]
        torch.testing.assert_close(trial.proxies[1, 3], normalize(embeddings[of_class[3]], dim=0))


@given(seed=st.integers(0, 2**31 - 1), data=st.data(), per_class=st.integers(2, 6))
def test_usage_stays_a_distribution_and_one_proxy_at_most_moves(seed, data, per_class):
    torch.manual_seed(seed)
    loss_func = MultiProxyEntropyLoss(4, 5, per_class, reseed_below=0.9)
    for _ in range(8):
        labels = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=9)))
        before = copy.deepcopy(loss_func)
        loss_func(torch.randn(len(labels), 5), labels)
        for c, proxies in enumerate(moved(before, loss_func)):
            assert len(proxies) <= (c in labels)
    torch.testing.assert_close(loss_func.proxy_usage.sum(dim=1), torch.ones(4))


def test_the_same_under_the_same_seed(loss_func, batch):
    trials = [copy.deepcopy(loss_func) for _ in range(3)]
    for seed, trial in zip((1, 1, 4), trials, strict=True):
        torch.manual_seed(seed)
        trial(*batch)
    assert trials[0].proxies.equal(trials[1].proxies)
    assert not trials[0].proxies.equal(trials[2].proxies)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype, loss_func, batch):
    embeddings, labels = batch
    loss_func.to(dtype)
    before = copy.deepcopy(loss_func)
    loss_func(embeddings.to(dtype), labels).backward()
    assert moved(before, loss_func)[1] == {3}
    assert loss_func.proxies.dtype == dtype
    assert loss_func.proxy_usage.dtype == torch.float32


def test_keeps_the_lengths_where_the_distance_does(loss_func, batch):
    embeddings, labels = batch
    loss_func.distance = distances.LpDistance(normalize_embeddings=False)
    loss_func(embeddings, labels)
    assert (embeddings[labels == 1] == loss_func.proxies[1, 3]).all(dim=1).any()


def test_training_and_resuming_go_on_alike(loss_func):
    def steps(loss_func, optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            loss_func(torch.randn(12, 8), torch.arange(12) % 3).backward()
            optimizer.step()

    def make_optimizer(loss_func):
        return torch.optim.Adam(loss_func.parameters(), lr=0.05)

    optimizer = make_optimizer(loss_func)
    steps(loss_func, optimizer)
    resumed = MultiProxyEntropyLoss(3, 8, 4, reseed_below=BELOW, usage_momentum=1.0)
    resumed.load_state_dict(loss_func.state_dict())
    resumed_optimizer = make_optimizer(resumed)
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    state = torch.get_rng_state()
    steps(loss_func, optimizer)
    torch.set_rng_state(state)
    steps(resumed, resumed_optimizer)
    for name, value in resumed.state_dict().items():
        assert value.equal(loss_func.state_dict()[name]), name


def test_a_second_call_before_backward_is_refused(loss_func, batch):
    total = loss_func(*batch) + loss_func(*batch)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:copyreg")
def test_compiles_without_graph_breaks(loss_func, batch):
    embeddings, labels = batch
    compiled = torch.compile(copy.deepcopy(loss_func), fullgraph=True, backend="aot_eager")
    before = compiled.proxies.detach().clone()
    compiled(embeddings, labels).backward()
    changed = (compiled.proxies != before).any(dim=2)
    assert changed.sum(dim=1).tolist() == [0, 1, 1]
    assert changed[1, 3]
    assert compiled.proxies.grad.isfinite().all()


def test_draws_samples_and_dead_proxies_evenly():
    """Each of 4 eligible samples with each of 3 dead proxies, in 12,000 classes: 1,000 times each."""
    classes = 12_000
    proxies, usage = torch.full((classes, 5, 1), -1.0), torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).repeat(classes, 1)
    labels = torch.arange(classes).repeat_interleave(6)
    points = torch.tensor([[1.0], [float("nan")], [2.0], [3.0], [0.0], [4.0]]).repeat(classes, 1)
    order = torch.randperm(len(labels))
    reseed_(proxies, usage, points[order], labels[order], below=0.1)
    moved = proxies.squeeze(2) > 0
    assert (moved.sum(dim=1) == 1).all()
    pairs = torch.stack([moved.long().argmax(dim=1), proxies.squeeze(2)[moved].long()])
    values, counts = pairs.unique(dim=1, return_counts=True)
    assert values.T.tolist() == [[k, x] for k in (0, 2, 4) for x in (1, 2, 3, 4)]
    chi_squared = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_squared < 31.3  # 11 degrees of freedom: one time in a thousand by chance


class LargestTensor(TorchDispatchMode):
    """How many numbers the largest result of an operation has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return result


def test_memory_is_linear_in_the_batch():
    proxies, usage = torch.empty(7, 3, 5, device="meta"), torch.empty(7, 3, device="meta")
    points, labels = torch.empty(20_000, 5, device="meta"), torch.empty(20_000, dtype=torch.long, device="meta")
    with LargestTensor() as largest:
        reseed_(proxies, usage, points, labels, below=0.1)
    assert largest.numbers == 20_000 * 5


def test_memory_layouts():
    """Views that share their storage with other numbers, which stay."""
    storage, usage_storage = torch.zeros(3, 2, 8), torch.tensor([[0.0, 9.0], [1.0, 9.0]]).expand(3, 2, 2).clone()
    proxies, usage = storage.transpose(1, 2)[:, ::4], usage_storage[..., 0]
    points, labels = torch.ones(2, 6).T, torch.tensor([0, 7, 2, 7, 2, 7, 0, 7, 2, 7, 0, 7])[::2]
    reseed_(proxies, usage, points, labels, below=0.1)
    assert proxies[:, 0].tolist() == [[1, 1], [0, 0], [1, 1]]
    assert usage.tolist() == [[0.5, 0.5], [0.0, 1.0], [0.5, 0.5]]
    assert storage.sum() == 4
    assert (usage_storage[..., 1] == 9).all()
    assert not proxies[:, 1].any()


def test_points_that_the_proxies_cannot_hold_are_not_drawn():
    proxies, usage = torch.zeros(1, 2, 1, dtype=torch.float16), torch.tensor([[1.0, 0.0]])
    for points in ([[1e30], [1e-30]], [[1e30], [1e-30], [2.0]]):
        reseed_(proxies, usage, torch.tensor(points), torch.zeros(len(points), dtype=torch.long), below=0.1)
        assert proxies[0, 1, 0] == (2 if len(points) == 3 else 0)


def test_a_usage_that_is_not_a_number_moves_nothing():
    proxies, usage = torch.zeros(1, 2, 1), torch.full((1, 2), float("nan"))
    reseed_(proxies, usage, torch.ones(3, 1), torch.zeros(3, dtype=torch.long), below=0.1)
    assert not proxies.any()
