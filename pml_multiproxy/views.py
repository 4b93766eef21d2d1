"""Batches of several views of each sample, for ``views=`` of the losses."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from pytorch_metric_learning.utils.common_functions import to_numpy
from torch.utils.data import Dataset, IterableDataset, default_collate

from . import _check as check

__all__ = ["ViewsDataset", "stack_views"]


class _MapStyle(Protocol):
    """What a sampler draws from: it has a length, and an item for each index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class _Views(tuple[Any, ...]):
    """The views of one sample; a type of its own, so that :func:`stack_views` takes no (data, label) for two views."""

    __slots__ = ()


class ViewsDataset(Dataset[Any]):
    r"""Draws several views of each sample from a dataset with a random transform.

    Item ``i`` is ``dataset[i]``, drawn ``views`` times. With :func:`stack_views` as ``collate_fn``, batches are as
    ``MultiProxyEntropyLoss(..., views=views)`` expects them, and otherwise as those of ``dataset``. The augmentation is
    the transform of ``dataset``: torchvision's, kornia's or your own. Everything that takes a dataset and a
    ``collate_fn`` stays as it is: ``DataLoader`` with its workers, PML's trainers, and samplers, since length and
    indices are those of ``dataset``. The batch size counts samples: the network gets ``views`` times as many rows.

    Random numbers: PyTorch seeds ``torch``, ``random`` and ``numpy.random`` differently in each worker and epoch. A
    generator that ``dataset`` holds itself, such as ``numpy.random.default_rng()``, is copied instead, so that all
    workers draw the same numbers: seed it in ``worker_init_fn``.

    Args:
        dataset: map-style, with ``__len__`` and ``__getitem__``. Its items are (data, label), unless
            ``data_and_label_getter`` says otherwise.
        views: :math:`V`, at least 1. The loss has to get the same number.
        data_and_label_getter: called on an item, returns its data and its label. The function that PML's trainers take
            under this name, and call on a batch, serves here too. With workers that are spawned, it must be picklable,
            which a lambda is not.

    Attributes:
        dataset: the dataset as given, for what samplers or testers want to know of it.

    Raises:
        TypeError: for a dataset that is not map-style, or items that are not (data, label) without a
            ``data_and_label_getter``.
        ValueError: when the draws of a sample differ in their labels: they are then not views of the same sample.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> from pml_multiproxy.views import ViewsDataset, stack_views
        >>> class Noisy(torch.utils.data.Dataset):
        ...     def __len__(self):
        ...         return 6
        ...
        ...     def __getitem__(self, i):
        ...         return i + 0.1 * torch.rand(2), i % 3
        >>> loader = DataLoader(ViewsDataset(Noisy(), views=2), batch_size=3, collate_fn=stack_views)
        >>> data, labels = next(iter(loader))
        >>> data.shape, labels
        (torch.Size([6, 2]), tensor([0, 1, 2, 0, 1, 2]))
    """

    def __init__(
        self,
        dataset: _MapStyle,
        views: int = 2,
        data_and_label_getter: Callable[[Any], tuple[Any, Any]] | None = None,
    ) -> None:
        stream = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
        if stream or not hasattr(dataset, "__len__"):
            raise TypeError(
                f"dataset must be map-style, with __len__ and __getitem__, got {type(dataset).__name__}: "
                "a stream has no second draw of a sample"
            )
        if data_and_label_getter is not None and not callable(data_and_label_getter):
            raise TypeError(
                "data_and_label_getter must be None or a function of an item, "
                f"got {type(data_and_label_getter).__name__}"
            )
        self.dataset = dataset
        self.views = check.positive_int("views", views)
        self.data_and_label_getter = data_and_label_getter

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Views:
        draws = _Views(self.dataset[index] for _ in range(self.views))
        labels = [self._label(draw) for draw in draws]
        for label in labels[1:]:
            if not np.array_equal(to_numpy(label), to_numpy(labels[0])):
                raise ValueError(
                    "labels must be the same for all views of a sample, "
                    f"got {labels[0]!r} and {label!r} from two draws of dataset[{index}]"
                )
        return draws

    def _label(self, item: Any) -> Any:
        if self.data_and_label_getter is not None:
            return self.data_and_label_getter(item)[1]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            kind = type(item).__name__
            got = f"a {kind} of {len(item)}" if isinstance(item, (tuple, list, dict)) else f"a {kind}"
            raise TypeError(
                f"items of the dataset must be (data, label), got {got}: "
                "give a data_and_label_getter, as PML's trainers take it"
            )
        return item[1]


def stack_views(samples: Sequence[_Views], collate_fn: Callable[[list[Any]], Any] = default_collate) -> Any:
    r"""Stacks the views of several samples into a batch: the ``collate_fn`` for ``DataLoader`` and PML's trainers.

    The batch is what ``collate_fn`` makes of all views, in :math:`V` blocks of :math:`n` samples each: the first views
    of all, then the second ones, and so on. Row :math:`i` of every block is a view of sample :math:`i`, and the
    labels repeat. A smaller last batch (without ``drop_last``) is as well formed.

    Args:
        samples: :math:`n` items of a :class:`ViewsDataset`.
        collate_fn: what makes a batch of a list of items: tensors, numbers, and tuples or dicts of them by default. For
            another, use ``functools.partial(stack_views, collate_fn=...)``.

    Returns:
        The batch, of :math:`V n` rows.

    Raises:
        TypeError: for samples that do not come from a :class:`ViewsDataset`.
        ValueError: for samples that differ in their number of views.

    Example:
        >>> from pml_multiproxy.views import ViewsDataset, stack_views
        >>> samples = ViewsDataset([(0.5, 0), (1.5, 1)], views=3)
        >>> stack_views([samples[0], samples[1]])
        [tensor([0.5000, 1.5000, 0.5000, 1.5000, 0.5000, 1.5000], dtype=torch.float64), tensor([0, 1, 0, 1, 0, 1])]
    """
    for sample in samples:
        if not isinstance(sample, _Views):
            raise TypeError(f"samples must be items of a ViewsDataset, got {type(sample).__name__}")
    counts = sorted({len(sample) for sample in samples})
    if len(counts) > 1:
        raise ValueError(f"samples must have the same number of views, got {counts}")
    return collate_fn([view for block in zip(*samples, strict=True) for view in block])
