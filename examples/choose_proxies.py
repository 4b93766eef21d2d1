"""Choose ``proxies_per_class`` and ``temperature`` without a single fine label, by the agreement of two seeds.

The digits are labelled only as even or odd, and a part of the training images is held out. Optuna tries settings. Each
is trained twice; its value is how far the two trainings agree on which held-out images of a class belong together
(pml_multiproxy.agreement). Settings on which they agree less than others did at the same epoch are given up early.

Beside each stands MAP@R of the ten digits in the test half, which the search never saw: it tells whether the choice was
good.

Written to the folder given with --out: study.db, from which a further call goes on; trials.json, table.md, and
agreement.png, a picture of agreement against MAP@R.
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import optuna
import torch
from digits import EMBEDDING_SIZE, load_data, load_views, make_models, make_optimizer, map_at_r, train_epoch
from matplotlib import pyplot as plt
from scipy.stats import spearmanr
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.agreement import proxy_agreement

TRAININGS = 2
VIEWS = 2
FIRST_LOOK = 5
"""The epoch after which settings may be given up."""


class Training:
    """A network and a loss, trained epoch by epoch."""

    def __init__(self, train_set, proxies_per_class, temperature):
        self.batches = load_views(train_set, VIEWS)
        self.network = nn.Sequential(*make_models().values())
        self.loss_func = MultiProxyEntropyLoss(
            2, EMBEDDING_SIZE, proxies_per_class, temperature=temperature, views=VIEWS
        )
        self.optimizer = make_optimizer(self.network, self.loss_func)

    def train_epoch(self):
        train_epoch(self.network, self.loss_func, self.optimizer, self.batches)

    @torch.no_grad()
    def embed(self, images):
        embeddings = self.network.eval()(images)
        self.network.train()
        return embeddings


def split():
    """The training half with its labels even and odd: 70 % to train with, 30 % held out for the agreement."""
    images, labels = load_data()[0].tensors
    kept, held_out = train_test_split(range(len(labels)), test_size=0.3, stratify=labels, random_state=0)
    return TensorDataset(images[kept], labels[kept]), TensorDataset(images[held_out], labels[held_out])


def agreement(trainings, held_out):
    images, labels = held_out.tensors
    return proxy_agreement([t.loss_func for t in trainings], [t.embed(images) for t in trainings], labels).mean


def make_objective(epochs):
    train_set, held_out = split()

    def objective(trial):
        proxies_per_class = trial.suggest_int("proxies_per_class", 1, 100, log=True)
        temperature = trial.suggest_float("temperature", 0.03, 0.3, log=True)
        torch.manual_seed(0)  # The second training goes on in the stream of random numbers, so that it differs.
        trainings = [Training(train_set, proxies_per_class, temperature) for _ in range(TRAININGS)]
        for epoch in range(1, epochs + 1):
            for training in trainings:
                training.train_epoch()
            if epoch >= FIRST_LOOK:
                trial.report(agreement(trainings, held_out), epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned
        # For the reader alone: Optuna does not look at attributes.
        trial.set_user_attr("map_at_r", sum(map_at_r(training.network) for training in trainings) / TRAININGS)
        return agreement(trainings, held_out)

    return objective


def search(out, trials, epochs):
    """The study in ``out/study.db``, with so many trials in all."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{out / 'study.db'}",
        study_name=f"digits, {epochs} epochs",
        load_if_exists=True,
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=8, n_warmup_steps=FIRST_LOOK),
    )
    ended = study.get_trials(states=(optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED))
    study.sampler = optuna.samplers.TPESampler(
        seed=len(ended), n_startup_trials=15
    )  # a seed drawn with is not repeated
    study.optimize(make_objective(epochs), max(0, trials - len(ended)), show_progress_bar=True)
    return study


def completed(study):
    """The trials that were not given up, the highest agreement first."""
    trials = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    return sorted(
        (
            {**trial.params, "agreement": trial.value, "map_at_r": trial.user_attrs["map_at_r"], "trial": trial.number}
            for trial in trials
        ),
        key=lambda row: -row["agreement"],
    )


def make_table(rows, given_up):
    """Markdown: the best by agreement, and the best by fine labels, which the search never saw."""
    best = max(rows, key=lambda row: row["map_at_r"])
    named = {"chosen by agreement": rows[0], "best MAP@R of all trials": best, "least agreement": rows[-1]}
    lines = [
        "| | proxies per class | temperature | agreement | clusters found again | MAP@R |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in named.items():
        settings = f"{row['proxies_per_class']} | {row['temperature']:.3f}"
        clusters = f"{row['agreement']:.2f} | {math.exp(row['agreement']):.1f}"
        lines.append(f"| {name} | {settings} | {clusters} | {row['map_at_r']:.1f} |")
    correlation = spearmanr([row["agreement"] for row in rows], [row["map_at_r"] for row in rows])[0]
    counts = f"{len(rows)} trials, and {given_up} that were given up early"
    return "\n".join([*lines, "", f"{counts}. Spearman correlation of agreement and MAP@R: {correlation:.2f}"]) + "\n"


def make_picture(path, rows):
    figure, ax = plt.subplots(figsize=(8, 5.5), layout="constrained")
    points = ax.scatter(
        [row["agreement"] for row in rows],
        [row["map_at_r"] for row in rows],
        c=[row["proxies_per_class"] for row in rows],
        s=60,
        norm="log",
        cmap="viridis",
        edgecolor="black",
        linewidth=0.5,
    )
    bar = figure.colorbar(points, label="proxies per class")
    ticks = [count for count in (1, 2, 5, 10, 20, 50, 100) if points.norm.vmin <= count <= points.norm.vmax]
    bar.set_ticks(ticks, labels=[str(count) for count in ticks])
    bar.minorticks_off()
    name = f"chosen: K={rows[0]['proxies_per_class']}, temperature {rows[0]['temperature']:.2f}"
    circle = {"s": 260, "facecolor": "none", "edgecolor": "red", "linewidth": 2}
    ax.scatter(rows[0]["agreement"], rows[0]["map_at_r"], label=name, **circle)
    ax.legend(loc="lower right")
    ax.set(xlabel="agreement of two seeds on held-out images, in nats", ylabel="MAP@R of the ten digits, in %")
    ax.set_title("Chosen by agreement, without fine labels; MAP@R was never seen")
    ax.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default="runs/choose_proxies", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--trials", type=int, default=40, metavar="N", help="in all calls; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=15, metavar="N", help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.trials < 1 or args.epochs < 1:
        parser.error(f"--trials and --epochs must be at least 1, got {args.trials} and {args.epochs}")
    args.out.mkdir(parents=True, exist_ok=True)
    study = search(args.out, args.trials, args.epochs)
    rows = completed(study)
    table = make_table(rows, len(study.get_trials(states=(optuna.trial.TrialState.PRUNED,))))
    (args.out / "trials.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.out / "table.md").write_text(table)
    make_picture(args.out / "agreement.png", rows)
    print(f"\n{table}\nWritten: {args.out}/study.db, trials.json, table.md, agreement.png")


if __name__ == "__main__":
    main()
