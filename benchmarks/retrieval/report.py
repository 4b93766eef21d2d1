"""The tables and pictures of retrieval.py, made of its CSV files alone."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .losses import (
    CHANGES_BEFORE,
    CLASSES_ONLY,
    COUNTS,
    DEFAULTS_BEFORE,
    FAMILIES,
    OURS,
    REFERENCES,
    SEVERAL_PROXIES,
    UNTRAINED,
    changes,
    changes_before,
    counts,
    load,
)
from .tasks import TASKS

PEERS = [name for name in FAMILIES if name not in REFERENCES and not name.startswith(OURS)]
TABLES = {
    "best here": "each loss in its configuration that was best on the validation part of the task",
    "best elsewhere": "one configuration per loss for everything: that which was best on validation of the other tasks",
    "defaults": "untouched defaults",
}
RESAMPLES = 4000


def chosen(runs, name, loss):
    """The settings that each table takes; those that cannot be known yet are left out."""
    configurations = load()[loss]
    tables = {"defaults": configurations[0]}
    here, *others = (runs[task].validated(loss) for task in (name, *like(name)))
    if here:
        tables["best here"] = configurations[int(np.argmax(here))]
    if all(others):
        tables["best elsewhere"] = configurations[int(np.argmax(np.mean(relative(others), axis=0)))]
    return tables


def like(name):
    """The other tasks that have views, or have none, as this one."""
    return [task for task in TASKS if task != name and task.endswith("views") == name.endswith("views")]


def relative(scores):
    """Of ``(tasks, configurations)``, each task's relative to its best."""
    return np.array(scores) / np.max(scores, axis=1, keepdims=True)


def configurations_table(runs):
    """Ours on validation, and what the other tasks choose, or None where some are missing."""
    names = [name for name in TASKS if runs[name].validated(OURS)]
    if not names:
        return None
    scores = [runs[name].validated(OURS) for name in names]
    means = np.mean(relative(scores), axis=0)
    keys = [key for key in load()[OURS][0] if key != "proxies_lr"]
    lines = [f"| | {' | '.join(f'`{key}`' for key in (*keys, 'proxies_lr'))} | {' | '.join(names)} | mean, relative |"]
    lines.append("|---|" + "---|" * (len(keys) + 2 + len(names)))
    for i, configuration in enumerate(load()[OURS]):
        settings = " | ".join(f"{configuration[key]}" for key in (*keys, "proxies_lr"))
        cells = " | ".join(f"{of_task[i]:.1f}" for of_task in scores)
        lines.append(f"| {i} | {settings} | {cells} | {means[i]:.2f} |")
    elsewhere = " | ".join(str(chosen(runs, name, OURS).get("best elsewhere", "")) for name in names)
    lines.append(f"| chosen by the other tasks |{' |' * (len(keys) + 1)} {elsewhere} | |")
    return "\n".join(lines)


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
    rows = [(name, values[OURS], values) for name, values in found.items() if OURS in values]
    return differences("ours", [(name, "", ours, values) for name, ours, values in rows])


def changed_table(runs):
    """The best of the sweep, and the best without terms within classes, against the best peer at its best."""
    rows = []
    for name, values in measured(runs, "best here").items():
        for table in ("changed", "classes only"):
            label = chosen(runs, name, OURS).get(table)
            if label:
                rows.append((name, f"`{label}`: ", by_seed_and_class(runs, name, OURS, table), values))
    return differences("ours, changed", rows) if rows else None


def differences(title, rows):
    """``rows``: task, label, MAP@R of ours, and that of each loss."""
    lines = [f"| task | best peer | {title} | difference | ratio |", "|---|---|---|---|---|"]
    for name, label, ours, values in rows:
        peers = {loss: v for loss, v in values.items() if loss in PEERS}
        if not peers or ours is None:
            continue
        best = max(peers, key=lambda loss: peers[loss].mean())
        seeds = min(len(ours), len(peers[best]))
        ours, peer = ours[:seeds], peers[best][:seeds]
        low, high = interval(ours - peer)
        difference = f"{ours.mean() - peer.mean():+.1f} ({low:+.1f} to {high:+.1f})"
        ratio = ours.mean() / peer.mean()
        lines.append(f"| {name} | {best}: {peer.mean():.1f} | {label}{ours.mean():.1f} | {difference} | {ratio:.2f} |")
    return "\n".join(lines)


def report(runs, out):
    parts = []
    for table, title in TABLES.items():
        found = measured(runs, table)
        if found:
            parts += [f"**{title[0].upper()}{title[1:]}**", main_table(found), difference_table(found)]
            draw_bars(found, title, out / f"{table.replace(' ', '_')}.png")
    changed = changed_table(runs)
    if changed:
        title = "Our defaults, changed as was best on validation, also where only the terms between classes are left"
        parts += [f"**{title}; each peer at its best**", changed]
    configurations = configurations_table(runs)
    if configurations:
        parts += ["**Our loss on the validation parts, by configuration**", configurations]
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
    names = [name for name in runs if swept(runs, name, OURS).keys() >= set(changes())]
    if names:
        draw_proxies_per_class(runs, names, out)
        draw_sensitivity(runs, names, out)


def curve(values, key, default=None):
    """The values of one hyperparameter, in order, and the mean and the standard deviation of the score at each."""
    points = {
        label.split("=")[1]: scores
        for label, scores in values.items()
        if label.startswith(f"{key}=") and " " not in label
    }
    if default is not None:
        points[str(default)] = values["defaults"]
    numeric = all(point.replace(".", "").isdigit() for point in points)
    order = sorted(points, key=float) if numeric else sorted(points)
    return order, np.array([np.mean(points[x]) for x in order]), np.array([np.std(points[x]) for x in order])


def draw_proxies_per_class(runs, names, out):
    figure = Figure(figsize=(max(3.4 * len(names), 7), 4), layout="constrained")
    for ax, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        for loss in (OURS, *SEVERAL_PROXIES):
            x, mean, deviation = curve(swept(runs, name, loss), FAMILIES[loss].several)
            ax.errorbar([int(k) for k in x], mean, deviation, marker="o", capsize=3, label=loss)
        ax.set(title=name, xlabel="proxies per class", ylabel="MAP@R on validation, %", xscale="log")
        ax.set_xticks(COUNTS, labels=COUNTS, fontsize="small")
        ax.minorticks_off()
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(out / "proxies_per_class.png", dpi=90)


def draw_sensitivity(runs, names, out):
    keys = [key for key in CHANGES_BEFORE if key != "proxies_per_class"]
    defaults = DEFAULTS_BEFORE | {"margin": 0.0, "usage_momentum": 0.9, "from_kmeans": False}
    figure = Figure(figsize=(16, 8), layout="constrained")
    axes = figure.subplots(3, 4, sharey=True).flatten()
    for ax, key in zip(axes, keys, strict=False):
        for name in names:
            values = swept(runs, name, OURS)
            x, mean, deviation = curve(values, key, defaults[key])
            of_defaults = np.mean(values["defaults"])
            ax.errorbar(range(len(x)), mean / of_defaults, deviation / of_defaults, marker="o", capsize=3, label=name)
        ax.set_xticks(range(len(x)), labels=x)
        ax.set(title=f"{key} (default {defaults[key]})")
        ax.axhline(1, color="gray", linewidth=0.8)
    for ax in axes[len(keys) :]:
        ax.set_axis_off()
    figure.supylabel("MAP@R on validation, relative to the defaults")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(out / "sensitivity.png", dpi=90)
