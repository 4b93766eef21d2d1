"""The losses that retrieval.py compares, and the twelve configurations of each.

``python benchmarks/retrieval_losses.py`` draws them into retrieval_configurations.json: first the documented defaults,
then eleven draws, once, from the loss's own hyperparameters and the learning rate of its proxies: of each
hyperparameter, each value about as often, in an order drawn by lot. The losses with several proxies per class share one
such order of how many.
"""

import inspect
import json
import random
from ast import literal_eval
from pathlib import Path
from typing import NamedTuple

import torch
from pytorch_metric_learning import losses
from sklearn.cluster import KMeans

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.miners import MultiProxyMiner

FILE = Path(__file__).parent / "retrieval_configurations.json"
DRAWS = 11
PROXIES_PER_CLASS = [5, 10, 20, 30, 1, 2, 15]  # the first of them twice
DEFAULT_LR = 1e-2
PROXIES_LR = {"proxies_lr": [3e-3, 1e-2, 3e-2]}

OURS = {
    "scale": [5, 10, 20],
    "temperature": [0.05, 0.1, 0.2],
    "pooling": ["max", "softmax", "logsumexp"],
    "intra_weight": [0.25, 0.5, 1.0],
    "inter_weight": [0.0, 0.1, 0.3],
}
PROTOTYPE = {
    "scale": 10,
    "temperature": 0.05,
    "pooling": "max",
    "intra_weight": 0.5,
    "inter_weight": 0.1,
    "balance_weight": 0.5,
    "reseed_below": 0.0,
    "proxies_per_class": 10,
    "proxies_lr": 1e-2,
}
"""Our defaults until these runs chose one of the draws, which then changed places with them."""
DEFAULTS = inspect.signature(MultiProxyEntropyLoss).parameters
PROXIES_PER_CLASS_BY_DEFAULT = DEFAULTS["proxies_per_class"].default
"""Also for the losses that have no default of their own."""
BALANCED = {"balance_weight": [0.5, 1.0], "reseed_below": [0.0, 0.1]}
MULTI_SIMILARITY = {"alpha": [1, 2, 5, 10], "beta": [10, 30, 50, 70], "base": [0.3, 0.5, 0.7]}


class Family(NamedTuple):
    """``build(num_classes, embedding_size, **hyperparameters)``, of which ``choices`` are drawn."""

    build: object
    choices: dict
    several: str | None = None
    """The name of the hyperparameter that says how many proxies a class has."""
    defaults: dict | None = None
    """Where they are not those of ``build``."""


def ours(num_classes, size, **settings):
    return MultiProxyEntropyLoss(num_classes, size, **settings)


def with_pairs(num_classes, size, pair_weight, alpha, beta, base, **settings):
    loss_func = ours(num_classes, size, **settings)
    pairs = pairs_only(num_classes, size, alpha=alpha, beta=beta, base=base)
    return losses.MultipleLosses(
        [loss_func, pairs], miners=[None, MultiProxyMiner(loss_func)], weights=[1, pair_weight]
    )


def pairs_only(num_classes, size, **settings):
    return losses.MultiSimilarityLoss(**settings)


def pml(name):
    return lambda num_classes, size, **settings: getattr(losses, name)(
        num_classes=num_classes, embedding_size=size, **settings
    )


FAMILIES = {
    "MultiProxyEntropy": Family(ours, OURS | BALANCED, "proxies_per_class"),
    "MultiProxyEntropy, no balance": Family(ours, OURS, "proxies_per_class", {"balance_weight": 0.0}),
    "SoftTriple": Family(
        pml("SoftTripleLoss"),
        {"la": [5, 10, 20, 40], "gamma": [0.05, 0.1, 0.2], "margin": [0.0, 0.01, 0.05]},
        "centers_per_class",
        {"centers_per_class": PROXIES_PER_CLASS_BY_DEFAULT},
    ),
    "SubCenterArcFace": Family(
        pml("SubCenterArcFaceLoss"),
        {"margin": [0.0, 5.0, 10.0, 28.6], "scale": [10, 16, 30, 64]},
        "sub_centers",
        {"sub_centers": 3},
    ),
    "ProxyAnchor": Family(pml("ProxyAnchorLoss"), {"margin": [0.0, 0.1, 0.2, 0.4], "alpha": [8, 16, 32, 64]}),
    "NormalizedSoftmax": Family(pml("NormalizedSoftmaxLoss"), {"temperature": [0.02, 0.05, 0.1, 0.2, 0.5]}),
    "CosFace": Family(pml("CosFaceLoss"), {"margin": [0.0, 0.1, 0.2, 0.35], "scale": [10, 16, 30, 64]}),
    "MultiSimilarity": Family(
        lambda num_classes, size, **settings: losses.MultiSimilarityLoss(**settings), MULTI_SIMILARITY
    ),
    "MultiProxyEntropy + MultiSimilarity, mined": Family(
        with_pairs,
        OURS | BALANCED | MULTI_SIMILARITY | {"pair_weight": [0.03, 0.1, 0.3, 1.0]},
        "proxies_per_class",
        {"pair_weight": 0.1, "alpha": 2, "beta": 50, "base": 0.5},
    ),
    "k-means, NormalizedSoftmax": Family(
        pml("NormalizedSoftmaxLoss"),
        {"temperature": [0.02, 0.05, 0.1, 0.2, 0.5]},
        "clusters",
        {"clusters": PROXIES_PER_CLASS_BY_DEFAULT},
    ),
}
UNTRAINED = "no training"
REFERENCES = UNTRAINED, "k-means, NormalizedSoftmax"
"""Rows to hold the losses against. The other losses that are not ours are the peers."""


def draw(name, family):
    several = {family.several: shuffled(PROXIES_PER_CLASS, "proxies per class")} if family.several else {}
    drawn = several | {key: shuffled(values, f"{name} {key}") for key, values in (family.choices | PROXIES_LR).items()}
    first = {"proxies_lr": DEFAULT_LR, **(family.defaults or {})}
    if name.startswith("MultiProxyEntropy"):  # written down, so that new defaults do not pass for what was measured
        first = {key: DEFAULTS[key].default for key in (*OURS, *BALANCED, "proxies_per_class")} | first
    configurations = [first] + [first | {key: values[i] for key, values in drawn.items()} for i in range(DRAWS)]
    if name == "MultiProxyEntropy":
        configurations[configurations.index(first, 1)] = PROTOTYPE
    return configurations


COUNTS = [1, 2, 5, 10, 15, 20, 30, 50]
SWEEPS = {
    "proxies_per_class": COUNTS,
    "scale": [5, 20, 30],
    "temperature": [0.02, 0.05, 0.2],
    "margin": [0.05, 0.1],
    "intra_weight": [0.0, 0.5, 1.0],
    "inter_weight": [0.1, 0.3, 1.0],
    "balance_weight": [0.0, 0.25, 1.0],
    "usage_momentum": [0.5, 0.95, 0.99],
    "pooling": ["softmax", "logsumexp"],
    "reseed_below": [0.1],
    "proxies_lr": [0.003, 0.03],
    "from_kmeans": [True],
}
NO_BALANCE = {
    "proxies_per_class": [10, 20],
    "pooling": ["softmax", "logsumexp"],
    "intra_weight": [0.0, 1.0],
    "proxies_lr": [0.01, 0.03],
}
CLASSES_ONLY = "balance_weight=0.0 intra_weight=0.0"
"""What leaves no term within a class."""
WITH_CLASSES_ONLY = {
    "proxies_per_class": [10, 50],
    "pooling": ["softmax", "logsumexp"],
    "margin": [0.05, 0.1],
    "proxies_lr": [0.003, 0.03],
    "from_kmeans": [True],
}
TOGETHER = {
    "proxies_per_class=1": {
        "scale": [5, 20, 30],
        "margin": [0.05, 0.1],
        "inter_weight": [0.1, 0.3],
        "proxies_lr": [0.003, 0.03],
    },
    "balance_weight=0.0 scale=5": NO_BALANCE,
    "balance_weight=0.0 scale=20": NO_BALANCE,
    f"{CLASSES_ONLY} scale=5": WITH_CLASSES_ONLY,
    f"{CLASSES_ONLY} scale=20": WITH_CLASSES_ONLY,
    "proxies_per_class=1 scale=20": {"margin": [0.05, 0.1], "proxies_lr": [0.003, 0.03]},
    "temperature=0.05 intra_weight=0.5 inter_weight=0.1": {"proxies_per_class": [10, 20, 30]},
}
"""What to change together: for classes of one cluster; for classes that are not those of training; and as in the
prototype."""


def changes():
    """Of our defaults, as labels that :func:`settings_of` reads."""
    singles = [f"{key}={value}" for key, values in SWEEPS.items() for value in values]
    together = [
        f"{first} {key}={value}" for first, more in TOGETHER.items() for key, values in more.items() for value in values
    ]
    return ["defaults", *singles, *together]


def settings_of(loss, index):
    """The configuration of this number, or the first with these changes."""
    if isinstance(index, int):
        return load()[loss][index]
    changes = dict(change.split("=") for change in index.split() if index != "defaults")
    return load()[loss][0] | {key: value if key == "pooling" else literal_eval(value) for key, value in changes.items()}


def shuffled(values, seed):
    return random.Random(seed).sample((values * DRAWS)[:DRAWS], DRAWS)


def load():
    return json.loads(FILE.read_text())


def cluster(x, labels, clusters, seed):
    """K-means of the untrained inputs within each class: labels of ``clusters`` times as many classes."""
    result = torch.empty_like(labels)
    for c in labels.unique().tolist():
        of_class = labels == c
        count = min(clusters, int(of_class.sum()))
        found = KMeans(count, n_init=1, random_state=seed).fit_predict(x[of_class].flatten(1).numpy())
        result[of_class] = c * clusters + torch.as_tensor(found).long()
    return result


def main():
    drawn = {name: draw(name, family) for name, family in FAMILIES.items()}
    lines = (
        f"  {json.dumps(name)}: [\n" + ",\n".join(f"    {json.dumps(c)}" for c in configurations) + "\n  ]"
        for name, configurations in drawn.items()
    )
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
