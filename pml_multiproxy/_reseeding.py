"""Dead proxies start again at a sample of their class, as codes of vector quantization do."""

import torch
from torch import Tensor


@torch.no_grad()
def reseed_(proxies: Tensor, usage: Tensor, points: Tensor, labels: Tensor, below: float) -> None:
    """Moves, in place, one random dead proxy of each class of the batch onto a random sample of that class.

    A proxy that moves gets an even share of the usage, so that it has time to win samples. Samples that are not finite,
    or all zero, are not drawn. Time and memory are linear in the batch; nothing here synchronises a device.

    Args:
        proxies: ``(C, K, D)``.
        usage: ``(C, K)``, rows sum to 1.
        points: ``(B, D)``, the samples, where a proxy of theirs should lie.
        labels: ``(B,)``, long, in ``[0, C)``.
        below: a proxy is dead below this part of an even share ``1 / K``.

    >>> proxies, usage = torch.zeros(1, 2, 3), torch.tensor([[1.0, 0.0]])
    >>> reseed_(proxies, usage, torch.ones(1, 3), torch.tensor([0]), below=0.1)
    >>> proxies, usage
    (tensor([[[0., 0., 0.],
             [1., 1., 1.]]]), tensor([[0.5000, 0.5000]]))
    """
    if len(labels) == 0:
        return
    points, even = points.to(proxies.dtype), 1 / usage.shape[1]
    eligible = points.isfinite().all(dim=1) & points.any(dim=1)
    drawn, found = _draw_row_of_class(eligible, labels, len(usage))
    own_usage = usage[labels]
    dead = own_usage < below * even
    moves = found & dead.any(dim=1)
    # Every row does what the row that was drawn for its class does, so that all rows of a class write the same.
    proxy = torch.where(dead, torch.rand(dead.shape, device=points.device), -1).argmax(dim=1)[drawn]
    place = labels, proxy

    proxies[place] = torch.where(moves.unsqueeze(1), points[drawn], proxies[place])
    shared = (own_usage * (1 - even)).scatter_add(1, proxy.unsqueeze(1), torch.full_like(own_usage[:, :1], even))
    usage[labels] = torch.where(moves.unsqueeze(1), shared, own_usage)


def _draw_row_of_class(eligible: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """For each row, a random eligible row of its class, the same for all rows of a class; and whether there is one."""
    shuffled = torch.randperm(len(labels), device=labels.device)
    # Ranks of a permutation, unlike random numbers, are never equal: the highest rank belongs to exactly one row.
    rank = torch.empty_like(shuffled).scatter_(0, shuffled, torch.arange(len(labels), device=labels.device))
    highest = labels.new_full((num_classes,), -1)
    highest = highest.scatter_reduce(0, labels, torch.where(eligible, rank, -1), "amax")[labels]
    return shuffled[highest.clamp_min(0)], highest >= 0
