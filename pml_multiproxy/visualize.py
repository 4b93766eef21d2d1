"""Pictures of a loss: its proxies among the embeddings, the images nearest to each, and how evenly they are used.

Needs matplotlib, which the package does not install, so this module is imported by name::

    from pml_multiproxy import visualize

Arrays may be NumPy's or torch's. Nothing here shows a window, writes a file, chooses a backend or changes the loss. A
function that gets no axes makes a figure of its own; ``ax.figure.savefig(...)`` writes it.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    from matplotlib.axes import Axes
except ModuleNotFoundError as error:
    raise ImportError('pml_multiproxy.visualize needs matplotlib: pip install "pml-multiproxy[visualize]"') from error

from . import _check as check
from . import _drawing as drawing
from . import _plot_arguments as arguments
from . import functional, inspection
from ._plot_arguments import Array
from .losses import MultiProxyEntropyLoss

__all__ = ["plot_class", "plot_embeddings", "plot_nearest", "plot_usage"]

Names = Sequence[str] | Mapping[int, str]

MOST_ROWS = 30
"""How many classes :func:`plot_usage` draws when it is not told which."""

MOST_IN_LEGEND = 20
"""More colours than that are neither told apart nor do their names leave room for the picture."""


def plot_embeddings(
    loss_func: MultiProxyEntropyLoss,
    embeddings: Tensor | Array,
    labels: Tensor | Array,
    *,
    colors: Tensor | Array | None = None,
    classes: Sequence[int] | Tensor | Array | None = None,
    axes: Axes | Sequence[Axes] | Array | None = None,
    class_names: Names | None = None,
    color_names: Names | None = None,
    legend_title: str | None = None,
) -> Array:
    """One panel per class: its samples, each with a line to its nearest proxy, in the plane where they spread most.

    Each panel is a :func:`plot_class` of its own, so its plane and scale are not those of the others. Embeddings and
    proxies are drawn at unit length where the distance of the loss normalizes them, and as they are where it does not.
    "Nearest" is what :meth:`MultiProxyEntropyLoss.assign() <pml_multiproxy.losses.MultiProxyEntropyLoss.assign>` says,
    among the proxies of the class.

    Args:
        loss_func: where the proxies are. Neither its mode nor its usage nor its statistics change.
        embeddings: ``(B, D)``, finite, a tensor on the device of the proxies or a NumPy array.
        labels: ``(B,)``, integers in ``[0, C)``.
        colors: ``(B,)``, integers: labels finer than the classes, which then colour the dots and are named in a legend.
            ``None``: a dot has the colour of its nearest proxy.
        classes: which to draw, in that order; one without samples has only its proxies drawn. ``None``: all that occur
            in ``labels``; name them when there are many, as each is a panel.
        axes: one for each class. ``None``: those of a new figure.
        class_names: what to write above the panels, by class, for each that is drawn. ``None``: their numbers.
        color_names: what to write in the legends, by colour, for each that occurs. ``None``: the integers.
        legend_title: what the colours stand for.

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
    embeddings, labels = arguments.samples(loss_func, embeddings, labels)
    if colors is not None:
        colors = arguments.integers("colors", colors, len(embeddings))
        arguments.names("color_names", color_names, colors)
    shown = arguments.classes(np.unique(labels) if classes is None else classes, loss_func.num_classes)
    titles = arguments.names("class_names", class_names, shown, default="class {}")
    panels = drawing.panels(len(shown)) if axes is None else arguments.axes("axes", axes, len(shown))

    for ax, label in zip(panels, shown, strict=True):
        own = labels == label
        samples, proxies = embeddings.detach()[own.to(embeddings.device)], loss_func.proxies.detach()[label]
        with _keep_statistics(loss_func):
            _, nearest = loss_func.assign(samples, labels[own])
        if loss_func.distance.normalize_embeddings:
            samples, proxies = functional.normalize(samples), functional.normalize(proxies)
        group = None if colors is None else colors[own]
        plot_class(samples, proxies, group, ax, nearest=nearest, legend_title=legend_title, color_names=color_names)
        ax.set_title(titles[label])
    return panels


def plot_class(
    embeddings: Tensor | Array,
    proxies: Tensor | Array,
    colors: Tensor | Array | None = None,
    ax: Axes | None = None,
    *,
    nearest: Tensor | Array | None = None,
    legend_title: str | None = None,
    color_names: Names | None = None,
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
        color_names: what to write in the legend, by colour, for each that occurs. ``None``: the integers.

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
    proxies = arguments.vectors("proxies", proxies)
    if len(proxies) == 0:
        raise ValueError("proxies must hold at least one row, got none")
    embeddings = arguments.vectors("embeddings", embeddings, proxies.shape[1])
    if nearest is None:  # the faster way by a matrix product would get near ties wrong
        nearest = torch.cdist(embeddings, proxies, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
    nearest = arguments.integers("nearest", nearest, len(embeddings))
    check.in_range("nearest", nearest, len(proxies), "the number of proxies")
    groups = nearest if colors is None else arguments.integers("colors", colors, len(embeddings))
    names = arguments.names("color_names", None if colors is None else color_names, groups)
    ax = drawing.panel(ax)

    dots, stars = _in_plane(embeddings, proxies)
    drawing.dots_and_stars(ax, dots, stars, nearest.numpy(), groups.numpy(), names)
    ax.set(xticks=[], yticks=[])
    ax.set_xlabel(f"{len(np.unique(nearest))} of {len(stars)} proxies are the nearest to some sample")
    if colors is not None and 0 < len(names) <= MOST_IN_LEGEND:
        ax.legend(title=legend_title, loc="best", fontsize=8, title_fontsize=8, markerscale=2)
    return ax


def plot_nearest(
    loss_func: MultiProxyEntropyLoss,
    embeddings: Tensor | Array,
    labels: Tensor | Array,
    images: Sequence[Any] | Tensor | Array,
    *,
    count: int = 8,
    classes: Sequence[int] | Tensor | Array | None = None,
    ax: Axes | None = None,
    class_names: Names | None = None,
) -> Axes:
    """What each proxy stands for: the images nearest to it among those of its class, one row per proxy.

    They are the :func:`~pml_multiproxy.inspection.nearest_samples`, the nearest first. An image is pale where its
    sample is nearer to another proxy of the class; a row of pale images is that of a proxy that few samples, or none,
    belong to. A class with fewer than ``count`` samples has shorter rows.

    Args:
        loss_func: where the proxies are. Neither its mode nor its usage nor its statistics change.
        embeddings: ``(B, D)``, finite, a tensor on the device of the proxies or a NumPy array.
        labels: ``(B,)``, integers in ``[0, C)``.
        images: of the samples, in their order: an array, a tensor or a sequence, of which those that are drawn are
            asked for by number. Each is an image of Pillow or of shape ``(H, W)``, ``(H, W, channels)`` or
            ``(channels, H, W)`` with 1, 3 or 4 channels. ``uint8``, and other numbers in [0, 1], are drawn as they are;
            where there are others, the image is scaled from its lowest to its highest value.
        count: how many images for each proxy, at least 1.
        classes: which to draw, in that order. ``None``: all that occur in ``labels``; name them when there are many, as
            each has a row per proxy.
        ax: where to draw. ``None``: in a new figure.
        class_names: what to write beside the rows, by class, for each that is drawn. ``None``: their numbers.

    Returns:
        The axes.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or range.

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
    embeddings, labels = arguments.samples(loss_func, embeddings, labels)
    arguments.check_images(images, len(labels))
    shown = arguments.classes(np.unique(labels) if classes is None else classes, loss_func.num_classes)
    names = arguments.names("class_names", class_names, shown, default="class {}")
    with _keep_statistics(loss_func):
        found = inspection.nearest_samples(loss_func, embeddings, labels, count)[shown].flatten(0, 1).cpu()
        nearest = loss_func.assign(embeddings, labels)[1].cpu()
    rows = [(label, proxy) for label in shown for proxy in range(loss_func.proxies_per_class)]
    cells = [
        (x, y, 1.0 if int(nearest[sample]) == proxy else 0.3, arguments.image(sample, images[sample]))
        for y, ((_, proxy), samples) in enumerate(zip(rows, found.tolist(), strict=True))
        for x, sample in enumerate(samples)
        if sample >= 0
    ]
    beside = 0.5 + 0.1 * max(len(name) + 10 for name in names.values())
    ax = drawing.panel(ax, (max(beside + 0.7 * count, 4.5), 0.8 + 0.7 * len(rows)))

    drawing.images(ax, cells)
    ax.set(xlim=(-0.5, count - 0.5), ylim=(len(rows) - 0.5, -0.5), xticks=[])
    ax.set_yticks(range(len(rows)), [f"{names[label]}, proxy {proxy}" for label, proxy in rows])
    ax.set_xlabel("the nearest first; pale: nearer to another proxy", loc="right")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_anchor("E")  # away from the names, where the figure has other proportions
    return ax


def plot_usage(
    loss_func: MultiProxyEntropyLoss,
    *,
    classes: Sequence[int] | Tensor | Array | None = None,
    ax: Axes | None = None,
    class_names: Names | None = None,
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
        class_names: what to write beside the rows, by class, for each that is drawn. ``None``: their numbers.

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
    arguments.check_loss(loss_func)
    num_classes, num_proxies = loss_func.proxy_usage.shape
    shown = arguments.classes(range(min(num_classes, MOST_ROWS)) if classes is None else classes, num_classes)
    names = arguments.names("class_names", class_names, shown)
    ax = drawing.panel(ax, (8, 1.6 + 0.25 * len(shown)))

    usage = loss_func.proxy_usage.detach().cpu().double()[shown].sort(dim=1, descending=True).values
    drawing.bars(ax, usage.numpy())
    for row, perplexity in enumerate(functional.perplexity(usage).tolist()):
        ax.text(1.01, row, f"{perplexity:.1f}", va="center")
    ax.set(xlim=(0, 1), ylim=(len(shown) - 0.4, -0.6), ylabel="class")
    ax.set_yticks(range(len(shown)), [names[label] for label in shown])
    ax.set_xlabel(f"usage of its {num_proxies} proxies, the most used first; at the right: perplexity of the usage")
    if len(shown) < num_classes:
        ax.set_title(f"{'the first ' if classes is None else ''}{len(shown)} of {num_classes} classes")
    return ax


def _in_plane(embeddings: Tensor, proxies: Tensor) -> tuple[Array, Array]:
    """Both as ``(_, 2)``, in the plane of the first two principal components of the embeddings."""
    fitted = embeddings if len(embeddings) > 2 else torch.cat([embeddings, proxies])
    center = fitted.mean(dim=0)
    directions = torch.linalg.svd(fitted - center, full_matrices=False).Vh[:2]
    directions = directions * directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()
    # One dimension, or one vector, has but one direction.
    directions = torch.nn.functional.pad(directions, (0, 0, 0, 2 - len(directions)))
    return ((embeddings - center) @ directions.T).numpy(), ((proxies - center) @ directions.T).numpy()


def _keep_statistics(loss_func: MultiProxyEntropyLoss) -> ExitStack:
    """What PML's modules recorded of the last batch, for logging hooks to read, is not to become that of a picture."""
    afterwards = ExitStack()
    for module in loss_func.modules():
        for name in getattr(module, "_record_these_stats", []):
            afterwards.callback(setattr, module, name, getattr(module, name))
    return afterwards
