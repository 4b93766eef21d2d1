"""Batches of views: their structure, whatever the items are, and in the places where PML takes datasets."""

import functools
import pickle
import random
import re

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, miners, samplers, testers, trainers
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from pml_multiproxy import MultiProxyEntropyLoss, MultiProxyMiner
from pml_multiproxy.views import ViewsDataset, stack_views


class Noisy(Dataset):
    """Item ``i`` holds ``i``, how often it was drawn before, and random numbers of three kinds; labels ``i % 3``."""

    def __init__(self, count=12):
        self.draws = [0] * count

    def __len__(self):
        return len(self.draws)

    def __getitem__(self, i):
        self.draws[i] += 1
        noise = [torch.rand(()).item(), random.random(), np.random.rand()]
        return torch.tensor([i, self.draws[i] - 1, *noise]), i % 3


class AsDict(Noisy):
    def __getitem__(self, i):
        x, label = super().__getitem__(i)
        return {"image": {"x": x, "both": (x[:1], x[1:])}, "name": f"sample {i}", "label": label}


def unpack(item):
    return item["image"], item["label"]


def x_and_label(item):
    return item["image"]["x"], item["label"]


class Triples(Noisy):
    def __getitem__(self, i):
        return (*super().__getitem__(i), i)


class RandomLabels(Noisy):
    def __getitem__(self, i):
        return super().__getitem__(i)[0], self.draws[i] % 2


@pytest.mark.parametrize("views", [1, 2, 3])
def test_batch_is_blocks_in_the_order_of_the_samples(views):
    samples = ViewsDataset(Noisy(), views)
    assert len(samples) == 12
    x, labels = stack_views([samples[i] for i in (5, 0, 4)])
    assert x[:, 0].tolist() == [5, 0, 4] * views
    assert x[:, 1].tolist() == [view for view in range(views) for _ in range(3)]  # first draws, then second ones
    assert labels.equal(torch.tensor([2, 0, 1] * views))


def test_each_view_is_drawn_anew():
    x, _ = stack_views([ViewsDataset(Noisy(), 2)[0]])
    assert (x[0, 2:] != x[1, 2:]).all()


def test_one_view_is_the_batch_of_the_dataset():
    ours = next(iter(DataLoader(ViewsDataset(Noisy(), 1), batch_size=5, collate_fn=stack_views)))
    assert ours[0][:, 0].tolist() == list(range(5))
    assert ours[1].equal(next(iter(DataLoader(Noisy(), batch_size=5)))[1])


def test_items_keep_their_structure():
    loader = DataLoader(ViewsDataset(AsDict(), 2, unpack), batch_size=3, collate_fn=stack_views)
    batch = next(iter(loader))
    assert batch["image"]["x"].shape == (6, 5)
    assert [part.shape for part in batch["image"]["both"]] == [(6, 1), (6, 4)]
    assert batch["name"] == ["sample 0", "sample 1", "sample 2"] * 2
    assert unpack(batch)[1].tolist() == [0, 1, 2, 0, 1, 2]


def test_another_collate_fn():
    collate = functools.partial(stack_views, collate_fn=list)
    samples = ViewsDataset([("a", 0), ("b", 1)], 2)
    assert collate([samples[0], samples[1]]) == [("a", 0), ("b", 1), ("a", 0), ("b", 1)]


@pytest.mark.parametrize(("drop_last", "lengths"), [(False, [10, 10, 4]), (True, [10, 10])])
def test_last_batch(drop_last, lengths):
    loader = DataLoader(ViewsDataset(Noisy(), 2), batch_size=5, drop_last=drop_last, collate_fn=stack_views)
    batches = list(loader)
    assert [len(x) for x, _ in batches] == lengths
    assert all(labels[: len(labels) // 2].equal(labels[len(labels) // 2 :]) for _, labels in batches)


def test_of_a_subset_and_subset_of_views():
    (one,) = DataLoader(ViewsDataset(Subset(Noisy(), [7, 3]), 2), batch_size=2, collate_fn=stack_views)
    (other,) = DataLoader(Subset(ViewsDataset(Noisy(), 2), [7, 3]), batch_size=2, collate_fn=stack_views)
    assert one[0][:, 0].tolist() == other[0][:, 0].tolist() == [7, 3, 7, 3]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_draw_different_numbers(context):
    """In each of two workers and two epochs, with the generators of torch, random and numpy."""
    samples = ViewsDataset(Noisy(4), 2)
    loader = DataLoader(samples, 2, num_workers=2, collate_fn=stack_views, multiprocessing_context=context)
    numbers = torch.cat([x[:, 2:] for _ in range(2) for x, _ in loader])
    assert numbers.shape == (16, 3)
    assert all(len(column.unique()) == 16 for column in numbers.T)


def test_pickled():
    samples = pickle.loads(pickle.dumps(ViewsDataset(AsDict(), 3, unpack)))
    assert stack_views([samples[2]])["label"].tolist() == [2, 2, 2]
    assert len(pickle.loads(pickle.dumps(samples[0]))) == 3
    assert pickle.loads(pickle.dumps(stack_views)) is stack_views


def test_labels_that_are_arrays_strings_or_hierarchies():
    for label in (torch.tensor(1), torch.tensor([1, 4]), np.array([1, 4]), (1, 4), "cat", np.int64(3)):
        assert len(ViewsDataset([(0.0, label)], 2)[0]) == 2


def test_labels_that_differ_are_refused():
    message = "labels must be the same for all views of a sample, got 1 and 0 from two draws of dataset[3]"
    with pytest.raises(ValueError, match=re.escape(message)):
        ViewsDataset(RandomLabels(), 2)[3]


@pytest.mark.parametrize(
    ("dataset", "got"), [(AsDict(), "a dict of 3"), (Triples(), "a tuple of 3"), ([0.5], "a float"), (["ab"], "a str")]
)
def test_items_that_are_not_data_and_label(dataset, got):
    with pytest.raises(TypeError, match=f"must be \\(data, label\\), got {got}: give a data_and_label_getter"):
        ViewsDataset(dataset, 2)[0]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(0.0, 0)])

    def __len__(self):
        return 1


@pytest.mark.parametrize("dataset", [Stream(), {1, 2}, iter([])])
def test_streams_are_refused(dataset):
    with pytest.raises(TypeError, match=f"dataset must be map-style.*got {type(dataset).__name__}"):
        ViewsDataset(dataset, 2)


def test_other_errors():
    with pytest.raises(ValueError, match="views must be an int of at least 1, got 0"):
        ViewsDataset(Noisy(), 0)
    with pytest.raises(TypeError, match="data_and_label_getter must be None or a function of an item, got int"):
        ViewsDataset(Noisy(), 2, 1)
    with pytest.raises(TypeError, match="samples must be items of a ViewsDataset, got tuple"):
        stack_views([Noisy()[0]])
    with pytest.raises(ValueError, match=re.escape("samples must have the same number of views, got [2, 3]")):
        stack_views([ViewsDataset(Noisy(), 3)[0], ViewsDataset(Noisy(), 2)[0]])


def test_sampler_counts_samples():
    labels = [i % 3 for i in range(12)]
    sampler = samplers.MPerClassSampler(labels, m=2, batch_size=6, length_before_new_iter=12)
    for x, batch_labels in DataLoader(ViewsDataset(Noisy(), 2), 6, sampler=sampler, collate_fn=stack_views):
        assert len(x) == 12
        assert batch_labels.bincount().tolist() == [4, 4, 4]
        assert x[:6, 0].equal(x[6:, 0])


class Seen(MultiProxyEntropyLoss):
    """Keeps what it was called with."""

    def forward(self, embeddings, labels, *args, **kwargs):
        self.seen = [*getattr(self, "seen", []), (embeddings.detach().clone(), labels.clone())]
        return super().forward(embeddings, labels, *args, **kwargs)


def train(dataset, loss_func, **settings):
    trunk = torch.nn.Linear(5, 8)
    parameters = [parameter for parameter in loss_func.parameters() if parameter.requires_grad]
    trainers.MetricLossOnly(
        **{
            "models": {"trunk": trunk},
            "optimizers": {
                "trunk_optimizer": torch.optim.Adam(trunk.parameters()),
                "metric_loss_optimizer": torch.optim.Adam(parameters, lr=0.01),
            },
            "batch_size": 6,
            "loss_funcs": {"metric_loss": loss_func},
            "dataset": dataset,
            "collate_fn": stack_views,
            "dataloader_num_workers": 0,
            **settings,
        }
    ).train(num_epochs=1)
    return trunk


pml_bar = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")  # of PML's trainers


@pml_bar
@pytest.mark.parametrize("workers", [0, 2])
def test_pml_trainer(workers):
    loss_func = Seen(3, 8, 4, views=2)
    train(ViewsDataset(Noisy(), 2), loss_func, dataloader_num_workers=workers)
    assert [len(embeddings) for embeddings, _ in loss_func.seen] == [12, 12]
    for embeddings, labels in loss_func.seen:
        assert labels[:6].equal(labels[6:])
        assert not embeddings[:6].equal(embeddings[6:])


@pml_bar
def test_pml_trainer_with_sampler_and_getter():
    """One function unpacks the items here, and the batches in the trainer."""
    sampler = samplers.MPerClassSampler([i % 3 for i in range(12)], m=2, batch_size=6, length_before_new_iter=12)
    loss_func = Seen(3, 8, 4, views=3)
    samples = ViewsDataset(AsDict(), 3, x_and_label)
    train(samples, loss_func, sampler=sampler, data_and_label_getter=x_and_label)
    assert [labels.bincount().tolist() for _, labels in loss_func.seen] == [[6, 6, 6]] * 2


@pml_bar
def test_pml_tester_takes_the_dataset_itself():
    loss_func = MultiProxyEntropyLoss(3, 8, 4, views=2)
    trunk = train(ViewsDataset(Noisy(), 2), loss_func)
    embeddings, labels = testers.GlobalEmbeddingSpaceTester(dataloader_num_workers=0).get_all_embeddings(Noisy(), trunk)
    assert (embeddings.shape, labels.shape) == ((12, 8), (12, 1))


def test_mismatch_of_views_is_an_error_of_the_loss():
    x, labels = next(iter(DataLoader(ViewsDataset(Noisy(), 3), batch_size=4, collate_fn=stack_views)))
    with pytest.raises(ValueError, match="views = 2 blocks"):
        MultiProxyEntropyLoss(3, 5, 4, views=2)(x, labels)


class Elsewhere(torch.Tensor):
    """Labels that say that they are on a GPU."""

    device = torch.device("cuda")


def test_first_batch_is_looked_at_on_every_device():
    """What forgets to stack views does so from the first batch on; a look at each would be a device synchronisation."""
    loss_func, embeddings = MultiProxyEntropyLoss(3, 2, 4, views=2), torch.randn(4, 2)
    no_views, views = (torch.tensor(y).as_subclass(Elsewhere) for y in ([0, 1, 2, 1], [0, 1, 0, 1]))
    for _ in range(2):
        with pytest.raises(ValueError, match="labels must be the same in each of the views = 2 blocks"):
            loss_func(embeddings, no_views)
    loss_func(embeddings, views)
    loss_func(embeddings, no_views)


def near_proxies(loss_func, which, labels):
    """Embeddings near the given proxies of their classes, and far from all others."""
    with torch.no_grad():
        count = loss_func.proxies.shape[0] * loss_func.proxies.shape[1]
        loss_func.proxies.copy_(torch.eye(count).view(loss_func.proxies.shape))
        noise = 0.01 * torch.randn(len(labels), count)
        return loss_func.proxies[labels, which] + noise


def test_miner_pairs_views_at_one_proxy_and_no_others():
    """Two views of a sample are a positive pair where they share a proxy, and no pair where they do not."""
    loss_func = MultiProxyEntropyLoss(2, 6, 3, views=2)
    labels = torch.tensor([0, 0, 1, 0, 0, 1])
    embeddings = near_proxies(loss_func, torch.tensor([0, 1, 2, 0, 2, 2]), labels)  # sample 1 changes proxies
    anchors, positives, _, negatives = MultiProxyMiner(loss_func)(embeddings, labels)
    assert set(zip(anchors.tolist(), positives.tolist(), strict=True)) == {(0, 3), (3, 0), (2, 5), (5, 2)}
    assert len(negatives) == 0


@pml_bar
@pytest.mark.parametrize("pair_loss", [losses.MultiSimilarityLoss, losses.TripletMarginLoss, losses.NTXentLoss])
def test_pair_loss_joined_by_the_miner(pair_loss):
    proxies = MultiProxyEntropyLoss(3, 8, 4, views=2)
    both = losses.MultipleLosses(
        {"proxies": proxies, "pairs": pair_loss()},
        miners={"pairs": MultiProxyMiner(proxies)},
        weights={"proxies": 1, "pairs": 0.1},
    )
    embeddings, labels = torch.randn(12, 8), torch.arange(6).repeat(2) % 3
    usage = proxies.proxy_usage.clone()
    proxies.eval()  # so that all calls find the same usage
    mined = MultiProxyMiner(proxies)(embeddings, labels)
    expected = proxies(embeddings, labels) + 0.1 * pair_loss()(embeddings, labels, mined)
    torch.testing.assert_close(both(embeddings, labels), expected)

    proxies.train()
    before = proxies.proxies.detach().clone()
    train(ViewsDataset(Noisy(), 2), both)
    assert not proxies.proxy_usage.equal(usage)
    assert not proxies.proxies.equal(before)


def test_pair_loss_joined_by_all_pairs_takes_views_for_positives():
    """A pair loss without a miner sees more samples of the class; nothing in PML needs to know of views."""
    embeddings, labels = torch.randn(8, 4), torch.arange(4).repeat(2)
    a, p, *_ = miners.BatchEasyHardMiner(pos_strategy="all", neg_strategy="all")(embeddings, labels)
    assert set(zip(a.tolist(), p.tolist(), strict=True)) == {(i, (i + 4) % 8) for i in range(8)}


def test_tensor_datasets_of_unchanging_samples_give_equal_views():
    """Without a random transform, the loss is that of one view."""
    data = TensorDataset(torch.randn(6, 8), torch.arange(6) % 3)
    x, labels = next(iter(DataLoader(ViewsDataset(data, 2), batch_size=6, collate_fn=stack_views)))
    two, one = MultiProxyEntropyLoss(3, 8, 4, views=2).eval(), MultiProxyEntropyLoss(3, 8, 4).eval()
    with torch.no_grad():
        one.proxies.copy_(two.proxies)
    torch.testing.assert_close(two(x, labels), one(*data.tensors))
