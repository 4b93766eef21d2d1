"""The effect of the k-means start, the miner and the regularizer on retrieval.

The task is ``clinc-coarse`` of benchmarks/retrieval, trained without its validation part. Ours is at its defaults, but
for what a row names. "Sibling cosine" is the mean cosine between proxies of one class after training.

For each of the three tables, writes results/NAME.csv, one row when a run ends, goes on from what it holds, and makes
results/NAME.md of it.
"""

import argparse
import platform
from datetime import date
from pathlib import Path

import numpy as np
import torch
from pytorch_metric_learning.losses import MultipleLosses, MultiSimilarityLoss, SoftTripleLoss
from tqdm import tqdm

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.miners import MultiProxyMiner
from pml_multiproxy.regularizers import ProxyEntropyRegularizer

from .. import csv_rows
from ..retrieval.losses import DEFAULT_LR, Family
from ..retrieval.tasks import TASKS
from ..retrieval.training import evaluate, proxies_of, train

RESULTS = Path(__file__).parent / "results"
EPOCHS = 1, 2, 5, 10, 20


def retrieval(task, seed, build, **settings):
    """MAP@R on the test part, and the trained loss; ``build(num_classes, embedding_size)`` makes it."""
    family = Family(lambda num_classes, size, views: build(num_classes, size), {})
    network, loss_func = train(task, task.train, family, {"proxies_lr": DEFAULT_LR} | settings, seed)
    return float(evaluate(network, task.test)["map_at_r"]), loss_func


def ours(proxies_per_class, **settings):
    return lambda num_classes, size: MultiProxyEntropyLoss(num_classes, size, proxies_per_class, **settings)


def kmeans_start(task, seed, count, start):
    """A run for each number of epochs: with one seed, the longer run starts as the shorter."""
    from_kmeans = start == "k-means"
    runs = {e: retrieval(task._replace(epochs=e), seed, ours(count), from_kmeans=from_kmeans) for e in EPOCHS}
    return {f"epoch_{epoch}": value for epoch, (value, _) in runs.items()}


def miner(task, seed, build):
    value = retrieval(task, seed, build)[0] if build else float(evaluate(task.make_network(), task.test)["map_at_r"])
    return {"map_at_r": value}


def with_pairs(count, weight, how):
    def build(num_classes, size):
        proxy_loss = ours(count)(num_classes, size)
        mined = MultiProxyMiner(proxy_loss) if how == "with the miner" else None
        return MultipleLosses([proxy_loss, MultiSimilarityLoss()], miners=[None, mined], weights=[1, weight])

    return build


def regularizer(task, seed, loss, weight):
    settings = {"weight_regularizer": ProxyEntropyRegularizer(10), "weight_reg_weight": weight} if weight else {}
    soft_triple = lambda num_classes, size: SoftTripleLoss(num_classes, size, centers_per_class=10, **settings)  # noqa: E731
    value, loss_func = retrieval(task, seed, soft_triple if loss == "SoftTriple" else ours(10, **settings))
    directions = torch.nn.functional.normalize(proxies_of(loss_func).detach(), dim=-1)
    cosines = (directions @ directions.mT)[:, ~torch.eye(10, dtype=torch.bool)]
    return {"sibling_cosine": cosines.mean().item(), "map_at_r": value}


ABLATIONS = {
    "kmeans_start": (
        kmeans_start,
        {f"K={count}, {start}": (count, start) for count in (10, 30) for start in ("random", "k-means")},
        {f"epoch_{epoch}": f"MAP@R after epoch {epoch}" for epoch in EPOCHS},
    ),
    "miner": (
        miner,
        {"frozen features": (None,), "MultiSimilarity": (lambda *_: MultiSimilarityLoss(),)}
        | {f"MultiProxyEntropy, K={count}": (ours(count),) for count in (10, 30)}
        | {
            f"K={count} + {weight} MultiSimilarity, {how}": (with_pairs(count, weight, how),)
            for count in (10, 30)
            for weight, how in ((0.1, "all pairs"), (0.1, "with the miner"), (0.3, "with the miner"))
        },
        {"map_at_r": "MAP@R"},
    ),
    "regularizer": (
        regularizer,
        {
            f"{loss}, K=10, {f'regularizer at weight {weight}' if weight else 'no regularizer'}": (loss, weight)
            for loss in ("SoftTriple", "MultiProxyEntropy")
            for weight in (0, 0.1, 1)
        },
        {"sibling_cosine": "sibling cosine", "map_at_r": "MAP@R"},
    ),
}
"""By name: the function that runs; its arguments, by label; the columns of the table."""


def make_table(rows, labels, columns):
    """Mean ± standard deviation over the seeds."""
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---|" + "---|" * len(columns)]
    for label in labels:
        values = np.array([[float(row[c]) for c in columns] for row in rows if row["configuration"] == label])
        digits = np.where(abs(values).max(axis=0) > 2, 1, 2)
        spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(columns))
        cells = [f"{m:.{d}f} ± {s:.{d}f}" for m, s, d in zip(values.mean(axis=0), spread, digits, strict=True)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", nargs="+", choices=ABLATIONS, default=list(ABLATIONS), help="default: all")
    parser.add_argument("--data", required=True, metavar="DIR", help="the folder of the features of CLINC150")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default: %(default)s")
    args = parser.parse_args(argv)
    task = TASKS["clinc-coarse"](args.data)
    for name in args.table:
        run, configurations, columns = ABLATIONS[name]
        path = RESULTS / f"{name}.csv"
        done = {(row["configuration"], int(row["seed"])) for row in csv_rows.read(path)}
        todo = [(label, seed) for seed in range(args.seeds) for label in configurations if (label, seed) not in done]
        for label, seed in tqdm(todo, desc=name, disable=not todo):
            torch.manual_seed(seed)
            row = {"configuration": label, "seed": seed}
            row |= {key: f"{value:.4g}" for key, value in run(task, seed, *configurations[label]).items()}
            row |= {"date": date.today().isoformat(), "torch": torch.__version__}
            csv_rows.append(path, row | {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads"})
        table = make_table(csv_rows.read(path), configurations, columns)
        (RESULTS / f"{name}.md").write_text(table)
        print(table)


if __name__ == "__main__":
    main()
