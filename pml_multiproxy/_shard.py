"""The classes that this process holds, and communication with the processes that hold the others.

Without other processes, every function returns at once. With them, all ranks of the group have to call it, or none.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from . import functional
from ._analytic.online_softmax import Sums
from ._similarity import keep_short

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The alternatives are the names before PyTorch 2.13.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Shard(NamedTuple):
    start: int
    stop: int
    num_classes: int
    group: "ProcessGroup | None" = None
    """Its ranks hold all classes together; ``None``: this process holds them all."""

    @property
    def classes(self) -> range:
        return range(self.start, self.stop)

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else distributed.get_world_size(self.group)


def shard_of_rank(num_classes: int, group: "ProcessGroup") -> Shard:
    """Slices of equal length; the last ranks may hold fewer classes, or none, as in a ``DTensor``."""
    length = -(-num_classes // distributed.get_world_size(group))
    start = min(distributed.get_rank(group) * length, num_classes)
    return Shard(start, min(start + length, num_classes), num_classes, group)


class Batch(NamedTuple):
    embeddings: Tensor
    labels: Tensor
    indices_tuple: tuple[Tensor, ...] | None


def gather(
    batch: Batch, shard: Shard, views: int, proxies: Tensor, distance: Any, training: bool
) -> tuple[Batch, list[int]]:
    """The samples of all ranks, view by view, as if one process had them; and how many each rank has."""
    if shard.group is None:
        return batch, [len(batch.embeddings)]
    embeddings, labels, indices_tuple = batch
    sizes = _sizes(embeddings, training, shard.group)
    order = _order_of_views(sizes, views).to(embeddings.device)
    labels_and_counts = torch.stack([labels, _counts(indices_tuple, labels)], dim=1)
    all_labels, counts = _gather(labels_and_counts, sizes, shard.group)[order].unbind(dim=1)
    dtype = functional.compute_dtype(embeddings, proxies)
    everything = _Gather.apply(embeddings, sizes, order, dtype, shard.group)  # type: ignore[no-untyped-call]
    everything = keep_short(distance, everything, embeddings.dtype)
    return Batch(everything, all_labels, (torch.repeat_interleave(counts),)), sizes


def is_local(positions: Tensor, shard: Shard) -> Tensor | None:
    """Whether this process holds each sample's target class, ``(B,)``; ``None``: it holds them all."""
    return None if shard.group is None else (positions >= 0) & (positions < len(shard.classes))


def scaled_gradient(embeddings: Tensor, shard: Shard) -> Tensor:
    """The embeddings; their gradient from here on is multiplied by the number of ranks."""
    # Each rank computes a share of this gradient, and all of any other, as of a regularizer. Adding over the ranks
    # multiplies the others by their number, and so it has to be here.
    if shard.group is None:
        return embeddings
    scaled, ranks = embeddings.view_as(embeddings), shard.ranks
    if scaled.requires_grad:
        scaled.register_hook(lambda gradient: gradient * ranks)  # type: ignore[no-untyped-call]
    return scaled


class Partial(NamedTuple):
    """The parts of each sample's loss over some of the classes; each ``(B,)``, or made of such."""

    others: Sums
    """Over the classes that are not the target class."""
    target_similarity: Tensor
    """To the target class, and the terms within it: of no meaning where it is not among these classes."""
    intra: Tensor
    balance: Tensor


def reduce(partial: Partial, positions: Tensor, shard: Shard) -> Partial:
    """From the classes of this rank to all classes: six numbers for each sample."""
    if shard.group is None:
        return partial
    maximum = partial.others.maximum.clone()
    distributed.all_reduce(maximum, distributed.ReduceOp.MAX, group=shard.group)
    others = partial.others.relative_to(maximum)
    at_target = torch.stack([partial.target_similarity, partial.intra, partial.balance])
    values = torch.cat([torch.stack([others.z, others.t]), torch.where(is_local(positions, shard), at_target, 0)])  # type: ignore[arg-type]
    distributed.all_reduce(values, group=shard.group)
    z, t, *within_class = values
    return Partial(Sums(maximum, z, t), *within_class)


def from_target(values: Tensor, positions: Tensor, shard: Shard) -> Tensor:
    """Values at the target class of each sample, ``(..., B)``, from the rank that holds it."""
    if shard.group is None:
        return values
    values = torch.where(is_local(positions, shard), values, 0)  # type: ignore[arg-type]
    distributed.all_reduce(values, group=shard.group)
    return values


def mean_over_classes(values: Tensor, shard: Shard) -> Tensor:
    """The mean ``(N,)`` of values ``(N, c')`` of the classes of this rank."""
    if shard.group is None:
        return values.mean(dim=1)
    total = values.sum(dim=1)
    distributed.all_reduce(total, group=shard.group)
    return total / shard.num_classes


def of_largest(values: Tensor, positions: Tensor, shard: Shard) -> Tensor:
    """The position ``(B,)`` of the rank that has the largest value; the first one if several have it."""
    if shard.group is None:
        return positions
    # A row of NaN has no largest value: any position will do, as long as all ranks say the same.
    values = values.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    largest = values.clone()
    distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=shard.group)
    positions = torch.where(values == largest, positions, torch.iinfo(positions.dtype).max)
    distributed.all_reduce(positions, distributed.ReduceOp.MIN, group=shard.group)
    return positions


def own_rows(rows: Tensor, sizes: list[int], shard: Shard) -> Tensor:
    """This rank's part of ``rows``, which hold the rows of all ranks, rank by rank."""
    return rows if shard.group is None else torch.split(rows, sizes)[distributed.get_rank(shard.group)]


def processes(usage_group: "ProcessGroup | str | None") -> "ProcessGroup | None":
    """The processes of a ``usage_group``; ``None``: this one alone."""
    if isinstance(usage_group, str):  # "world"
        return distributed.group.WORLD if distributed.is_available() else None
    return usage_group


def check_replicas(usage_group: "ProcessGroup | str | None") -> None:
    """Raises an error if each process would set the proxies of its own copy of the loss."""
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if several and usage_group is None:
        raise ValueError(
            "init_proxies needs a usage_group on several processes, whose copies of the loss would differ otherwise: "
            'with usage_group="world", every process calls it, and all get the result of the first'
        )


def copy_from_first_(tensors: Iterable[Tensor], usage_group: "ProcessGroup | str | None") -> None:
    """Overwrites the tensors by those of the first process of the group."""
    group = processes(usage_group)
    if group is not None:
        for tensor in tensors:
            distributed.broadcast(tensor, distributed.get_global_rank(group, 0), group=group)


def check_equal(facts: dict[str, Any], group: "ProcessGroup") -> None:
    """Raises an error on every rank if the facts differ between ranks."""
    of_ranks: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(of_ranks, facts, group=group)
    for name in facts:
        _check_same(name, [of_rank[name] for of_rank in of_ranks])


def _check_same(name: str, values: list[Any]) -> None:
    if any(value != values[0] for value in values):
        raise ValueError(f"{name} must be the same on all ranks, got {values}, from rank 0 on")


def _sizes(embeddings: Tensor, training: bool, group: "ProcessGroup") -> list[int]:
    """How many embeddings each rank has; an error on every rank if dtype, mode or requires_grad differ."""
    wants_gradient = embeddings.requires_grad and torch.is_grad_enabled()
    facts = torch.tensor([len(embeddings), DTYPES.index(embeddings.dtype), training, wants_gradient])
    facts = facts.to(embeddings.device)
    of_ranks = facts.new_empty(distributed.get_world_size(group) * len(facts))
    _all_gather(of_ranks, facts, group=group)
    sizes, dtypes, *others = of_ranks.view(-1, len(facts)).T.tolist()
    _check_same("the dtype of the embeddings", [DTYPES[value] for value in dtypes])
    for name, values in zip(
        ("training with gradients enabled", "requires_grad of the embeddings"), others, strict=True
    ):
        _check_same(name, [bool(value) for value in values])
    return list(sizes)


def _gather(rows: Tensor, sizes: list[int], group: "ProcessGroup") -> Tensor:
    """``(B, N)``: the rows of all ranks, rank by rank, without a gradient."""
    longest = max(sizes)
    if longest == 0:
        return rows
    padded = _pad(rows, longest)
    gathered = padded.new_empty(len(sizes) * longest, rows.shape[1])
    _all_gather(gathered, padded, group=group)
    if min(sizes) == longest:
        return gathered
    return torch.cat([part[:size] for part, size in zip(torch.split(gathered, longest), sizes, strict=True)])


def _scatter(rows: Tensor, sizes: list[int], group: "ProcessGroup") -> Tensor:
    """The sum of ``rows`` ``(B, N)`` over the ranks, of which each rank gets its own part."""
    longest = max(sizes)
    if longest == 0:
        return rows
    padded = rows.contiguous()
    if min(sizes) < longest:
        padded = torch.cat([_pad(part, longest) for part in torch.split(rows, sizes)])
    own = padded.new_empty(longest, rows.shape[1])
    _reduce_scatter(own, padded, group=group)
    return own[: sizes[distributed.get_rank(group)]]


class _Gather(torch.autograd.Function):
    """:func:`_gather`, in ``order`` and cast to ``dtype``; its gradient is :func:`_scatter`."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sizes: list[int], order: Tensor, dtype: torch.dtype, group: "ProcessGroup"
    ) -> Tensor:
        ctx.sizes, ctx.order, ctx.dtype, ctx.group = sizes, order, rows.dtype, group
        return _gather(rows, sizes, group)[order].to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gradient = torch.empty_like(gradient).index_copy_(0, ctx.order, gradient)
        # Summed in the dtype of the loss: that of the embeddings is narrower under autocast.
        return _scatter(gradient, ctx.sizes, ctx.group).to(ctx.dtype), None, None, None, None


def _pad(rows: Tensor, length: int) -> Tensor:
    return F.pad(rows, (0, 0, 0, length - len(rows))).contiguous()


def _order_of_views(sizes: list[int], views: int) -> Tensor:
    """The rows that come rank by rank, in the order view by view."""
    blocks = torch.split(torch.arange(sum(sizes)), [size // views for size in sizes for _ in range(views)])
    return torch.cat([block for view in range(views) for block in blocks[view::views]])


def _counts(indices_tuple: tuple[Tensor, ...] | None, labels: Tensor) -> Tensor:
    """How often each sample was mined, ``(B,)``."""
    counts = torch.zeros_like(labels)
    for indices in indices_tuple or ():
        counts.index_add_(0, indices.to(labels.device), torch.ones_like(indices, device=labels.device))
    return counts
