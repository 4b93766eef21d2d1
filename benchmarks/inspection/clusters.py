"""How well the proxies of each class match fine labels that training never saw: ACC, NMI and ARI beside MAP@R.

The tasks of benchmarks/retrieval whose training labels are coarse, on their test part. Ours and PML's losses with
several proxies per class, each at its defaults, of which --seeds trainings. The table has the mean ± standard deviation
over the seeds, in %.

Writes one row per training to results/clusters.csv, goes on from what that holds, and makes results/clusters.md of it.
"""

import argparse
import platform
from datetime import date
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.inspection import Scores, cluster_scores

from .. import csv_rows
from ..retrieval.losses import FAMILIES, OURS, load
from ..retrieval.tasks import TASKS
from ..retrieval.training import embed, evaluate, proxies_of, train

RESULTS = Path(__file__).parent / "results"
COARSE = [task for task in TASKS if "coarse" in task]
LOSSES = [OURS, "SoftTriple", "SubCenterArcFace"]
COLUMNS = {"accuracy": "ACC", "nmi": "NMI", "ari": "ARI", "map_at_r": "MAP@R"}


def defaults(loss):
    return load()[loss][0]


def run(name, loss, seed, folder):
    task = TASKS[name](folder)
    data, unseen = task.phase("test")
    torch.manual_seed(seed)
    network, loss_func = train(task, data, FAMILIES[loss], defaults(loss), seed)
    scores = of_proxies(proxies_of(loss_func), embed(network, unseen.x), unseen)
    percent = {name: f"{100 * value:.2f}" for name, value in scores._asdict().items()}
    return percent | {"map_at_r": evaluate(network, unseen)["map_at_r"]}


def of_proxies(proxies, embeddings, data) -> Scores:
    """Of the proxies of any loss that compares by cosine: ours takes them over."""
    loss_func = MultiProxyEntropyLoss(len(proxies), proxies.shape[2], proxies.shape[1])
    loss_func.proxies.data = proxies.detach().cpu().contiguous()
    labels = torch.unique(data.coarse, return_inverse=True)[1]
    return cluster_scores(loss_func, embeddings, labels, data.fine).mean


def clusters_per_class(data):
    """How many fine labels a coarse label has, on average."""
    return len(data.fine.unique()) / len(data.coarse.unique())


def make_table(rows):
    names = ["task", "fine labels per class", "loss", "proxies per class", *COLUMNS.values()]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for task in COARSE:
        for loss in LOSSES:
            own = [row for row in rows if (row["task"], row["loss"]) == (task, loss)]
            if own:
                values = np.array([[float(row[column]) for column in COLUMNS] for row in own])
                spread = values.std(axis=0, ddof=1) if len(own) > 1 else None
                cells = [f"{value:.1f}" for value in values.mean(axis=0)]
                if spread is not None:
                    cells = [f"{cell} ± {width:.1f}" for cell, width in zip(cells, spread, strict=True)]
                shape = f"{float(own[0]['fine_per_class']):.0f} | {loss} | {own[0]['proxies_per_class']}"
                lines.append(f"| {task} | {shape} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=COARSE, default=COARSE, help="default: all")
    parser.add_argument("--data", metavar="DIR", help="the folder of the data, see benchmarks/retrieval/tasks.py")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="how many; default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(argv)

    path = args.out / "clusters.csv"
    done = {(row["task"], row["loss"], int(row["seed"])) for row in csv_rows.read(path)}
    wanted = [(task, loss, seed) for task in args.task for loss in LOSSES for seed in range(args.seeds)]
    for task, loss, seed in tqdm([key for key in wanted if key not in done], unit="training"):
        row = {
            "task": task,
            "loss": loss,
            "seed": seed,
            "proxies_per_class": defaults(loss)[FAMILIES[loss].several],
            "fine_per_class": f"{clusters_per_class(TASKS[task](args.data).test):.2f}",
            **run(task, loss, seed, args.data),
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }
        csv_rows.append(path, row)
    table = make_table(csv_rows.read(path))
    (args.out / "clusters.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
