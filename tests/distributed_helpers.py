"""What the tests with several ranks share: models, losses, data, training and comparisons."""

import torch
from cases import LearnedDistance
from pytorch_metric_learning import distances
from torch import distributed
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.distributed import ShardedMultiProxyEntropyLoss

CLASSES, SIZE, PER_CLASS = 11, 6, 3
UNEVEN = [5, 0, 12, 1]
"""Sizes of the batches of four ranks."""

DISTANCES = {
    "cosine": distances.CosineSimilarity,
    "dot product": lambda: distances.DotProductSimilarity(normalize_embeddings=False),
    "L2": distances.LpDistance,
    "L1 squared": lambda: distances.LpDistance(p=1, power=2),
    "SNR": distances.SNRDistance,
    "learned": LearnedDistance,
}


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


def make_optimizer(network, loss_func):
    return torch.optim.Adam([{"params": network.parameters()}, {"params": loss_func.parameters(), "lr": 0.01}])


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
    for step, (inputs, labels) in enumerate(batches(steps.stop, UNEVEN, model["loss_func"].num_classes)):
        if step in steps:
            optimizer.zero_grad()
            embeddings = model["network"](torch.cat(inputs[share]))
            model["loss_func"](embeddings, torch.cat(labels[share])).backward()
            optimizer.step()


def whole_state(model, optimizer):
    """Parameters, buffers and moments by name, of all ranks together."""
    state, of_optimizer = get_state_dict(model, optimizer)
    for name, moments in of_optimizer["state"].items():
        state |= {f"{name}: {kind}": value for kind, value in moments.items()}
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone() for name, value in state.items()
    }
