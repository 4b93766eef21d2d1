"""Hidden groups on held-out samples: are they the fine labels, and does the worst of them show where a model fails?

``--table groups`` compares ``find_groups`` with k-means, spherical k-means (both are told the true number of groups of
each class) and HDBSCAN, of the same embeddings and of the inputs: pixels or pretrained features. Scores are means over
the classes. ``--table failures`` fits a classifier of the coarse labels (five nearest neighbours of the inputs) without
one of the fine labels, for each fine label or ten of them in turn, lists the worst groups of the test samples, and
counts how often most samples of the first group are of the label left out.

A training writes its embeddings to EMBEDDINGS/TASK-SEED.npz, or takes those that are there. Files of other tasks are
compared, too, if --task names them; they hold ``embeddings``, ``inputs``, ``labels`` and ``fine`` of the test part,
``train_inputs``, ``train_labels`` and ``train_fine``, and the ``proxies`` and ``usage`` of the loss. Each result is
written when it is there, and a later run goes on from the file.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import HDBSCAN, KMeans
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize
from tqdm import tqdm

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.inspection import Group, Groups, _scores, find_groups, worst_groups

from .. import csv_rows
from ..retrieval.losses import FAMILIES, OURS, configurations
from ..retrieval.tables import table
from ..retrieval.tasks import TASKS
from ..retrieval.training import embed, train

RESULTS = Path(__file__).parent / "results"
DEFAULT_TASKS = "digits-coarse-views", "omniglot-coarse-views", "clinc-coarse"
MOST_HIDDEN = 15
"""A task with more fine labels leaves out ten of them in turn."""
RESTARTS = 10


def arrays_of(task, seed, folder, data):
    path = folder / f"{task}-{seed}.npz"
    if not path.exists():
        np.savez_compressed(path, **make_arrays(task, seed, data))
    return dict(np.load(path))


def make_arrays(name, seed, data):
    torch.manual_seed(seed)
    np.random.seed(seed)
    task = TASKS[name](data)
    known, unseen = task.phase("test")
    network, loss_func = train(task, known, FAMILIES[OURS], configurations(OURS, name)[0], seed)
    parts = {"": unseen, "train_": known}
    result = {f"{prefix}inputs": part.x.flatten(1) for prefix, part in parts.items()}
    result |= {f"{prefix}labels": torch.unique(part.coarse, return_inverse=True)[1] for prefix, part in parts.items()}
    result |= {f"{prefix}fine": part.fine for prefix, part in parts.items()}
    result |= {"embeddings": embed(network, unseen.x), "proxies": loss_func.proxies, "usage": loss_func.proxy_usage}
    return {key: value.detach().cpu().numpy() for key, value in result.items()}


def ours(arrays, x, seed):
    loss_func = MultiProxyEntropyLoss(len(arrays["proxies"]), x.shape[1], arrays["proxies"].shape[1])
    loss_func.proxies.data = torch.tensor(arrays["proxies"])
    loss_func.proxy_usage.copy_(torch.tensor(arrays["usage"]))
    return find_groups(loss_func, x, arrays["labels"]).group.numpy()


def by_class(cluster):
    """Clusters of each class on its own, which ``cluster(x, count, seed)`` finds, numbered over all classes."""

    def method(arrays, x, seed):
        group = np.empty(len(x), dtype=int)
        for c in np.unique(arrays["labels"]):
            own = arrays["labels"] == c
            found = cluster(x[own], len(np.unique(arrays["fine"][own])), seed)
            group[own] = found + len(x) * c
        return np.unique(group, return_inverse=True)[1]

    return method


def k_means(x, count, seed):
    return KMeans(count, n_init=RESTARTS, random_state=seed).fit(x).labels_


def spherical(x, count, seed):
    """K-means by cosine: the best of several starts from random samples."""
    x, generator, best = normalize(x), np.random.default_rng(seed), (-np.inf, None)
    for _ in range(RESTARTS):
        centers, before, found = x[generator.choice(len(x), count, replace=False)], None, None
        while found is None or not np.array_equal(found, before):
            before, similarities = found, x @ centers.T
            found = similarities.argmax(axis=1)
            sums = [x[found == k].sum(axis=0) if (found == k).any() else centers[k] for k in range(count)]
            centers = normalize(np.stack(sums))
        best = max(best, (similarities.max(axis=1).sum(), found), key=lambda pair: pair[0])
    return best[1]


def density(x, count, seed):
    """HDBSCAN at its defaults; its noise forms one more cluster."""
    return HDBSCAN(copy=True).fit(x).labels_


OURS_OF = "find_groups, embeddings"
METHODS = {OURS_OF: (ours, "embeddings")} | {
    f"{name}, {source}": (by_class(cluster), source)
    for source, (name, cluster) in product(
        ("embeddings", "inputs"),
        {"k-means": k_means, "spherical k-means": spherical, "HDBSCAN": density}.items(),
    )
}
COMPARED_ON_FAILURES = OURS_OF, "k-means, embeddings", "k-means, inputs", "HDBSCAN, embeddings"


def found_by(method, arrays, seed):
    function, source = METHODS[method]
    return function(arrays, arrays[source], seed)


def score_groups(arrays, seed):
    """One row for each method."""
    labels, fine = arrays["labels"], arrays["fine"]
    for method in METHODS:
        group = found_by(method, arrays, seed)
        of_classes = [(fine[labels == c], group[labels == c]) for c in np.unique(labels)]
        scores = np.mean([_scores(*pair) for pair in of_classes], axis=0)
        found, true = (np.mean([len(np.unique(pair[i])) for pair in of_classes]) for i in (1, 0))
        values = dict(zip(("acc", "nmi", "ari"), (f"{100 * score:.2f}" for score in scores), strict=True))
        yield {"method": method} | values | {"found": f"{found:.2f}", "true": f"{true:.2f}"}


def score_failures(arrays, seed):
    """One row for each fine label left out and method."""
    fine = np.unique(arrays["fine"])
    drawn = fine if len(fine) <= MOST_HIDDEN else np.random.default_rng(0).choice(fine, 10, replace=False)
    groups = {method: as_groups(found_by(method, arrays, seed), arrays["labels"]) for method in COMPARED_ON_FAILURES}
    for hidden in drawn:
        known, unseen = arrays["train_fine"] != hidden, arrays["fine"] == hidden
        classifier = KNeighborsClassifier().fit(arrays["train_inputs"][known], arrays["train_labels"][known])
        correct = classifier.predict(arrays["inputs"]) == arrays["labels"]
        accuracies = {
            "accuracy": f"{100 * correct[~unseen].mean():.1f}",
            "left_out": f"{100 * correct[unseen].mean():.1f}",
        }
        for method, of_method in groups.items():
            first = worst_groups(of_method, correct)[0]
            share = unseen[of_method.group.numpy() == first.group].mean()
            yield {"method": method, "hidden": f"{hidden}"} | accuracies | {"size": first.size, "share": f"{share:.3f}"}


def as_groups(group, labels):
    records = [
        Group(g, int(labels[group == g][0]), int((group == g).sum()), [], [], 1.0, None) for g in range(group.max() + 1)
    ]
    return Groups(torch.tensor(group), torch.ones(len(group)), records)


def table_of_groups(rows):
    columns = "acc", "nmi", "ari", "found", "true"
    lines = []
    for task, method in product(dict.fromkeys(row["task"] for row in rows), METHODS):
        own = [row for row in rows if (row["task"], row["method"]) == (task, method)]
        if own:
            values = np.array([[float(row[column]) for column in columns] for row in own])
            spread = values.std(axis=0, ddof=1) if len(own) > 1 else np.zeros(len(columns))
            cells = [f"{m:.1f} ± {s:.1f}" for m, s in zip(values.mean(axis=0)[:4], spread[:4], strict=True)]
            lines.append([task, method, *cells, f"{values[0, 4]:.1f}"])
    return table(["task", "method", "ACC", "NMI", "ARI", "groups per class", "fine labels per class"], lines)


def table_of_failures(rows):
    lines = []
    for task, method in product(dict.fromkeys(row["task"] for row in rows), COMPARED_ON_FAILURES):
        own = [row for row in rows if (row["task"], row["method"]) == (task, method)]
        if own:
            hits = sum(float(row["share"]) > 0.5 for row in own)
            means = [f"{np.mean([float(row[column]) for row in own]):.1f}" for column in ("accuracy", "left_out")]
            lines.append([task, method, f"{hits} of {len(own)}", *means])
    return table(
        ["task", "groups by", "label left out is the first group listed", "accuracy on the others", "on it"], lines
    )


TABLES = {"groups": (score_groups, table_of_groups), "failures": (score_failures, table_of_failures)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, required=True)
    parser.add_argument("--task", nargs="+", default=DEFAULT_TASKS, help="default: %(default)s")
    parser.add_argument("--data", metavar="DIR", help="the folder of the data, see benchmarks/retrieval/tasks.py")
    parser.add_argument("--embeddings", type=Path, required=True, metavar="DIR", help="where the embeddings are")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how many; default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(argv)

    score, make_table = TABLES[args.table]
    path = args.out / f"{args.table}.csv"
    done = {(row["task"], row["seed"]) for row in csv_rows.read(path)}
    for task, seed in tqdm([*product(args.task, range(args.seeds))], unit="training"):
        if (task, f"{seed}") not in done:
            for row in [*score(arrays_of(task, seed, args.embeddings, args.data), seed)]:
                csv_rows.append(path, {"task": task, "seed": seed} | row)
    made = make_table(csv_rows.read(path)) + "\n"
    path.with_suffix(".md").write_text(made)
    print(made)


if __name__ == "__main__":
    main()
