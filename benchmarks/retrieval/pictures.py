"""The pictures of the report."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .losses import COUNTS, FAMILIES, SWEPT, UNTRAINED, proxy_counts
from .selection import by_class, interval, measured, with_any_test

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


def draw_proxies_per_class(runs, path, seeds):
    """What :func:`~.tables.numbers_of_proxies` holds; numbers without all runs are left out."""
    names = [name for name in COUNTS if name in runs and runs[name].rows]
    if not names:
        return
    figure = Figure(figsize=(4.5 * len(names), 4), layout="constrained")
    for ax, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        for loss in SWEPT:
            found = {k: by_class(runs[name], loss, settings, seeds) for k, settings in proxy_counts(loss, name).items()}
            found = {k: values for k, values in found.items() if values is not None}
            means = [values.mean() for values in found.values()]
            spread = [values.mean(axis=1).std() for values in found.values()]
            ax.errorbar(list(found), means, spread, marker="o", capsize=3, label=loss)
        ax.set(title=name, xlabel="proxies per class", ylabel="MAP@R, %", xscale="log")
        ax.set_xticks(COUNTS[name], labels=COUNTS[name])
        ax.minorticks_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("All else at the defaults; five seeds, ± standard deviation")
    figure.savefig(path, dpi=90)
