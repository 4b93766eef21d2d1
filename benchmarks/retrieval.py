"""MAP@R of our loss beside PML's, under one protocol for all, as Musgrave et al. ask for.

(*A Metric Learning Reality Check*, ECCV 2020.) Within a task, every loss trains the same network with the same
optimizer, batches and epochs. Each has twelve configurations, the same on every task (retrieval_losses.py). Each of
them is run once and evaluated on a validation part; then, with fresh seeds, on the test part: the configuration that
was best on validation, the documented defaults, and the one that was best on the other tasks. For the test, validation
data are trained on, too. Where training labels are coarse, validation uses the fine labels of held-out samples; where
the test classes are new, held-out classes. --sweep evaluates changes of our defaults on validation, and tests the best.

Writes one row per run to results/retrieval/TASK.csv, and goes on from what these hold. --report makes the tables and
pictures of them alone.
"""

import argparse
import csv
import platform
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from retrieval_losses import COUNTS, FAMILIES, UNTRAINED, changes, cluster, load, settings_of
from retrieval_report import OURS, SEVERAL_PROXIES, chosen, report
from retrieval_tasks import IMAGE_TASKS, TASKS
from torch import nn
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results" / "retrieval"
METRICS = "map_at_r", "r_precision", "precision_at_1"
VALIDATION_SEED = 100
SWEEP_SEEDS = 100, 101
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(task, data, family, configuration, seed):
    """The trained network."""
    settings = dict(configuration)
    proxies_lr, from_kmeans = settings.pop("proxies_lr"), settings.pop("from_kmeans", False)
    labels = torch.unique(data.coarse, return_inverse=True)[1]
    count = settings.pop("clusters", None)
    if count:
        labels = torch.unique(cluster(data.x, labels, count, seed), return_inverse=True)[1]
    network = task.make_network().to(DEVICE)
    loss_func = family.build(int(labels.max()) + 1, task.embedding_size, **settings).to(DEVICE)
    if from_kmeans:
        loss_func.init_proxies(embed(network, data.x).to(DEVICE), labels)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    if list(loss_func.parameters()):
        optimizer.add_param_group({"params": loss_func.parameters(), "lr": proxies_lr})
    for _ in range(task.epochs):
        for batch in batches(task, data.coarse):
            optimizer.zero_grad()
            loss_func(network(data.x[batch].to(DEVICE)), labels[batch].to(DEVICE)).backward()
            optimizer.step()
    return network


def batches(task, labels):
    if task.per_class is None:
        return torch.randperm(len(labels)).split(task.batch_size)
    sampler = MPerClassSampler(labels, task.per_class, length_before_new_iter=len(labels))
    return torch.tensor(list(sampler)).split(task.batch_size)


@torch.no_grad()
def embed(network, x):
    network.eval()
    parts = [nn.functional.normalize(network(x[batch].to(DEVICE))) for batch in torch.arange(len(x)).split(1024)]
    network.train()
    return torch.cat(parts).cpu()


def evaluate(network, data):
    """Each metric as the mean over the classes, in %; MAP@R of each class, too."""
    calculator = AccuracyCalculator(
        include=("mean_average_precision_at_r", *METRICS[1:]), k="max_bin_count", return_per_class=True
    )
    by_class = calculator.get_accuracy(embed(network, data.x), data.fine)
    by_class["map_at_r"] = by_class["mean_average_precision_at_r"]
    means = {name: f"{100 * np.mean(by_class[name]):.2f}" for name in METRICS}
    return means | {"map_at_r_by_class": " ".join(f"{100 * value:.1f}" for value in by_class["map_at_r"])}


def run(task, phase, name, configuration, seed):
    torch.manual_seed(seed)
    np.random.seed(seed)  # which the sampler draws from
    data, unseen = task.phase(phase)
    network = (
        task.make_network().to(DEVICE) if name == UNTRAINED else train(task, data, FAMILIES[name], configuration, seed)
    )
    return evaluate(network, unseen)


class Runs:
    """The rows of one task, in its CSV."""

    def __init__(self, name, folder, out):
        self.path, self.name, self.folder, self.task = out / f"{name}.csv", name, folder, None
        self.rows = list(csv.DictReader(self.path.read_text().splitlines())) if self.path.exists() else []

    def get(self, phase, loss, index):
        """By seed. ``index``: the number of the configuration, or what is changed in the first."""
        key = phase, loss, str(index)
        return {int(row["seed"]): row for row in self.rows if (row["phase"], row["loss"], row["configuration"]) == key}

    def validated(self, loss):
        """MAP@R on validation by configuration, or None where some are missing."""
        found = [self.get("validation", loss, index) for index in range(len(load()[loss]))]
        return [float(rows[VALIDATION_SEED]["map_at_r"]) for rows in found] if all(found) else None

    def has(self, phase, loss, index, configuration, seed):
        return seed in self.get(phase, loss, index)

    def add(self, phase, loss, index, configuration, seed):
        self.task = self.task or (TASKS | IMAGE_TASKS)[self.name](self.folder)
        start = time.perf_counter()
        result = run(self.task, "validation" if phase == "sweep" else phase, loss, configuration, seed)
        row = {
            "task": self.name,
            "phase": phase,
            "loss": loss,
            "configuration": index,
            "seed": seed,
            **result,
            "seconds": f"{time.perf_counter() - start:.1f}",
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "PML": version("pytorch-metric-learning"),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {DEVICE}",
        }
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append({key: str(value) for key, value in row.items()})


def plan(runs, name, args):
    """The arguments of the runs that there should be, in the order to do them in."""
    # Of images, there are no inputs that k-means could cluster.
    losses = [loss for loss in args.losses if name in TASKS or FAMILIES[loss].several != "clusters"]
    for index in range(args.configs):
        for loss in losses:
            yield "validation", loss, index, settings_of(loss, index), VALIDATION_SEED
    if args.sweep:
        yield from sweep(name, losses, args.seeds)
    for seed in range(args.seeds):
        yield "test", UNTRAINED, 0, None, seed
        for loss in losses:
            for index in dict.fromkeys(chosen(runs, name, loss).values()):
                yield "test", loss, index, settings_of(loss, index), seed


def sweep(task, losses, seeds):
    peers = SEVERAL_PROXIES if task.endswith("coarse") else ()
    for seed in SWEEP_SEEDS[:seeds]:
        for loss in losses:
            if loss == OURS:
                yield from (("sweep", loss, label, settings_of(loss, label), seed) for label in changes())
            elif loss in peers:
                for count in COUNTS:
                    label = f"{FAMILIES[loss].several}={count}"
                    yield "sweep", loss, label, settings_of(loss, label), seed


def main():
    tasks = [*TASKS, *IMAGE_TASKS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=tasks, default=[], metavar="NAME", help=", ".join(tasks))
    parser.add_argument("--losses", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--data", metavar="DIR", help="where the files lie that are not part of scikit-learn")
    parser.add_argument("--configs", type=int, default=12, metavar="N", help="how many of each loss; default: all 12")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--sweep", action="store_true", help="changes of our defaults, too, on one or two seeds")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--report", action="store_true", help="tables and pictures of what the CSV files hold")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    runs = {name: Runs(name, args.data, args.out) for name in tasks}
    for name in args.task:
        for _ in range(2):  # in the second round, validation has chosen what to test
            todo = [arguments for arguments in plan(runs, name, args) if not runs[name].has(*arguments)]
            for arguments in tqdm(todo, desc=name, disable=not todo):
                runs[name].add(*arguments)
    if args.report:
        report(runs, args.out)


if __name__ == "__main__":
    main()
