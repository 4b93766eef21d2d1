"""The layout of a loss whose classes are spread over the ranks of a process group."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from .._layout import Batch, Partial
from .ranks import Gather, Ranks, ScaledGradient, in_order, order_of_views


class ShardedLayout:
    """Each rank holds a slice of the classes; as DTensor has it, the last ranks may hold fewer, or none."""

    def __init__(self, num_classes: int, ranks: Ranks, device_type: str) -> None:
        self.num_classes, self.ranks, self.classes = num_classes, ranks, ranks.slice_of(num_classes)
        self.mesh = DeviceMesh.from_group(ranks.group, device_type)

    def sharded(self, local: Tensor) -> DTensor:
        """What the ranks hold of a tensor over all classes, ``(c', ...)`` each, as one."""
        shape = torch.Size((self.num_classes, *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def gather(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, views: int, dtype: torch.dtype, training: bool
    ) -> Batch:
        sizes = self.ranks.sizes(embeddings, training)
        order = order_of_views(sizes, views, embeddings.device)
        labels_and_counts = torch.stack([labels, _counts(indices_tuple, labels)], dim=1)
        all_labels, counts = in_order(self.ranks.gather(labels_and_counts, sizes), order).unbind(dim=1)
        largest = F.pad(counts, (0, 1)).max()
        weights = torch.where(largest > 0, counts.to(dtype) / largest.clamp_min(1), 1)
        everything = Gather.apply(embeddings, sizes, order, dtype, self.ranks)  # type: ignore[no-untyped-call]
        return Batch(everything, all_labels, weights)

    def local(self, tensor: Tensor) -> Tensor:
        local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return local

    def share_of_gradient(self, embeddings: Tensor) -> Tensor:
        # The ranks add their shares up. Whatever else depends on the embeddings, a regularizer, each rank computes as a
        # whole, so that the sum is as many times as large as there are ranks; and so it has to be here.
        shared: Tensor = ScaledGradient.apply(embeddings, self.ranks.size)  # type: ignore[no-untyped-call]
        return shared

    def positions(self, labels: Tensor) -> Tensor:
        return labels - self.classes.start

    def is_local(self, positions: Tensor) -> Tensor:
        return (positions >= 0) & (positions < len(self.classes))

    def reduce_usage_(self, sums: Tensor) -> None:
        """The usage of a class has one place, and every rank has all samples."""

    def reduce(self, partial: Partial, positions: Tensor) -> Partial:
        return self.ranks.reduce(partial, self.is_local(positions))

    def reduce_samples(self, values: Tensor, positions: Tensor) -> Tensor:
        return self.ranks.sum(torch.where(self.is_local(positions), values, 0))

    def mean_over_classes(self, values: Tensor) -> Tensor:
        return self.ranks.sum(values.sum(dim=1)) / self.num_classes

    def reduce_gradients(self, gradients: list[Tensor]) -> list[Tensor]:
        return [self.ranks.sum(gradient.contiguous()) for gradient in gradients]

    def gather_rows(
        self, embeddings: Tensor, labels: Tensor | None, dtype: torch.dtype, training: bool
    ) -> tuple[Tensor, Tensor | None, list[int]]:
        sizes = self.ranks.sizes(embeddings, training)
        all_labels = None if labels is None else self.ranks.gather(labels.unsqueeze(1), sizes).squeeze(1)
        return self.ranks.gather(embeddings, sizes).to(dtype), all_labels, sizes

    def nearest(self, similarity: Tensor, position: Tensor, sizes: list[int]) -> Tensor:
        return torch.split(self.ranks.nearest(similarity, position), sizes)[self.ranks.rank]


def _counts(indices_tuple: tuple[Tensor, ...] | None, labels: Tensor) -> Tensor:
    """How often each sample was mined, ``(B,)``, long."""
    counts = torch.zeros_like(labels)
    for indices in indices_tuple or ():
        counts.index_add_(0, indices.to(labels.device), torch.ones_like(indices, device=labels.device))
    return counts
