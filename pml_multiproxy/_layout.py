"""Where the classes are: all in this process, or spread over several (:mod:`pml_multiproxy._sharding.layout`).

A step of the loss is the same for both, and calls the layout where processes have something to tell each other.
"""

from typing import Any, NamedTuple, Protocol

import torch
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor, distributed

from ._analytic.class_softmax import Sums


class Batch(NamedTuple):
    """The samples that the loss is the loss of."""

    embeddings: Tensor
    labels: Tensor
    weights: Tensor | None
    """How much each sample counts, ``(B,)``; None: all the same."""


class Partial(NamedTuple):
    """What the loss of each sample takes from all classes, summed over some of them; each ``(B,)``, or made of such."""

    others: Sums
    """Over the classes that are not its target."""
    target_similarity: Tensor
    """To its target class, and the terms within that class. Not set where that class is not among these."""
    intra: Tensor
    balance: Tensor


class Layout(Protocol):
    classes: range
    """Those that this process holds."""

    def gather(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, views: int, dtype: torch.dtype, training: bool
    ) -> Batch:
        """The samples of all processes that share the loss."""

    def local(self, tensor: Tensor) -> Tensor:
        """Of proxies or usage, what this process holds, ``(c', ...)``."""

    def share_of_gradient(self, embeddings: Tensor) -> Tensor:
        """The embeddings, whose gradient from here on is the share of this process in a sum over all."""

    def positions(self, labels: Tensor) -> Tensor:
        """Of classes among those of this process; outside of them, those of the others."""

    def is_local(self, positions: Tensor) -> Tensor | None:
        """Whether the classes are of this process, ``(B,)``; None: all are."""

    def reduce_usage_(self, sums: Tensor) -> None:
        """Sums ``(c', K)`` over the processes that share the usage, in place."""

    def reduce(self, partial: Partial, positions: Tensor) -> Partial:
        """Over the classes of all processes."""

    def reduce_samples(self, values: Tensor, positions: Tensor) -> Tensor:
        """Values of the target class of each sample, ``(N, B)``, from the process that holds it."""

    def mean_over_classes(self, values: Tensor) -> Tensor:
        """Of values ``(N, c')`` of each class, ``(N,)``."""

    def reduce_gradients(self, gradients: list[Tensor]) -> list[Tensor]:
        """Of parameters of which every process holds a copy."""

    def gather_rows(
        self, embeddings: Tensor, labels: Tensor | None, dtype: torch.dtype, training: bool
    ) -> tuple[Tensor, Tensor | None, list[int]]:
        """The embeddings and labels of all processes, one after the other, without a gradient, and how many of each."""

    def nearest(self, similarity: Tensor, position: Tensor, sizes: list[int]) -> Tensor:
        """``(B,)``, for the embeddings of this process alone: of the positions that the processes found, the first one
        that has the largest similarity.
        """


class LocalLayout:
    """All classes in this process; ``usage_group``: the processes that update the usage together."""

    def __init__(self, num_classes: int, usage_group: "distributed.ProcessGroup | str | None" = None) -> None:
        self.classes, self.usage_group = range(num_classes), usage_group

    def gather(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, views: int, dtype: torch.dtype, training: bool
    ) -> Batch:
        if indices_tuple is None:
            return Batch(embeddings, labels, None)
        return Batch(embeddings, labels, lmu.convert_to_weights(indices_tuple, labels, dtype=dtype))

    def local(self, tensor: Tensor) -> Tensor:
        return tensor

    def share_of_gradient(self, embeddings: Tensor) -> Tensor:
        return embeddings

    def positions(self, labels: Tensor) -> Tensor:
        return labels

    def is_local(self, positions: Tensor) -> Tensor | None:
        return None

    def reduce_usage_(self, sums: Tensor) -> None:
        if self.usage_group is None:
            return
        if self.usage_group != "world":
            distributed.all_reduce(sums, group=self.usage_group)
        elif distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)

    def reduce(self, partial: Partial, positions: Tensor) -> Partial:
        return partial

    def reduce_samples(self, values: Tensor, positions: Tensor) -> Tensor:
        return values

    def mean_over_classes(self, values: Tensor) -> Tensor:
        return values.mean(dim=1)

    def reduce_gradients(self, gradients: list[Tensor]) -> list[Tensor]:
        return gradients

    def gather_rows(
        self, embeddings: Tensor, labels: Tensor | None, dtype: torch.dtype, training: bool
    ) -> tuple[Tensor, Tensor | None, list[int]]:
        return embeddings, labels, [len(embeddings)]

    def nearest(self, similarity: Tensor, position: Tensor, sizes: list[int]) -> Tensor:
        return position

    def __deepcopy__(self, memo: dict[int, Any]) -> "LocalLayout":
        return LocalLayout(len(self.classes), self.usage_group)  # a process group is shared, not copied

    def __reduce__(self) -> Any:
        if self.usage_group is not None and self.usage_group != "world":
            raise TypeError(
                "a loss with a process group as its usage_group cannot be pickled, since the group belongs to its "
                'process: give usage_group="world", or save its state_dict()'
            )
        return LocalLayout, (len(self.classes), self.usage_group)
