"""Choose ``proxies_per_class`` and ``temperature`` without a single fine label, by the agreement of two seeds.

The digits are labelled only as even or odd, and a part of the training images is held out. Optuna tries settings: each
is trained twice, with two seeds, and worth how far the two trainings agree on which held-out images of a class belong
together (pml_multiproxy.agreement). Settings on which they agree little are given up early.

Beside each stands MAP@R of the ten digits in the test half, which the search never saw: whether the choice was good.

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
from digits import EMBEDDING_SIZE, load_data, make_models, make_optimizer, map_at_r
from matplotlib import pyplot as plt
from scipy.stats import spearmanr
from sklearn.model_selection import train_test_split
from torch import nn

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.agreement import proxy_agreement

SEEDS = 0, 1
VIEWS = 2
FIRST_LOOK = 5
"""The epoch after which settings may be given up."""


def random_views(images, generator):
    """Each image ``(B, 1, 8, 8)``, rotated, scaled, sheared and shifted at random."""
    bounds = torch.tensor([[math.radians(15)], [0.15], [0.15], [0.2], [0.2]])
    angle, scale, shear, right, down = (2 * torch.rand(5, len(images), generator=generator) - 1) * bounds
    cosine, sine = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    rows = [cosine, shear * cosine - sine, right], [sine, shear * sine + cosine, down]
    matrix = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)
    grid = nn.functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


class Training:
    """A network and a loss that are trained epoch by epoch. Two of them with one seed are the same."""

    def __init__(self, proxies_per_class, temperature, seed):
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.network = nn.Sequential(*make_models().values())
        self.loss_func = MultiProxyEntropyLoss(
            2,
            EMBEDDING_SIZE,
            proxies_per_class,
            temperature=temperature,
            views=VIEWS,
            scale=10,
            pooling="logsumexp",
            intra_weight=0.5,
            inter_weight=0.0,
            balance_weight=0.5,
        )
        self.optimizer = make_optimizer(self.network, self.loss_func)

    def train_epoch(self, images, labels):
        for batch in torch.randperm(len(labels), generator=self.generator).split(64):
            views = random_views(images[batch].repeat(VIEWS, 1, 1, 1), self.generator)
            self.optimizer.zero_grad()
            self.loss_func(self.network(views), labels[batch].repeat(VIEWS)).backward()
            self.optimizer.step()

    @torch.no_grad()
    def embed(self, images):
        embeddings = self.network.eval()(images)
        self.network.train()
        return embeddings


def split():
    """The training half with its labels even and odd: 70 % to train with, 30 % held out for the agreement."""
    images, labels = load_data()[0].tensors
    kept, held_out = train_test_split(range(len(labels)), test_size=0.3, stratify=labels, random_state=0)
    return (images[kept], labels[kept]), (images[held_out], labels[held_out])


def agreement(trainings, images, labels):
    return proxy_agreement([t.loss_func for t in trainings], [t.embed(images) for t in trainings], labels).mean


def make_objective(epochs):
    (images, labels), held_out = split()

    def objective(trial):
        proxies_per_class = trial.suggest_int("proxies_per_class", 1, 50, log=True)
        temperature = trial.suggest_float("temperature", 0.03, 0.3, log=True)
        trainings = [Training(proxies_per_class, temperature, seed) for seed in SEEDS]
        for epoch in range(1, epochs + 1):
            for training in trainings:
                training.train_epoch(images, labels)
            if epoch >= FIRST_LOOK:
                trial.report(agreement(trainings, *held_out), epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned
        # For the reader alone: Optuna does not look at attributes.
        trial.set_user_attr("map_at_r", sum(map_at_r(training.network) for training in trainings) / len(trainings))
        return agreement(trainings, *held_out)

    return objective


def search(out, trials, epochs):
    """The study in ``out/study.db``, with so many trials in all."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{out / 'study.db'}",
        study_name=f"digits, {epochs} epochs",
        load_if_exists=True,
        direction="maximize",
        pruner=optuna.pruners.PercentilePruner(33, n_startup_trials=8, n_warmup_steps=FIRST_LOOK),
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
    """Markdown: the best by agreement, and the best by what the search never saw."""
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
    ticks = [count for count in (1, 2, 5, 10, 20, 50) if points.norm.vmin <= count <= points.norm.vmax]
    bar.set_ticks(ticks, labels=[str(count) for count in ticks])
    bar.minorticks_off()
    ax.scatter(rows[0]["agreement"], rows[0]["map_at_r"], s=260, facecolor="none", edgecolor="red", linewidth=2)
    ax.annotate(
        f"chosen: K={rows[0]['proxies_per_class']}, temperature {rows[0]['temperature']:.2f}",
        (rows[0]["agreement"], rows[0]["map_at_r"]),
        xytext=(-14, -26),
        textcoords="offset points",
        ha="right",
        color="red",
    )
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
