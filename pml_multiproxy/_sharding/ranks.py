"""What the processes of a group, its ranks, tell each other in a step of the sharded loss."""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from .._analytic.class_softmax import Sums
from .._layout import Partial

# The others are their names before PyTorch 2.13.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Ranks:
    """A process group as seen by this process. All methods have to be called on every rank, or none."""

    def __init__(self, group: distributed.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, distributed.get_rank(group), distributed.get_world_size(group)

    def slice_of(self, count: int) -> range:
        """Which of ``count`` things this rank holds: as DTensor has it, the last ranks may hold fewer, or none."""
        length = -(-count // self.size)
        return range(min(self.rank * length, count), min((self.rank + 1) * length, count))

    def agree(self, facts: dict[str, Any]) -> None:
        """An error on every rank where another rank has others."""
        of_ranks: list[Any] = [None] * self.size
        distributed.all_gather_object(of_ranks, facts, group=self.group)
        for name in facts:
            values = [of_rank[name] for of_rank in of_ranks]
            if any(value != values[0] for value in values):
                raise ValueError(f"{name} must be the same on all ranks, got {values}, from rank 0 on")

    def nearest(self, similarity: Tensor, position: Tensor) -> Tensor:
        """``(B,)``: of the positions that the ranks have, the first one that has the largest similarity."""
        # A row that is not a number has no nearest proxy: any will do, as long as all ranks say the same.
        similarity = similarity.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        largest = similarity.clone()
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self.group)
        position = torch.where(similarity == largest, position, torch.iinfo(position.dtype).max)
        distributed.all_reduce(position, distributed.ReduceOp.MIN, group=self.group)
        return position

    def first(self, value: Any) -> Any:
        """The value that the first rank has."""
        values = [value]
        distributed.broadcast_object_list(values, distributed.get_global_rank(self.group, 0), self.group)
        return values[0]

    def sizes(self, embeddings: Tensor, learns: bool) -> list[int]:
        """How many embeddings each rank has; an error on every rank where what they do would not fit together."""
        wants_gradient = embeddings.requires_grad and torch.is_grad_enabled()
        facts = torch.tensor([len(embeddings), DTYPES.index(embeddings.dtype), learns, wants_gradient])
        facts = facts.to(embeddings.device)
        of_ranks = facts.new_empty(self.size * len(facts))
        _all_gather(of_ranks, facts, group=self.group)
        sizes, *others = of_ranks.view(self.size, -1).T.tolist()
        names = ("the dtype of the embeddings", "training with gradients enabled", "requires_grad of the embeddings")
        for name, values in zip(names, others, strict=True):
            if len(set(values)) > 1:
                kinds = [DTYPES[value] for value in values] if name == names[0] else [bool(value) for value in values]
                raise ValueError(f"{name} must be the same on all ranks, got {kinds}, from rank 0 on")
        return list(sizes)

    def gather(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """``(B, N)``, the rows of all ranks, in their order, without a gradient; ``sizes`` as :meth:`sizes` tells."""
        longest = max(sizes)
        if longest == 0:
            return rows
        padded = _pad(rows, longest)
        gathered = padded.new_empty(self.size * longest, rows.shape[1])
        _all_gather(gathered, padded, group=self.group)
        if min(sizes) == longest:
            return gathered
        return torch.cat([part[:size] for part, size in zip(torch.split(gathered, longest), sizes, strict=True)])

    def scatter(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """The other way: the sum over the ranks, ``(B, N)``, of which each gets its own rows."""
        longest = max(sizes)
        if longest == 0:
            return rows
        padded = rows.contiguous()
        if min(sizes) < longest:
            padded = torch.cat([_pad(part, longest) for part in torch.split(rows, sizes)])
        own = padded.new_empty(longest, rows.shape[1])
        _reduce_scatter(own, padded, group=self.group)
        return own[: sizes[self.rank]]

    def reduce(self, partial: Partial, is_local: Tensor) -> Partial:
        """From sums over the classes of this rank to those over all; ``is_local``: samples whose class is this rank's.

        Six numbers for each sample, whatever the number of classes.
        """
        maximum = partial.others.maximum.clone()
        distributed.all_reduce(maximum, distributed.ReduceOp.MAX, group=self.group)
        others = partial.others.relative_to(maximum)
        of_target = torch.stack([partial.target_similarity, partial.intra, partial.balance])
        sums = self.sum(torch.cat([torch.stack([others.z, others.t]), torch.where(is_local, of_target, 0)]))
        z, t, *within_class = sums
        return Partial(Sums(maximum, z, t), *within_class)

    def sum(self, values: Tensor) -> Tensor:
        """Over the ranks, in place."""
        distributed.all_reduce(values, group=self.group)
        return values


class Gather(torch.autograd.Function):
    """:meth:`Ranks.gather`, cast to ``dtype``, in ``order``, with its gradient: :meth:`Ranks.scatter`."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sizes: list[int], order: Tensor | None, dtype: torch.dtype, ranks: Ranks
    ) -> Tensor:
        ctx.sizes, ctx.order, ctx.dtype, ctx.ranks = sizes, order, rows.dtype, ranks
        return in_order(ranks.gather(rows, sizes), order).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if ctx.order is not None:
            gradient = torch.empty_like(gradient).index_copy_(0, ctx.order, gradient)
        # Summed in the dtype of the loss, which is wider than that of embeddings under autocast.
        return ctx.ranks.scatter(gradient, ctx.sizes).to(ctx.dtype), None, None, None, None


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.factor, None


def _pad(rows: Tensor, length: int) -> Tensor:
    return F.pad(rows, (0, 0, 0, length - len(rows))).contiguous()


def order_of_views(sizes: list[int], views: int, device: torch.device) -> Tensor | None:
    """Where the rows, rank by rank, have to come from so that they are view by view; ``None``: they are."""
    if views == 1:
        return None
    blocks = torch.split(torch.arange(sum(sizes)), [size // views for size in sizes for _ in range(views)])
    return torch.cat([block for view in range(views) for block in blocks[view::views]]).to(device)


def in_order(rows: Tensor, order: Tensor | None) -> Tensor:
    return rows if order is None else rows[order]
