"""Pictures of a loss: its proxies among the embeddings, the images nearest to each, and how evenly they are used.

Needs matplotlib, which the package does not install, so this module is imported by name::

    from pml_multiproxy import visualize

Arrays may be NumPy's or torch's. Nothing here shows a window, writes a file, chooses a backend or changes the loss. A
function that gets no axes makes a figure of its own; ``ax.figure.savefig(...)`` writes it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from . import functional, inspection
from .losses import MultiProxyEntropyLoss

__all__ = ["plot_class", "plot_embeddings", "plot_nearest", "plot_usage"]

Array = NDArray[Any]
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
    embeddings, labels = _samples(loss_func, embeddings, labels)
    if colors is not None:
        colors = check.integers("colors", _tensor("colors", colors), len(embeddings)).cpu()
        _names("color_names", color_names, colors)
    shown = _classes(np.unique(labels) if classes is None else classes, loss_func.num_classes)
    titles = _class_names(class_names, shown)
    panels = _new_axes(len(shown)) if axes is None else _given_axes("axes", axes, len(shown))

    for ax, label in zip(panels, shown, strict=True):
        own = (labels == label).nonzero().squeeze(1)
        samples, proxies = embeddings.detach()[own.to(embeddings.device)], loss_func.proxies.detach()[label]
        with _keep_statistics(loss_func):
            _, nearest = loss_func.assign(samples, labels[own])
        if loss_func.distance.normalize_embeddings:
            samples, proxies = functional.normalize(samples), functional.normalize(proxies)
        plot_class(
            samples,
            proxies,
            None if colors is None else colors[own],
            ax,
            nearest=nearest,
            legend_title=legend_title,
            color_names=color_names,
        )
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
    proxies = _vectors("proxies", proxies)
    if len(proxies) == 0:
        raise ValueError("proxies must hold at least one row, got none")
    embeddings = _vectors("embeddings", embeddings, proxies.shape[1])
    if nearest is None:
        nearest = _nearest(embeddings, proxies)
    nearest = check.integers("nearest", _tensor("nearest", nearest), len(embeddings)).cpu()
    check.in_range("nearest", nearest, len(proxies), "the number of proxies")
    group = nearest if colors is None else check.integers("colors", _tensor("colors", colors), len(embeddings)).cpu()
    names, groups = _names("color_names", None if colors is None else color_names, group), group.numpy()
    ax = plt.subplots(layout="constrained")[1] if ax is None else _given_axes("ax", ax, 1)[0]

    ends, palette = nearest.numpy(), _palette(groups)
    points, stars = _in_plane(embeddings, proxies)
    _draw_samples(ax, points, stars[ends], groups, palette, names)
    _draw_proxies(ax, stars, [_majority(groups[ends == position]) for position in range(len(stars))], palette)
    ax.set(xticks=[], yticks=[])
    ax.set_xlabel(f"{len(np.unique(ends))} of {len(stars)} proxies are the nearest to some sample")
    if colors is not None and 0 < len(palette) <= MOST_IN_LEGEND:
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
            asked for by number. Each is of shape ``(H, W)``, ``(H, W, channels)`` or ``(channels, H, W)`` with 1, 3 or
            4 channels. ``uint8``, and other numbers in [0, 1], are drawn as they are; where there are others, the image
            is scaled from its lowest to its highest value.
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
    embeddings, labels = _samples(loss_func, embeddings, labels)
    _check_images(images, len(labels))
    shown = _classes(np.unique(labels) if classes is None else classes, loss_func.num_classes)
    names = _class_names(class_names, shown)
    with _keep_statistics(loss_func):
        found = inspection.nearest_samples(loss_func, embeddings, labels, count)[shown].flatten(0, 1).cpu()
        nearest = loss_func.assign(embeddings, labels)[1].cpu()
    rows = [(label, proxy) for label in shown for proxy in range(loss_func.proxies_per_class)]
    cells = [
        (x, y, 1.0 if int(nearest[sample]) == proxy else 0.3, _image(sample, images[sample]))
        for y, ((_, proxy), samples) in enumerate(zip(rows, found.tolist(), strict=True))
        for x, sample in enumerate(samples)
        if sample >= 0
    ]
    if ax is None:
        beside = 0.5 + 0.1 * max(len(names[label]) + 10 for label in shown)
        size = max(beside + 0.7 * count, 4.5), 0.8 + 0.7 * len(rows)
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    ax = _given_axes("ax", ax, 1)[0]

    _draw_images(ax, cells)
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
    _check_loss(loss_func)
    num_classes, num_proxies = loss_func.proxy_usage.shape
    shown = _classes(range(min(num_classes, MOST_ROWS)) if classes is None else classes, num_classes)
    names = _names("class_names", class_names, shown)
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
    ax.set_yticks(rows, [names[label] for label in shown])
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


def _draw_samples(
    ax: Axes, points: Array, ends: Array, groups: Array, palette: dict[int, Any], names: Mapping[int, str]
) -> None:
    line_colors = [palette[group] for group in groups.tolist()]
    lines = np.stack([points, ends], axis=1)
    # One collection: as many single lines would take seconds to draw.
    ax.add_collection(LineCollection(list(lines), colors=line_colors, alpha=0.2, linewidths=0.8), autolim=False)
    for group, color in palette.items():
        xs, ys = points[groups == group].T
        ax.scatter(xs, ys, s=10, alpha=0.6, color=color, label=names[group], zorder=2)


def _draw_images(ax: Axes, cells: Iterable[tuple[int, int, float, Array]]) -> None:
    """Each in its proportions, into a part of the unit square around its place."""
    for x, y, alpha, image in cells:
        height, width = 0.46 * np.array(image.shape[:2]) / max(image.shape[:2])
        box = (x - width, x + width, y + height, y - height)
        ax.imshow(image, cmap="gray", vmin=0, vmax=1, extent=box, alpha=alpha)


def _image(number: int, value: object) -> Array:
    """As ``(H, W)`` or ``(H, W, 3 or 4)``, in [0, 1]."""
    array = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or array.size == 0 or array.shape[2:] not in ((), (3,), (4,)):
        raise ValueError(
            f"images[{number}] must be of shape (H, W), (H, W, channels) or (channels, H, W) with 1, 3 or 4 channels, "
            f"got {array.shape}"
        )
    if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        raise ValueError(f"images[{number}] must hold finite numbers, got {array.dtype}")
    is_bytes = array.dtype == np.uint8 or (isinstance(value, Tensor) and value.dtype == torch.uint8)
    array = array / 255 if is_bytes else array.astype(np.float64)
    low, high = array.min(), array.max()
    return array if low >= 0 and high <= 1 else (array - low) / max(high - low, np.finfo(float).tiny)


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


def _names(name: str, names: object, numbers: Iterable[Any]) -> dict[int, str]:
    """What to write for each of the numbers."""
    wanted = sorted({int(number) for number in numbers})
    if names is None:
        return {number: str(number) for number in wanted}
    if isinstance(names, str) or not isinstance(names, (Sequence, Mapping, np.ndarray)):
        raise TypeError(f"{name} must be a sequence of strings or a dict of them by number, got {names!r}")
    given = names if isinstance(names, Mapping) else dict(enumerate(names))
    missing = [number for number in wanted if number not in given]
    if missing:
        raise ValueError(f"{name} must have a name for each number that is drawn, got none for {missing}")
    return {number: str(given[number]) for number in wanted}


def _class_names(names: object, shown: list[int]) -> dict[int, str]:
    found = _names("class_names", names, shown)
    return {label: f"class {label}" for label in shown} if names is None else found


def _check_images(value: object, count: int) -> None:
    if not (hasattr(value, "__len__") and hasattr(value, "__getitem__")) or isinstance(value, str):
        raise TypeError(f"images must be an array, a tensor or a sequence of images, got {type(value).__name__}")
    if len(value) != count:
        raise ValueError(f"images must be {count}, one for each embedding, got {len(value)}")


def _samples(loss_func: MultiProxyEntropyLoss, embeddings: object, labels: object) -> tuple[Tensor, Tensor]:
    """Both, checked, the labels on the CPU."""
    _check_loss(loss_func)
    points = _tensor("embeddings", embeddings)
    if isinstance(embeddings, np.ndarray):
        points = points.to(loss_func.proxies.device)
    check.embeddings(points, loss_func.proxies)
    _check_finite("embeddings", points)
    _check_finite("proxies", loss_func.proxies.flatten(0, 1))
    checked = check.labels(_tensor("labels", labels), len(points), loss_func.num_classes).cpu()
    check.in_range("labels", checked, loss_func.num_classes, "num_classes")  # those of a GPU were not checked yet
    return points, checked


def _tensor(name: str, value: object) -> Any:
    """A NumPy array as a tensor of its own, since it may be read-only or reversed; ``None`` as it is."""
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(np.array(value, order="C"))
        except TypeError:
            raise TypeError(f"{name} must hold numbers, got an array of {value.dtype}") from None
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or a NumPy array, got {type(value).__name__}")
    return value


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
    vectors: Tensor | None = _tensor(name, value)
    if vectors is None:
        raise TypeError(f"{name} must be a torch.Tensor or a NumPy array of shape {shape}, got None")
    if not vectors.is_floating_point():
        raise TypeError(f"{name} must be of a floating-point dtype, got {vectors.dtype}")
    if vectors.ndim != 2 or vectors.shape[1] == 0 or size not in (None, vectors.shape[1]):
        raise ValueError(f"{name} must be of shape {shape}, got {tuple(vectors.shape)}")
    _check_finite(name, vectors)
    return vectors.detach().cpu().double()


def _classes(value: object, num_classes: int) -> list[int]:
    try:
        classes = torch.as_tensor(_tensor("classes", value) if isinstance(value, np.ndarray) else value).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"classes must be integers in a sequence or tensor, got {value!r}") from None
    if classes.numel() == 0:
        raise ValueError("classes must name at least one, got none (by default, those that occur in labels)")
    if classes.ndim != 1:
        raise ValueError(f"classes must be in one dimension, got shape {tuple(classes.shape)}")
    classes = check.integers("classes", classes, len(classes))
    check.in_range("classes", classes, num_classes, "num_classes")
    return [int(label) for label in classes]
