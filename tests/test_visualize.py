"""The pictures show what the loss does, whatever axes they are drawn on, and leave the loss as it was."""

import math
import re
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_rgba
from PIL import Image
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from sklearn.decomposition import PCA

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.inspection import nearest_samples
from pml_multiproxy.visualize import plot_class, plot_embeddings, plot_nearest, plot_usage

SMALL, LARGE = 90, 300
WHITE = to_rgba("white")
DISTANCES = {
    "cosine": CosineSimilarity(),
    "normalized Lp": LpDistance(),
    "Lp": LpDistance(normalize_embeddings=False),
    "L1": LpDistance(normalize_embeddings=False, p=1),
    "dot product": DotProductSimilarity(normalize_embeddings=False),
}


@pytest.fixture(autouse=True)
def no_figure_is_left():
    yield
    plt.close("all")


def tab10(value):
    return plt.get_cmap("tab10")(value)


def lines_of(ax):
    """``(samples, 2 ends, 2)``."""
    (lines,) = (artist for artist in ax.collections if isinstance(artist, LineCollection))
    return np.array(lines.get_segments()).reshape(-1, 2, 2)


def scatters_of(ax):
    """Those of the dots, and that of the stars."""
    *dots, stars = (artist for artist in ax.collections if isinstance(artist, PathCollection))
    return dots, stars


def dots_of(ax):
    """Positions by colour."""
    return {tuple(dots.get_facecolor()[0][:3]): np.array(dots.get_offsets()) for dots in scatters_of(ax)[0]}


def stars_of(ax):
    """Positions, sizes and colours."""
    _, stars = scatters_of(ax)
    return np.array(stars.get_offsets()), stars.get_sizes(), stars.get_facecolor()


def nearest_count(ax):
    count, total = re.fullmatch(r"(\d+) of (\d+) proxies are the nearest to some sample", ax.get_xlabel()).groups()
    return int(count), int(total)


def unit(vectors):
    return torch.nn.functional.normalize(vectors.detach(), dim=1)


# plot_embeddings


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("colored", [False, True])
def test_one_panel_per_class_with_its_samples_and_proxies(distance, colored):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, distance=DISTANCES[distance])
    embeddings, labels = torch.randn(30, 8) * 3, torch.arange(30) % 3
    axes = plot_embeddings(loss_func, embeddings, labels, colors=torch.arange(30) % 7 if colored else None)
    assert isinstance(axes, np.ndarray)
    assert axes.shape == (3,)
    assert [ax.get_title() for ax in axes] == ["class 0", "class 1", "class 2"]
    for label, ax in enumerate(axes):
        _, nearest = loss_func.assign(embeddings[labels == label], labels[labels == label])
        assert nearest_count(ax) == (len(nearest.unique()), 4)
        positions, sizes, faces = stars_of(ax)
        assert sizes.tolist() == [LARGE if k in nearest else SMALL for k in range(4)]
        assert [tuple(face) == WHITE for face in faces] == [k not in nearest for k in range(4)]
        ends = lines_of(ax)
        assert np.allclose(ends[:, 1], positions[nearest])
        dots = np.concatenate(list(dots_of(ax).values()))
        assert len(dots) == 10
        assert np.allclose(np.unique(dots, axis=0), np.unique(ends[:, 0], axis=0))


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_plane_is_that_of_the_pca_of_what_the_distance_sees(distance):
    loss_func = MultiProxyEntropyLoss(2, 8, 4, distance=DISTANCES[distance])
    embeddings, labels = torch.randn(40, 8) * torch.arange(1, 9) + 1, torch.arange(40) % 2
    for label, ax in enumerate(plot_embeddings(loss_func, embeddings, labels)):
        samples, proxies = embeddings[labels == label], loss_func.proxies[label].detach()
        if loss_func.distance.normalize_embeddings:
            samples, proxies = unit(samples), unit(proxies)
        pca = PCA(2).fit(samples.double())
        points, stars = pca.transform(samples.double()), pca.transform(proxies.double())
        signs = np.sign(points[0] * lines_of(ax)[0, 0])
        assert np.allclose(lines_of(ax)[:, 0] * signs, points, atol=1e-5)
        assert np.allclose(stars_of(ax)[0] * signs, stars, atol=1e-5)


def test_nearest_is_what_the_loss_says_and_not_what_euclid_says():
    loss_func = MultiProxyEntropyLoss(1, 2, 2, distance=DotProductSimilarity(normalize_embeddings=False))
    loss_func.proxies.data = torch.tensor([[[1.0, 0.0], [9.0, 0.0]]])
    embeddings = torch.tensor([[1.0, 0.1], [1.1, 0.2], [0.9, 0.3]])
    (ax,) = plot_embeddings(loss_func, embeddings, torch.zeros(3, dtype=torch.long))
    assert stars_of(ax)[1].tolist() == [SMALL, LARGE]
    ax = plot_class(embeddings, loss_func.proxies[0])
    assert stars_of(ax)[1].tolist() == [LARGE, SMALL]


def test_classes_are_drawn_in_the_order_given_also_without_samples(loss_func):
    embeddings, labels = torch.randn(7, 8), torch.tensor([0, 0, 2, 2, 2, 0, 0])
    assert [ax.get_title() for ax in plot_embeddings(loss_func, embeddings, labels)] == ["class 0", "class 2"]
    for classes in ([2, 1], (2, 1), range(2, 0, -1), np.array([2, 1]), torch.tensor([2, 1], dtype=torch.uint8)):
        axes = plot_embeddings(loss_func, embeddings, labels, classes=classes)
        assert [ax.get_title() for ax in axes] == ["class 2", "class 1"]
        assert len(lines_of(axes[0])) == 3
        assert len(lines_of(axes[1])) == 0
        assert nearest_count(axes[1]) == (0, 4)
        assert stars_of(axes[1])[1].tolist() == [SMALL] * 4


@pytest.mark.parametrize("per_class", [1, 2, 3])
@pytest.mark.parametrize("proxies_per_class", [1, 5])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_few_samples_proxies_and_dimensions(per_class, proxies_per_class, size):
    loss_func = MultiProxyEntropyLoss(3, size, proxies_per_class, distance=LpDistance(normalize_embeddings=False))
    embeddings, labels = torch.randn(3 * per_class, size), torch.arange(3 * per_class) % 3
    for label, ax in enumerate(plot_embeddings(loss_func, embeddings, labels)):
        assert lines_of(ax).shape == (per_class, 2, 2)
        positions, sizes, _ = stars_of(ax)
        assert sizes.shape == (proxies_per_class,)
        assert np.isfinite(lines_of(ax)).all()
        assert np.isfinite(positions).all()
        if size == 2:  # the plane is all there is, so no length is lost
            lengths = np.linalg.norm(lines_of(ax)[:, 0] - lines_of(ax)[:, 1], axis=1)
            expected = torch.cdist(embeddings[labels == label], loss_func.proxies[label].detach()).min(dim=1).values
            assert np.allclose(lengths, expected, atol=1e-5)
        elif size == 8 and proxies_per_class == 5:  # proxies do not fall on a line or point where samples do
            assert np.ptp(positions, axis=0).min() > 0.01
        ax.figure.canvas.draw()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int32, torch.int64])
def test_any_dtype_with_gradient(dtype, label_dtype):
    loss_func = MultiProxyEntropyLoss(2, 8, 4).to(dtype)
    labels = (torch.arange(12) % 2).to(label_dtype)
    axes = plot_embeddings(loss_func, torch.randn(12, 8, dtype=dtype, requires_grad=True), labels, colors=labels)
    assert all(len(lines_of(ax)) == 6 for ax in axes)


def test_draws_in_the_given_axes(loss_func, batch):
    figure, grid = plt.subplots(2, 2)
    for axes in (grid.flat[:3], list(grid.flat[:3]), tuple(grid.flat[:3])):
        drawn = plot_embeddings(loss_func, *batch, axes=axes)
        assert all(ax is given for ax, given in zip(drawn, axes, strict=True))
    square = plot_embeddings(MultiProxyEntropyLoss(4, 8), torch.randn(8, 8), torch.arange(8) % 4, axes=grid)
    assert square.shape == (4,)
    (single,) = plot_embeddings(loss_func, *batch, classes=[1], axes=grid[1, 1])
    assert single is grid[1, 1]
    assert plot_class(torch.randn(5, 8), torch.randn(2, 8), None, grid[0, 0]) is grid[0, 0]
    assert plot_usage(loss_func, ax=grid[0, 1]) is grid[0, 1]
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 3)), (10, (3, 4))])
def test_a_figure_of_its_own_has_no_empty_panels(count, shape):
    loss_func = MultiProxyEntropyLoss(count, 4, 2)
    axes = plot_embeddings(loss_func, torch.randn(2 * count, 4), torch.arange(2 * count) % count)
    assert axes[0].get_gridspec().get_geometry() == shape
    assert axes[0].figure.axes == list(axes)
    assert len(plt.get_fignums()) == 1


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_loss_as_it_was(batch, training):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, collect_stats=True, distance=CosineSimilarity(collect_stats=True)).train(
        training
    )
    loss_func(*batch).backward()
    embeddings, labels = batch
    before = {name: value.clone() for name, value in loss_func.state_dict().items()}
    gradients = loss_func.proxies.grad.clone(), embeddings.grad.clone()
    statistics = {name: float(i) for i, name in enumerate(loss_func.distance._record_these_stats, start=1)}
    assert len(statistics) > 0
    vars(loss_func.distance).update(statistics)
    recorded = {name: getattr(loss_func, name) for name in loss_func._record_these_stats}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()

    plot_embeddings(loss_func, embeddings * 2, labels, colors=labels)
    plot_nearest(loss_func, embeddings * 2, labels, torch.zeros(len(labels), 3, 3))
    plot_usage(loss_func)

    assert loss_func.training == training
    assert all(value.equal(before[name]) for name, value in loss_func.state_dict().items())
    assert loss_func.proxies.requires_grad
    assert loss_func.proxies.grad.equal(gradients[0])
    assert embeddings.grad.equal(gradients[1])
    assert statistics == {name: getattr(loss_func.distance, name) for name in statistics}
    assert recorded == {name: getattr(loss_func, name) for name in recorded}
    assert torch.get_rng_state().equal(torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_the_same_input_gives_the_same_picture(loss_func, batch):
    pictures = []
    for _ in range(2):
        figure = plot_embeddings(loss_func, *batch)[0].figure
        figure.canvas.draw()
        pictures.append(np.array(figure.canvas.buffer_rgba()))
    assert (pictures[0] == pictures[1]).all()


def test_names_and_legends(loss_func):
    embeddings, labels = torch.randn(12, 8), torch.arange(12) % 3
    colors, names = labels + 4, {4: "four", 5: "five", 6: "six"}
    axes = plot_embeddings(
        loss_func,
        embeddings,
        labels,
        colors=colors,
        classes=[2, 0],
        class_names=["cat", "dog", "cow"],
        color_names=names,
        legend_title="breed",
    )
    assert [ax.get_title() for ax in axes] == ["cow", "cat"]
    for ax, name in zip(axes, ["six", "four"], strict=True):
        assert ax.get_legend().get_title().get_text() == "breed"
        assert [text.get_text() for text in ax.get_legend().get_texts()] == [name]


def test_names_need_to_be_there_only_for_what_is_drawn(loss_func):
    embeddings, labels = torch.randn(12, 8), torch.arange(12) % 3
    (ax,) = plot_embeddings(loss_func, embeddings, labels, classes=[1], class_names={1: "dog"})
    assert ax.get_title() == "dog"
    ax = plot_usage(loss_func, classes=[2, 1], class_names=np.array(["cat", "dog", "cow"]))
    assert [text.get_text() for text in ax.get_yticklabels()] == ["cow", "dog"]
    ax = plot_class(embeddings, embeddings[:2], labels, color_names=("cat", "dog", "cow"))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["cat", "dog", "cow"]


def awkward(tensor):
    """The same values in a NumPy array that is reversed in memory and read-only."""
    array = tensor.detach().numpy()[::-1].copy()[::-1]
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int32, torch.int64])
def test_numpy_arrays_give_the_same_pictures(dtype, label_dtype, loss_func):
    embeddings, labels = torch.randn(12, 8, dtype=dtype), (torch.arange(12) % 3).to(label_dtype)
    images, nearest = torch.rand(12, 5, 5), torch.arange(12) % 4

    def pictures(convert):
        x, y, z = convert(embeddings), convert(labels), convert(images)
        yield plot_embeddings(loss_func, x, y, colors=y, classes=convert(torch.tensor([2, 0])))[1]
        yield plot_class(x, convert(embeddings[:4]), y, nearest=convert(nearest))
        yield plot_nearest(loss_func, x, y, z, count=3)

    for of_torch, of_numpy in zip(pictures(lambda tensor: tensor), pictures(awkward), strict=True):
        canvases = [ax.figure.canvas for ax in (of_torch, of_numpy)]
        for canvas in canvases:
            canvas.draw()
        assert (np.array(canvases[0].buffer_rgba()) == np.array(canvases[1].buffer_rgba())).all()


# plot_class

SAMPLES = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.0, 0.1], [5.0, 5.0], [5.1, 5.0], [2.0, 9.0]])
PROXIES = torch.tensor([[0.0, 0.0], [5.0, 5.0], [2.0, 9.0], [-4.0, 4.0]])


def test_sign_of_the_plane():
    """Of each direction the component of largest magnitude is positive: here, they are the axes themselves."""
    samples = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    for factors in ([1, 1], [-1, 1], [1, -1]):
        moved = samples * torch.tensor(factors)
        assert np.allclose(lines_of(plot_class(moved, samples))[:, 0], moved)
        assert np.allclose(lines_of(plot_class(moved.flip(1), samples))[:, 0], moved)


def test_dots_and_stars_have_the_colors_of_their_proxies():
    ax = plot_class(SAMPLES, PROXIES)
    assert {color: len(dots) for color, dots in dots_of(ax).items()} == {
        tab10(0)[:3]: 3,
        tab10(1)[:3]: 2,
        tab10(2)[:3]: 1,
    }
    assert [tuple(face) for face in stars_of(ax)[2]] == [tab10(0), tab10(1), tab10(2), WHITE]
    assert ax.get_legend() is None


def test_dots_have_the_colors_given_and_stars_that_of_their_majority():
    colors = torch.tensor([4, 7, 7, 9, 4, 1])
    ax = plot_class(SAMPLES, PROXIES, colors, legend_title="digit")
    dots = dots_of(ax)
    assert {color: len(positions) for color, positions in dots.items()} == {
        tab10(value)[:3]: int((colors == value).sum()) for value in (1, 4, 7, 9)
    }
    starts = lines_of(ax)[:, 0]
    for position, value in zip(starts, colors.tolist(), strict=True):
        assert np.isclose(dots[tab10(value)[:3]], position).all(axis=1).any()
    # The second proxy has one dot of 9 and one of 4: the smaller.
    assert [tuple(face) for face in stars_of(ax)[2]] == [tab10(7), tab10(4), tab10(1), WHITE]
    legend = ax.get_legend()
    assert legend.get_title().get_text() == "digit"
    assert [text.get_text() for text in legend.get_texts()] == ["1", "4", "7", "9"]


def test_lines_have_the_colors_of_their_dots():
    ax = plot_class(SAMPLES, PROXIES, torch.tensor([4, 7, 7, 9, 4, 1]))
    (lines,) = (artist for artist in ax.collections if isinstance(artist, LineCollection))
    assert [tuple(color) for color in lines.get_color()] == [(*tab10(value)[:3], 0.2) for value in (4, 7, 7, 9, 4, 1)]


@pytest.mark.parametrize("values", [range(-3, 4), range(100, 110), range(0, 40, 2), range(30)], ids=str)
def test_every_color_differs(values):
    samples = torch.randn(2 * len(values), 5)
    ax = plot_class(samples, samples[:3], torch.tensor([*values, *values]))
    assert [len(dots) for dots in dots_of(ax).values()] == [2] * len(values)
    legend = ax.get_legend()
    if len(values) <= 20:
        assert [text.get_text() for text in legend.get_texts()] == [str(value) for value in values]
    else:
        assert legend is None


def test_more_proxies_than_named_colors():
    samples = torch.randn(60, 5)
    ax = plot_class(samples, samples[:30])
    assert len(dots_of(ax)) == 30
    assert {tuple(face[:3]) for face in stars_of(ax)[2]} == set(dots_of(ax))


def test_nearest_by_euclidean_distance():
    samples, proxies = torch.randn(50, 5), torch.randn(9, 5)
    ax = plot_class(samples, proxies)
    assert np.allclose(lines_of(ax)[:, 1], stars_of(ax)[0][torch.cdist(samples, proxies).argmin(dim=1)])


def test_given_nearest_proxies():
    nearest = torch.tensor([3, 3, 3, 3, 3, 0])
    ax = plot_class(SAMPLES, PROXIES, nearest=nearest)
    assert np.allclose(lines_of(ax)[:, 1], stars_of(ax)[0][nearest])
    assert nearest_count(ax) == (2, 4)


def test_everything_lies_within_the_panel():
    ax = plot_class(SAMPLES, PROXIES * 3)
    for (low, high), positions in zip(
        (ax.get_xlim(), ax.get_ylim()), np.concatenate([lines_of(ax).reshape(-1, 2), stars_of(ax)[0]]).T, strict=True
    ):
        assert low < positions.min()
        assert positions.max() < high


# plot_nearest


def grid_of(ax):
    """The images by row and column: the pixels, and how opaque they are."""
    found = {}
    for image in ax.images:
        left, right, bottom, top = image.get_extent()
        x, y = (left + right) / 2, (bottom + top) / 2
        assert x == pytest.approx(round(x))
        assert y == pytest.approx(round(y))
        found[round(y), round(x)] = np.array(image.get_array()), image.get_alpha()
    assert len(found) == len(ax.images)
    return found


def numbered_images(count):
    """Each of one value, which tells its number."""
    return (torch.arange(count) / count).view(-1, 1, 1).expand(-1, 4, 4)


@pytest.mark.parametrize("classes", [None, [2], [2, 0]], ids=str)
@pytest.mark.parametrize("count", [1, 4, 9])
def test_each_row_has_the_images_nearest_to_its_proxy(classes, count, loss_func):
    embeddings, labels = torch.randn(18, 8), torch.arange(18) % 3
    ax = plot_nearest(loss_func, embeddings, labels, numbered_images(18), count=count, classes=classes)
    shown = [0, 1, 2] if classes is None else classes
    expected = nearest_samples(loss_func, embeddings, labels, count)
    nearest = loss_func.assign(embeddings, labels)[1]
    rows = [(c, k) for c in shown for k in range(4)]
    assert [text.get_text() for text in ax.get_yticklabels()] == [f"class {c}, proxy {k}" for c, k in rows]
    grid = grid_of(ax)
    assert sorted(grid) == [(row, column) for row in range(len(rows)) for column in range(min(count, 6))]
    for (row, column), (pixels, alpha) in grid.items():
        c, k = rows[row]
        sample = int(expected[c, k, column])
        assert np.allclose(pixels, sample / 18)
        assert alpha == (1 if nearest[sample] == k else 0.3)
    assert count == 1 or {alpha for _, alpha in grid.values()} == {1, 0.3}
    assert ax.get_xlim() == (-0.5, count - 0.5)
    assert ax.get_ylim() == (len(rows) - 0.5, -0.5)  # the first row is above


@pytest.mark.parametrize("name", ["", "a", "a class of a rather long name"])
@pytest.mark.parametrize(("per_class", "count"), [(1, 1), (3, 8), (2, 30), (10, 2)])
def test_rows_have_the_names_of_classes(name, per_class, count):
    loss_func, names = MultiProxyEntropyLoss(2, 8, per_class), [name, name + "b"]
    ax = plot_nearest(
        loss_func, torch.randn(9, 8), torch.arange(9) % 2, torch.rand(9, 7, 5), count=count, class_names=names
    )
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels == [f"{name}, proxy {k}" for name in names for k in range(per_class)]
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in (*ax.get_yticklabels(), ax.xaxis.label)]
    assert all(ax.figure.bbox.contains(box.x0, box.y0) for box in boxes)
    assert all(ax.figure.bbox.contains(box.x1, box.y1) for box in boxes)
    assert all(not a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_class_without_samples_has_rows_without_images(loss_func):
    ax = plot_nearest(loss_func, torch.randn(3, 8), torch.tensor([0, 0, 0]), numbered_images(3), classes=[1, 0])
    assert len(ax.get_yticklabels()) == 8
    assert {row for row, _ in grid_of(ax)} == {4, 5, 6, 7}


def drawn(image):
    loss_func = MultiProxyEntropyLoss(1, 8, 1)
    ax = plot_nearest(loss_func, torch.randn(1, 8), torch.tensor([0]), [image], count=2)
    (image,) = ax.images
    left, right, bottom, top = image.get_extent()
    return np.array(image.get_array()), (right - left) / (bottom - top)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_first_or_last(channels):
    image = torch.rand(channels, 10, 5)
    for given in (image, image.numpy(), image.movedim(0, 2), image.movedim(0, 2).numpy()):
        pixels, proportion = drawn(given)
        assert np.allclose(pixels, image[0] if channels == 1 else image.movedim(0, 2))
        assert proportion == pytest.approx(0.5)  # half as wide as high


def test_ranges_of_values():
    ramp = torch.arange(6.0).view(2, 3)
    for image, expected in (
        (ramp / 10, ramp / 10),
        (ramp.to(torch.uint8) * 50, ramp * 50 / 255),
        (ramp.to(torch.uint8), ramp / 255),
        (ramp.numpy().astype(np.uint8), ramp / 255),
        (ramp * 3 - 7, ramp / 5),
        (ramp.long() * 51, ramp / 5),
        (ramp.bfloat16() * 16, ramp / 5),
        (ramp > 2, ramp > 2),
        (torch.full((2, 3), 7.0), torch.zeros(2, 3)),
    ):
        assert np.allclose(drawn(image)[0], expected), image


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV"])
def test_images_of_pillow_are_drawn_in_their_colors(mode, loss_func):
    """Not in the numbers of a palette's entries, or of other color spaces."""
    color = (90, 90, 90) if mode in ("L", "LA") else (200, 50, 120)
    image = Image.new("RGB", (4, 4), color)
    image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    ax = plot_nearest(loss_func, torch.randn(1, 8), torch.tensor([0]), [image], classes=[0])
    drawn = np.asarray(ax.images[0].get_array())
    wanted = np.asarray(image.convert("RGB")) / 255
    assert drawn.shape[:2] == (4, 4)
    assert np.allclose(drawn[..., :3] if drawn.ndim == 3 else drawn[..., None], wanted, atol=0.01)


def test_only_images_that_are_drawn_are_asked_for(loss_func):
    asked = []

    class Lazy:
        def __len__(self):
            return 30

        def __getitem__(self, number):
            asked.append(number)
            return np.zeros((3, 3))

    plot_nearest(loss_func, torch.randn(30, 8), torch.arange(30) % 3, Lazy(), count=1, classes=[1])
    assert len(asked) == 4
    assert all(number % 3 == 1 for number in asked)


# plot_usage


def usage_of(ax):
    """``(classes, proxies)``, from left to right, and where each bar starts."""
    bars = [list(container) for container in ax.containers]
    widths = np.array([[bar.get_width() for bar in row] for row in bars]).T
    return widths, np.array([[bar.get_x() for bar in row] for row in bars]).T


@pytest.fixture
def used():
    loss_func = MultiProxyEntropyLoss(5, 8, 4)
    loss_func.proxy_usage.copy_(torch.rand(5, 4).mul(3).softmax(dim=1))
    loss_func.proxy_usage[1] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    loss_func.proxy_usage[2] = 0.25
    return loss_func


@pytest.mark.parametrize("classes", [None, [4, 1], torch.tensor([2]), range(1, 5)], ids=str)
def test_bars_are_the_sorted_usage_with_its_perplexity(used, classes):
    ax = plot_usage(used, classes=classes)
    shown = list(range(5)) if classes is None else [int(label) for label in classes]
    expected = -np.sort(-used.proxy_usage.double().numpy()[shown], axis=1)
    widths, starts = usage_of(ax)
    assert np.allclose(widths, expected)
    assert np.allclose(starts, np.cumsum(expected, axis=1) - expected)
    assert [text.get_text() for text in ax.get_yticklabels()] == [str(label) for label in shown]
    for row, (text, usage) in enumerate(zip(ax.texts, expected, strict=True)):
        assert text.get_text() == f"{math.exp(-sum(u * math.log(u) for u in usage if u > 0)):.1f}"
        assert text.get_position()[1] == row
    assert ax.get_title() == ("" if classes is None else f"{len(shown)} of 5 classes")


def test_perplexity_of_one_and_of_all_proxies(used):
    assert [text.get_text() for text in plot_usage(used, classes=[1, 2]).texts] == ["1.0", "4.0"]


@pytest.mark.parametrize("num_classes", [30, 31, 100])
def test_of_many_classes_the_first_are_drawn_and_the_title_says_so(num_classes):
    loss_func = MultiProxyEntropyLoss(num_classes, 4, 10)
    ax = plot_usage(loss_func)
    assert usage_of(ax)[0].shape == (30, 10)
    assert [text.get_text() for text in ax.get_yticklabels()] == [str(label) for label in range(30)]
    assert ax.get_title() == ("" if num_classes == 30 else f"the first 30 of {num_classes} classes")
    assert usage_of(plot_usage(loss_func, classes=range(num_classes)))[0].shape == (num_classes, 10)


def test_rows_do_not_touch_in_a_figure_of_its_own():
    ax = plot_usage(MultiProxyEntropyLoss(100, 4, 10))
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in (*ax.get_yticklabels(), *ax.texts)]
    assert all(not a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(ax.figure.bbox.contains(box.x1, box.y1) for box in boxes)


def test_one_proxy_per_class():
    assert [text.get_text() for text in plot_usage(MultiProxyEntropyLoss(2, 4, 1)).texts] == ["1.0", "1.0"]


# Errors

x, y = torch.zeros(4, 8), torch.tensor([0, 1, 2, 0])
BROKEN = x.clone()
BROKEN[1:3] = float("nan")
CALLS = {
    "another loss": ({"loss_func": torch.nn.Linear(2, 2)}, TypeError, "loss_func must be a MultiProxyEntropyLoss, got "
        "Linear: plot_class draws the proxies of any loss"),
    "embeddings as a list": ({"embeddings": [[0.0] * 8]}, TypeError, "embeddings must be a torch.Tensor or a "
        "NumPy array, got list"),
    "embeddings of another size": ({"embeddings": x[:, :5]}, ValueError, "embeddings must be of shape (batch_size, 8), "
        "got (4, 5)"),
    "another device": ({"embeddings": x.to("meta")}, ValueError, "embeddings must be on the device of the proxies, "
        "cpu, got meta"),
    "embeddings that are not finite": ({"embeddings": BROKEN}, ValueError, "embeddings must be finite, got nan or inf "
        "in 2 of 4 rows"),
    "no labels": ({"labels": None}, ValueError, "labels must be given, a tensor of shape (4,), got None"),
    "labels of floats": ({"labels": y.float()}, TypeError, "labels must be of an integer dtype, got torch.float32"),
    "a label too large": ({"labels": y + 1}, ValueError, "labels must lie in [0, 2] (num_classes is 3), got values "
        "from 1 to 3"),
    "no samples": ({"embeddings": x[:0], "labels": y[:0]}, ValueError, "classes must name at least one, got none (by "
        "default, those that occur in labels)"),
    "colors as a list": ({"colors": [0, 1, 2, 0]}, TypeError, "colors must be a torch.Tensor or a NumPy array, got "
        "list"),
    "colors of floats": ({"colors": y.float()}, TypeError, "colors must be of an integer dtype, got torch.float32"),
    "colors of bools": ({"colors": y.bool()}, TypeError, "colors must be of an integer dtype, got torch.bool"),
    "too few colors": ({"colors": y[:3]}, ValueError, "colors must be of shape (4,), one for each embedding, got (3,)"),
    "one class": ({"classes": 1}, ValueError, "classes must be in one dimension, got shape ()"),
    "classes of words": ({"classes": ["even"]}, TypeError, "classes must be integers in a sequence or tensor, got "
        "['even']"),
    "classes of floats": ({"classes": [0.5]}, TypeError, "classes must be of an integer dtype, got torch.float32"),
    "classes of bools": ({"classes": [True]}, TypeError, "classes must be of an integer dtype, got torch.bool"),
    "no classes": ({"classes": []}, ValueError, "classes must name at least one, got none"),
    "a class too large": ({"classes": [0, 3]}, ValueError, "classes must lie in [0, 2] (num_classes is 3), got values "
        "from 0 to 3"),
    "a negative class": ({"classes": [-1]}, ValueError, "classes must lie in [0, 2] (num_classes is 3), got values "
        "from -1 to -1"),
    "embeddings of words": ({"embeddings": np.full((4, 8), "a")}, TypeError, "embeddings must hold numbers, got an "
        "array of <U1"),
    "labels of NumPy's floats": ({"labels": y.numpy() / 2}, TypeError, "labels must be of an integer dtype, got "
        "torch.float64"),
    "a name of each class as one word": ({"class_names": "cat"}, TypeError, "class_names must be a sequence of strings "
        "or a dict of them by number, got 'cat'"),
    "too few names of classes": ({"class_names": ["a"], "classes": [2, 0]}, ValueError, "class_names must have a name "
        "for each number that is drawn, got none for [2]"),
    "names of other colors": ({"colors": y, "color_names": {5: "five"}}, ValueError, "color_names must have a name for "
        "each number that is drawn, got none for [0, 1, 2]"),
    "axes of another kind": ({"axes": ["left", "right", "middle"]}, TypeError, "axes must be matplotlib Axes, got str"),
    "no axes": ({"axes": []}, ValueError, "axes must be 3, one for each panel, got 0"),
}  # fmt: skip


IMAGES = torch.rand(4, 5, 5)
NEAREST_CALLS = {
    "no images": ({"images": None}, TypeError, "images must be an array, a tensor or a sequence of images, got "
        "NoneType"),
    "too few images": ({"images": IMAGES[:3]}, ValueError, "images must be 4, one for each embedding, got 3"),
    "a batch of videos": ({"images": IMAGES.view(4, 1, 1, 5, 5)}, ValueError, "images[0] must be of shape (H, W), (H, "
        "W, channels) or (channels, H, W) with 1, 3 or 4 channels, got (1, 1, 5, 5)"),
    "two channels": ({"images": IMAGES.new_zeros(4, 2, 5, 5)}, ValueError, "with 1, 3 or 4 channels, got (2, 5, 5)"),
    "flat images": ({"images": x}, ValueError, "with 1, 3 or 4 channels, got (8,)"),
    "images that are not finite": ({"images": IMAGES / 0}, ValueError, "images[0] must hold finite numbers, got "
        "float64"),
    "a dataset": ({"images": [(image, 1) for image in IMAGES]}, TypeError, "images[0] must be an array or a tensor, "
        "got tuple: of (image, label), give the image alone"),
    "words": ({"images": np.full((4, 5, 5), "a")}, ValueError, "images[0] must hold finite numbers, got <U1"),
    "a count of none": ({"count": 0}, ValueError, "count must be an int of at least 1, got 0"),
    "axes of another kind": ({"ax": "left"}, TypeError, "ax must be matplotlib Axes, got str"),
    **{case: CALLS[case] for case in CALLS if "color" not in case and "axes" not in case and "no sam" not in case},
}  # fmt: skip


@pytest.mark.parametrize("case", NEAREST_CALLS)
def test_wrong_arguments_of_plot_nearest(case, loss_func):
    arguments, error, message = NEAREST_CALLS[case]
    with pytest.raises(error, match=re.escape(message)):
        plot_nearest(**{"loss_func": loss_func, "embeddings": x, "labels": y, "images": IMAGES, **arguments})
    assert plt.get_fignums() == []


@pytest.mark.parametrize("case", CALLS)
def test_wrong_arguments_of_plot_embeddings(case, loss_func):
    arguments, error, message = CALLS[case]
    with pytest.raises(error, match=re.escape(message)):
        plot_embeddings(**{"loss_func": loss_func, "embeddings": x, "labels": y, **arguments})
    assert plt.get_fignums() == []


@pytest.mark.parametrize("case", [case for case in CALLS if "class" in case or case == "another loss"])
def test_wrong_arguments_of_plot_usage(case, loss_func):
    arguments, error, message = CALLS[case]
    with pytest.raises(error, match=re.escape(message)):
        plot_usage(**{"loss_func": loss_func, **arguments})
    assert plt.get_fignums() == []


def test_proxies_that_are_not_finite(loss_func):
    loss_func.proxies.data[1, 2, 3] = float("inf")
    with pytest.raises(ValueError, match="proxies must be finite, got nan or inf in 1 of 12 rows"):
        plot_embeddings(loss_func, x, y)
    assert plt.get_fignums() == []


CLASS_CALLS = {
    "proxies as a list": ({"proxies": [[0.0] * 8]}, TypeError, "proxies must be a torch.Tensor or a NumPy array, "
        "got list"),
    "proxies of all classes": ({"proxies": x[None]}, ValueError, "proxies must be of shape (N, D), got (1, 4, 8)"),
    "proxies without a dimension": ({"proxies": x[:, :0]}, ValueError, "proxies must be of shape (N, D), got (4, 0)"),
    "no proxies": ({"proxies": x[:0]}, ValueError, "proxies must hold at least one row, got none"),
    "embeddings of another size": ({"embeddings": x[:, :5]}, ValueError, "embeddings must be of shape (N, 8), got "
        "(4, 5)"),
    "embeddings of integers": ({"embeddings": x.long()}, TypeError, "embeddings must be of a floating-point dtype, got "
        "torch.int64"),
    "embeddings that are not finite": ({"embeddings": BROKEN}, ValueError, "embeddings must be finite, got nan or inf "
        "in 2 of 4 rows"),
    "colors of floats": ({"colors": y.float()}, TypeError, "colors must be of an integer dtype, got torch.float32"),
    "too few nearest": ({"nearest": y[:3]}, ValueError, "nearest must be of shape (4,), one for each embedding, got "
        "(3,)"),
    "a proxy that is not there": ({"nearest": y * 2}, ValueError, "nearest must lie in [0, 3] (the number of proxies "
        "is 4), got values from 0 to 4"),
    "proxies of None": ({"proxies": None}, TypeError, "proxies must be a torch.Tensor or a NumPy array of shape (N, "
        "D), got None"),
    "axes of another kind": ({"ax": "left"}, TypeError, "ax must be matplotlib Axes, got str"),
}  # fmt: skip


@pytest.mark.parametrize("case", CLASS_CALLS)
def test_wrong_arguments_of_plot_class(case):
    arguments, error, message = CLASS_CALLS[case]
    with pytest.raises(error, match=re.escape(message)):
        plot_class(**{"embeddings": x, "proxies": x, **arguments})
    assert plt.get_fignums() == []


def test_several_axes_where_one_is_asked_for(loss_func):
    _, axes = plt.subplots(1, 2)
    with pytest.raises(ValueError, match="ax must be 1, one for each panel, got 2"):
        plot_usage(loss_func, ax=axes)


# The module


def run(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_the_package_does_not_import_matplotlib():
    code = "import sys, pml_multiproxy; print([m for m in sys.modules if m.startswith('matplotlib')])"
    assert run(code) == "[]"


def test_without_matplotlib_it_says_what_to_install():
    code = "import sys; sys.modules['matplotlib'] = None\ntry:\n import pml_multiproxy.visualize\n"
    code += "except ImportError as error:\n print(error)"
    assert run(code) == 'pml_multiproxy.visualize needs matplotlib: pip install "pml-multiproxy[visualize]"'


def test_it_leaves_the_backend_alone():
    code = "import matplotlib; matplotlib.use('svg')\nimport torch\nfrom pml_multiproxy import visualize\n"
    code += "visualize.plot_class(torch.eye(3), torch.eye(3)); print(matplotlib.get_backend())"
    assert run(code) == "svg"
