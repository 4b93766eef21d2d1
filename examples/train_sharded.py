"""Train with the proxies spread over several processes, save, and resume on any number of processes.

    torchrun --standalone --nproc-per-node 2 examples/train_sharded.py --checkpoints checkpoints

Task and network are those of coarse_to_fine.py. DistributedDataParallel wraps the network alone; the sharded loss holds
the proxies of some classes on each process. Run the same command with more epochs to go on from the last complete
checkpoint. Prints MAP@R and the sum of the proxies. Runs on CPUs, with the backend gloo; on GPUs, take nccl, and make
the model within torch.device("cuda", LOCAL_RANK).
"""

import argparse
import gc
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.nn  # as in train_ddp.py
from digits import EMBEDDING_SIZE, load_data, make_models, make_optimizer, map_at_r
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from pml_multiproxy.distributed import ShardedMultiProxyEntropyLoss


def save(folder, model, optimizer, group=None):
    """A module that holds network and loss, and its optimizer after at least one step; all processes call it."""
    # Buffers that differ between the processes, such as batch normalization's, are saved from the first one.
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=folder, planner=planner, process_group=group)


def load(folder, model, optimizer, group=None):
    """The number of processes may differ, and the loss may be the ordinary one."""
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder, process_group=group)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def complete(folder):
    """The complete checkpoints, oldest first: ``.metadata`` is written last."""
    return sorted(path.parent for path in folder.glob("*/.metadata"))


def train_epoch(model, optimizer, sampler, epoch):
    sampler.set_epoch(epoch)  # the order depends on seed and epoch alone
    loader = DataLoader(load_data()[0], 64 // distributed.get_world_size(), sampler=sampler, drop_last=True)
    for images, labels in loader:
        optimizer.zero_grad()
        model["loss_func"](model["network"](images), labels).backward()
        optimizer.step()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="default: none are kept")
    args = parser.parse_args(argv)
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    network = nn.Sequential(*make_models().values())
    loss_func = ShardedMultiProxyEntropyLoss(2, EMBEDDING_SIZE, 10)
    model = nn.ModuleDict({"network": DistributedDataParallel(network), "loss_func": loss_func})
    optimizer = make_optimizer(network, loss_func)
    saved = complete(args.checkpoints) if args.checkpoints else []
    if saved:
        load(saved[-1], model, optimizer)
    sampler = DistributedSampler(load_data()[0], drop_last=True)
    for epoch in range(len(saved), args.epochs):
        train_epoch(model, optimizer, sampler, epoch)
        if args.checkpoints:
            save(args.checkpoints / f"epoch-{epoch:04d}", model, optimizer)

    proxies = loss_func.proxies.full_tensor().detach()  # of all processes, so all call it
    if distributed.get_rank() == 0:
        print(f"MAP@R {map_at_r(network):.1f}, proxies {proxies.double().sum():.9f}", flush=True)
    # As in train_ddp.py.
    del model
    gc.collect()
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
