"""Train with two labels, retrieve ten: what several balanced proxies per class are for.

The network sees handwritten digits labelled only as even or odd. Afterwards its embeddings have to find other images of
the same *digit*, a label that training never used. A loss that pulls each class into one blob throws the digits away; a
loss that spreads a class over its proxies keeps them apart. With views, it also learns how a digit may vary: two random
views (rotated, scaled, sheared, shifted) of the same image have to be assigned to the same proxy.

Every loss trains the same network with the same budget on the same two views of each image, at its own default
settings; PML's losses with several proxies get ten per class. The strongest rival takes two steps: k-means splits the
pixels of each class into ten clusters, then NormalizedSoftmaxLoss trains with the clusters as labels. One more row
shows our loss on the images as they are, one view of each. PML's trainer, tester and hooks run everything. Read the
result as it is: one small data set, and we looked at its test labels when we chose the network of the example.

Written to the folder given with --out: metrics.json, table.md, embedding.png, and logs/ with the records of each run as
CSV, SQLite and TensorBoard.
"""

import argparse
import json
import os
import warnings
from datetime import datetime
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # PML shows a bar for every epoch and test of every run; one is enough.

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from digits import EMBEDDING_SIZE, load_data, make_models, stack_random_views
from matplotlib import pyplot as plt
from pytorch_metric_learning import losses, testers, trainers
from pytorch_metric_learning.utils import logging_presets
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.cluster import KMeans
from torch import nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

from pml_multiproxy.losses import MultiProxyEntropyLoss
from pml_multiproxy.views import ViewsDataset
from pml_multiproxy.visualize import plot_class

PROXIES_PER_CLASS = 10  # for PML's losses and k-means: rather more than the five digits in each class
METRICS = {"precision_at_1": "Precision@1", "r_precision": "R-Precision", "mean_average_precision_at_r": "MAP@R"}
OURS = "MultiProxyEntropyLoss"
K_MEANS = "k-means of the pixels, NormalizedSoftmaxLoss"
LOSSES = {
    "SoftTripleLoss": lambda _: losses.SoftTripleLoss(2, EMBEDDING_SIZE, centers_per_class=PROXIES_PER_CLASS),
    "SubCenterArcFaceLoss": lambda _: losses.SubCenterArcFaceLoss(
        num_classes=2, embedding_size=EMBEDDING_SIZE, sub_centers=PROXIES_PER_CLASS
    ),
    "ProxyAnchorLoss": lambda _: losses.ProxyAnchorLoss(2, EMBEDDING_SIZE),
    K_MEANS: lambda _: losses.NormalizedSoftmaxLoss(2 * PROXIES_PER_CLASS, EMBEDDING_SIZE),
    OURS: lambda views: MultiProxyEntropyLoss(2, EMBEDDING_SIZE, views=views, collect_stats=True),
}
RUNS = {
    ("SoftTripleLoss", 2): PROXIES_PER_CLASS,
    ("SubCenterArcFaceLoss", 2): PROXIES_PER_CLASS,
    ("ProxyAnchorLoss", 2): 1,
    (K_MEANS, 2): PROXIES_PER_CLASS,
    (OURS, 1): 50,
    (OURS, 2): 50,
}
"""Loss and number of views: proxies per class."""


def clustered(train_set, seed):
    """The training images, labelled by their cluster within their class."""
    images, labels = train_set.tensors
    clusters = torch.empty_like(labels)
    for label in (0, 1):
        k_means = KMeans(PROXIES_PER_CLASS, n_init=3, random_state=seed)
        found = k_means.fit_predict(images[labels == label].flatten(1).numpy())
        clusters[labels == label] = label * PROXIES_PER_CLASS + torch.as_tensor(found).long()
    return TensorDataset(images, clusters)


def train_and_test(loss_name, views, seed, epochs, log_dir, bar):
    """One run through PML's trainer, tester and hooks; returns the metrics, the models and the loss."""
    train_set, test_set = load_data()
    if loss_name == K_MEANS:
        train_set = clustered(train_set, seed)
    if views > 1:
        train_set = ViewsDataset(train_set, views)
    torch.manual_seed(seed)
    models, loss_func = make_models(), LOSSES[loss_name](views)
    torch.manual_seed(seed)  # the same batches and views for all losses, which take different numbers to start
    record_keeper, _, _ = logging_presets.get_record_keeper(str(log_dir / "csv"), str(log_dir / "tensorboard"))
    hooks = logging_presets.get_hook_container(record_keeper, validation_split_name="test", log_freq=10)
    tester = testers.GlobalEmbeddingSpaceTester(
        end_of_testing_hook=hooks.end_of_testing_hook,
        batch_size=256,
        dataloader_num_workers=0,
        accuracy_calculator=AccuracyCalculator(include=tuple(METRICS), k="max_bin_count"),
    )
    log_epoch = hooks.end_of_epoch_hook(tester, {"test": test_set}, str(log_dir / "models"), test_interval=epochs)

    def end_of_epoch(trainer):
        bar.set_description(f"{loss_name}, {views} view{'s' * (views > 1)}, seed {seed}")
        bar.update()
        return log_epoch(trainer)

    trainers.MetricLossOnly(
        models=models,
        optimizers={
            "trunk_optimizer": torch.optim.AdamW(models["trunk"].parameters(), lr=1e-3),
            "embedder_optimizer": torch.optim.AdamW(models["embedder"].parameters(), lr=1e-3),
            # Without this one, the trainer would leave the proxies as they were drawn, and say nothing.
            "metric_loss_optimizer": torch.optim.AdamW(loss_func.parameters(), lr=1e-2),
        },
        batch_size=64,
        loss_funcs={"metric_loss": loss_func},
        dataset=train_set,
        collate_fn=stack_random_views if views > 1 else None,
        dataloader_num_workers=0,
        end_of_iteration_hook=hooks.end_of_iteration_hook,
        end_of_epoch_hook=end_of_epoch,
    ).train(num_epochs=epochs)
    accuracies = tester.all_accuracies["test"]
    return {metric: accuracies[f"{metric}_level0"] for metric in METRICS}, models, loss_func


def pixel_metrics():
    """The same metrics for the images as they are: what an embedding has to beat."""
    images, digits = load_data()[1].tensors
    pixels = nn.functional.normalize(images.flatten(1))
    accuracies = AccuracyCalculator(include=tuple(METRICS), k="max_bin_count").get_accuracy(pixels, digits)
    return [accuracies[metric] for metric in METRICS]


def make_table(rows):
    """Markdown: mean ± standard deviation over the seeds, in %."""
    lines = [
        "| loss | proxies per class | views | " + " | ".join(METRICS.values()) + " |",
        "|---" * (3 + len(METRICS)) + "|",
    ]
    for (loss_name, views), proxies in RUNS.items():
        own = [row for row in rows if (row["loss"], row["views"]) == (loss_name, views)]
        values = np.array([[row[metric] for metric in METRICS] for row in own]) * 100
        cells = [f"{mean:.1f}" for mean in values.mean(axis=0)]
        if len(values) > 1:
            cells = [f"{cell} ± {spread:.1f}" for cell, spread in zip(cells, values.std(axis=0, ddof=1), strict=True)]
        lines.append(f"| {loss_name} | {proxies} | {views} | " + " | ".join(cells) + " |")
    cells = [f"{value * 100:.1f}" for value in pixel_metrics()]
    lines.append("| no training: the pixels | – | – | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def proxies_of(loss_func):
    if isinstance(loss_func, MultiProxyEntropyLoss):
        return loss_func.proxies.detach()
    return loss_func.fc.detach().T.unflatten(0, (2, PROXIES_PER_CLASS))


@torch.no_grad()
def make_picture(path, trained):
    images, digits = load_data()[1].tensors
    figure, axes = plt.subplots(2, len(trained), figsize=(6 * len(trained), 11), squeeze=False)
    for column, (loss_name, (network, loss_func)) in zip(axes.T, trained.items(), strict=True):
        embeddings = nn.functional.normalize(network(images))
        for label, (ax, class_name) in enumerate(zip(column, ("even", "odd"), strict=True)):
            own = digits % 2 == label
            proxies = nn.functional.normalize(proxies_of(loss_func)[label])
            plot_class(embeddings[own], proxies, digits[own], ax, legend_title="digit")
            ax.set_title(f"{loss_name}: class “{class_name}”")
    figure.suptitle(
        "Test embeddings (dots), each with a line to its nearest proxy (stars). Trained with the labels even "
        "and odd, on two views of each image.\n"
        "A star has the colour of the digit that most of its dots show; a small white star has no dots."
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv=None):
    warnings.filterwarnings("ignore", "Converting a tensor with requires_grad")  # PML's own progress bar does that
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default="runs/coarse_to_fine", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=15, metavar="N", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how many; default: %(default)s")
    args = parser.parse_args(argv)
    if args.epochs < 1 or args.seeds < 1:
        parser.error(f"--epochs and --seeds must be at least 1, got {args.epochs} and {args.seeds}")

    logs = args.out / "logs" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")  # an earlier call keeps its own
    rows, pictured = [], {}
    with tqdm(total=len(RUNS) * args.seeds * args.epochs, unit="epoch", disable=False) as bar:
        for seed in range(args.seeds):
            for loss_name, views in RUNS:
                log_dir = logs / f"{loss_name.replace(' ', '_')}_views{views}_seed{seed}"
                metrics, models, loss_func = train_and_test(loss_name, views, seed, args.epochs, log_dir, bar)
                rows.append({"loss": loss_name, "seed": seed, "views": views, **metrics})
                if seed == 0 and (loss_name, views) in ((OURS, 2), ("SoftTripleLoss", 2)):
                    pictured[loss_name] = nn.Sequential(*models.values()).eval(), loss_func

    table = make_table(rows)
    (args.out / "metrics.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.out / "table.md").write_text(table)
    make_picture(args.out / "embedding.png", dict(sorted(pictured.items())))
    print("\nRetrieving ten digits after training with two labels: in %, mean ± standard deviation over the seeds\n")
    print(table)
    print(f"Written: {args.out}/metrics.json, table.md, embedding.png; records of each run below {logs}")


if __name__ == "__main__":
    main()
