"""The tables, as Markdown, made of the CSV files alone."""

import numpy as np

from ..retrieval.report import join
from ..retrieval.selection import interval
from ..retrieval.tables import mean_and_interval, table
from ..retrieval.training import METRICS
from .losses import FAMILIES, K_MEANS, ONE_PROXY, OURS, UNTRAINED, applies
from .runs import SEEDS

HEADER = ["", "MAP@R", "R-Precision", "Precision@1", "ours ahead in MAP@R", "ours ahead in Precision@1"]
SHORT_HEADER = ["", "ours", "best loss of PML", "best rival by MAP@R", "best rival by Precision@1", "pretrained"]
TITLES = {
    "defaults": "every loss at its documented defaults",
    "best of three": "every loss in the best of three configurations on validation, beside ours at its defaults",
}
PEERS = [loss for loss in FAMILIES if loss not in (OURS, ONE_PROXY)]
OF_PML = [loss for loss in PEERS if loss != K_MEANS and "+" not in loss]
OPEN = "*Not all runs are there yet. The differences are of the seeds that both losses have.*"


def measured(runs, loss, which):
    """By seed and metric, the values of the classes, in %."""
    settings = runs.chosen(loss, which)
    rows = {} if settings is None else runs.get("test", loss, settings)
    rows = dict.fromkeys(SEEDS, rows[0]) if rows and loss == UNTRAINED else rows
    return {
        seed: {metric: np.array(rows[seed][f"{metric}_by_class"].split(), dtype=float) for metric in METRICS}
        for seed in SEEDS
        if seed in rows
    }


def stacked(found, seeds, metric):
    return np.array([found[seed][metric] for seed in seeds])


def of_task(runs, which):
    """Ours at its defaults first, then the strongest rival in MAP@R; below, the losses without any run."""
    own = {loss: measured(runs, loss, "defaults") for loss in (OURS, ONE_PROXY) if applies(loss, runs.name)}
    rivals = {loss: measured(runs, loss, which) for loss in (*PEERS, UNTRAINED)}
    rivals = dict(sorted(rivals.items(), key=lambda pair: -mean(pair[1])))
    if which != "defaults":
        rivals[f"{OURS}, best of three"] = measured(runs, OURS, which)
    first = max(own, key=lambda loss: mean(own[loss]))
    rows = [row(loss, found, own[first] if loss != first else {}) for loss, found in (own | rivals).items() if found]
    lacking = [loss for loss, found in (own | rivals).items() if not found]
    return join(table(HEADER, rows), f"Open: {'; '.join(lacking)}." if lacking else None)


def mean(found, metric="map_at_r"):
    """-1 where it is open."""
    return stacked(found, found, metric).mean() if found else -1.0


def row(loss, found, ours):
    seeds = [seed for seed in found if seed in ours]
    cells = [mean_and_interval(stacked(found, found, metric)) for metric in METRICS]
    cells += [difference(found, ours, seeds, metric) if seeds else "" for metric in ("map_at_r", "precision_at_1")]
    number = "" if len(found) == len(SEEDS) else f" ({len(found)} of {len(SEEDS)} seeds)"
    return [loss + number, *cells]


def difference(found, ours, seeds, metric):
    """Of ours to this loss, with its interval: both are resampled with the same seeds and classes."""
    values = stacked(ours, seeds, metric) - stacked(found, seeds, metric)
    low, high = interval(values)
    return f"{values.mean():+.1f} ({low:+.1f} to {high:+.1f})"


def summary(runs):
    """One line, MAP@R and Precision@1: ours at its defaults, rivals at their best; None before both have a run."""
    found = {loss: measured(runs, loss, "defaults") for loss in (OURS, ONE_PROXY, UNTRAINED)}
    found |= {loss: measured(runs, loss, "best of three") for loss in PEERS}
    groups = ((OURS, ONE_PROXY), "map_at_r"), (OF_PML, "map_at_r"), (PEERS, "map_at_r"), (PEERS, "precision_at_1")
    best = [max(losses, key=lambda loss: mean(found[loss], metric)) for losses, metric in groups]
    if not all(found[loss] for loss in best):
        return None
    pairs = {
        loss: f"{mean(found[loss]):.1f} / {mean(found[loss], 'precision_at_1'):.1f}" for loss in (*best, UNTRAINED)
    }
    return [f"`{runs.name}`", *(f"{loss}: {pairs[loss]}" for loss in best), pairs[UNTRAINED]]


def report(runs, out):
    lines = [line for of in runs if (line := summary(of))]
    short = table(SHORT_HEADER, lines)
    parts = [
        f"**`{of.name}`: {title}**{schedule(of)}\n\n{of_task(of, which)}"
        for of in runs
        if any(row["phase"] == "test" for row in of.rows)
        for which, title in TITLES.items()
    ]
    text = join(OPEN, *parts) if any("Open: " in part or " seeds)" in part for part in parts) else join(*parts)
    for name, content in {"summary.md": short or "*Nothing has been run yet.*", "tables.md": text}.items():
        (out / name).write_text(content + "\n", encoding="utf-8")
    print(join(short, text))


def schedule(runs):
    chosen = runs.schedule()
    return f" ({chosen['epochs']} epochs, learning rate {chosen['lr']:g}, chosen for all)" if chosen else ""
