"""The tables and pictures of retrieval.py, made of its CSV files alone."""

import inspect

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from retrieval_losses import FAMILIES, REFERENCES, UNTRAINED
from retrieval_tasks import TASKS

from pml_multiproxy import MultiProxyEntropyLoss

OURS = "MultiProxyEntropy"
PEERS = [name for name in FAMILIES if name not in REFERENCES and not name.startswith(OURS)]
TABLES = {
    "best here": "each loss in its configuration that was best on the validation part of the task",
    "best elsewhere": "one configuration per loss for everything: that which was best on validation of the other tasks",
    "defaults": "untouched defaults",
}
RESAMPLES = 4000


def chosen(runs, name, loss):
    """The number of the configuration that each table takes; those that cannot be known yet are left out."""
    tables = {"defaults": 0}
    here, *others = (runs[task].validated(loss) for task in (name, *(task for task in TASKS if task != name)))
    if here:
        tables["best here"] = int(np.argmax(here))
    if all(others):  # each counts by how far it is from the best on its task
        tables["best elsewhere"] = int(
            np.argmax(np.mean([np.array(scores) / max(scores) for scores in others], axis=0))
        )
    return tables


def by_seed_and_class(runs, name, loss, table):
    """MAP@R of the test runs, ``(seeds, classes)``, in %, or None where there are none."""
    index = 0 if loss == UNTRAINED else chosen(runs, name, loss).get(table)
    rows = runs[name].get("test", loss, index)
    if not rows:
        return None
    return np.array([[float(x) for x in rows[seed]["map_at_r_by_class"].split()] for seed in sorted(rows)])


def interval(values):
    """95 %, by bootstrap over the seeds and the classes."""
    rng = np.random.default_rng(0)
    seeds, classes = values.shape
    means = [
        values[np.ix_(rng.integers(seeds, size=seeds), rng.integers(classes, size=classes))].mean()
        for _ in range(RESAMPLES)
    ]
    return np.percentile(means, [2.5, 97.5])


def measured(runs, table):
    """The test runs of each task, by loss."""
    found = {
        name: {loss: by_seed_and_class(runs, name, loss, table) for loss in (*FAMILIES, UNTRAINED)} for name in runs
    }
    found = {name: {loss: v for loss, v in values.items() if v is not None} for name, values in found.items()}
    return {name: values for name, values in found.items() if set(values) > {UNTRAINED}}


def main_table(found):
    lines = [f"| | {' | '.join(found)} |", "|---|" + "---|" * len(found)]
    for loss in (*FAMILIES, UNTRAINED):
        cells = []
        for values in found.values():
            if loss in values:
                low, high = interval(values[loss])
                cells.append(f"{values[loss].mean():.1f} ({low:.1f} to {high:.1f})")
            else:
                cells.append("")
        lines.append(f"| {loss} | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference_table(found):
    lines = ["| task | best peer | ours | difference | ratio |", "|---|---|---|---|---|"]
    for name, values in found.items():
        peers = {loss: v for loss, v in values.items() if loss in PEERS}
        if not peers or OURS not in values:
            continue
        best = max(peers, key=lambda loss: peers[loss].mean())
        seeds = min(len(values[OURS]), len(peers[best]))
        ours, peer = values[OURS][:seeds], peers[best][:seeds]
        low, high = interval(ours - peer)
        difference = f"{ours.mean() - peer.mean():+.1f} ({low:+.1f} to {high:+.1f})"
        ratio = ours.mean() / peer.mean()
        lines.append(f"| {name} | {best}: {peer.mean():.1f} | {ours.mean():.1f} | {difference} | {ratio:.2f} |")
    return "\n".join(lines)


def report(runs, out):
    parts = []
    for table, title in TABLES.items():
        found = measured(runs, table)
        if found:
            parts += [f"**{title[0].upper()}{title[1:]}**", main_table(found), difference_table(found)]
            draw_bars(found, title, out / f"{table.replace(' ', '_')}.png")
    (out / "tables.md").write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))
    draw_sweeps(runs, out)


def draw_bars(found, title, path):
    figure = Figure(figsize=(max(3.4 * len(found), 10), 5), layout="constrained")
    colors = [*matplotlib.colormaps["tab10"].colors, "black"]
    for ax, (name, values) in zip(np.atleast_1d(figure.subplots(1, len(found))), found.items(), strict=True):
        for i, loss in enumerate((*FAMILIES, UNTRAINED)):
            if loss in values:
                low, high = interval(values[loss])
                mean = values[loss].mean()
                ax.bar(
                    i, mean, yerr=[[mean - low], [high - mean]], color=colors[i], ecolor="gray", capsize=3, label=loss
                )
        ax.set(title=name, ylabel="MAP@R, %", xticks=[])
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title)
    figure.savefig(path, dpi=90)


def swept(runs, name, loss):
    """MAP@R on validation by what was changed, each over the seeds."""
    values = {}
    for row in runs[name].rows:
        if row["phase"] == "sweep" and row["loss"] == loss:
            values.setdefault(row["configuration"], []).append(float(row["map_at_r"]))
    return values


def draw_sweeps(runs, out):
    names = [name for name in runs if swept(runs, name, OURS)]
    if names:
        draw_proxies_per_class(runs, [name for name in names if name.endswith("coarse")], out)
        draw_sensitivity(runs, names, out)


def curve(values, key, default=None):
    """The values of one hyperparameter, in order, and the mean and the standard deviation of the score at each."""
    points = {label.split("=")[1]: scores for label, scores in values.items() if label.startswith(f"{key}=")}
    if default is not None:
        points[str(default)] = values["defaults"]
    numeric = all(point.replace(".", "").isdigit() for point in points)
    order = sorted(points, key=float) if numeric else sorted(points)
    return order, [np.mean(points[x]) for x in order], [np.std(points[x]) for x in order]


def draw_proxies_per_class(runs, names, out):
    figure = Figure(figsize=(4.5 * len(names), 4), layout="constrained")
    for ax, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        for loss in (OURS, "SoftTriple", "SubCenterArcFace"):
            x, mean, deviation = curve(swept(runs, name, loss), "proxies_per_class")
            ax.errorbar([int(k) for k in x], mean, deviation, marker="o", capsize=3, label=loss)
        ax.set(title=name, xlabel="proxies per class", ylabel="MAP@R on validation, %", xscale="log")
        ax.set_xticks([int(k) for k in x], labels=x)
        ax.minorticks_off()
    ax.legend()
    figure.savefig(out / "proxies_per_class.png", dpi=90)


def draw_sensitivity(runs, names, out):
    keys = {label.split("=")[0] for label in swept(runs, names[0], OURS)} - {"defaults", "proxies_per_class"}
    defaults = default_values()
    figure = Figure(figsize=(16, 7), layout="constrained")
    axes = figure.subplots(2, (len(keys) + 1) // 2).flatten()
    for ax, key in zip(axes, sorted(keys), strict=False):
        for name in names:
            x, mean, deviation = curve(swept(runs, name, OURS), key, defaults[key])
            ax.errorbar(range(len(x)), mean, deviation, marker="o", capsize=3, label=name)
        ax.set_xticks(range(len(x)), labels=x)
        ax.set(title=f"{key} (default {defaults[key]})", ylabel="MAP@R on validation, %")
    for ax in axes[len(keys) :]:
        ax.set_axis_off()
    axes[0].legend()
    figure.savefig(out / "sensitivity.png", dpi=90)


def default_values():
    return {key: value.default for key, value in inspect.signature(MultiProxyEntropyLoss).parameters.items()}
