"""What the tests with several ranks share: models, losses, data, training and comparisons."""

import torch
from cases import make_distance
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.distributed import ShardedMultiProxyEntropyLoss

CLASSES, SIZE, PER_CLASS = 11, 6, 3
UNEVEN = [5, 0, 12, 1]
"""Sizes of the batches of four ranks."""


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


def pair_of_losses(group, num_classes=CLASSES, distance="cosine", **settings):
    """The ordinary loss and the sharded one, from the same start, in float64; a distance is given by its name."""
    settings = {"scale": 3, "temperature": 0.3, "margin": 0.1, "inter_weight": 0.4, **settings}
    arguments = num_classes, SIZE, PER_CLASS
    one = MultiProxyEntropyLoss(*arguments, distance=make_distance(distance), **settings).double()
    sharded = ShardedMultiProxyEntropyLoss(
        *arguments, distance=make_distance(distance), process_group=group, **settings
    ).double()
    sharded.load_state_dict(one.state_dict())
    return one, sharded


def local(tensor):
    return tensor.to_local().detach()


def make_training(group, num_classes=7, sharded=True):
    """Network and loss, with an optimizer. Each rank draws a start of its own, which must not matter."""
    torch.manual_seed(100 + distributed.get_rank())
    cls, settings = (ShardedMultiProxyEntropyLoss, {"process_group": group}) if sharded else (MultiProxyEntropyLoss, {})
    model = Model(cls(num_classes, SIZE, PER_CLASS, margin=0.1, balance_weight=1.0, **settings)).double()
    of_loss = {"params": model.loss_func.parameters(), "lr": 0.01}
    optimizer = torch.optim.Adam([{"params": model.network.parameters()}, of_loss])
    model.network = DistributedDataParallel(model.network, process_group=group)
    return model, optimizer


def train(group, model, optimizer, steps):
    """Some of the steps over the samples of four ranks, of which this rank has its share, in order."""
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    share = slice(rank * 4 // size, (rank + 1) * 4 // size)
    for inputs, labels in list(batches(steps.stop, UNEVEN, model.loss_func.num_classes))[steps.start :]:
        optimizer.zero_grad()
        model(torch.cat(inputs[share]), torch.cat(labels[share])).backward()
        optimizer.step()
