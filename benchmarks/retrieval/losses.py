"""The losses that are compared, and the twelve configurations of each.

``python -m benchmarks.retrieval.losses`` draws them into configurations.json: first the documented defaults, then
eleven draws, once, from the loss's own hyperparameters and the learning rate of its proxies: of each hyperparameter,
each value about as often, in a random order. The losses with several proxies per class share one such order of how
many.
"""

import json
import random
from ast import literal_eval
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from pytorch_metric_learning import losses
from sklearn.cluster import KMeans

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.miners import MultiProxyMiner

from .contrast import EasyPositives, SoftmaxAndInstances, Spread

FILE = Path(__file__).parent / "configurations.json"
DRAWS = 11
PROXIES_PER_CLASS = [5, 10, 20, 30, 1, 2, 15]  # the first of them twice
DEFAULT_LR = 1e-2
PROXIES_LR = {"proxies_lr": [3e-3, 1e-2, 3e-2]}

CHOICES = {
    "scale": [5, 10, 20],
    "temperature": [0.05, 0.1, 0.2],
    "pooling": ["max", "softmax", "logsumexp"],
    "intra_weight": [0.25, 0.5, 1.0],
    "inter_weight": [0.0, 0.1, 0.3],
}
OUR_DEFAULTS = {
    "scale": 10.0,
    "temperature": 0.1,
    "pooling": "logsumexp",
    "intra_weight": 0.25,
    "inter_weight": 0.0,
    "balance_weight": 0.5,
    "reseed_below": 0.0,
    "proxies_per_class": 30,
    "proxies_lr": DEFAULT_LR,
}
"""Written down, so that new defaults do not pass for what was measured."""
DEFAULTS_BEFORE = OUR_DEFAULTS | {"pooling": "max"}
"""Our defaults until there were views: one of the draws, which five tasks chose."""
PROXIES_PER_CLASS_BY_DEFAULT = OUR_DEFAULTS["proxies_per_class"]
"""Also for the losses that have no default of their own."""
BALANCED = {"balance_weight": [0.5, 1.0], "reseed_below": [0.0, 0.1]}
MULTI_SIMILARITY = {"alpha": [1, 2, 5, 10], "beta": [10, 30, 50, 70], "base": [0.3, 0.5, 0.7]}


class Family(NamedTuple):
    """``build(num_classes, embedding_size, views, **hyperparameters)``, of which ``choices`` are drawn."""

    build: object
    choices: dict
    several: str | None = None
    """The name of the hyperparameter that says how many proxies a class has."""
    defaults: dict | None = None
    """Where they are not those of ``build``."""
    needs_views: bool = False


def ours(num_classes, size, views, **settings):
    return MultiProxyEntropyLoss(num_classes, size, views=views, **settings)


def with_pairs(num_classes, size, views, pair_weight, alpha, beta, base, **settings):
    loss_func = ours(num_classes, size, views, **settings)
    pairs = losses.MultiSimilarityLoss(alpha=alpha, beta=beta, base=base)
    return losses.MultipleLosses(
        [loss_func, pairs], miners=[None, MultiProxyMiner(loss_func)], weights=[1, pair_weight]
    )


def pml(name):
    return lambda num_classes, size, views, **settings: getattr(losses, name)(
        num_classes=num_classes, embedding_size=size, **settings
    )


def of_pairs(build):
    return lambda num_classes, size, views, **settings: build(**settings)


K_MEANS = "k-means, NormalizedSoftmax"
FAMILIES = {
    "MultiProxyEntropy": Family(ours, CHOICES | BALANCED, "proxies_per_class"),
    "MultiProxyEntropy, no balance": Family(ours, CHOICES, "proxies_per_class", {"balance_weight": 0.0}),
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
    "MultiSimilarity": Family(of_pairs(losses.MultiSimilarityLoss), MULTI_SIMILARITY),
    "easy positives": Family(
        of_pairs(EasyPositives), {"temperature": [0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0]}
    ),
    "NormalizedSoftmax + instance contrast": Family(
        SoftmaxAndInstances,
        {
            "temperature": [0.05, 0.1, 0.2],
            "contrast_temperature": [0.05, 0.1, 0.2, 0.5],
            "contrast_weight": [0.3, 1.0, 3.0],
        },
        needs_views=True,
    ),
    "supervised + class-conditional contrast": Family(
        lambda num_classes, size, views, **settings: Spread(views, **settings),
        {"temperature": [0.05, 0.1, 0.2, 0.5], "conditional_weight": [0.1, 0.25, 0.5, 0.75, 0.9]},
        needs_views=True,
    ),
    "MultiProxyEntropy + MultiSimilarity, mined": Family(
        with_pairs,
        CHOICES | BALANCED | MULTI_SIMILARITY | {"pair_weight": [0.03, 0.1, 0.3, 1.0]},
        "proxies_per_class",
        {"pair_weight": 0.1, "alpha": 2, "beta": 50, "base": 0.5},
    ),
    K_MEANS: Family(
        pml("NormalizedSoftmaxLoss"),
        {"temperature": [0.02, 0.05, 0.1, 0.2, 0.5]},
        "clusters",
        {"clusters": PROXIES_PER_CLASS_BY_DEFAULT},
    ),
}
OURS = "MultiProxyEntropy"
SEVERAL_PROXIES = "SoftTriple", "SubCenterArcFace"
UNTRAINED = "no training"
REFERENCES = UNTRAINED, K_MEANS
"""Rows to hold the losses against. The other losses that are not ours are the peers."""


def draw(name, family):
    several = {family.several: shuffled(PROXIES_PER_CLASS, "proxies per class")} if family.several else {}
    drawn = several | {key: shuffled(values, f"{name} {key}") for key, values in (family.choices | PROXIES_LR).items()}
    first = {"proxies_lr": DEFAULT_LR, **(family.defaults or {})}
    if name.startswith("MultiProxyEntropy"):
        first = OUR_DEFAULTS | first
    return [first] + [first | {key: values[i] for key, values in drawn.items()} for i in range(DRAWS)]


COUNTS = [1, 2, 5, 10, 15, 20, 30, 50]
CHANGES = {
    "proxies_per_class": [2, 5, 10, 20, 50],
    "temperature": [0.05, 0.07, 0.15, 0.2],
    "pooling": ["max"],
    "balance_weight": [0.7],
}
"""Of our defaults, one at a time, and together with CHANGED_WEIGHT."""
CHANGED_WEIGHT = "intra_weight=0.5"
"""What makes the terms within classes the mutual information; the changes were first measured around it."""
CHANGES_BEFORE = {
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
"""Of the defaults that came before, one at a time."""
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
    """Of our defaults: settings by label, first the defaults."""
    labels = singles(CHANGES)
    together = [f"{CHANGED_WEIGHT} {label}" for label in labels]
    return labelled(load()["MultiProxyEntropy"][0], [*labels, CHANGED_WEIGHT, *together])


def changes_before():
    """Of the defaults that came before, one at a time and together: settings by label, first those defaults."""
    together = [f"{first} {label}" for first, more in TOGETHER.items() for label in singles(more)]
    return labelled(DEFAULTS_BEFORE, singles(CHANGES_BEFORE) + together)


def counts(loss):
    """The documented defaults of a peer with other numbers of proxies per class: settings by label."""
    return labelled(load()[loss][0], singles({FAMILIES[loss].several: COUNTS}))


def our_sweep():
    """Of our defaults, over the number of proxies and the temperature."""
    keys = "proxies_per_class", "temperature"
    return labelled(load()[OURS][0], singles({key: CHANGES[key] for key in keys}))


def soft_triple_changes():
    return labelled(load()["SoftTriple"][0], singles({"centers_per_class": COUNTS, "gamma": [0.05, 0.2]}))


def sub_center_changes():
    return labelled(load()["SubCenterArcFace"][0], singles({"sub_centers": COUNTS, "scale": [10, 16, 30]}))


COARSE_SWEEPS = {
    OURS: our_sweep,
    "SoftTriple": soft_triple_changes,
    "SubCenterArcFace": sub_center_changes,
    K_MEANS: partial(counts, K_MEANS),
}
"""Over the number of proxies and the temperature, for what assigns samples to parts of their class."""


def singles(values_by_key):
    return [f"{key}={value}" for key, values in values_by_key.items() for value in values]


def labelled(center, labels):
    return {"defaults": center} | {label: center | from_text(label) for label in labels}


def from_text(text):
    """``"scale=10 pooling=max"`` as a dictionary."""
    pairs = (part.split("=") for part in text.split())
    return {key: value if key == "pooling" else literal_eval(value) for key, value in pairs}


def to_text(settings):
    return " ".join(f"{key}={value}" for key, value in settings.items())


def shuffled(values, seed):
    return random.Random(seed).sample((values * DRAWS)[:DRAWS], DRAWS)


def load():
    return json.loads(FILE.read_text())


def fit_clusters(x, labels, clusters, seed):
    """K-means of the untrained inputs of each class, by class."""
    samples = {c: x[labels == c].flatten(1).numpy() for c in labels.unique().tolist()}
    return {c: KMeans(min(clusters, len(of)), n_init=1, random_state=seed).fit(of) for c, of in samples.items()}


def cluster(x, labels, clusters, seed):
    """Labels of ``clusters`` times as many classes: the cluster of each sample within its class."""
    result = torch.empty_like(labels)
    for c, found in fit_clusters(x, labels, clusters, seed).items():
        result[labels == c] = c * clusters + torch.as_tensor(found.labels_).long()
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
