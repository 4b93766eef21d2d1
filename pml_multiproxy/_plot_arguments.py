"""The arguments of :mod:`pml_multiproxy.visualize`, checked, and as its pictures take them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from . import _check as check
from .losses import MultiProxyEntropyLoss

Array = NDArray[Any]

MODES_WITHOUT_RGB = ("P", "PA", "LA", "CMYK", "YCbCr", "LAB", "HSV")
"""Of images of Pillow, whose pixels, taken as numbers, would be drawn in wrong colours, or not at all."""


def check_loss(value: object) -> None:
    if not isinstance(value, MultiProxyEntropyLoss):
        raise TypeError(
            f"loss_func must be a MultiProxyEntropyLoss, got {type(value).__name__}: plot_class draws the proxies of "
            "any loss"
        )


def samples(loss_func: MultiProxyEntropyLoss, embeddings: object, labels: object) -> tuple[Tensor, Tensor]:
    """Both, checked, the labels on the CPU."""
    check_loss(loss_func)
    points = _tensor("embeddings", embeddings)
    if isinstance(embeddings, np.ndarray):
        points = points.to(loss_func.proxies.device)
    check.embeddings(points, loss_func.proxies)
    _check_finite("embeddings", points)
    _check_finite("proxies", loss_func.proxies.flatten(0, 1))
    checked = check.labels(_tensor("labels", labels), len(points), loss_func.num_classes).cpu()
    check.in_range("labels", checked, loss_func.num_classes, "num_classes")  # those of a GPU were not checked yet
    return points, checked


def vectors(name: str, value: object, size: int | None = None) -> Tensor:
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


def integers(name: str, value: object, count: int) -> Tensor:
    return check.integers(name, _tensor(name, value), count).cpu()


def classes(value: object, num_classes: int) -> list[int]:
    try:
        numbers = torch.as_tensor(_tensor("classes", value) if isinstance(value, np.ndarray) else value).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"classes must be integers in a sequence or tensor, got {value!r}") from None
    if numbers.numel() == 0:
        raise ValueError("classes must name at least one, got none (by default, those that occur in labels)")
    if numbers.ndim != 1:
        raise ValueError(f"classes must be in one dimension, got shape {tuple(numbers.shape)}")
    numbers = check.integers("classes", numbers, len(numbers))
    check.in_range("classes", numbers, num_classes, "num_classes")
    return list(numbers.tolist())


def names(name: str, value: object, numbers: Iterable[Any], default: str = "{}") -> dict[int, str]:
    """What to write for each of the numbers; ``default``: the format without names."""
    wanted = sorted({int(number) for number in numbers})
    if value is None:
        return {number: default.format(number) for number in wanted}
    if isinstance(value, str) or not isinstance(value, (Sequence, Mapping, np.ndarray)):
        raise TypeError(f"{name} must be a sequence of strings or a dict of them by number, got {value!r}")
    given = value if isinstance(value, Mapping) else dict(enumerate(value))
    if missing := [number for number in wanted if number not in given]:
        raise ValueError(f"{name} must have a name for each number that is drawn, got none for {missing}")
    return {number: str(given[number]) for number in wanted}


def check_images(value: object, count: int) -> None:
    if not (hasattr(value, "__len__") and hasattr(value, "__getitem__")) or isinstance(value, str):
        raise TypeError(f"images must be an array, a tensor or a sequence of images, got {type(value).__name__}")
    if len(value) != count:
        raise ValueError(f"images must be {count}, one for each embedding, got {len(value)}")


def image(number: int, value: object) -> Array:
    """As ``(H, W)`` or ``(H, W, 1, 3 or 4)``, in [0, 1]."""
    if isinstance(value, (tuple, dict)):  # which a dataset gives
        kind = type(value).__name__
        raise TypeError(
            f"images[{number}] must be an array or a tensor, got {kind}: of (image, label), give the image alone"
        )
    if isinstance(value, Image) and value.mode in MODES_WITHOUT_RGB:
        value = value.convert("RGBA")
    array = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = np.moveaxis(array, 0, 2)
    if array.ndim not in (2, 3) or array.size == 0 or array.shape[2:] not in ((), (1,), (3,), (4,)):
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


def axes(name: str, value: object, count: int) -> Array:
    given = np.array(value, dtype=object).ravel()
    for ax in given:
        if not isinstance(ax, Axes):
            raise TypeError(f"{name} must be matplotlib Axes, got {type(ax).__name__}")
    if len(given) != count:
        raise ValueError(f"{name} must be {count}, one for each panel, got {len(given)}")
    return given


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


def _check_finite(name: str, value: Tensor) -> None:
    if broken := int((~value.isfinite()).any(dim=1).sum()):
        raise ValueError(f"{name} must be finite, got nan or inf in {broken} of {len(value)} rows")
