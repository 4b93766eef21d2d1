"""The groups that our loss found in the leaves: a picture, and the files for the benchmark of hidden groups.

Reads the folders that ``python -m benchmarks.finetuning --task leaves --save SAVED`` wrote, and draws those of seed 0
into results/groups.png: a row per group, named by the crop, which training knew, and by the condition that most of its
leaves have, which it did not. For each seed, writes EMBEDDINGS/leaves-SEED.npz, which
``python -m benchmarks.inspection.groups --task leaves`` reads.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.inspection import find_groups
from pml_multiproxy.visualize import plot_groups

from ..retrieval.losses import OURS
from ..retrieval.training import embed
from . import images
from .command import CACHE, RESULTS
from .sources import path_of
from .tasks import TASKS, Options, rows_of
from .training import pretrained

SHOWN = 14
"""Groups in the picture, the largest."""


def draw(loss_func, saved, rows, archive, path):
    groups = find_groups(loss_func, saved["embeddings"], saved["coarse"])
    names = [f"{rows[number]['crop']}: {rows[number]['condition']}" for number in saved["numbers"]]
    chosen = sorted(groups.records, key=lambda record: -record.size)[:SHOWN]
    labels = []
    for record in chosen:
        kinds, counts = np.unique(np.array(names)[groups.group.numpy() == record.group], return_counts=True)
        most = counts.argmax()
        labels.append(f"{kinds[most]}\n{counts[most]} of {record.size} leaves")
    pictures = images.read(archive, [rows[number]["image"] for number in saved["numbers"]]).permute(0, 2, 3, 1)
    figure = Figure(figsize=(9, 0.95 * len(chosen)), layout="constrained")
    ax = plot_groups(groups, pictures, count=8, shown=[record.group for record in chosen], ax=figure.subplots())
    ax.set_yticks(ax.get_yticks(), labels)
    figure.savefig(path, dpi=80, bbox_inches="tight")
    print(groups)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="holds the folder leaves")
    parser.add_argument("--saved", type=Path, required=True, metavar="DIR", help="what --save wrote")
    parser.add_argument("--embeddings", type=Path, required=True, metavar="DIR", help="where to write the files")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="of activations; default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(argv)
    task = TASKS["leaves"](Options(args.data, args.cache))
    known, unseen = task.phase("test")
    body = pretrained(task)
    inputs, train_inputs = embed(body, unseen.x), embed(body, known.x)
    for folder in sorted(args.saved.glob(f"leaves_{OURS}_test_seed*")):
        loss_func, saved = MultiProxyEntropyLoss.load(folder / "loss.pt"), dict(np.load(folder / "embeddings.npz"))
        if folder.name.endswith("seed0"):
            rows, archive = rows_of(path_of(args.data, "leaves/labels.csv")), path_of(args.data, "leaves/images128.zip")
            draw(loss_func, saved, rows, archive, args.out / "groups.png")
        assert torch.equal(torch.tensor(saved["numbers"]), unseen.x), "the samples of another split"
        values = {"embeddings": saved["embeddings"], "labels": saved["coarse"], "fine": saved["fine"], "inputs": inputs}
        values |= {"train_inputs": train_inputs, "train_labels": known.coarse, "train_fine": known.fine}
        values |= {"proxies": loss_func.proxies.detach().numpy(), "usage": loss_func.proxy_usage.numpy()}
        np.savez_compressed(args.embeddings / f"leaves-{folder.name.split('seed')[1]}.npz", **values)


if __name__ == "__main__":
    main()
