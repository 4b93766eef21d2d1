"""Train with FSDP2 (fully_shard): mixed precision, gradient accumulation, exact resuming, several processes.

    torchrun --standalone --nproc-per-node 2 examples/integrations/train_fsdp2.py --checkpoints checkpoints

The task is that of ../coarse_to_fine.py, for a network without batch normalization, whose statistics FSDP2 would not
share between the processes. Each process keeps a part of every parameter, the proxies' too, and has them as a whole
while a module runs. The network computes in bfloat16, the loss in float32. Run the same command with more epochs to go
on from the last checkpoint, as if never interrupted. Prints MAP@R and the sum of the proxies.

If all proxies do not fit on one device, take ShardedMultiProxyEntropyLoss instead (../train_sharded.py), which never
gathers them.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).parents[1]))  # for digits.py and train_sharded.py

from digits import EMBEDDING_SIZE, load_data, make_optimizer, map_at_r
from train_sharded import complete, load, save

from pml_multiproxy.losses import MultiProxyEntropyLoss

ACCUMULATED = 2


def make_network():
    layers = nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, EMBEDDING_SIZE)
    return nn.Sequential(nn.Flatten(), *layers)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = make_network()
        # All processes together move the usage of the proxies.
        self.loss_func = MultiProxyEntropyLoss(2, EMBEDDING_SIZE, 10, usage_group="world")

    def forward(self, images, labels):
        return self.loss_func(self.network(images), labels)


def shard(model, device_type):
    mesh = init_device_mesh(device_type, (distributed.get_world_size(),))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model.network, mesh=mesh, mp_policy=half)
    fully_shard(model.loss_func, mesh=mesh)  # apart from the network, so that proxies stay float32
    return fully_shard(model, mesh=mesh)


def train_epoch(model, optimizer, sampler, epoch, device):
    sampler.set_epoch(epoch)  # the order depends on seed and epoch alone
    loader = DataLoader(load_data()[0], 32 // distributed.get_world_size(), sampler=sampler, drop_last=True)
    for step, (images, labels) in enumerate(loader, start=1):
        last = step % ACCUMULATED == 0
        model.set_requires_gradient_sync(last)
        (model(images.to(device), labels.to(device)) / ACCUMULATED).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="default: none are kept")
    args = parser.parse_args(argv)
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    distributed.init_process_group("nccl" if device_type == "cuda" else "gloo")
    device = torch.device(device_type, distributed.get_rank() if device_type == "cuda" else None)
    torch.manual_seed(0)
    model = shard(Model().to(device), device_type)
    optimizer = make_optimizer(model.network, model.loss_func)  # after sharding, which replaces the parameters
    saved = complete(args.checkpoints) if args.checkpoints else []
    if saved:
        load(saved[-1], model, optimizer)
    sampler = DistributedSampler(load_data()[0], drop_last=True)
    for epoch in range(len(saved), args.epochs):
        train_epoch(model, optimizer, sampler, epoch, device)
        if args.checkpoints:
            save(args.checkpoints / f"epoch-{epoch:04d}", model, optimizer)

    # All of it, on the first process: outside of forward, the parameters are DTensors of which each process has a part.
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if distributed.get_rank() == 0:
        trained = Model()
        trained.load_state_dict(whole)
        print(
            f"MAP@R {map_at_r(trained.network):.1f}, proxies {trained.loss_func.proxies.double().sum():.9f}", flush=True
        )
    distributed.barrier()
    distributed.destroy_process_group()  # a cache of PyTorch's DTensor holds it still: see docs/training.md


if __name__ == "__main__":
    main()
