"""Train with accelerate: mixed precision, gradient accumulation, exact resuming, several processes.

    pip install accelerate
    python examples/integrations/train_accelerate.py --checkpoints checkpoints
    accelerate launch --cpu --num_processes 2 examples/integrations/train_accelerate.py

Task and network are those of ../coarse_to_fine.py. Network and loss are one module: so accelerate moves and saves both,
and averages the gradients of both over the processes. Run the same command with more epochs to go on from the last
checkpoint, as if never interrupted. Prints MAP@R and the sum of the proxies.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed.nn  # as in ../train_ddp.py
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))  # for digits.py

from digits import EMBEDDING_SIZE, load_data, make_models, make_optimizer, map_at_r

from pml_multiproxy.losses import MultiProxyEntropyLoss


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(*make_models().values())
        # All processes together move the usage of the proxies.
        self.loss_func = MultiProxyEntropyLoss(2, EMBEDDING_SIZE, 10, usage_group="world")

    def forward(self, images, labels):
        return self.loss_func(self.network(images), labels)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="default: none are kept")
    args = parser.parse_args(argv)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16",
        gradient_accumulation_steps=2,
        # The order of samples then depends on seed and epoch alone.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    set_seed(0)
    model = Model()
    optimizer = make_optimizer(model.network, model.loss_func)  # without the loss, proxies would never be trained
    loader = DataLoader(load_data()[0], 32 // accelerator.num_processes, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    saved = sorted(args.checkpoints.glob("epoch-*")) if args.checkpoints else []
    if saved:
        accelerator.load_state(str(saved[-1]))  # model, loss, optimizer and random states
    for epoch in range(len(saved), args.epochs):
        loader.set_epoch(epoch)
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(images, labels))
                optimizer.step()
                optimizer.zero_grad()
        if args.checkpoints:
            accelerator.save_state(str(args.checkpoints / f"epoch-{epoch:04d}"))

    if accelerator.is_main_process:
        trained = accelerator.unwrap_model(model).cpu()
        print(f"MAP@R {map_at_r(trained.network):.1f}, proxies {trained.loss_func.proxies.double().sum():.9f}")
    # end_training destroys the process group, which nothing may hold by then: ../train_ddp.py says why.
    model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
    accelerator.end_training()


if __name__ == "__main__":
    main()
