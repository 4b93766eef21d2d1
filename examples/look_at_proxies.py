"""Look at the images nearest to each proxy, and score the clusters where fine labels are known.

A network learns the digits with the labels even and odd alone, from two views of each image. Then, for images that it
was not trained with: the ones nearest to each proxy, in a picture; and how well the proxies of each class match the
digits, which the training never saw.

Written to the folder given with --out: nearest.png and scores.md.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from digits import EMBEDDING_SIZE, load_data, load_views, make_models, make_optimizer, train_epoch
from torch import nn

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.inspection import cluster_scores
from pml_multiproxy.visualize import plot_nearest

CLASSES = ["even", "odd"]
PROXIES_PER_CLASS = 10  # twice the five digits in each class; a row of the picture each


def train(epochs):
    network = nn.Sequential(*make_models().values())
    loss_func = MultiProxyEntropyLoss(2, EMBEDDING_SIZE, PROXIES_PER_CLASS, views=2)
    optimizer = make_optimizer(network, loss_func)
    batches = load_views(load_data()[0], views=2)
    for _ in range(epochs):
        train_epoch(network, loss_func, optimizer, batches)
    return network.eval(), loss_func


def make_table(scores):
    """Markdown, in %."""
    rows = {CLASSES[c]: of_class for c, of_class in scores.per_class.items()} | {"mean": scores.mean}
    lines = ["| class | ACC | NMI | ARI |", "|---|---|---|---|"]
    lines += [f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in row) + " |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default="runs/look_at_proxies", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=15, metavar="N", help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")

    torch.manual_seed(0)
    network, loss_func = train(args.epochs)
    images, digits = load_data()[1].tensors
    with torch.no_grad():
        embeddings = network(images)
    args.out.mkdir(parents=True, exist_ok=True)
    ax = plot_nearest(loss_func, embeddings, digits % 2, images, count=10, class_names=CLASSES)
    ax.figure.savefig(args.out / "nearest.png", dpi=60)
    table = make_table(cluster_scores(loss_func, embeddings, digits % 2, fine_labels=digits))
    (args.out / "scores.md").write_text(table)
    print(table)
    print(f"Written: {args.out}/nearest.png, scores.md")


if __name__ == "__main__":
    main()
