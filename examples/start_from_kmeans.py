"""Start the proxies at the centroids of each class, instead of at random.

Task and network are those of coarse_to_fine.py: train with the labels even and odd, retrieve digits. Prints MAP@R epoch
by epoch for both starts. init_proxies wants the embeddings of the network that is about to be trained.
"""

import argparse

import torch
from digits import EMBEDDING_SIZE, load_batches, load_data, make_models, make_optimizer, map_at_r, train_epoch
from torch import nn
from tqdm import tqdm

from pml_multiproxy.losses import MultiProxyEntropyLoss


def train(start, seed, epochs, bar):
    """MAP@R after each epoch."""
    torch.manual_seed(seed)
    network, loss_func = nn.Sequential(*make_models().values()), MultiProxyEntropyLoss(2, EMBEDDING_SIZE, 10)
    if start == "k-means":
        images, labels = load_data()[0].tensors
        with torch.no_grad():
            loss_func.init_proxies(network(images), labels)
    optimizer = make_optimizer(network, loss_func)
    history = []
    for _ in range(epochs):
        train_epoch(network, loss_func, optimizer, load_batches())
        history.append(map_at_r(network))
        bar.update()
    return history


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15, metavar="N", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how many; default: %(default)s")
    args = parser.parse_args(argv)
    if args.epochs < 1 or args.seeds < 1:
        parser.error(f"--epochs and --seeds must be at least 1, got {args.epochs} and {args.seeds}")
    starts = ("random", "k-means")
    with tqdm(total=len(starts) * args.seeds * args.epochs, unit="epoch", disable=False) as bar:
        histories = {
            start: torch.tensor([train(start, seed, args.epochs, bar) for seed in range(args.seeds)]).mean(dim=0)
            for start in starts
        }
    print("| MAP@R after epoch | random start | k-means |", "|---|---|---|", sep="\n")
    for epoch, values in enumerate(zip(*histories.values(), strict=True), start=1):
        print(f"| {epoch} | " + " | ".join(f"{value:.1f}" for value in values) + " |")


if __name__ == "__main__":
    main()
