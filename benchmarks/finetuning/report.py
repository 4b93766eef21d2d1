"""The tables, as Markdown, made of the CSV files alone."""

import numpy as np

from ..retrieval.report import join
from ..retrieval.selection import interval
from ..retrieval.tables import mean_and_interval, table
from ..retrieval.training import METRICS
from .losses import FAMILIES, ONE_PROXY, OURS, UNTRAINED, applies
from .runs import SEEDS

NAMES = dict(zip(METRICS, ("MAP@R", "R-Precision", "Precision@1"), strict=True))
TITLES = {
    "defaults": "every loss at its documented defaults",
    "best of three": "ours at its defaults, every other loss in the best of three configurations on validation",
}
OPEN = "*open: not all runs are there yet. The differences are of the seeds that both losses have.*"


def measured(runs, loss, which):
    """By seed and metric, the values of the classes, in %."""
    settings = runs.chosen(loss, "defaults" if loss in (OURS, ONE_PROXY) else which)
    rows = {} if settings is None else runs.get("test", loss, settings)
    return {
        seed: {metric: np.array(rows[seed][f"{metric}_by_class"].split(), dtype=float) for metric in METRICS}
        for seed in SEEDS
        if seed in rows
    }


def stacked(found, seeds, metric):
    return np.array([found[seed][metric] for seed in seeds])


def of_task(runs, which):
    """Ours first, then the strongest rival in MAP@R."""
    found = {loss: measured(runs, loss, which) for loss in FAMILIES if applies(loss, runs.name)}
    untrained = measured(runs, UNTRAINED, which)
    found[UNTRAINED] = dict.fromkeys(SEEDS, untrained[0]) if untrained else {}
    mean = {loss: stacked(of, of, "map_at_r").mean() if of else -1 for loss, of in found.items()}
    rivals = sorted((loss for loss in found if loss not in (OURS, ONE_PROXY)), key=lambda loss: -mean[loss])
    own = [loss for loss in (OURS, ONE_PROXY) if loss in found]
    first = max(own, key=lambda loss: mean[loss])
    return [row(loss, found[loss], found[first] if loss != first else {}) for loss in (*own, *rivals)]


def row(loss, found, ours):
    seeds = [seed for seed in found if seed in ours]
    cells = [mean_and_interval(stacked(found, found, metric)) if found else "open" for metric in METRICS]
    cells += [difference(found, ours, seeds, metric) if seeds else "" for metric in ("map_at_r", "precision_at_1")]
    number = (
        "" if loss == UNTRAINED or len(found) in (0, len(SEEDS)) else f" ({len(found)} of {len(SEEDS)} seeds, open)"
    )
    return [loss + number, *cells]


def difference(found, ours, seeds, metric):
    """Of ours to this loss, with its interval: both are resampled with the same seeds and classes."""
    values = stacked(ours, seeds, metric) - stacked(found, seeds, metric)
    low, high = interval(values)
    return f"{values.mean():+.1f} ({low:+.1f} to {high:+.1f})"


def summary(runs):
    """One line: ours at its defaults beside the best rival there and the pretrained network."""
    rows = {loss: measured(runs, loss, "defaults") for loss in (*FAMILIES, UNTRAINED)}
    mean = {loss: stacked(of, of, "map_at_r").mean() for loss, of in rows.items() if of}
    own = max((loss for loss in (OURS, ONE_PROXY) if loss in mean), key=mean.get, default=None)
    rivals = [loss for loss in mean if loss not in (OURS, ONE_PROXY, UNTRAINED)]
    if not own or not rivals:
        return None
    best = max(rivals, key=mean.get)
    return [runs.name, f"{own}: {mean[own]:.1f}", f"{best}: {mean[best]:.1f}", f"{mean[own] / mean[best]:.2f}"]


def report(runs, out):
    header = ["", *NAMES.values(), "ours ahead in MAP@R", "ours ahead in Precision@1"]
    parts = [table(["task", "ours, MAP@R", "best rival at defaults", "ratio"], list(filter(None, map(summary, runs))))]
    for of in runs:
        parts += [
            f"**`{of.name}`: {title}**{schedule(of)}\n\n{table(header, of_task(of, which))}"
            for which, title in TITLES.items()
            if any(row["phase"] == "test" for row in of.rows)
        ]
    text = join(*parts)
    text = join(OPEN, text) if "open" in text else text
    (out / "tables.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def schedule(runs):
    chosen = runs.schedule()
    return f" ({chosen['epochs']} epochs, learning rate {chosen['lr']:g}, chosen for all)" if chosen else ""
