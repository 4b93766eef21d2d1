"""Train on several processes with DistributedDataParallel, the loss inside of it.

    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py

Task and network are those of coarse_to_fine.py: train with the labels even and odd, retrieve digits. Prints MAP@R epoch
by epoch. With usage_group, the usage of the proxies is moved by the batches of all processes together: the loss is that
of one process with the whole batch. (The network is not quite, since batch normalization takes its statistics from the
batch of each process.) Runs on CPUs, with the backend gloo; on GPUs, take nccl, and move model and batches to the one
with the number LOCAL_RANK.
"""

import argparse
import gc

import torch
import torch.distributed.nn  # before there is a group, which would become the default of its functions
from digits import EMBEDDING_SIZE, load_data, make_models, make_optimizer, map_at_r
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from pml_multiproxy.losses import MultiProxyEntropyLoss


class Model(nn.Module):
    """Network and loss in one: DistributedDataParallel averages the gradients of both."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(*make_models().values())
        self.loss_func = MultiProxyEntropyLoss(2, EMBEDDING_SIZE, 10, usage_group=distributed.group.WORLD)

    def forward(self, images, labels):
        return self.loss_func(self.network(images), labels)


def train(epochs, batch_size):
    """Yields the network after each epoch. Batches are of equal size on all processes, together ``batch_size``."""
    model = Model()
    parallel = DistributedDataParallel(model)
    optimizer = make_optimizer(model.network, model.loss_func)
    sampler = DistributedSampler(load_data()[0], drop_last=True)
    local_size = batch_size // distributed.get_world_size()
    for epoch in range(epochs):
        sampler.set_epoch(epoch)  # or every epoch would have the same order
        for images, labels in DataLoader(load_data()[0], local_size, sampler=sampler, drop_last=True):
            optimizer.zero_grad()
            parallel(images, labels).backward()
            optimizer.step()
        yield model.network


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="of all processes; default: %(default)s"
    )
    args = parser.parse_args(argv)
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    for epoch, network in enumerate(train(args.epochs, args.batch_size), start=1):
        if distributed.get_rank() == 0:
            print(f"epoch {epoch}: MAP@R {map_at_r(network):.1f}", flush=True)
    # Gloo's threads end with the group, if nothing holds it. One that is left may abort the process as Python ends, or
    # hang when the group is collected later: both are PyTorch's, and docs/training.md says more.
    gc.collect()  # DistributedDataParallel, which holds the group and is in a cycle
    distributed.barrier()  # the first process is still testing: do not end the group under it
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
