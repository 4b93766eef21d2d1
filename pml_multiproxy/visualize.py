"""Pictures of a loss: its proxies among the embeddings, and how evenly they are used.

Needs matplotlib, which the package does not install, so this module is imported by name::

    from pml_multiproxy import visualize

Nothing here shows a window, writes a file, chooses a backend or changes the loss. A function that gets no axes makes a
figure of its own; ``ax.figure.savefig(...)`` writes it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

try:
    from matplotlib import colormaps
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
except ModuleNotFoundError as error:
    raise ImportError('pml_multiproxy.visualize needs matplotlib: pip install "pml-multiproxy[visualize]"') from error

from . import _validation as check
from . import functional
from .losses import MultiProxyEntropyLoss

__all__ = ["plot_class", "plot_embeddings", "plot_usage"]

Array = NDArray[Any]

MOST_ROWS = 30
"""How many classes :func:`plot_usage` draws when it is not told which."""

MOST_IN_LEGEND = 20
"""More colours than that are neither told apart nor do their names leave room for the picture."""


def plot_embeddings(
    loss_func: MultiProxyEntropyLoss,
    embeddings: Tensor,
    labels: Tensor,
    *,
    colors: Tensor | None = None,
    classes: Sequence[int] | Tensor | None = None,
    axes: Axes | Sequence[Axes] | Array | None = None,
) -> Array:
    """One panel per class: its samples, each with a line to its nearest proxy, in the plane where they spread most.

    Each panel is a :func:`plot_class` of its own, so its plane and scale are not those of the others. Embeddings and
    proxies are drawn at unit length where the distance of the loss normalizes them, and as they are where it does not.
    "Nearest" is what :meth:`MultiProxyEntropyLoss.assign() <pml_multiproxy.losses.MultiProxyEntropyLoss.assign>` says,
    among the proxies of the class.

    Args:
        loss_func: where the proxies are. Neither its mode nor its usage nor its statistics change.
        embeddings: ``(B, D)``, finite, on the device of the proxies.
        labels: ``(B,)``, integers in ``[0, C)``.
        colors: ``(B,)``, integers: labels finer than the classes, which then colour the dots and are named in a legend.
            ``None``: a dot has the colour of its nearest proxy.
        classes: which to draw, in that order; one without samples has only its proxies drawn. ``None``: all that occur
            in ``labels``; name them when there are many, as each is a panel.
        axes: one for each class. ``None``: those of a new figure.

    Returns:
        The axes, one for each class, in one dimension.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or range.

    Example:
        >>> import torch
        >>> from pml_multiproxy import MultiProxyEntropyLoss, visualize
        >>> loss_func = MultiProxyEntropyLoss(num_classes=2, embedding_size=8, proxies_per_class=3)
        >>> axes = visualize.plot_embeddings(loss_func, torch.randn(20, 8), torch.arange(20) % 2)
        >>> [ax.get_title() for ax in axes]
        ['class 0', 'class 1']
    """
    _check_loss(loss_func)
    check.embeddings(embeddings, loss_func.proxies)
    _check_finite("embeddings", embeddings)
    _check_finite("proxies", loss_func.proxies.flatten(0, 1))
    labels = check.labels(labels, len(embeddings), loss_func.num_classes).cpu()
    check.in_range("labels", labels, loss_func.num_classes, "num_classes")  # those of a GPU were not checked yet
    if colors is not None:
        colors = check.integers("colors", colors, len(embeddings)).cpu()
    shown = _classes(np.unique(labels) if classes is None else classes, loss_func.num_classes)
    panels = _new_axes(len(shown)) if axes is None else _given_axes("axes", axes, len(shown))

    for ax, label in zip(panels, shown, strict=True):
        own = (labels == label).nonzero().squeeze(1)
        samples, proxies = embeddings.detach()[own.to(embeddings.device)], loss_func.proxies.detach()[label]
        with _keep_statistics(loss_func):
            _, nearest = loss_func.assign(samples, labels[own])
        if loss_func.distance.normalize_embeddings:
            samples, proxies = functional.normalize(samples), functional.normalize(proxies)
        plot_class(samples, proxies, None if colors is None else colors[own], ax, nearest=nearest)
        ax.set_title(f"class {label}")
    return panels


def plot_class(
    embeddings: Tensor,
    proxies: Tensor,
    colors: Tensor | None = None,
    ax: Axes | None = None,
    *,
    nearest: Tensor | None = None,
    legend_title: str | None = None,
) -> Axes:
    """The samples of one class and its proxies, whatever loss these belong to.

    Samples are dots, each with a thin line to its nearest proxy. Proxies are stars: a large one has the colour that
    most of its dots have, a small white one is the nearest to no sample. The plane is that of the first two principal
    components of the samples, or of samples and proxies together where fewer than three samples span no plane. The
    component of largest magnitude in each direction is positive, so that the same input gives the same picture.

    Args:
        embeddings: ``(N, D)``, finite, drawn as they are: normalize them first where the loss does.
        proxies: ``(K, D)``, finite, likewise.
        colors: ``(N,)``, integers that colour the dots and are named in a legend, if there are at most 20. From 0 to 9,
            each has a colour of its own, the same in every picture; others are numbered off in ascending order.
            ``None``: a dot has the colour of its nearest proxy.
        ax: where to draw. ``None``: in a new figure.
        nearest: ``(N,)``, integers in ``[0, K)``: the nearest proxy of each sample. ``None``: by Euclidean distance,
            which for vectors of unit length agrees with the cosine.
        legend_title: what the colours stand for.

    Returns:
        The axes.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype or range.

    Example:
        >>> import torch
        >>> embeddings, proxies = torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.7, 0.2]]), torch.eye(2)
        >>> plot_class(embeddings, proxies).get_xlabel()
        '1 of 2 proxies are the nearest to some sample'
    """
    proxies = _vectors("proxies", proxies)
    if len(proxies) == 0:
        raise ValueError("proxies must hold at least one row, got none")
    embeddings = _vectors("embeddings", embeddings, proxies.shape[1])
    if nearest is None:
        nearest = _nearest(embeddings, proxies)
    nearest = check.integers("nearest", nearest, len(embeddings)).cpu()
    check.in_range("nearest", nearest, len(proxies), "the number of proxies")
    groups = (nearest if colors is None else check.integers("colors", colors, len(embeddings))).cpu().numpy()
    ax = plt.subplots(layout="constrained")[1] if ax is None else _given_axes("ax", ax, 1)[0]

    ends, palette = nearest.numpy(), _palette(groups)
    points, stars = _in_plane(embeddings, proxies)
    _draw_samples(ax, points, stars[ends], groups, palette)
    _draw_proxies(ax, stars, [_majority(groups[ends == position]) for position in range(len(stars))], palette)
    ax.set(xticks=[], yticks=[])
    ax.set_xlabel(f"{len(np.unique(ends))} of {len(stars)} proxies are the nearest to some sample")
    if colors is not None and 0 < len(palette) <= MOST_IN_LEGEND:
        ax.legend(title=legend_title, loc="best", fontsize=8, title_fontsize=8, markerscale=2)
    return ax


def plot_usage(
    loss_func: MultiProxyEntropyLoss,
    *,
    classes: Sequence[int] | Tensor | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""How the samples of each class spread over its proxies: ``proxy_usage``, one row per class.

    A row holds one bar per proxy, the most used first. At its right end stands the perplexity of the usage,
    :math:`\exp H(u_c)`: :math:`K` for an even usage, 1 where one proxy has all samples.

    Proxies that have become identical share their samples evenly: **usage alone cannot show a collapse**. It shows
    proxies that are not used; :func:`plot_embeddings` shows those that lie on each other.

    Args:
        loss_func: whose usage to draw. Only training updates it: that of a new loss is even.
        classes: which to draw, in that order. ``None``: all, or the first 30 where there are more, as the title says.
        ax: where to draw. ``None``: in a new figure.

    Returns:
        The axes.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind or range.

    Example:
        >>> from pml_multiproxy import MultiProxyEntropyLoss, visualize
        >>> ax = visualize.plot_usage(MultiProxyEntropyLoss(num_classes=2, embedding_size=8, proxies_per_class=4))
        >>> [text.get_text() for text in ax.texts]
        ['4.0', '4.0']
    """
    _check_loss(loss_func)
    num_classes, num_proxies = loss_func.proxy_usage.shape
    shown = _classes(range(min(num_classes, MOST_ROWS)) if classes is None else classes, num_classes)
    if ax is None:
        ax = plt.subplots(figsize=(8, 1.6 + 0.25 * len(shown)), layout="constrained")[1]
    ax = _given_axes("ax", ax, 1)[0]

    usage = loss_func.proxy_usage.detach().cpu().double()[shown].sort(dim=1, descending=True).values
    starts = usage.cumsum(dim=1) - usage
    rows = np.arange(len(shown))
    shades = colormaps["viridis"](np.linspace(0.15, 0.95, num_proxies))
    for widths, lefts, shade in zip(usage.T.numpy(), starts.T.numpy(), shades, strict=True):
        # The edges of the narrowest bars would cover them.
        ax.barh(rows, widths, left=lefts, color=shade, edgecolor="white", linewidth=np.where(widths > 0.005, 0.5, 0))
    for row, perplexity in enumerate(functional.perplexity(usage).tolist()):
        ax.text(1.01, row, f"{perplexity:.1f}", va="center")
    ax.set(xlim=(0, 1), ylim=(len(shown) - 0.4, -0.6), ylabel="class")
    ax.set_yticks(rows, [str(label) for label in shown])
    ax.set_xlabel(f"usage of its {num_proxies} proxies, the most used first; at the right: perplexity of the usage")
    if len(shown) < num_classes:
        ax.set_title(f"{'the first ' if classes is None else ''}{len(shown)} of {num_classes} classes")
    return ax


def _in_plane(embeddings: Tensor, proxies: Tensor) -> tuple[Array, Array]:
    """Both as ``(_, 2)``, in the plane of the first two principal components of the embeddings."""
    fitted = embeddings if len(embeddings) > 2 else torch.cat([embeddings, proxies])
    center = fitted.mean(dim=0)
    directions = torch.linalg.svd(fitted - center, full_matrices=False).Vh[:2]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    directions = directions * largest.sign()
    # One dimension, or one vector, has but one direction.
    directions = torch.nn.functional.pad(directions, (0, 0, 0, 2 - len(directions)))
    return ((embeddings - center) @ directions.T).numpy(), ((proxies - center) @ directions.T).numpy()


def _nearest(embeddings: Tensor, proxies: Tensor) -> Tensor:
    # The faster way by a matrix product would get near ties wrong.
    return torch.cdist(embeddings, proxies, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)


def _majority(groups: Array) -> int | None:
    """The most frequent value, the smallest of several; ``None`` without any."""
    values, counts = np.unique(groups, return_counts=True)
    return int(values[counts.argmax()]) if len(values) else None


def _palette(groups: Array) -> dict[int, Any]:
    values = np.unique(groups).tolist()
    if all(0 <= value < 10 for value in values):
        return {value: colormaps["tab10"](value) for value in values}
    if len(values) <= 20:
        few = colormaps["tab10" if len(values) <= 10 else "tab20"]
        return {value: few(rank) for rank, value in enumerate(values)}
    return dict(zip(values, colormaps["turbo"](np.linspace(0, 1, len(values))), strict=True))


def _draw_samples(ax: Axes, points: Array, ends: Array, groups: Array, palette: dict[int, Any]) -> None:
    line_colors = [palette[group] for group in groups.tolist()]
    lines = np.stack([points, ends], axis=1)
    # One collection: as many single lines would take seconds to draw.
    ax.add_collection(LineCollection(list(lines), colors=line_colors, alpha=0.2, linewidths=0.8), autolim=False)
    for group, color in palette.items():
        xs, ys = points[groups == group].T
        ax.scatter(xs, ys, s=10, alpha=0.6, color=color, label=f"{group}", zorder=2)


def _draw_proxies(ax: Axes, stars: Array, groups: Sequence[int | None], palette: dict[int, Any]) -> None:
    xs, ys = stars.T
    sizes = [90 if group is None else 300 for group in groups]
    faces = ["white" if group is None else palette[group] for group in groups]
    ax.scatter(xs, ys, marker="*", s=sizes, c=faces, edgecolor="black", zorder=3)


def _new_axes(count: int) -> Array:
    columns = min(count, max(3, math.ceil(math.sqrt(count))))
    rows = math.ceil(count / columns)
    grid = plt.subplots(rows, columns, figsize=(5 * columns, 4.6 * rows), squeeze=False, layout="constrained")[1]
    for spare in grid.flat[count:]:
        spare.remove()
    return grid.ravel()[:count]


def _given_axes(name: str, value: object, count: int) -> Array:
    given = np.array(value, dtype=object).ravel()
    for ax in given:
        if not isinstance(ax, Axes):
            raise TypeError(f"{name} must be matplotlib Axes, got {type(ax).__name__}")
    if len(given) != count:
        raise ValueError(f"{name} must be {count}, one for each panel, got {len(given)}")
    return given


@contextmanager
def _keep_statistics(loss_func: MultiProxyEntropyLoss) -> Iterator[None]:
    """What PML's modules recorded of the last batch, for logging hooks to read, is not to become that of a picture."""
    kept = [
        (module, name, getattr(module, name))
        for module in loss_func.modules()
        for name in getattr(module, "_record_these_stats", [])
    ]
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def _check_loss(value: object) -> None:
    if not isinstance(value, MultiProxyEntropyLoss):
        raise TypeError(
            f"loss_func must be a MultiProxyEntropyLoss, got {type(value).__name__}: plot_class draws the proxies of "
            "any loss"
        )


def _check_finite(name: str, value: Tensor) -> None:
    broken = int((~value.isfinite()).any(dim=1).sum())
    if broken:
        raise ValueError(f"{name} must be finite, got nan or inf in {broken} of {len(value)} rows")


def _vectors(name: str, value: object, size: int | None = None) -> Tensor:
    """The vectors as ``float64`` on the CPU, where every device's can be drawn, without their gradient."""
    shape = f"(N, {'D' if size is None else size})"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape {shape}, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be of a floating-point dtype, got {value.dtype}")
    if value.ndim != 2 or value.shape[1] == 0 or size not in (None, value.shape[1]):
        raise ValueError(f"{name} must be of shape {shape}, got {tuple(value.shape)}")
    _check_finite(name, value)
    return value.detach().cpu().double()


def _classes(value: object, num_classes: int) -> list[int]:
    try:
        classes = torch.as_tensor(value).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"classes must be integers in a sequence or tensor, got {value!r}") from None
    if classes.numel() == 0:
        raise ValueError("classes must name at least one, got none (by default, those that occur in labels)")
    if classes.ndim != 1:
        raise ValueError(f"classes must be in one dimension, got shape {tuple(classes.shape)}")
    classes = check.integers("classes", classes, len(classes))
    check.in_range("classes", classes, num_classes, "num_classes")
    return [int(label) for label in classes]
