"""The agreement of two seeds as a guide: beside MAP@R, over pairs of seeds, by number of samples; and what it costs.

Trains with coarse labels, and compares trainings that differ in their seed alone on held-out samples, as a user without
fine labels can. Ours over a grid of K and temperature, two seeds each; losses whose proxies are not balanced, of which
most end with one proxy that takes nearly all samples; and three settings on --seeds seeds, from which pairs are formed
that share no seed. MAP@R of the held-out samples stands beside it.

Writes one row per training to results/runs.csv, and goes on from what that holds; then, of these rows alone,
the tables guide.md, pairs.md and samples.md. --cost measures the CPU seconds of a call on assignments drawn at
random instead, the least of three, and writes cost.csv and cost.md.
"""

import argparse
import csv
import math
import platform
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pytorch_metric_learning import losses
from scipy.stats import spearmanr
from torch import nn
from tqdm import tqdm

from benchmarks.retrieval.tasks import TASKS, Data, joined
from benchmarks.retrieval.training import embed, evaluate
from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.agreement import assignment_agreement

RESULTS = Path(__file__).parent / "results"
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
ROTATION, SCALING, SHEAR, SHIFT = math.radians(15), 0.15, 0.15, 0.1
VIEWS = {
    "digits-coarse": ("digits-coarse", 1),
    "digits-coarse, two views": ("digits-coarse", 2),
    "clinc-coarse": ("clinc-coarse", 1),
    "omniglot-coarse, two views": ("omniglot-coarse", 2),
}
"""The task of the retrieval benchmark, and how many random views of a sample a batch holds."""

SETTINGS = {"scale": 10, "pooling": "logsumexp", "intra_weight": 0.5, "inter_weight": 0.0, "balance_weight": 0.5}
OURS = "MultiProxyEntropy"
LOSSES = {
    OURS: lambda classes, size, count, temperature, views: MultiProxyEntropyLoss(
        classes, size, count, temperature=temperature, views=views, **SETTINGS
    ),
    "MultiProxyEntropy, no balance": lambda classes, size, count, temperature, views: MultiProxyEntropyLoss(
        classes, size, count, temperature=temperature, views=views, **SETTINGS | {"balance_weight": 0.0}
    ),
    "SoftTriple": lambda classes, size, count, *_: losses.SoftTripleLoss(classes, size, centers_per_class=count),
    "SubCenterArcFace": lambda classes, size, count, *_: losses.SubCenterArcFaceLoss(
        num_classes=classes, embedding_size=size, sub_centers=count
    ),
}
GRID = [(OURS, count, temperature) for count in (2, 5, 10, 30) for temperature in (0.05, 0.1, 0.2)]
UNBALANCED = [(loss, count, 0.1) for loss in LOSSES if loss != OURS for count in (5, 30)]
OFTEN = [(OURS, count, 0.1) for count in (2, 10, 30)]
SAMPLES = [5, 10, 20, 50, 100, 200]
SUBSETS = 20
SHAPES = [(1_000, 1, 10), (10_000, 1, 10), (100_000, 1, 10), (10_000, 1, 50), (10_000, 10, 10), (10_000, 100, 10)]
SHAPES += [(100_000, 1_000, 10), (1_000_000, 10, 10)]
"""Samples, classes, proxies per class."""


class Key(NamedTuple):
    task: str
    loss: str
    proxies_per_class: int
    temperature: float
    seed: int


def augment(images):
    """One random affine view of each image; what comes from outside it is 0."""
    bounds = torch.tensor([[ROTATION], [SCALING], [SHEAR], [SHIFT], [SHIFT]])
    angle, scale, shear, right, down = (2 * torch.rand(5, len(images)) - 1) * bounds
    cosine, sine = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    rows = [cosine, shear * cosine - sine, 2 * right], [sine, shear * sine + cosine, 2 * down]
    matrix = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)
    grid = nn.functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


def run(key, folder):
    """MAP@R in %, and the proxy of each held-out sample: per class a word, per sample a letter."""
    name, views = VIEWS[key.task]
    task = TASKS[name](folder)
    held_out = Data(*(joined(*parts) for parts in zip(task.validation, task.test, strict=True)))
    torch.manual_seed(key.seed)
    network, classes = task.make_network(), len(task.train.coarse.unique())
    loss_func = LOSSES[key.loss](classes, task.embedding_size, key.proxies_per_class, key.temperature, views)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    optimizer.add_param_group({"params": loss_func.parameters(), "lr": 1e-2})
    for _ in range(task.epochs):
        for batch in torch.randperm(len(task.train.coarse)).split(task.batch_size):
            x = task.train.x[batch]
            if views > 1:
                x = augment(x.repeat(views, 1, 1, 1))
            optimizer.zero_grad()
            loss_func(network(x), task.train.coarse[batch].repeat(views)).backward()
            optimizer.step()
    proxies = nn.functional.normalize(proxies_of(loss_func, classes), dim=2)
    nearest = torch.einsum("bd,bkd->bk", embed(network, held_out.x), proxies[held_out.coarse]).argmax(dim=1)
    words = ["".join(DIGITS[k] for k in nearest[held_out.coarse == c]) for c in range(classes)]
    return {"map_at_r": evaluate(network, held_out)["map_at_r"], "assigned": " ".join(words)}


def proxies_of(loss_func, classes):
    """Of our losses and PML's alike."""
    if isinstance(loss_func, MultiProxyEntropyLoss):
        return loss_func.proxies.detach()
    weights = loss_func.fc if isinstance(loss_func, losses.SoftTripleLoss) else loss_func.W
    return weights.detach().T.unflatten(0, (classes, -1))


class Runs:
    """The rows of runs.csv."""

    def __init__(self, out):
        self.path = out / "runs.csv"
        rows = list(csv.DictReader(self.path.read_text().splitlines())) if self.path.exists() else []
        self.rows = {key_of(row): row for row in rows}

    def add(self, key, folder):
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
        row = key._asdict() | run(key, folder)
        row |= {"date": date.today().isoformat(), "torch": torch.__version__, "machine": machine}
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row, lineterminator="\n")
            if not self.rows:
                writer.writeheader()
            writer.writerow(row)
        self.rows[key] = row

    def pairs(self, task, setting):
        """Of one setting, pairs of rows that share no seed."""
        rows = [row for key, row in sorted(self.rows.items()) if (key.task, key[1:4]) == (task, setting)]
        return list(zip(rows[::2], rows[1::2], strict=False))


def key_of(row):
    count, temperature, seed = int(row["proxies_per_class"]), float(row["temperature"]), int(row["seed"])
    return Key(row["task"], row["loss"], count, temperature, seed)


def compare(pair, samples=None, generator=None):
    """The agreement of two rows; of so many samples per class, drawn at random."""
    words = [row["assigned"].split() for row in pair]
    labels = np.repeat(np.arange(len(words[0])), [len(word) for word in words[0]])
    assignments = [np.frombuffer("".join(word).encode(), dtype=np.uint8) for word in words]
    if samples:
        order = generator.permutation(len(labels))
        order = order[np.argsort(labels[order], kind="stable")]
        rank = np.arange(len(order)) - np.searchsorted(labels[order], labels[order])
        kept = order[rank < samples]
        labels, assignments = labels[kept], [assignment[kept] for assignment in assignments]
    return assignment_agreement(assignments, labels, min_samples=1)


def map_at_r(pair):
    return np.mean([float(row["map_at_r"]) for row in pair])


def largest_share(pair):
    """The mean share of a class that its most used proxy takes."""
    words = [word for row in pair for word in row["assigned"].split()]
    return np.mean([max(word.count(letter) for letter in set(word)) / len(word) for word in words])


def table(columns, rows):
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def guide(runs, tasks):
    """Each measure as a guide: what it chooses among our settings, and what among all."""
    rows = []
    for task in tasks:
        first = {setting: runs.pairs(task, setting)[0] for setting in GRID + UNBALANCED if runs.pairs(task, setting)}
        for what, settings in (("ours", GRID), ("with unbalanced", GRID + UNBALANCED)):
            pairs = {setting: first[setting] for setting in settings if setting in first}
            if len(pairs) < len(settings):
                continue
            scores = [map_at_r(pair) for pair in pairs.values()]
            for measure in ("mean", "normalized"):
                values = [getattr(compare(pair), measure) for pair in pairs.values()]
                chosen = int(np.argmax(values))
                loss, count, temperature = list(pairs)[chosen]
                name = f"{loss}, K={count}" + (f", τ={temperature:g}" if loss == OURS else "")
                rows.append(
                    [
                        task,
                        what,
                        "nats" if measure == "mean" else "adjusted mutual information",
                        f"{spearmanr(values, scores)[0]:.2f}",
                        name,
                        f"{values[chosen]:.2f}",
                        f"{100 * largest_share(list(pairs.values())[chosen]):.0f} %",
                        f"{scores[chosen]:.1f}",
                        f"{max(scores):.1f}",
                    ]
                )
    columns = ["task", "settings", "agreement in", "Spearman with MAP@R", "chosen", "its agreement"]
    return table([*columns, "its most used proxy takes", "its MAP@R", "best MAP@R"], rows)


def pairs(runs, tasks):
    rows = []
    for task in tasks:
        for setting in OFTEN:
            found = runs.pairs(task, setting)
            if len(found) > 1:
                values, scores = [compare(pair).mean for pair in found], [map_at_r(pair) for pair in found]
                spread = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
                rows.append([task, setting[1], len(found), spread, f"{min(values):.2f} to {max(values):.2f}"])
                rows[-1] += [f"{np.mean(scores):.1f}", f"{spearmanr(values, scores)[0]:.2f}"]
    columns = ["task", "K", "pairs of seeds", "agreement", "range", "MAP@R", "Spearman over the pairs"]
    return table(columns, rows)


def samples(runs, tasks):
    """By number of held-out samples per class: the mean, and the spread that comes from which samples they are."""
    rows, generator = [], np.random.default_rng(0)
    for task in tasks:
        for setting in OFTEN:
            found = runs.pairs(task, setting)[:10]
            if len(found) < 2:
                continue
            row = [task, setting[1]]
            for count in SAMPLES:
                values = np.array([[compare(p, count, generator).mean for _ in range(SUBSETS)] for p in found])
                row.append(f"{values.mean():.2f} ± {values.std(axis=1, ddof=1).mean():.2f}")
            rows.append([*row, f"{np.mean([compare(pair).mean for pair in found]):.2f}"])
    return table(["task", "K", *map(str, SAMPLES), "all"], rows)


def cost(out):
    rows = []
    for samples_, classes, count in tqdm(SHAPES, desc="cost"):
        generator = np.random.default_rng(0)
        labels = np.arange(samples_) % classes
        first = generator.integers(count, size=samples_)
        second = np.where(generator.random(samples_) < 0.5, first, generator.integers(count, size=samples_))
        seconds = []
        for _ in range(3):
            start = time.process_time()
            assignment_agreement([first, second], labels, min_samples=1)
            seconds.append(time.process_time() - start)
        rows.append([samples_, classes, count, f"{min(seconds):.3g}"])
    columns = ["samples", "classes", "proxies per class", "CPU seconds"]
    with (out / "cost.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])
    (out / "cost.md").write_text(table(columns, [[f"{number:,}" for number in row[:3]] + [row[3]] for row in rows]))
    print((out / "cost.md").read_text())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    digits = [task for task in VIEWS if task.startswith("digits")]
    parser.add_argument("--task", nargs="*", choices=VIEWS, default=digits, metavar="NAME", help="; ".join(VIEWS))
    parser.add_argument("--data", metavar="DIR", help="where the files lie that are not part of scikit-learn")
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="of three settings; default: %(default)s")
    parser.add_argument("--cost", action="store_true", help="only measure the seconds of a call")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.cost:
        cost(args.out)
        return
    runs = Runs(args.out)
    todo = [Key(task, *setting, seed) for task in args.task for setting in GRID + UNBALANCED for seed in range(2)]
    todo += [Key(task, *setting, seed) for task in args.task for setting in OFTEN for seed in range(args.seeds)]
    for key in tqdm([key for key in dict.fromkeys(todo) if key not in runs.rows]):
        runs.add(key, args.data)
    for make in (guide, pairs, samples):
        made = make(runs, VIEWS)
        (args.out / f"{make.__name__}.md").write_text(made)
        print(made)


if __name__ == "__main__":
    main()
