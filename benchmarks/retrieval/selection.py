"""The settings of each table, and the results of their runs."""

from functools import cache

import numpy as np

from pml_multiproxy.agreement import assignment_agreement

from .losses import COMPARED_BY_AGREEMENT, FAMILIES, OURS, REFERENCES, UNTRAINED, candidates, configurations
from .tasks import IMAGE_TASKS, TASKS
from .training import DIGITS

PEERS = [name for name in FAMILIES if name not in REFERENCES and not name.startswith(OURS)]
RESAMPLES = 4000


def applies(loss, task):
    """Whether the loss has runs on this task; k-means cannot cluster images that are only read in batches."""
    if loss == UNTRAINED:
        return True
    return FAMILIES[loss].only in task and not (task in IMAGE_TASKS and FAMILIES[loss].several == "clusters")


def like(name):
    """The other tasks that have views, or have none, as this one."""
    return [task for task in TASKS if task != name and task.endswith("views") == name.endswith("views")]


def chosen(runs, name, loss):
    """The settings that each table takes; those that cannot be known yet are left out."""
    if loss == UNTRAINED:
        return dict.fromkeys(("defaults", "best here", "best elsewhere"))
    of_loss = configurations(loss, name)
    tables = {"defaults": of_loss[0]}
    if len(of_loss) == 1:
        return tables
    here, *others = (runs[task].validated(loss) for task in (name, *like(name)))
    if here:
        tables["best here"] = of_loss[int(np.argmax(here))]
    if others and all(others):
        tables["best elsewhere"] = of_loss[int(np.argmax(np.mean(relative(others), axis=0)))]
    if loss in COMPARED_BY_AGREEMENT and "coarse" in name:
        by = {"by agreement": agreements(runs[name], loss), "by fine labels": validations(runs[name], loss)}
        tables |= {t: candidates(loss, name)[int(np.argmax(of))] for t, of in by.items() if None not in of}
    return tables


def relative(scores):
    """Of ``(tasks, configurations)``, each task's relative to its best."""
    return np.array(scores) / np.max(scores, axis=1, keepdims=True)


def agreements(runs, loss):
    """How far two seeds agree on held-out samples, by candidate; None where a seed is missing."""
    found = [runs.assigned(loss, settings) for settings in candidates(loss, runs.name)]
    return [agreement(*texts.values()) if len(texts) == 2 else None for texts in found]


@cache
def agreement(assigned, again):
    """Of the assignments of two seeds, each a word per class: nats, mean over the classes."""
    numbers = [[DIGITS.index(digit) for digit in text.replace(" ", "")] for text in (assigned, again)]
    labels = [c for c, word in enumerate(assigned.split()) for _ in word]
    return assignment_agreement(numbers, labels).mean


def validations(runs, loss):
    """MAP@R on validation, by candidate; None where a seed is missing."""
    return [runs.score(loss, settings) for settings in candidates(loss, runs.name)]


def tested(runs, name, loss, table, seeds):
    """MAP@R of the test runs, ``(seeds, classes)``, in %, or None where some are missing."""
    tables = chosen(runs, name, loss)
    return by_class(runs[name], loss, tables[table], seeds) if table in tables else None


def by_class(runs, loss, settings, seeds):
    """As :func:`tested`, with these settings."""
    rows = runs.get("test", loss, settings)
    values = [[float(x) for x in rows[seed]["map_at_r_by_class"].split()] for seed in sorted(rows)]
    return np.array(values)[:seeds] if len(rows) >= seeds else None


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
    losses = [loss for loss in (*FAMILIES, UNTRAINED) if applies(loss, name)]
    if table != "defaults":
        losses = [loss for loss in losses if loss == UNTRAINED or FAMILIES[loss].choices]
    found = {loss: tested(runs, name, loss, table, seeds) for loss in losses}
    lacking = [loss for loss, values in found.items() if values is None]
    return {loss: values for loss, values in found.items() if values is not None}, lacking


def with_any_test(runs):
    """The tasks that have runs of a trained network on the test part."""
    return [
        name for name in runs if any(row["phase"] == "test" and row["loss"] != UNTRAINED for row in runs[name].rows)
    ]
