"""The pictures show the proxies of the loss, on any axes, and leave the loss as it was."""

import math
import re
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
import torch
from cases import ARRAYS
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection, PathCollection
from PIL import Image
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from sklearn.decomposition import PCA

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.inspection import Group, Groups, nearest_samples, worst_groups
from pml_multiproxy.visualize import (
    plot_class,
    plot_embeddings,
    plot_groups,
    plot_nearest,
    plot_usage,
    plot_worst_groups,
)

SMALL, LARGE, WHITE = 90, 300, (1, 1, 1, 1)
TAB10 = plt.get_cmap("tab10").colors
DISTANCES = [CosineSimilarity(), LpDistance(), DotProductSimilarity(normalize_embeddings=False)]


@pytest.fixture(autouse=True)
def no_figure_is_left():
    yield
    plt.close("all")


def lines_of(ax):
    """Their ends ``(samples, 2, 2)``, and their colours."""
    (lines,) = (artist for artist in ax.collections if isinstance(artist, LineCollection))
    return np.array(lines.get_segments()).reshape(-1, 2, 2), [tuple(color[:3]) for color in lines.get_color()]


def dots_of(ax):
    """Positions by colour."""
    dots = [artist for artist in ax.collections if isinstance(artist, PathCollection)][:-1]
    return {tuple(group.get_facecolor()[0][:3]): np.array(group.get_offsets()) for group in dots}


def stars_of(ax):
    """Positions, sizes and colours."""
    stars = [artist for artist in ax.collections if isinstance(artist, PathCollection)][-1]
    return np.array(stars.get_offsets()), stars.get_sizes().tolist(), [tuple(face) for face in stars.get_facecolor()]


def legend_of(ax):
    """The colours by name."""
    legend = ax.get_legend()
    names = [text.get_text() for text in legend.get_texts()]
    return dict(zip(names, [tuple(dot.get_facecolor()[0][:3]) for dot in legend.legend_handles], strict=True))


def texts(labels):
    return [label.get_text() for label in labels]


def drawn(ax):
    ax.figure.set_dpi(30)
    ax.figure.canvas.draw()
    return bytes(ax.figure.canvas.buffer_rgba())


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_panel_shows_what_the_loss_sees_in_the_plane_of_the_pca(distance):
    loss_func = MultiProxyEntropyLoss(2, 8, 4, distance=distance)
    embeddings, labels = torch.randn(14, 8) * torch.arange(1, 9) + 1, torch.arange(14) % 2
    axes = plot_embeddings(loss_func, embeddings, labels)
    assert texts(ax.title for ax in axes) == ["class 0", "class 1"]
    for label, ax in enumerate(axes):
        samples, proxies = embeddings[labels == label], loss_func.proxies[label].detach()
        _, nearest = loss_func.assign(samples, labels[labels == label])
        if distance.normalize_embeddings:
            samples, proxies = torch.nn.functional.normalize(samples), torch.nn.functional.normalize(proxies)
        pca = PCA(2).fit(samples.double())
        points, stars = pca.transform(samples.double()), pca.transform(proxies.double())
        (ends, _), (positions, sizes, faces) = lines_of(ax), stars_of(ax)
        signs = np.sign(points[0] * ends[0, 0])
        assert np.allclose(ends * signs, np.stack([points, stars[nearest]], axis=1), atol=1e-5)
        assert np.allclose(positions * signs, stars, atol=1e-5)
        dots = np.concatenate(list(dots_of(ax).values()))
        assert np.allclose(np.unique(dots, axis=0), np.unique(ends[:, 0], axis=0))
        assert sizes == [LARGE if k in nearest else SMALL for k in range(4)]
        assert [face == WHITE for face in faces] == [k not in nearest for k in range(4)]
        assert ax.get_xlabel() == f"{len(nearest.unique())} of 4 proxies are the nearest to some sample"


def test_classes_are_drawn_in_the_order_given_also_without_samples(loss_func):
    axes = plot_embeddings(loss_func, torch.randn(7, 8), torch.tensor([0, 0, 2, 2, 2, 0, 0]), classes=[2, 1])
    assert texts(ax.title for ax in axes) == ["class 2", "class 1"]
    assert [len(lines_of(ax)[0]) for ax in axes] == [3, 0]
    assert stars_of(axes[1])[1:] == ([SMALL] * 4, [WHITE] * 4)


@pytest.mark.parametrize("values", [[3, 15, 40], range(0, 90, 3)])
def test_a_label_has_the_same_color_in_all_panels(values):
    colors = torch.tensor([*values, *values[1:]])
    labels = (torch.arange(len(colors)) >= len(values)).long()  # class 1 has all but the first
    loss_func = MultiProxyEntropyLoss(2, 8, 4)
    first, second = plot_embeddings(loss_func, torch.randn(len(colors), 8), labels, colors=colors)
    assert len(dots_of(first)) == len(values)
    assert list(dots_of(first))[1:] == list(dots_of(second))
    assert lines_of(first)[1][1:] == lines_of(second)[1]
    if len(values) == 3:
        assert legend_of(first) == {"3": lines_of(first)[1][0], **legend_of(second)}


@pytest.mark.parametrize("size", [1, 2])
def test_few_samples_proxies_and_dimensions_lose_no_length(size):
    for per_class, num_proxies in ((1, 1), (1, 5), (2, 1), (3, 5)):
        samples, proxies = torch.randn(per_class, size), torch.randn(num_proxies, size)
        ends, _ = lines_of(plot_class(samples, proxies))
        distances = torch.cdist(samples, proxies).min(dim=1).values
        assert np.allclose(np.linalg.norm(ends[:, 0] - ends[:, 1], axis=1), distances, atol=1e-5)


def test_draws_in_the_given_axes_or_in_a_figure_without_empty_panels(loss_func, batch):
    figure, grid = plt.subplots(2, 2)
    assert list(plot_embeddings(loss_func, *batch, classes=[2, 1, 0, 1], axes=grid)) == list(grid.flat)
    assert list(plot_embeddings(loss_func, *batch, classes=[1], axes=grid[1, 1])) == [grid[1, 1]]
    assert plot_usage(loss_func, ax=grid[0, 1]) is grid[0, 1]
    assert plt.get_fignums() == [figure.number]
    axes = plot_embeddings(loss_func, *batch, classes=[0, 1, 2, 0])
    assert axes[0].get_gridspec().get_geometry() == (2, 3)
    assert axes[0].figure.axes == list(axes)


def test_leaves_the_loss_as_it_was(batch):
    distance = CosineSimilarity(collect_stats=True)
    loss_func = MultiProxyEntropyLoss(3, 8, 4, collect_stats=True, distance=distance)
    loss_func(*batch).backward()
    places = [(module, name) for module in (loss_func, distance) for name in module._record_these_stats]

    def state():
        tensors = [loss_func.proxies.detach(), loss_func.proxies.grad, loss_func.proxy_usage, torch.get_rng_state()]
        return loss_func.training, [tensor.tolist() for tensor in tensors], [getattr(*place) for place in places]

    before = state()
    plot_embeddings(loss_func, batch[0] * 2, batch[1])
    plot_nearest(loss_func, batch[0] * 2, batch[1], torch.zeros(12, 3, 3))
    plot_usage(loss_func)
    assert state() == before


def test_the_same_values_give_the_same_pictures(loss_func):
    x, y, images = torch.randn(12, 8).bfloat16().float(), torch.arange(12) % 3, torch.rand(12, 5, 5).bfloat16().float()
    inputs = [x, y, images, torch.tensor([2, 0])]

    def pictures(x, y, images, classes):
        axes = plot_embeddings(loss_func, x, y, colors=y, classes=classes)[1], plot_usage(loss_func, classes=classes)
        of_class, nearest = plot_class(x, x[:4], y, nearest=y), plot_nearest(loss_func, x, y, images, count=3)
        found = [drawn(ax) for ax in (*axes, of_class, nearest)]
        plt.close("all")
        return found

    expected = pictures(*inputs)
    short = [tensor.bfloat16() if tensor.is_floating_point() else tensor.int() for tensor in inputs]
    assert pictures(*short) == expected
    for make in ARRAYS.values():
        assert pictures(*(make(tensor.numpy()) for tensor in inputs)) == expected
    with torch.device("meta"):  # the default device does not matter
        assert pictures(*inputs) == expected


def test_names_and_legends(loss_func):
    colors = torch.arange(12) % 3 - 1
    names = {"class_names": ["cat", "dog", "cow"], "color_names": {-1: "none", 1: "one"}, "legend_title": "breed"}
    axes = plot_embeddings(loss_func, torch.randn(12, 8), torch.arange(12) % 3, colors=colors, classes=[2, 0], **names)
    assert texts(ax.title for ax in axes) == ["cow", "cat"]
    assert [list(legend_of(ax)) for ax in axes] == [["one"], ["none"]]
    assert axes[0].get_legend().get_title().get_text() == "breed"
    with pytest.raises(KeyError):  # rather than the last name for -1
        plot_class(torch.randn(12, 8), torch.randn(2, 8), colors, color_names=["zero", "one"])


# plot_class

SAMPLES = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.0, 0.1], [5.0, 5.0], [5.1, 5.0], [2.0, 9.0]])
PROXIES = torch.tensor([[0.0, 0.0], [5.0, 5.0], [2.0, 9.0], [-4.0, 4.0]])


def test_sign_of_the_plane():
    """Of each direction the component of largest magnitude is positive: here, they are the axes themselves."""
    samples = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    for factors in ([1, 1], [-1, 1], [1, -1]):
        moved = samples * torch.tensor(factors)
        assert np.allclose(lines_of(plot_class(moved, samples))[0][:, 0], moved)
        assert np.allclose(lines_of(plot_class(moved.flip(1), samples))[0][:, 0], moved)


def test_dots_and_lines_have_the_colors_given_and_stars_that_of_their_majority():
    """Without colours given, they have those of their proxies."""
    ax = plot_class(SAMPLES, PROXIES)
    assert {color: len(dots) for color, dots in dots_of(ax).items()} == {TAB10[0]: 3, TAB10[1]: 2, TAB10[2]: 1}
    assert stars_of(ax)[2] == [(*color, 1) for color in TAB10[:3]] + [WHITE]
    colors = [4, 7, 7, 9, 4, 1]
    ax = plot_class(SAMPLES, PROXIES, torch.tensor(colors))
    starts, line_colors = lines_of(ax)
    assert line_colors == [TAB10[value] for value in colors]
    assert {color: len(dots) for color, dots in dots_of(ax).items()} == {TAB10[v]: colors.count(v) for v in colors}
    assert all((dots_of(ax)[TAB10[value]] == starts[colors.index(value), 0]).any() for value in colors)
    # The second proxy has one dot of 9 and one of 4: the smaller.
    assert stars_of(ax)[2] == [(*TAB10[7], 1), (*TAB10[4], 1), (*TAB10[1], 1), WHITE]
    assert legend_of(ax) == {str(value): TAB10[value] for value in (1, 4, 7, 9)}


def test_every_color_differs_and_has_its_name():
    for values in (range(-3, 4), range(20), range(0, 40, 2), range(30)):
        samples = torch.randn(len(values), 5)
        ax = plot_class(samples, samples[:3], torch.tensor(values))
        assert [len(dots) for dots in dots_of(ax).values()] == [1] * len(values)
        assert ax.get_legend() is None if len(values) > 20 else list(legend_of(ax)) == [str(v) for v in values]


def test_nearest_proxies_by_euclid_or_as_given_within_the_panel():
    for nearest, expected in ((None, [0, 0, 0, 1, 1, 2]), (torch.tensor([3, 3, 3, 3, 3, 0]), [3, 3, 3, 3, 3, 0])):
        ax = plot_class(SAMPLES, PROXIES * 1.5, nearest=nearest)
        (ends, _), (stars, _, _) = lines_of(ax), stars_of(ax)
        assert np.allclose(ends[:, 1], stars[expected])
        everything = np.concatenate([ends.reshape(-1, 2), stars])
        for (low, high), positions in zip((ax.get_xlim(), ax.get_ylim()), everything.T, strict=True):
            assert low < positions.min() < positions.max() < high


# plot_nearest


@pytest.mark.parametrize(("count", "classes"), [(4, None), (9, [2, 0])])
def test_each_row_has_the_images_nearest_to_its_proxy(count, classes, loss_func):
    embeddings, labels = torch.randn(18, 8), torch.arange(18) % 3
    # Each of one value, which tells its number; those of other classes must not be read.
    images = [torch.full((4, 4), i / 18) if i % 3 in (classes or range(3)) else None for i in range(18)]
    ax = plot_nearest(loss_func, embeddings, labels, images, count=count, classes=classes)
    rows = [(c, k) for c in classes or range(3) for k in range(4)]
    assert texts(ax.get_yticklabels()) == [f"class {c}, proxy {k}" for c, k in rows]
    expected, nearest = nearest_samples(loss_func, embeddings, labels, count), loss_func.assign(embeddings, labels)[1]
    places = set()
    for image in ax.images:
        x, y = (round(v) for v in np.reshape(image.get_extent(), (2, 2)).mean(axis=1))
        places.add((x, y))
        sample = int(expected[(*rows[y], x)])
        assert np.allclose(image.get_array(), sample / 18)
        assert image.get_alpha() == (1 if nearest[sample] == rows[y][1] else 0.3)
    assert places == {(x, y) for x in range(min(count, 6)) for y in range(len(rows))}
    assert {image.get_alpha() for image in ax.images} == {1, 0.3}
    assert (ax.get_xlim(), ax.get_ylim()) == ((-0.5, count - 0.5), (len(rows) - 0.5, -0.5))  # the first row is above


def test_layouts_ranges_and_palettes_of_images():
    ramp, color = torch.arange(6.0).view(2, 3), torch.rand(3, 10, 5)
    palette = Image.new("RGB", (4, 4), (200, 50, 120)).convert("P")
    for image, expected in (
        (color, color.movedim(0, 2)),
        (color.movedim(0, 2).numpy(), color.movedim(0, 2)),
        (color[:1], color[0]),
        (ramp.to(torch.uint8), ramp / 255),
        (ramp * 3 - 7, ramp / 5),
        (torch.full((2, 3), 7.0), torch.zeros(2, 3)),
        (palette, np.array(palette.convert("RGBA")) / 255),
    ):
        ax = plot_nearest(MultiProxyEntropyLoss(1, 8, 1), torch.randn(1, 8), torch.tensor([0]), [image])
        left, right, bottom, top = ax.images[0].get_extent()
        assert np.allclose(ax.images[0].get_array(), expected)
        assert (right - left) / (bottom - top) == pytest.approx(expected.shape[1] / expected.shape[0])


# plot_groups and plot_worst_groups


def three_groups():
    """Of 12 samples; those of group g have the numbers g, g + 3, g + 6 and g + 9, nearest first."""
    records = [Group(g, g // 2, 4, [g], [g, g + 3, g + 6, g + 9], 0.25 * g, None) for g in range(3)]
    return Groups(torch.arange(12) % 3, torch.full((12,), 0.5), records)


@pytest.mark.parametrize("shown", [None, [2, 0]])
def test_each_group_has_a_row_of_its_nearest_images(shown):
    images = [torch.full((4, 4), i / 12) if i % 3 in (shown or range(3)) and i < 9 else None for i in range(12)]
    ax = plot_groups(three_groups(), images, count=3, shown=shown, class_names=["cat", "dog"])
    numbers = shown or [0, 1, 2]
    names = [f"{'dog' if g == 2 else 'cat'}, group {g}: 4 samples, certainty {0.25 * g:.2f}" for g in numbers]
    assert texts(ax.get_yticklabels()) == names
    found = {}
    for image in ax.images:
        x, y = (round(v) for v in np.reshape(image.get_extent(), (2, 2)).mean(axis=1))
        found[x, y] = round(12 * float(np.mean(image.get_array())))
    assert found == {(x, y): g + 3 * x for y, g in enumerate(numbers) for x in range(3)}


def test_the_worst_group_is_on_top_with_its_interval():
    rows = worst_groups(three_groups(), torch.tensor([1, 0, 1] * 3 + [1, 1, 0]).bool())
    ax = plot_worst_groups(rows, count=2)
    assert texts(ax.get_yticklabels()) == ["class 0, group 1: 4 samples", "class 1, group 2: 4 samples"]
    (bars,) = ax.containers
    assert np.allclose(bars[0].get_xdata(), [0.25, 0.75])
    ends = np.array([line[:, 0] for line in bars[2][0].get_segments()])
    assert np.allclose(ends, [[row.low, row.high] for row in rows[:2]])
    assert ax.get_ylim() == (1.5, -0.5)  # the first is above
    assert "3 groups" in ax.get_xlabel()


# plot_usage


def test_bars_are_the_sorted_usage_with_its_perplexity():
    loss_func = MultiProxyEntropyLoss(31, 8, 4)
    loss_func.proxy_usage.copy_(torch.rand(31, 4).mul(3).softmax(dim=1))
    loss_func.proxy_usage[1] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    for classes, title in ((None, "the first 30 of 31 classes"), ([30, 1], "2 of 31 classes"), (range(31), "")):
        ax, shown = plot_usage(loss_func, classes=classes), list(classes or range(30))
        expected = -np.sort(-loss_func.proxy_usage.double().numpy()[shown], axis=1)
        assert np.allclose([[bar.get_width() for bar in row] for row in ax.containers], expected.T)
        lefts = np.cumsum(expected, axis=1) - expected
        assert np.allclose([[bar.get_x() for bar in row] for row in ax.containers], lefts.T)
        assert texts(ax.get_yticklabels()) == [str(label) for label in shown]
        assert texts(ax.texts) == [f"{math.exp(-sum(u * math.log(u) for u in usage if u)):.1f}" for usage in expected]
        assert ax.get_title() == title


# Errors

x, y = torch.zeros(4, 8), torch.tensor([0, 1, 2, 0])
images = x.view(4, 2, 4)
WRONG = [
    (lambda _: plot_usage(torch.nn.Linear(2, 2)), "loss_func must be a MultiProxyEntropyLoss, got Linear"),
    (lambda loss: plot_usage(loss, classes=[3]), "classes must lie in [0, 2] (num_classes is 3), got values from 3 to"),
    (lambda loss: plot_embeddings(loss, x / 0, y), "embeddings must be finite, got NaN or infinite values"),
    (lambda loss: plot_embeddings(loss, x, y + 1), "labels must lie in [0, 2] (num_classes is 3), got values from 1"),
    (lambda loss: plot_embeddings(loss, x, y, colors=y[:3]), "colors must be of shape (4,), one for each embedding"),
    (lambda loss: plot_nearest(loss, x, y, images[:3]), "images must be 4, one for each embedding, got 3"),
    (lambda loss: plot_nearest(loss, x, y, images / 0), "images[0] must be finite, got NaN or infinite values"),
    (lambda _: plot_groups(three_groups(), images), "images must be 12, one for each sample, got 4"),
    (
        lambda _: plot_groups(three_groups(), [x] * 12, shown=[3]),
        "shown must lie in [0, 2] (the number of groups is 3)",
    ),
    (lambda _: plot_worst_groups([], count=0), "count must be an int of at least 1, got 0"),
    (lambda _: plot_class(x[:, :5], x), "embeddings must be of shape (batch_size, 8), got (4, 5)"),
    (lambda _: plot_class(x, x / 0), "proxies must be finite, got NaN or infinite values"),
    (lambda _: plot_class(x, x, nearest=y * 2), "nearest must lie in [0, 3] (the number of proxies is 4), got values"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_wrong_arguments_are_refused_before_a_figure_is_made(case, loss_func):
    call, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        call(loss_func)
    assert plt.get_fignums() == []


# The module


IMPORTS = """
import sys, matplotlib, torch
matplotlib.use("svg")
from pml_multiproxy.visualize import plot_class
plot_class(torch.eye(3), torch.eye(3))
assert matplotlib.get_backend() == "svg"
del sys.modules["pml_multiproxy.visualize"]
sys.modules["matplotlib"] = None
import pml_multiproxy.visualize
"""


@pytest.mark.slow
def test_import_leaves_the_backend_alone_and_says_what_to_install():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    wanted = 'ImportError: pml_multiproxy.visualize needs matplotlib: pip install "pml-multiproxy[visualize]"'
    assert done.stderr.strip().endswith(wanted)
