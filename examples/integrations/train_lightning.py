"""Train with Lightning: mixed precision, gradient accumulation, exact resuming, several processes.

    pip install lightning
    python examples/integrations/train_lightning.py --checkpoints checkpoints --processes 2

Task and network are those of ../coarse_to_fine.py. The loss is a submodule of the LightningModule: so Lightning moves
it to the device, saves it, and averages the gradient of its proxies over the processes. Run the same command with more
epochs to go on from the last checkpoint, as if never interrupted. Prints MAP@R and the sum of the proxies.
"""

import argparse
import sys
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import distributed, nn
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).parents[1]))  # for digits.py

from digits import EMBEDDING_SIZE, load_data, make_models, make_optimizer, map_at_r

from pml_multiproxy.losses import MultiProxyEntropyLoss


class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(*make_models().values())
        # All processes together move the usage of the proxies.
        self.loss_func = MultiProxyEntropyLoss(2, EMBEDDING_SIZE, 10, usage_group="world")

    def training_step(self, batch, _):
        images, labels = batch
        return self.loss_func(self.network(images), labels)

    def configure_optimizers(self):
        return make_optimizer(self.network, self.loss_func)  # without the loss, its proxies would never be trained

    def train_dataloader(self):
        # This sampler's order depends on seed and epoch alone. That of shuffle=True would differ after resuming.
        size, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(load_data()[0], size, rank, drop_last=True)
        return DataLoader(load_data()[0], 32 // size, sampler=sampler, drop_last=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="default: none are kept")
    args = parser.parse_args(argv)
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        devices=args.processes,
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        strategy="ddp" if args.processes > 1 else "auto",
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        callbacks=[ModelCheckpoint(args.checkpoints, save_last=True)] if args.checkpoints else [],
        enable_checkpointing=args.checkpoints is not None,
        use_distributed_sampler=False,  # there is one already
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Model()
    last = args.checkpoints / "last.ckpt" if args.checkpoints else None
    trainer.fit(model, ckpt_path=last if last and last.exists() else None, weights_only=True)
    if trainer.is_global_zero:
        model = model.cpu()
        print(f"MAP@R {map_at_r(model.network):.1f}, proxies {model.loss_func.proxies.double().sum():.9f}")
    if distributed.is_initialized():
        distributed.barrier()  # the first process is still testing
        distributed.destroy_process_group()  # or gloo's threads outlive it: ../train_ddp.py says more


if __name__ == "__main__":
    main()
