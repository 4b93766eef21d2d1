"""How well the proxies of each class match fine labels that training never saw: ACC, NMI and ARI beside MAP@R.

On the test part of the tasks of benchmarks/retrieval whose training labels are coarse: ours and PML's losses with
several proxies per class, each at its defaults. The table has the mean ± standard deviation over --seeds trainings, in
%. Writes one row to results/clusters.csv when a training ends, goes on from what that holds, and makes
results/clusters.md of it.
"""

import argparse
import platform
from datetime import date
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.inspection import Scores, cluster_scores

from .. import csv_rows
from ..retrieval.losses import FAMILIES, NO_NEIGHBOR_TERM, OURS, configurations, to_text
from ..retrieval.selection import applies
from ..retrieval.tables import table
from ..retrieval.tasks import TASKS
from ..retrieval.training import embed, evaluate, proxies_of, train

RESULTS = Path(__file__).parent / "results"
COARSE = [task for task in TASKS if "coarse" in task]
LOSSES = [OURS, NO_NEIGHBOR_TERM, "SoftTriple", "SubCenterArcFace"]
COLUMNS = {"accuracy": "ACC", "nmi": "NMI", "ari": "ARI", "map_at_r": "MAP@R"}


def run(name, loss, seed, folder):
    task = TASKS[name](folder)
    data, unseen = task.phase("test")
    torch.manual_seed(seed)
    network, loss_func = train(task, data, FAMILIES[loss], configurations(loss, name)[0], seed)
    scores = of_proxies(proxies_of(loss_func), embed(network, unseen.x), unseen)
    fine_per_class = len(unseen.fine.unique()) / len(unseen.coarse.unique())
    percent = {name: f"{100 * value:.2f}" for name, value in scores._asdict().items()}
    return {"fine_per_class": f"{fine_per_class:.2f}"} | percent | {"map_at_r": evaluate(network, unseen)["map_at_r"]}


def of_proxies(proxies, embeddings, data) -> Scores:
    """The scores of the proxies of any loss that compares by cosine; ours is made to hold them."""
    loss_func = MultiProxyEntropyLoss(len(proxies), proxies.shape[2], proxies.shape[1])
    loss_func.proxies.data = proxies.detach().cpu().contiguous()
    labels = torch.unique(data.coarse, return_inverse=True)[1]
    return cluster_scores(loss_func, embeddings, labels, data.fine).mean


def settings_of(loss, task):
    return to_text(configurations(loss, task)[0])


def make_table(rows):
    lines = []
    for task, loss in product(COARSE, LOSSES):
        key = task, loss, settings_of(loss, task)
        own = [row for row in rows if (row["task"], row["loss"], row["settings"]) == key]
        if own:
            values = np.array([[float(row[column]) for column in COLUMNS] for row in own])
            spread = values.std(axis=0, ddof=1) if len(own) > 1 else np.zeros(len(COLUMNS))
            cells = [f"{m:.1f} ± {s:.1f}" for m, s in zip(values.mean(axis=0), spread, strict=True)]
            count = configurations(loss, task)[0][FAMILIES[loss].several]
            lines.append([task, f"{float(own[0]['fine_per_class']):.0f}", loss, f"{count}", *cells])
    return table(["task", "fine labels per class", "loss", "proxies per class", *COLUMNS.values()], lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=COARSE, default=COARSE, help="default: all")
    parser.add_argument("--data", metavar="DIR", help="the folder of the data, see benchmarks/retrieval/tasks.py")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="how many; default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(argv)

    path = args.out / "clusters.csv"
    done = {(row["task"], row["loss"], row["settings"], row["seed"]) for row in csv_rows.read(path)}
    for task, loss, seed in tqdm([*product(args.task, LOSSES, range(args.seeds))], unit="training"):
        key = task, loss, settings_of(loss, task), f"{seed}"
        if applies(loss, task) and key not in done:
            row = dict(zip(("task", "loss", "settings", "seed"), key, strict=True)) | run(task, loss, seed, args.data)
            row |= {"date": date.today().isoformat(), "torch": torch.__version__}
            csv_rows.append(path, row | {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads"})
    made = make_table(csv_rows.read(path))
    (args.out / "clusters.md").write_text(made)
    print(made)


if __name__ == "__main__":
    main()
