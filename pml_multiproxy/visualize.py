"""Pictures of a loss: its proxies among the embeddings, the images nearest to each, and how evenly they are used.

They need matplotlib, which the package does not install, so you import this module by name::

    from pml_multiproxy import visualize

Arrays may be NumPy's or torch's. The functions show no window, write no file, choose no backend and do not change the
loss. Without axes they make a new figure; ``ax.figure.savefig(...)`` writes it. Wrong embeddings, labels, colours or
numbers of images raise an error that names them; matplotlib and NumPy complain about the rest.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import multimode
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

try:
    from matplotlib import pyplot as plt
except ModuleNotFoundError as error:
    raise ImportError('pml_multiproxy.visualize needs matplotlib: pip install "pml-multiproxy[visualize]"') from error
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from . import _check as check
from . import functional
from .inspection import Array, Groups, WorstGroup, _as_tensor, _checked_samples, nearest_samples
from .losses import MultiProxyEntropyLoss, check_loss

__all__ = ["plot_class", "plot_embeddings", "plot_groups", "plot_nearest", "plot_usage", "plot_worst_groups"]

Numpy = NDArray[Any]
Styles = dict[int, dict[str, Any]]
"""The colour and the label of each group of dots."""

Classes = Sequence[int] | Array
Names = Sequence[str] | Mapping[int, str]

MOST_ROWS = 30
"""How many classes :func:`plot_usage` draws by default."""

MOST_IN_LEGEND = 20
"""With more colours, a reader cannot tell them apart, and the legend would cover the picture."""


def plot_embeddings(
    loss_func: MultiProxyEntropyLoss,
    embeddings: Array,
    labels: Array,
    *,
    colors: Array | None = None,
    classes: Classes | None = None,
    axes: Axes | Sequence[Axes] | Numpy | None = None,
    class_names: Names | None = None,
    color_names: Names | None = None,
    legend_title: str | None = None,
) -> Numpy:
    """One panel per class: its samples, each with a line to its nearest proxy, in the plane where they spread most.

    Each panel is drawn as by :func:`plot_class`, in its own plane and scale. All panels share their colours. If the
    distance of the loss normalizes embeddings, samples and proxies are drawn at unit length. The nearest proxy is the
    one that :meth:`MultiProxyEntropyLoss.assign() <pml_multiproxy.losses.MultiProxyEntropyLoss.assign>` returns, among
    the proxies of the class.

    Args:
        loss_func: the loss with the proxies. Its mode, usage and statistics stay as they are.
        embeddings: ``(B, D)``, finite, a tensor on the device of the proxies or a NumPy array.
        labels: ``(B,)``, integers in ``[0, C)``.
        colors: ``(B,)``, integers: finer labels, which colour the dots and are named in a legend. ``None``: dots have
            the colour of their nearest proxy.
        classes: which classes to draw, in this order. A class without samples shows its proxies only. ``None``: all
            classes in ``labels``; if these are many, choose some, since each takes a panel.
        axes: one for each class. ``None``: a new figure.
        class_names: titles of the panels, by class. ``None``: the numbers of the classes.
        color_names: names in the legend, by colour. ``None``: the integers.
        legend_title: what the colours stand for.

    Returns:
        The axes, one for each class, in one dimension.

    Raises:
        TypeError, ValueError: if the loss, embeddings, labels, colors or classes have the wrong type, shape, dtype,
            device or range.

    Example:
        >>> import torch
        >>> from pml_multiproxy import MultiProxyEntropyLoss, visualize
        >>> loss_func = MultiProxyEntropyLoss(num_classes=2, embedding_size=8, proxies_per_class=3)
        >>> axes = visualize.plot_embeddings(loss_func, torch.randn(20, 8), torch.arange(20) % 2)
        >>> [ax.get_title() for ax in axes]
        ['class 0', 'class 1']
    """
    points, targets = _checked_samples(loss_func, embeddings, labels)
    shown = _class_numbers(torch.unique(targets) if classes is None else classes, loss_func.num_classes)
    titles = _named(class_names, shown, default="class {}")
    nearest = loss_func.assign(points, targets)[1]
    groups = _numpy(nearest if colors is None else check.integers("colors", _as_tensor(colors), len(points)))
    scaled = functional.normalize if loss_func.distance.normalize_embeddings else Tensor.detach
    dots, of_class, stars = _numpy(scaled(points)), _numpy(targets), _numpy(nearest)
    drawn = np.unique(groups[np.isin(of_class, shown)])
    styles = _styles(drawn, {} if colors is None else _named(color_names, drawn.tolist()))
    panels = _panels(len(shown)) if axes is None else np.array(axes, dtype=object).ravel()
    for ax, label in zip(panels, shown, strict=True):
        own, proxies = of_class == label, _numpy(scaled(loss_func.proxies[label]))
        _draw_class(ax, dots[own], proxies, stars[own], groups[own], styles, legend_title)
        ax.set_title(titles[label])
    return panels


def plot_class(
    embeddings: Array,
    proxies: Array,
    colors: Array | None = None,
    ax: Axes | None = None,
    *,
    nearest: Array | None = None,
    legend_title: str | None = None,
    color_names: Names | None = None,
) -> Axes:
    """The samples and proxies of one class, from any loss.

    Samples are dots, each with a thin line to its nearest proxy. Proxies are stars: a large star has the colour of most
    of its dots; a small white star is nearest to no sample. The plane is spanned by the first two principal components
    of the samples, or of samples and proxies together if there are fewer than three samples. The largest component of
    each direction is made positive, so that the same input gives the same picture.

    Args:
        embeddings: ``(N, D)``, finite, drawn as they are: normalize them first if the loss does.
        proxies: ``(K, D)``, finite, drawn as they are.
        colors: ``(N,)``, integers, which colour the dots and are named in a legend if they are at most 20. The integers
            from 0 to 19 have the same colours in every picture that has no others. ``None``: dots have the colour of
            their nearest proxy.
        ax: where to draw. ``None``: a new figure.
        nearest: ``(N,)``, integers in ``[0, K)``: the nearest proxy of each sample. ``None``: by Euclidean distance,
            which agrees with the cosine for vectors of unit length.
        legend_title: what the colours stand for.
        color_names: names in the legend, by colour. ``None``: the integers.

    Returns:
        The axes.

    Raises:
        TypeError, ValueError: if embeddings, proxies, colors or nearest have the wrong type, shape, dtype or range.

    Example:
        >>> import torch
        >>> embeddings, proxies = torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.7, 0.2]]), torch.eye(2)
        >>> plot_class(embeddings, proxies).get_xlabel()
        '1 of 2 proxies are the nearest to some sample'
    """
    points, stars = _as_tensor(embeddings).cpu().double(), _as_tensor(proxies).cpu().double()
    check.embeddings(points, stars)
    check.finite("embeddings", points)
    check.finite("proxies", stars)
    if nearest is None:  # without matrix products, which round near ties wrongly
        nearest = torch.cdist(points, stars, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
    closest = check.integers("nearest", _as_tensor(nearest), len(points)).cpu()
    check.in_range("nearest", closest, len(stars), "the number of proxies")
    groups = _numpy(closest if colors is None else check.integers("colors", _as_tensor(colors), len(points)))
    styles = _styles(np.unique(groups), {} if colors is None else _named(color_names, np.unique(groups).tolist()))
    ax = ax or plt.figure(layout="constrained").add_subplot()
    _draw_class(ax, _numpy(points), _numpy(stars), _numpy(closest), groups, styles, legend_title)
    return ax


def plot_nearest(
    loss_func: MultiProxyEntropyLoss,
    embeddings: Array,
    labels: Array,
    images: Sequence[Any] | Array,
    *,
    count: int = 8,
    classes: Classes | None = None,
    ax: Axes | None = None,
    class_names: Names | None = None,
) -> Axes:
    """One row of images per proxy: the images of its class that are nearest to it.

    :func:`~pml_multiproxy.inspection.nearest_samples` finds them, nearest first. An image is pale if its sample is
    nearer to another proxy of the class. In a row of pale images, few samples or none belong to the proxy. A class with
    fewer than ``count`` samples has shorter rows.

    Args:
        loss_func: the loss with the proxies. Its mode, usage and statistics stay as they are.
        embeddings: ``(B, D)``, finite, a tensor on the device of the proxies or a NumPy array.
        labels: ``(B,)``, integers in ``[0, C)``.
        images: of the samples, in their order: an array, a tensor or a sequence; only those drawn are read. Each is a
            Pillow image or of shape ``(H, W)``, ``(H, W, channels)`` or ``(channels, H, W)`` with 1, 3 or 4 channels.
            Values of ``uint8`` are divided by 255. Other values are drawn as they are if they lie in [0, 1]; otherwise
            the image is scaled from its lowest to its highest value.
        count: how many images for each proxy, at least 1.
        classes: which classes to draw, in this order. ``None``: all classes in ``labels``; if these are many, choose
            some, since each takes a row per proxy.
        ax: where to draw. ``None``: a new figure.
        class_names: names beside the rows, by class. ``None``: the numbers of the classes.

    Returns:
        The axes.

    Raises:
        TypeError, ValueError: if the loss, embeddings, labels, count or classes have the wrong type, shape, dtype,
            device or range, if the number of images differs from that of embeddings, or if an image is not finite.

    Example:
        >>> import torch
        >>> from pml_multiproxy import MultiProxyEntropyLoss, visualize
        >>> loss_func = MultiProxyEntropyLoss(num_classes=2, embedding_size=8, proxies_per_class=2)
        >>> embeddings, labels, images = torch.randn(20, 8), torch.arange(20) % 2, torch.rand(20, 3, 16, 16)
        >>> ax = visualize.plot_nearest(loss_func, embeddings, labels, images, count=5, class_names=["cat", "dog"])
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['cat, proxy 0', 'cat, proxy 1', 'dog, proxy 0', 'dog, proxy 1']
        >>> len(ax.images)
        20
    """
    points, targets = _checked_samples(loss_func, embeddings, labels)
    if len(images) != len(points):
        raise ValueError(f"images must be {len(points)}, one for each embedding, got {len(images)}")
    shown = _class_numbers(torch.unique(targets) if classes is None else classes, loss_func.num_classes)
    names = _named(class_names, shown, default="class {}")
    found = nearest_samples(loss_func, points, targets, count)[shown].flatten(0, 1).tolist()
    nearest = loss_func.assign(points, targets)[1].tolist()
    rows = [(label, proxy) for label in shown for proxy in range(loss_func.proxies_per_class)]
    cells = [(x, y, sample) for y, samples in enumerate(found) for x, sample in enumerate(samples) if sample >= 0]
    alphas = [1.0 if nearest[sample] == rows[y][1] else 0.3 for _, y, sample in cells]
    titles = [f"{names[label]}, proxy {proxy}" for label, proxy in rows]
    ax = _draw_rows(images, cells, alphas, titles, count, ax)
    ax.set_xlabel("the nearest first; pale: nearer to another proxy", loc="right")
    return ax


def plot_groups(
    groups: Groups,
    images: Sequence[Any] | Array,
    *,
    count: int = 8,
    shown: Sequence[int] | None = None,
    ax: Axes | None = None,
    class_names: Names | None = None,
) -> Axes:
    """A contact sheet: one row per group, with its size, its mean certainty, and the images nearest to its mean.

    Args:
        groups: the result of :func:`~pml_multiproxy.inspection.find_groups`.
        images: of the samples, in their order, as for :func:`plot_nearest`.
        count: how many images of each group, at most as many as ``find_groups`` was asked for.
        shown: numbers of the groups to draw, in this order. ``None``: all groups; if these are many, choose some.
        ax: where to draw. ``None``: a new figure.
        class_names: names beside the rows, by class. ``None``: the numbers of the classes.

    Returns:
        The axes.

    Raises:
        TypeError, ValueError: if the count or a group has the wrong type or range, if the number of images differs from
            that of the samples, or if an image is not finite.

    Example:
        >>> import torch
        >>> from pml_multiproxy import inspection, visualize
        >>> record = inspection.Group(0, 1, 3, proxies=[2], nearest=[2, 0, 1], certainty=0.9, found_again=None)
        >>> groups = inspection.Groups(torch.zeros(3).long(), torch.full((3,), 0.9), [record])
        >>> ax = visualize.plot_groups(groups, torch.rand(3, 8, 8), class_names={1: "dog"})
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['dog, group 0: 3 samples, certainty 0.90']
    """
    if len(images) != len(groups.group):
        raise ValueError(f"images must be {len(groups.group)}, one for each sample, got {len(images)}")
    chosen = range(len(groups.records)) if shown is None else shown
    check.in_range("shown", torch.tensor(list(chosen)), len(groups.records), "the number of groups")
    records, count = [groups.records[number] for number in chosen], check.positive_int("count", count)
    names = _named(class_names, {record.label for record in records}, default="class {}")
    cells = [(x, y, sample) for y, record in enumerate(records) for x, sample in enumerate(record.nearest[:count])]
    titles = [f"{names[r.label]}, group {r.group}: {r.size} samples, certainty {r.certainty:.2f}" for r in records]
    ax = _draw_rows(images, cells, [1.0] * len(cells), titles, count, ax)
    ax.set_xlabel("the nearest to the mean of the group first", loc="right")
    return ax


def plot_worst_groups(
    rows: Sequence[WorstGroup], *, count: int = 20, ax: Axes | None = None, class_names: Names | None = None
) -> Axes:
    """The accuracy of each group, or its mean loss, with its interval: the worst on top.

    Args:
        rows: the result of :func:`~pml_multiproxy.inspection.worst_groups`.
        count: how many groups to draw, at least 1.
        ax: where to draw. ``None``: a new figure.
        class_names: names beside the rows, by class. ``None``: the numbers of the classes.

    Returns:
        The axes.

    Raises:
        TypeError, ValueError: if the count has the wrong type or range.

    Example:
        >>> from pml_multiproxy import inspection, visualize
        >>> row = inspection.WorstGroup(group=3, label=0, size=40, mean=0.5, low=0.3, high=0.7, compared=10)
        >>> ax = visualize.plot_worst_groups([row], class_names=["cat"])
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['cat, group 3: 40 samples']
    """
    drawn = rows[: check.positive_int("count", count)]
    names = _named(class_names, {row.label for row in drawn}, default="class {}")
    ax = ax or plt.figure(figsize=(8, 1.2 + 0.3 * len(drawn)), layout="constrained").add_subplot()
    means = np.array([row.mean for row in drawn])
    ends = np.array([[row.mean - row.low, row.high - row.mean] for row in drawn]).reshape(-1, 2).T
    ax.errorbar(means, range(len(drawn)), xerr=ends, fmt="o", capsize=3)
    ax.set(ylim=(len(drawn) - 0.5, -0.5))
    ax.set_yticks(range(len(drawn)), [f"{names[row.label]}, group {row.group}: {row.size} samples" for row in drawn])
    compared = drawn[0].compared if drawn else 0
    ax.set_xlabel(f"mean, with intervals that hold together for {compared} groups (95 %)")
    return ax


def plot_usage(
    loss_func: MultiProxyEntropyLoss,
    *,
    classes: Classes | None = None,
    ax: Axes | None = None,
    class_names: Names | None = None,
) -> Axes:
    r"""How the samples of each class spread over its proxies: ``proxy_usage``, one row per class.

    Each row has one bar per proxy, the most used first. The number at its right end is the perplexity of the usage,
    :math:`\exp H(u_c)`: :math:`K` for an even usage, 1 if one proxy has all samples.

    Identical proxies share their samples evenly, so **usage alone cannot show a collapse**. It shows unused proxies;
    :func:`plot_embeddings` shows proxies that lie on each other.

    Args:
        loss_func: the loss with the usage. Only training updates it; a new loss has an even usage.
        classes: which classes to draw, in this order. ``None``: all, but at most the first 30, as the title then says.
        ax: where to draw. ``None``: a new figure.
        class_names: names beside the rows, by class. ``None``: the numbers of the classes.

    Returns:
        The axes.

    Raises:
        TypeError, ValueError: if the loss or the classes have the wrong type or range.

    Example:
        >>> from pml_multiproxy import MultiProxyEntropyLoss, visualize
        >>> ax = visualize.plot_usage(MultiProxyEntropyLoss(num_classes=2, embedding_size=8, proxies_per_class=4))
        >>> [text.get_text() for text in ax.texts]
        ['4.0', '4.0']
    """
    num_classes, num_proxies = check_loss(loss_func).proxy_usage.shape
    shown = _class_numbers(range(min(num_classes, MOST_ROWS)) if classes is None else classes, num_classes)
    names = _named(class_names, shown)
    usage = loss_func.proxy_usage.detach().cpu().double()[shown].sort(dim=1, descending=True).values

    ax = ax or plt.figure(figsize=(8, 1.6 + 0.25 * len(shown)), layout="constrained").add_subplot()
    shades = plt.get_cmap("viridis")(np.linspace(0.15, 0.95, num_proxies))
    for widths, lefts, shade in zip(usage.T, (usage.cumsum(dim=1) - usage).T, shades, strict=True):
        # White edges would hide the narrowest bars.
        edges = np.where(widths > 0.005, 0.5, 0)
        ax.barh(range(len(shown)), widths, left=lefts, color=shade, edgecolor="white", linewidth=edges)
    for row, perplexity in enumerate(functional.perplexity(usage).tolist()):
        ax.text(1.01, row, f"{perplexity:.1f}", va="center")
    ax.set(xlim=(0, 1), ylim=(len(shown) - 0.4, -0.6), ylabel="class")
    ax.set_yticks(range(len(shown)), [names[label] for label in shown])
    ax.set_xlabel(f"usage of its {num_proxies} proxies, the most used first; at the right: perplexity of the usage")
    if len(shown) < num_classes:
        ax.set_title(f"{'the first ' if classes is None else ''}{len(shown)} of {num_classes} classes")
    return ax


def _draw_rows(
    images: Sequence[Any] | Array,
    cells: Sequence[tuple[int, int, int]],
    alphas: Sequence[float],
    titles: Sequence[str],
    count: int,
    ax: Axes | None,
) -> Axes:
    """Images in rows with titles; each cell is a column, a row and the number of an image."""
    pixels = {sample: _pixels(f"images[{sample}]", images[sample]) for _, _, sample in cells}
    width_of_names = 0.5 + 0.1 * max(map(len, titles), default=0)
    figsize = max(width_of_names + 0.7 * count, 4.5), 0.8 + 0.7 * len(titles)
    ax = ax or plt.figure(figsize=figsize, layout="constrained").add_subplot()
    for (x, y, sample), alpha in zip(cells, alphas, strict=True):
        height, width = 0.46 * np.array(pixels[sample].shape[:2]) / max(pixels[sample].shape[:2])
        extent = (x - width, x + width, y + height, y - height)
        ax.imshow(pixels[sample], cmap="gray", vmin=0, vmax=1, extent=extent, alpha=alpha)
    ax.set(xlim=(-0.5, count - 0.5), ylim=(len(titles) - 0.5, -0.5), xticks=[], frame_on=False)
    ax.set_yticks(range(len(titles)), titles)
    ax.tick_params(length=0)
    ax.set_anchor("E")  # spare width goes to the names
    return ax


def _panels(count: int) -> Numpy:
    columns = min(count, max(3, math.ceil(math.sqrt(count))))
    rows = math.ceil(count / columns)
    figure = plt.figure(figsize=(5 * columns, 4.6 * rows), layout="constrained")
    return np.array([figure.add_subplot(rows, columns, place) for place in range(1, count + 1)])


def _draw_class(
    ax: Axes, points: Numpy, proxies: Numpy, nearest: Numpy, groups: Numpy, styles: Styles, legend_title: str | None
) -> None:
    """Dots in the colours of their groups, each with a line to its nearest star; a legend of labelled groups."""
    dots, stars = _in_plane(points, proxies)
    lines = list(np.stack([dots, stars[nearest]], axis=1))
    colors = [styles[group]["color"] for group in groups.tolist()]
    # One collection, since thousands of single lines take seconds to draw.
    ax.add_collection(LineCollection(lines, colors=colors, alpha=0.2, linewidths=0.8), autolim=False)
    for group in np.unique(groups).tolist():
        xs, ys = dots[groups == group].T
        ax.scatter(xs, ys, s=10, alpha=0.6, zorder=2, **styles[group])
    majorities = [min(multimode(groups[nearest == star].tolist()), default=None) for star in range(len(stars))]
    sizes = [90 if group is None else 300 for group in majorities]
    faces = ["white" if group is None else styles[group]["color"] for group in majorities]
    ax.scatter(stars[:, 0], stars[:, 1], marker="*", s=sizes, c=faces, edgecolor="black", zorder=3)
    ax.set(xticks=[], yticks=[])
    ax.set_xlabel(f"{len(np.unique(nearest))} of {len(stars)} proxies are the nearest to some sample")
    if 0 < len(ax.get_legend_handles_labels()[1]) <= MOST_IN_LEGEND:
        ax.legend(title=legend_title, loc="best", fontsize=8, title_fontsize=8, markerscale=2)


def _in_plane(points: Numpy, proxies: Numpy) -> tuple[Numpy, Numpy]:
    """Both as ``(_, 2)``, in the plane of the first two principal components of the points."""
    fitted = points if len(points) > 2 else np.concatenate([points, proxies])
    center = fitted.mean(axis=0)
    directions = np.linalg.svd(fitted - center, full_matrices=False)[2][:2]
    largest = np.take_along_axis(directions, abs(directions).argmax(axis=1)[:, None], axis=1)
    # A single vector, or a single dimension, has one direction only.
    directions = np.pad(directions * np.sign(largest), ((0, 2 - len(directions)), (0, 0)))
    return (points - center) @ directions.T, (proxies - center) @ directions.T


def _styles(groups: Numpy, names: dict[int, str]) -> Styles:
    """Of different groups, in ascending order."""
    places = groups if np.isin(groups, range(20)).all() else np.arange(len(groups))
    if len(groups) <= 20:
        colors = plt.get_cmap("tab20")(np.r_[0:20:2, 1:20:2][places])  # the ten of tab10, then their pale ones
    else:  # far apart for neighbouring groups, which are often in the same panel
        colors = plt.get_cmap("turbo")((0.618 * places % 1).argsort().argsort() / (len(groups) - 1))
    return {group: {"color": c, "label": names.get(group)} for group, c in zip(groups.tolist(), colors, strict=True)}


def _pixels(name: str, image: object) -> Numpy:
    """``(H, W)`` or ``(H, W, channels)``, in [0, 1]."""
    values = _as_tensor(image.convert("RGBA") if hasattr(image, "convert") else image)  # Pillow's may have a palette
    check.finite(name, values)
    if values.ndim == 3 and values.shape[0] in (1, 3, 4) and values.shape[2] not in (1, 3, 4):
        values = values.movedim(0, 2)
    pixels = _numpy(values.double())
    if values.dtype == torch.uint8:
        return pixels / 255
    low, high = pixels.min(), pixels.max()
    return pixels if low >= 0 and high <= 1 else (pixels - low) / max(high - low, np.finfo(float).tiny)


def _class_numbers(classes: Classes, num_classes: int) -> list[int]:
    numbers = check.labels(_as_tensor(classes).cpu(), len(classes), num_classes, "classes")
    return list(numbers.tolist())


def _named(names: Names | None, numbers: Iterable[int], default: str = "{}") -> dict[int, str]:
    """The names of the numbers, which ``default`` formats if there are none."""
    if names is None:
        return {number: default.format(number) for number in numbers}
    given = names if isinstance(names, Mapping) else dict(enumerate(names))  # so that no number counts from the end
    return {number: str(given[number]) for number in numbers}


def _numpy(tensor: Tensor) -> Numpy:
    """On the CPU, floating point as ``float64``, since NumPy has no ``bfloat16``."""
    values = tensor.detach().cpu()
    return (values.double() if values.is_floating_point() else values).numpy()
