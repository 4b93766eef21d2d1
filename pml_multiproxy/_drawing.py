"""What the pictures of :mod:`pml_multiproxy.visualize` are made of."""

import math
from collections.abc import Iterable
from statistics import multimode
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from . import _plot_arguments as arguments
from ._plot_arguments import Array


def panel(ax: object, figsize: tuple[float, float] | None = None) -> Axes:
    """The given one, checked, or that of a new figure."""
    return plt.subplots(figsize=figsize, layout="constrained")[1] if ax is None else arguments.axes("ax", ax, 1)[0]


def panels(count: int) -> Array:
    columns = min(count, max(3, math.ceil(math.sqrt(count))))
    rows = math.ceil(count / columns)
    grid = plt.subplots(rows, columns, figsize=(5 * columns, 4.6 * rows), squeeze=False, layout="constrained")[1]
    for spare in grid.flat[count:]:
        spare.remove()
    return grid.ravel()[:count]


def dots_and_stars(ax: Axes, dots: Array, stars: Array, nearest: Array, groups: Array, names: dict[int, str]) -> None:
    """Dots in the colour of their group, each with a line to its nearest star, in the colour of most of its dots."""
    palette = _palette(groups)
    lines, line_colors = np.stack([dots, stars[nearest]], axis=1), [palette[group] for group in groups.tolist()]
    # One collection: as many single lines would take seconds to draw.
    ax.add_collection(LineCollection(list(lines), colors=line_colors, alpha=0.2, linewidths=0.8), autolim=False)
    for group, color in palette.items():
        xs, ys = dots[groups == group].T
        ax.scatter(xs, ys, s=10, alpha=0.6, color=color, label=names[group], zorder=2)
    majorities = [min(multimode(groups[nearest == star].tolist()), default=None) for star in range(len(stars))]
    sizes = [90 if group is None else 300 for group in majorities]
    faces = ["white" if group is None else palette[group] for group in majorities]
    ax.scatter(stars[:, 0], stars[:, 1], marker="*", s=sizes, c=faces, edgecolor="black", zorder=3)


def _palette(groups: Array) -> dict[int, Any]:
    values = np.unique(groups)
    if len(values) > 20:
        colors = plt.get_cmap("turbo")(np.linspace(0, 1, len(values)))
    elif np.isin(values, range(10)).all():
        colors = plt.get_cmap("tab10")(values)
    else:
        colors = plt.get_cmap("tab10" if len(values) <= 10 else "tab20")(np.arange(len(values)))
    return dict(zip(values.tolist(), colors, strict=True))


def images(ax: Axes, cells: Iterable[tuple[int, int, float, Array]]) -> None:
    """Each in its proportions, into a part of the unit square around its place."""
    for x, y, alpha, image in cells:
        height, width = 0.46 * np.array(image.shape[:2]) / max(image.shape[:2])
        box = (x - width, x + width, y + height, y - height)
        ax.imshow(image, cmap="gray", vmin=0, vmax=1, extent=box, alpha=alpha)


def bars(ax: Axes, widths: Array) -> None:
    """One row for each of ``widths``, ``(rows, bars)``, from left to right."""
    lefts, rows = widths.cumsum(axis=1) - widths, np.arange(len(widths))
    shades = plt.get_cmap("viridis")(np.linspace(0.15, 0.95, widths.shape[1]))
    for width, left, shade in zip(widths.T, lefts.T, shades, strict=True):
        # The edges of the narrowest bars would cover them.
        ax.barh(rows, width, left=left, color=shade, edgecolor="white", linewidth=np.where(width > 0.005, 0.5, 0))
