"""A pair loss that respects the clusters inside a class.

A pair loss pulls all samples of a class together. Trained with coarse labels, it throws away their differences.
MultiProxyMiner picks the pairs: positives at the proxy of the anchor, and negatives that are as close to this proxy as
the anchor. Task and network are those of coarse_to_fine.py: train with the labels even and odd, retrieve digits.
"""

import argparse

import torch
from digits import EMBEDDING_SIZE, load_batches, make_models, make_optimizer, map_at_r, train_epoch
from pytorch_metric_learning import losses
from torch import nn
from tqdm import tqdm

from pml_multiproxy.losses import MultiProxyEntropyLoss
from pml_multiproxy.miners import MultiProxyMiner


def pair_loss_alone():
    return losses.MultiSimilarityLoss()


def proxy_loss_alone():
    return MultiProxyEntropyLoss(2, EMBEDDING_SIZE, proxies_per_class=10)


def both_with_all_pairs():
    parts = {"proxies": proxy_loss_alone(), "pairs": losses.MultiSimilarityLoss()}
    return losses.MultipleLosses(parts, weights={"proxies": 1, "pairs": 0.1})


def both_with_the_miner():
    parts = {"proxies": proxy_loss_alone(), "pairs": losses.MultiSimilarityLoss()}
    miners = {"pairs": MultiProxyMiner(parts["proxies"])}
    return losses.MultipleLosses(parts, miners=miners, weights={"proxies": 1, "pairs": 0.1})


def train(make_loss, seed, epochs):
    torch.manual_seed(seed)
    network, loss_func = nn.Sequential(*make_models().values()), make_loss()
    optimizer = make_optimizer(network, loss_func)
    for _ in range(epochs):
        train_epoch(network, loss_func, optimizer, load_batches())
    return map_at_r(network)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15, metavar="N", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how many; default: %(default)s")
    args = parser.parse_args(argv)
    if args.epochs < 1 or args.seeds < 1:
        parser.error(f"--epochs and --seeds must be at least 1, got {args.epochs} and {args.seeds}")
    configurations = {
        "MultiSimilarityLoss": pair_loss_alone,
        "MultiProxyEntropyLoss": proxy_loss_alone,
        "both, all pairs": both_with_all_pairs,
        "both, with MultiProxyMiner": both_with_the_miner,
    }
    lines = ["| loss | MAP@R, mean of the seeds |", "|---|---|"]
    with tqdm(total=len(configurations) * args.seeds, disable=False) as bar:
        for name, make_loss in configurations.items():
            values = []
            for seed in range(args.seeds):
                values.append(train(make_loss, seed, args.epochs))
                bar.update()
            lines.append(f"| {name} | {sum(values) / len(values):.1f} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
