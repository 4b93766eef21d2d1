"""Shared by the benchmarks: train on the ten domains of CLINC150, retrieve its 150 intents.

The features are frozen sentence embeddings; what is trained is a residual head that starts as the identity, so that
every loss starts from the frozen features and has to do better than them.
"""

import argparse
import platform
from datetime import date
from pathlib import Path

import numpy as np
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import nn
from tqdm import tqdm

from . import csv_rows

RESULTS = Path(__file__).parent / "ablations" / "results"
FILE = "clinc150_minilm.npz"
SIZE = 384


def make_parser(description, seeds):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help=f"where {FILE} lies")
    parser.add_argument("--seeds", type=int, default=seeds, metavar="N", help="default: %(default)s")
    return parser


class Data:
    """``x_train``, ``domain_train``, ``intent_train`` to train with; ``x_test``, ``intent_test`` to retrieve."""

    def __init__(self, folder):
        path = Path(folder) / FILE
        if not path.exists():
            raise SystemExit(
                f"{path} is missing: CLINC150 (github.com/clinc/oos-eval) as L2-normalised sentence embeddings of "
                "all-MiniLM-L6-v2; python -m benchmarks.clinc_features makes it"
            )
        arrays = np.load(path)
        features = torch.tensor(arrays["features"].astype("float32"))
        train, test = (torch.tensor(np.flatnonzero(arrays["split"] == split)) for split in (0, 2))
        self.x_train, self.x_test = features[train], features[test]
        self.domain_train = torch.tensor(arrays["superclass"].astype("int64"))[train]
        intents = torch.tensor(arrays["label"].astype("int64"))
        self.intent_train, self.intent_test = intents[train], intents[test]


class ResidualHead(nn.Module):
    def __init__(self, hidden=512):
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, hidden), nn.Linear(hidden, SIZE)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x)))


def train(features, labels, head, loss_func, optimizer, epochs, batch_size=128, after_epoch=None):
    """``loss_func(embeddings, labels)`` over shuffled batches, and ``after_epoch(epoch)``."""
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(features)).split(batch_size):
            optimizer.zero_grad()
            loss_func(head(features[batch]), labels[batch]).backward()
            optimizer.step()
        if after_epoch:
            after_epoch(epoch)


def make_optimizer(head, loss_func, lr=1e-3, proxies_lr=1e-2):
    return torch.optim.AdamW(
        [{"params": head.parameters(), "lr": lr}, {"params": loss_func.parameters(), "lr": proxies_lr}]
    )


@torch.no_grad()
def map_at_r(data, head):
    """MAP@R of the intents among the test samples, in %."""
    calculator = AccuracyCalculator(include=("mean_average_precision_at_r",), k="max_bin_count")
    embeddings = nn.functional.normalize(head(data.x_test))
    return 100 * calculator.get_accuracy(embeddings, data.intent_test)["mean_average_precision_at_r"]


def run_all(name, configurations, seeds, run):
    """Calls ``run(seed, **configuration)`` for all that ``results/NAME.csv`` does not hold yet; returns all its rows.

    ``configurations`` maps a label to keyword arguments; ``run`` returns a dict of numbers.
    """
    path = RESULTS / f"{name}.csv"
    done = {(row["configuration"], int(row["seed"])) for row in csv_rows.read(path)}
    todo = [(label, seed) for seed in range(seeds) for label in configurations if (label, seed) not in done]
    for label, seed in tqdm(todo, desc=name, disable=not todo):
        torch.manual_seed(seed)
        row = {
            "configuration": label,
            "seed": seed,
            **{key: f"{value:.4g}" for key, value in run(seed, **configurations[label]).items()},
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }
        csv_rows.append(path, row)
    return csv_rows.read(path)


def publish(name, rows, configurations, columns):
    """Prints the table and writes it to results/NAME.md: mean ± standard deviation over the seeds.

    ``columns`` maps columns of the CSV to titles.
    """
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---|" + "---|" * len(columns)]
    for label in configurations:
        cells = []
        for column in columns:
            values = np.array([float(row[column]) for row in rows if row["configuration"] == label])
            digits = 1 if abs(values).max() > 2 else 2
            spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{spread}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    table = "\n".join(lines) + "\n"
    (RESULTS / f"{name}.md").write_text(table)
    print(table)
