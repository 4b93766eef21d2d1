"""Batches of views: their structure for items of all kinds, and in the places where PML takes datasets."""

import random
import re

import numpy as np
import pytest
import torch
from pytorch_metric_learning import samplers, testers, trainers
from torch.utils.data import DataLoader, Dataset, IterableDataset

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
    assert len(x[:, 2:].unique()) == 9 * views  # each view is drawn anew
    assert labels.equal(torch.tensor([2, 0, 1] * views))


def test_items_keep_their_structure():
    loader = DataLoader(ViewsDataset(AsDict(), 2, x_and_label), batch_size=3, collate_fn=stack_views)
    batch = next(iter(loader))
    assert batch["image"]["x"].shape == (6, 5)
    assert [part.shape for part in batch["image"]["both"]] == [(6, 1), (6, 4)]
    assert batch["name"] == ["sample 0", "sample 1", "sample 2"] * 2
    assert x_and_label(batch)[1].tolist() == [0, 1, 2, 0, 1, 2]


def test_workers_draw_different_numbers():
    """In each of two workers and two epochs, with the generators of torch, random and numpy."""
    samples = ViewsDataset(Noisy(4), 2)
    loader = DataLoader(samples, 2, num_workers=2, collate_fn=stack_views, multiprocessing_context="fork")
    numbers = torch.cat([x[:, 2:] for _ in range(2) for x, _ in loader])
    assert numbers.shape == (16, 3)
    assert all(len(column.unique()) == 16 for column in numbers.T)


def test_labels_that_are_arrays_strings_or_hierarchies():
    for label in (torch.tensor(1), torch.tensor([1, 4]), np.array([1, 4]), (1, 4), "cat", np.int64(3)):
        assert len(ViewsDataset([(0.0, label)], 2)[0]) == 2


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(0.0, 0)])

    def __len__(self):
        return 1


@pytest.mark.parametrize(
    ("dataset", "got"), [(AsDict(), "a dict"), (Triples(), "a tuple"), ([0.5], "a float"), (["ab"], "a str")]
)
def test_items_that_are_not_data_and_label(dataset, got):
    with pytest.raises(TypeError, match=f"must be \\(data, label\\), got {got}: give a data_and_label_getter"):
        ViewsDataset(dataset, 2)[0]


def test_errors():
    for dataset in (Stream(), {1, 2}, iter([])):
        with pytest.raises(
            TypeError, match=f"dataset must have __len__ and __getitem__, got a {type(dataset).__name__}"
        ):
            ViewsDataset(dataset, 2)
    message = "labels must be the same for all draws of dataset[3], got ["
    with pytest.raises(ValueError, match=re.escape(message)):
        ViewsDataset(RandomLabels(), 2)[3]
    with pytest.raises(ValueError, match="views must be an int of at least 1, got 0"):
        ViewsDataset(Noisy(), 0)
    with pytest.raises(TypeError, match="samples must be items of a ViewsDataset, got tuple"):
        stack_views([Noisy()[0]])
    with pytest.raises(ValueError, match=re.escape("samples must have the same number of views, got [2, 3]")):
        stack_views([ViewsDataset(Noisy(), 3)[0], ViewsDataset(Noisy(), 2)[0]])


def test_another_collate_fn():
    samples = ViewsDataset([("a", 0), ("b", 1)], 2)
    assert stack_views([samples[0], samples[1]], collate_fn=list) == [("a", 0), ("b", 1), ("a", 0), ("b", 1)]


class Seen(MultiProxyEntropyLoss):
    """Keeps what it was called with."""

    def forward(self, embeddings, labels, *args, **kwargs):
        self.seen = [*getattr(self, "seen", []), (embeddings.detach().clone(), labels.clone())]
        return super().forward(embeddings, labels, *args, **kwargs)


def train(dataset, loss_func, **settings):
    trunk = torch.nn.Linear(5, 8)
    optimizers = {"trunk": trunk.parameters(), "metric_loss": loss_func.parameters()}
    optimizers = {f"{name}_optimizer": torch.optim.Adam(params, lr=0.01) for name, params in optimizers.items()}
    settings = {"models": {"trunk": trunk}, "optimizers": optimizers, "batch_size": 6, **settings}
    losses, settings = {"metric_loss": loss_func}, {"dataloader_num_workers": 0, "collate_fn": stack_views, **settings}
    trainer = trainers.MetricLossOnly(loss_funcs=losses, dataset=dataset, **settings)
    trainer.train(num_epochs=1)
    trainer.dataloader_iter = None  # ends its workers; the garbage collector would wait ten seconds for them
    return trunk


pml_bar = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")  # of PML's trainers


@pml_bar
@pytest.mark.parametrize("workers", [0, 2])
def test_pml_trainer_sampler_and_tester(workers):
    """One function unpacks the items in the dataset, and the batches in the trainer."""
    sampler = samplers.MPerClassSampler([i % 3 for i in range(12)], m=2, batch_size=6, length_before_new_iter=12)
    loss_func = Seen(3, 8, 4, views=2)
    settings = {"sampler": sampler, "data_and_label_getter": x_and_label, "dataloader_num_workers": workers}
    trunk = train(ViewsDataset(AsDict(), 2, x_and_label), loss_func, **settings)
    assert len(loss_func.seen) == 2
    for embeddings, labels in loss_func.seen:
        assert labels.bincount().tolist() == [4, 4, 4]
        assert labels[:6].equal(labels[6:])
        assert not embeddings[:6].equal(embeddings[6:])
    embeddings, labels = testers.GlobalEmbeddingSpaceTester(dataloader_num_workers=0).get_all_embeddings(Noisy(), trunk)
    assert (embeddings.shape, labels.shape) == ((12, 8), (12, 1))


class Elsewhere(torch.Tensor):
    """Labels that say that they are on a GPU."""

    device = torch.device("cuda")


def test_first_batch_is_looked_at_on_every_device():
    """Forgotten views show in the first batch; looking at every batch would synchronise a device."""
    loss_func, embeddings = MultiProxyEntropyLoss(3, 2, 4, views=2, neighbor_weight=0), torch.randn(4, 2)
    no_views, views = (torch.tensor(y).as_subclass(Elsewhere) for y in ([0, 1, 2, 1], [0, 1, 0, 1]))
    for _ in range(2):
        with pytest.raises(ValueError, match="labels must be the same in each of the views = 2 blocks"):
            loss_func(embeddings, no_views)
    for labels in (views, no_views):
        loss_func._checked(embeddings, labels, None)


def test_miner_pairs_views_at_one_proxy_and_no_others():
    """Two views of a sample are a positive pair where they share a proxy, and no pair where they do not."""
    loss_func, labels = MultiProxyEntropyLoss(2, 6, 3, views=2), torch.tensor([0, 0, 1, 0, 0, 1])
    loss_func.proxies.data = torch.eye(6).view(2, 3, 6)
    which = torch.tensor([0, 1, 2, 0, 2, 2])  # sample 1 changes proxies
    embeddings = loss_func.proxies[labels, which] + 0.01 * torch.randn(6, 6)
    anchors, positives, _, negatives = MultiProxyMiner(loss_func)(embeddings, labels)
    assert set(zip(anchors.tolist(), positives.tolist(), strict=True)) == {(0, 3), (3, 0), (2, 5), (5, 2)}
    assert len(negatives) == 0
