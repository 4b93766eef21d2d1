"""The pictures of the report."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

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


def draw_bars(runs, which, title, path, seeds):
    found = {name: measured(runs, name, which, seeds)[0] for name in with_any_test(runs)}
    figure = Figure(figsize=(max(3.4 * len(found), 10), 5), layout="constrained")
    colors = [*matplotlib.colormaps["tab20"].colors[: len(FAMILIES)], "black"]
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
            ax.errorbar([int(k) for k in x], mean, deviation, marker="o", capsize=3, label=loss)
        ax.set(title=name, xlabel="proxies per class", ylabel="MAP@R on validation, %", xscale="log")
        ax.set_xticks(COUNTS, labels=COUNTS, fontsize="small")
        ax.minorticks_off()
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
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
