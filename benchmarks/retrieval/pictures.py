"""The pictures of the report."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .losses import (
    CHANGES_BEFORE,
    COUNTS,
    DEFAULTS_BEFORE,
    FAMILIES,
    OURS,
    SEVERAL_PROXIES,
    UNTRAINED,
    changes_before,
    counts,
)
from .selection import interval, measured, scores_of, with_any_test

COLUMNS = 4


def draw_bars(runs, which, title, path, seeds):
    names, losses = with_any_test(runs), (*FAMILIES, UNTRAINED)
    colors = dict(zip(losses, [*matplotlib.colormaps["tab20"].colors[: len(FAMILIES)], "black"], strict=True))
    rows = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(15, 3.2 * rows + 1.6), layout="constrained")
    for ax, name in zip(figure.subplots(rows, COLUMNS, squeeze=False).flatten(), names, strict=False):
        found, lacking = measured(runs, name, which, seeds)
        for i, loss in enumerate(losses):
            if loss in found:
                low, high = interval(found[loss])
                mean = found[loss].mean()
                ax.bar(i, mean, yerr=[[mean - low], [high - mean]], color=colors[loss], ecolor="gray", capsize=3)
            elif loss in lacking:
                ax.annotate("open", (i, 0), (0, 3), textcoords="offset points", rotation=90, ha="center", size="small")
        ax.set(title=name, ylabel="MAP@R, %", xticks=[], xlim=(-0.7, len(losses) - 0.3), ylim=(0, None))
    for ax in figure.axes[len(names) :]:
        ax.set_axis_off()
    figure.legend([Patch(color=color) for color in colors.values()], losses, loc="outside lower center", ncols=4)
    figure.suptitle(title)
    figure.savefig(path, dpi=90)


def swept_before(runs):
    """The tasks on which all changes of the defaults before were measured."""
    return [name for name in runs if scores_of(runs[name], OURS, changes_before()).keys() == changes_before().keys()]


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


def draw_proxies_per_class(runs, out):
    names = swept_before(runs)
    figure = Figure(figsize=(max(3.4 * len(names), 7), 4), layout="constrained")
    for ax, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        for loss in (OURS, *SEVERAL_PROXIES):
            labels = changes_before() if loss == OURS else counts(loss)
            x, mean, deviation = curve(scores_of(runs[name], loss, labels), FAMILIES[loss].several)
            if len(x) > 1:
                ax.errorbar([int(k) for k in x], mean, deviation, marker="o", capsize=3, label=loss)
        ax.set(title=name, xlabel="proxies per class", ylabel="MAP@R on validation, %", xscale="log")
        ax.set_xticks(COUNTS, labels=COUNTS, fontsize="small")
        ax.minorticks_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"All else at the defaults; of {OURS}, at the defaults before")
    figure.savefig(out / "proxies_per_class.png", dpi=90)


def draw_sensitivity(runs, out):
    names = swept_before(runs)
    keys = [key for key in CHANGES_BEFORE if key != "proxies_per_class"]
    defaults = DEFAULTS_BEFORE | {"margin": 0.0, "usage_momentum": 0.9, "from_kmeans": False}
    figure = Figure(figsize=(16, 8), layout="constrained")
    axes = figure.subplots(3, 4, sharey=True).flatten()
    for ax, key in zip(axes, keys, strict=False):
        for name in names:
            values = scores_of(runs[name], OURS, changes_before())
            x, mean, deviation = curve(values, key, defaults[key])
            of_defaults = np.mean(values["defaults"])
            ax.errorbar(range(len(x)), mean / of_defaults, deviation / of_defaults, marker="o", capsize=3, label=name)
        ax.set_xticks(range(len(x)), labels=x)
        ax.set(title=f"{key} (default {defaults[key]})")
        ax.axhline(1, color="gray", linewidth=0.8)
    for ax in axes[len(keys) :]:
        ax.set_axis_off()
    figure.supylabel("MAP@R on validation, relative to the defaults before")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(out / "sensitivity.png", dpi=90)
