"""Which settings each table takes, and what was measured with them."""

from functools import cache

import numpy as np

from pml_multiproxy.agreement import assignment_agreement

from .losses import (
    CLASSES_ONLY,
    COARSE_SWEEPS,
    DEFAULTS_BEFORE,
    FAMILIES,
    K_MEANS,
    OURS,
    REFERENCES,
    UNTRAINED,
    changes_before,
    load,
)
from .runs import SWEEP_SEEDS, VALIDATION_SEED
from .tasks import IMAGE_TASKS, TASKS
from .training import DIGITS

PEERS = [name for name in FAMILIES if name not in REFERENCES and not name.startswith(OURS)]
PROXY_LOSSES = "SoftTriple", "SubCenterArcFace", "ProxyAnchor", "NormalizedSoftmax", "CosFace"
"""PML's, as they are."""
RESAMPLES = 4000


def applies(loss, task):
    """Of images, there are no inputs that k-means could cluster; without views, there is nothing to contrast."""
    if loss != UNTRAINED and FAMILIES[loss].needs_views:
        return task.endswith("views")
    return task not in IMAGE_TASKS or loss == UNTRAINED or FAMILIES[loss].several != "clusters"


def like(name):
    """The other tasks that have views, or have none, as this one."""
    return [task for task in TASKS if task != name and task.endswith("views") == name.endswith("views")]


def chosen(runs, name, loss):
    """The settings that each table takes; those that cannot be known yet are left out."""
    if loss == UNTRAINED:
        return dict.fromkeys(("defaults", "best here", "best here by one seed", "best elsewhere"))
    configurations = load()[loss]
    tables = {"defaults": configurations[0]}
    first = runs[name].validated(loss, [VALIDATION_SEED])
    here, *others = (runs[task].validated(loss) for task in (name, *like(name)))
    if first:
        tables["best here by one seed"] = configurations[int(np.argmax(first))]
    if here:
        tables["best here"] = configurations[int(np.argmax(here))]
    if others and all(others):
        tables["best elsewhere"] = configurations[int(np.argmax(np.mean(relative(others), axis=0)))]
    if loss == OURS:
        tables["defaults before"] = DEFAULTS_BEFORE
        scores = scores_of(runs[name], loss, changes_before())
        if scores.keys() == changes_before().keys():
            ranking = sorted(scores, key=lambda label: np.mean(scores[label]), reverse=True)
            tables["changed"] = changes_before()[ranking[0]]
            tables["classes only"] = changes_before()[next(x for x in ranking if x.startswith(CLASSES_ONLY))]
    if loss in COARSE_SWEEPS and "coarse" in name:
        by = {"by agreement": agreements(runs[name], loss), "by fine labels": validations(runs[name], loss)}
        tables |= {table: candidates(loss)[max(of, key=of.get)] for table, of in by.items() if None not in of.values()}
    return tables


def relative(scores):
    """Of ``(tasks, configurations)``, each task's relative to its best."""
    return np.array(scores) / np.max(scores, axis=1, keepdims=True)


def scores_of(runs, loss, settings_by_label):
    """MAP@R on validation by label, each over the seeds of sweeps; labels without runs are left out."""
    found = {label: runs.held_out(loss, settings) for label, settings in settings_by_label.items()}
    scores = {
        label: [float(rows[seed]["map_at_r"]) for seed in SWEEP_SEEDS if seed in rows] for label, rows in found.items()
    }
    return {label: of_label for label, of_label in scores.items() if of_label}


def candidates(loss):
    """What agreement chooses from, by label: the twelve configurations, and the sweep over K and temperature.

    The clusters of k-means depend on nothing but how many they are.
    """
    swept = {label: settings for label, settings in COARSE_SWEEPS[loss]().items() if label != "defaults"}
    drawn = [] if loss == K_MEANS else load()[loss]
    return {str(index): settings for index, settings in enumerate(drawn)} | swept


def agreements(runs, loss):
    """How far two seeds agree on held-out samples, by candidate; None where a seed is missing."""
    found = {label: runs.assigned(loss, settings) for label, settings in candidates(loss).items()}
    return {label: agreement(*texts.values()) if len(texts) == 2 else None for label, texts in found.items()}


@cache
def agreement(assigned, again):
    """Of the assignments of two seeds, each a word per class: nats, mean over the classes."""
    numbers = [[DIGITS.index(digit) for digit in text.replace(" ", "")] for text in (assigned, again)]
    labels = [c for c, word in enumerate(assigned.split()) for _ in word]
    return assignment_agreement(numbers, labels).mean


def validations(runs, loss):
    """MAP@R on validation, by candidate; None where a seed is missing."""
    return {label: runs.score(loss, settings) for label, settings in candidates(loss).items()}


def tested(runs, name, loss, table, seeds):
    """MAP@R of the test runs, ``(seeds, classes)``, in %, or None where some are missing."""
    tables = chosen(runs, name, loss)
    rows = runs[name].get("test", loss, tables[table]) if table in tables else {}
    return by_class(rows)[:seeds] if len(rows) >= seeds else None


def by_class(rows):
    return np.array([[float(x) for x in rows[seed]["map_at_r_by_class"].split()] for seed in sorted(rows)])


def interval(*values, statistic=lambda x: x):
    """95 %, by bootstrap over the seeds and the classes: of the mean, or of a statistic of several means."""
    seeds, classes = resamples(values[0].shape)
    means = (np.einsum("rs,sc,rc->r", seeds, value, classes, optimize=True) for value in values)
    return np.percentile(statistic(*means), [2.5, 97.5])


@cache
def resamples(shape):
    """How often each seed and each class is drawn, as parts of all."""
    rng = np.random.default_rng(0)
    return [rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n for n in shape]


def measured(runs, name, table, seeds):
    """The test runs of a task by loss, and the losses that still lack some."""
    found = {loss: tested(runs, name, loss, table, seeds) for loss in (*FAMILIES, UNTRAINED) if applies(loss, name)}
    lacking = [loss for loss, values in found.items() if values is None]
    return {loss: values for loss, values in found.items() if values is not None}, lacking


def with_any_test(runs):
    """The tasks of which there are runs on the test part with one of our settings."""
    return [
        name for name in runs if any(row["phase"] == "test" and row["loss"] != UNTRAINED for row in runs[name].rows)
    ]
