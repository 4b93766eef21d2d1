"""The usage of the proxies: a running mean of the assignment, which training updates."""

import torch
from torch import Tensor

from . import functional
from ._layout import Layout


def update_usage_(usage: Tensor, assignments: Tensor, positions: Tensor, momentum: float, layout: Layout) -> None:
    """Moves the usage by one batch, in place, after reducing over the processes that share it.

    Args:
        usage: ``(c', K)``, that of the classes of this process.
        assignments: ``(B, K)``, over the proxies of each sample's target class.
        positions: ``(B,)``, of the target classes among those of this process.
        momentum: per sample.
        layout: whose processes reduce.
    """
    if len(usage) == 0:
        return
    # A table of all classes, not the rows of the batch: its size is the same everywhere, so that processes may hold
    # different numbers of samples without telling each other first, which would be a device synchronisation. It is a
    # small part, 1 / D, of what DistributedDataParallel sends of the proxies' gradient. And a sum that is the same to
    # the last bit everywhere leaves the usage the same everywhere.
    is_local = layout.is_local(positions)
    if is_local is not None:
        assignments, positions = torch.where(is_local.unsqueeze(1), assignments, 0), torch.where(is_local, positions, 0)
    sums = functional.usage_sums(assignments, positions, len(usage))
    layout.reduce_usage_(sums)
    usage.copy_(functional.moved_usage(usage, sums, momentum))


def usage_of_target(usage: Tensor, positions: Tensor, dtype: torch.dtype, layout: Layout) -> Tensor:
    """``(B, K)``; of no meaning where the target class is not of this process."""
    if len(usage) == 0:
        return usage.new_ones(len(positions), usage.shape[1], dtype=dtype)
    is_local = layout.is_local(positions)
    if is_local is not None:
        positions = torch.where(is_local, positions, 0)
    return usage.index_select(0, positions).to(dtype)
