"""The losses that are compared, and the twelve configurations of each.

``python -m benchmarks.retrieval.losses`` draws them into configurations.json: first the documented defaults, then
eleven draws from the hyperparameters of the loss and the learning rate of its proxies. Each value of a hyperparameter
is drawn about as often as the others, in a random order. The losses of PML with several proxies per class share one
such order of their numbers.
"""

import json
import random
from ast import literal_eval
from pathlib import Path
from typing import NamedTuple

import torch
from pytorch_metric_learning import losses
from sklearn.cluster import KMeans

from pml_multiproxy import MultiProxyEntropyLoss

from .contrast import EasyPositives, MaskCon, SoftmaxAndInstances, Spread

FILE = Path(__file__).parent / "configurations.json"
DRAWS = 11
PROXIES_PER_CLASS = [5, 10, 20, 30, 1, 2, 15]
DEFAULT_LR = 1e-2
PROXIES_LR = {"proxies_lr": [3e-3, 1e-2, 3e-2]}

CHOICES = {
    "scale": [5, 10, 20],
    "temperature": [0.05, 0.1, 0.2],
    "pooling": ["max", "softmax", "logsumexp"],
    "intra_weight": [0.25, 0.5, 1.0],
}
BALANCED = {
    "balance_weight": [0.5, 1.0],
    "proxies_per_class": [10, 30, 50, 100],
    "neighbor_weight": [0.5, 1.0, 2.0],
    "neighbor_temperature": [0.1, 0.2],
}
OUR_DEFAULTS = {
    "scale": 10.0,
    "temperature": 0.1,
    "pooling": "logsumexp",
    "intra_weight": 0.25,
    "inter_weight": 0.0,
    "balance_weight": 0.5,
    "proxies_per_class": 50,
    "proxies_lr": DEFAULT_LR,
}
"""Written down, so that results keep their settings when a default of the loss changes."""
NEIGHBORS = {"neighbor_weight": 1.0, "neighbor_temperature": 0.2}
"""The other defaults of our loss where there are views; with one view, the term is off."""
NO_NEIGHBORS = {"neighbor_weight": 0.0}
FORMER_COUNT = {"proxies_per_class": 30}
"""The default before the neighbour term; the rows without that term were made with it."""
COUNT_OF_PEERS = 30
"""For the losses that have no default of their own."""


class Family(NamedTuple):
    """A loss, made by ``build(num_classes, embedding_size, views, **hyperparameters)``."""

    build: object
    choices: dict
    """What to draw from; without choices, there is only the first configuration."""
    several: str | None = None
    """The name of the hyperparameter that says how many proxies a class has."""
    defaults: dict = {}  # noqa: RUF012
    """The first configuration, where it differs from the defaults of ``build``."""
    only: str = ""
    """Part of the names of the tasks that the loss is for."""


def ours(num_classes, size, views, **settings):
    return MultiProxyEntropyLoss(num_classes, size, views=views, **settings)


def pml(name):
    return lambda num_classes, size, views, **settings: getattr(losses, name)(
        num_classes=num_classes, embedding_size=size, **settings
    )


def of_pairs(build):
    return lambda num_classes, size, views, **settings: build(**settings)


OURS = "MultiProxyEntropy"
ONE_PROXY = "MultiProxyEntropy, K=1"
NO_NEIGHBOR_TERM = "MultiProxyEntropy, no neighbours"
K_MEANS = "k-means, NormalizedSoftmax"
UNTRAINED = "no training"
REFERENCES = UNTRAINED, K_MEANS
"""Rows to hold the losses against. The other losses that are not ours are the peers."""
FAMILIES = {
    OURS: Family(ours, CHOICES | BALANCED, "proxies_per_class", OUR_DEFAULTS | NEIGHBORS),
    ONE_PROXY: Family(
        ours,
        {},
        defaults=OUR_DEFAULTS | NEIGHBORS | {"proxies_per_class": 1, "intra_weight": 0.0, "balance_weight": 0.0},
        only="unseen",
    ),
    NO_NEIGHBOR_TERM: Family(ours, {}, "proxies_per_class", OUR_DEFAULTS | FORMER_COUNT | NO_NEIGHBORS, only="views"),
    "MultiProxyEntropy, no balance": Family(
        ours,
        CHOICES | {"inter_weight": [0.0, 0.1, 0.3]},
        "proxies_per_class",
        OUR_DEFAULTS | FORMER_COUNT | NO_NEIGHBORS | {"balance_weight": 0.0},
    ),
    "SoftTriple": Family(
        pml("SoftTripleLoss"),
        {"la": [5, 10, 20, 40], "gamma": [0.05, 0.1, 0.2], "margin": [0.0, 0.01, 0.05]},
        "centers_per_class",
        {"centers_per_class": COUNT_OF_PEERS},
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
        of_pairs(losses.MultiSimilarityLoss),
        {"alpha": [1, 2, 5, 10], "beta": [10, 30, 50, 70], "base": [0.3, 0.5, 0.7]},
    ),
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
        only="views",
    ),
    "supervised + class-conditional contrast": Family(
        lambda num_classes, size, views, **settings: Spread(views, **settings),
        {"temperature": [0.05, 0.1, 0.2, 0.5], "conditional_weight": [0.1, 0.25, 0.5, 0.75, 0.9]},
        only="views",
    ),
    "MaskCon": Family(
        MaskCon,
        {
            "temperature": [0.05, 0.1, 0.2],
            "contrast_temperature": [0.05, 0.1, 0.2, 0.5],
            "contrast_weight": [0.3, 1.0, 3.0],
            "target_temperature": [0.02, 0.05, 0.1],
            "target_weight": [0.2, 0.5, 1.0],
        },
        only="views",
    ),
    K_MEANS: Family(
        pml("NormalizedSoftmaxLoss"),
        {"temperature": [0.02, 0.05, 0.1, 0.2, 0.5]},
        "clusters",
        {"clusters": COUNT_OF_PEERS},
    ),
}


def draw(name, family):
    first = {"proxies_lr": DEFAULT_LR} | family.defaults
    if not family.choices:
        return [first]
    drawn = {family.several: shuffled(PROXIES_PER_CLASS, "proxies per class")} if family.several else {}
    drawn |= {key: shuffled(values, f"{name} {key}") for key, values in (PROXIES_LR | family.choices).items()}
    return [first] + [first | {key: values[i] for key, values in drawn.items()} for i in range(DRAWS)]


def shuffled(values, seed):
    return random.Random(seed).sample((values * DRAWS)[:DRAWS], DRAWS)


def configurations(loss, task):
    """First the defaults. Without views, settings of the neighbour term are left out, and the term is off."""
    drawn = json.loads(FILE.read_text())[loss]
    if task.endswith("views"):
        return drawn
    return [{key: value for key, value in c.items() if not key.startswith("neighbor")} for c in drawn]


COUNTS = {"digits-coarse-views": [10, 20, 30, 50, 75, 100], "omniglot-coarse-views": [30, 50, 75, 100]}
CLUSTERS = [1, 2, 5, 10, 15, 20, 30, 50]


def proxy_counts(loss, task):
    """The defaults with other numbers of proxies per class, by this number."""
    first = configurations(loss, task)[0]
    return {count: first | {"proxies_per_class": count} for count in COUNTS.get(task, ())}


def candidates(loss, task):
    """The settings that the agreement of two seeds chooses from.

    All configurations; for k-means numbers of clusters, since nothing else changes the assignment of samples.
    """
    found = configurations(loss, task)
    return [found[0] | {"clusters": count} for count in CLUSTERS] if loss == K_MEANS else found


SWEPT = OURS, NO_NEIGHBOR_TERM
COMPARED_BY_AGREEMENT = OURS, "SoftTriple", "SubCenterArcFace", K_MEANS


def from_text(text):
    """``"scale=10 pooling=max"`` as a dictionary."""
    pairs = (part.split("=") for part in text.split())
    return {key: value if key == "pooling" else literal_eval(value) for key, value in pairs}


def to_text(settings):
    return " ".join(f"{key}={value}" for key, value in settings.items())


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
        f"  {json.dumps(name)}: [\n" + ",\n".join(f"    {json.dumps(c)}" for c in of_loss) + "\n  ]"
        for name, of_loss in drawn.items()
    )
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
