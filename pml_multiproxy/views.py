"""Batches of several views of each sample, for ``views=`` of the losses."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, default_collate

from . import _check as check

__all__ = ["ViewsDataset", "stack_views"]


class _Views(tuple[Any, ...]):
    """The views of one sample. With a plain tuple, :func:`stack_views` could take (data, label) for two views."""

    __slots__ = ()


class ViewsDataset(Dataset[Any]):
    r"""Draws several views of each sample from a dataset with a random transform.

    Item ``i`` is ``dataset[i]``, drawn ``views`` times. Pass :func:`stack_views` as ``collate_fn`` to get the batches
    that ``MultiProxyEntropyLoss(..., views=views)`` expects. Take ``views=loss_func.views`` wherever a loss is at hand:
    a loss with ``views=1`` accepts a batch of two views, but does not compare them, and loses the main gain of views.

    The transform of ``dataset`` makes the augmentation: torchvision's, kornia's or your own. ``DataLoader`` with its
    workers, PML's trainers and samplers work as before, since length and indices are those of ``dataset``. The batch
    size counts samples: the network gets ``views`` times as many rows.

    Random numbers: PyTorch seeds ``torch``, ``random`` and ``numpy.random`` differently in each worker and epoch. It
    copies a generator that ``dataset`` holds itself, such as ``numpy.random.default_rng()``, so that all workers draw
    the same numbers: seed that one in ``worker_init_fn``.

    Args:
        dataset: map-style, with ``__len__`` and ``__getitem__``. Its items are (data, label), unless you give a
            ``data_and_label_getter``.
        views: :math:`V`, at least 1, as the loss has it.
        data_and_label_getter: a function that returns data and label of an item. PML's trainers take a function of
            this name for batches; the same one serves here. Spawned workers need one that can be pickled: no lambda.

    Attributes:
        dataset: the dataset as given, for samplers and testers.

    Raises:
        TypeError: for a dataset that is not map-style, or items that are not (data, label) without a
            ``data_and_label_getter``.
        ValueError: if the draws of a sample differ in their labels, and so are not views of the same sample.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> from pml_multiproxy import MultiProxyEntropyLoss
        >>> from pml_multiproxy.views import ViewsDataset, stack_views
        >>> class Noisy(torch.utils.data.Dataset):
        ...     def __len__(self):
        ...         return 6
        ...
        ...     def __getitem__(self, i):
        ...         return i + 0.1 * torch.rand(2), i % 3
        >>> loss_func = MultiProxyEntropyLoss(num_classes=3, embedding_size=2, views=2)
        >>> data = ViewsDataset(Noisy(), views=loss_func.views)
        >>> loader = DataLoader(data, batch_size=3, collate_fn=stack_views)
        >>> data, labels = next(iter(loader))
        >>> data.shape, labels
        (torch.Size([6, 2]), tensor([0, 1, 2, 0, 1, 2]))
    """

    def __init__(
        self, dataset: Any, views: int = 2, data_and_label_getter: Callable[[Any], tuple[Any, Any]] | None = None
    ) -> None:
        stream = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
        if stream or not hasattr(dataset, "__len__"):
            raise TypeError(f"dataset must have __len__ and __getitem__, got a {type(dataset).__name__}")
        self.dataset = dataset
        self.views = check.positive_int("views", views)
        self.data_and_label_getter = data_and_label_getter

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Views:
        draws = _Views(self.dataset[index] for _ in range(self.views))
        labels = [self._label(draw) for draw in draws]
        if not all(np.array_equal(label, labels[0]) for label in labels):
            raise ValueError(f"labels must be the same for all draws of dataset[{index}], got {labels}")
        return draws

    def _label(self, item: Any) -> Any:
        if self.data_and_label_getter is not None:
            return self.data_and_label_getter(item)[1]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise TypeError(f"items must be (data, label), got a {type(item).__name__}: give a data_and_label_getter")
        return item[1]


def stack_views(samples: Sequence[_Views], collate_fn: Callable[[list[Any]], Any] = default_collate) -> Any:
    r"""Stacks the views of several samples into a batch: the ``collate_fn`` for ``DataLoader`` and PML's trainers.

    ``collate_fn`` makes the batch from all views, in :math:`V` blocks of :math:`n` samples each: the first views of all
    samples, then the second ones, and so on. Row :math:`i` of every block is a view of sample :math:`i`, and the labels
    repeat. A smaller last batch (without ``drop_last``) is made in the same way.

    Args:
        samples: :math:`n` items of a :class:`ViewsDataset`.
        collate_fn: makes a batch of a list of items. The default takes tensors, numbers, and tuples or dicts of them.
            For another, use ``functools.partial(stack_views, collate_fn=...)``.

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
