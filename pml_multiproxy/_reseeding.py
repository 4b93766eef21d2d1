"""Dead proxies start again at a sample of their class, as codes of vector quantization do."""

import torch
from torch import Tensor


@torch.no_grad()
def reseed_(proxies: Tensor, usage: Tensor, points: Tensor, labels: Tensor, below: float) -> None:
    """In place, in each class of the batch that has one: moves one dead proxy, by lot, onto one sample, by lot.

    It gets an even share of the usage, so that it has time to win samples. Samples that are not finite, or all zero,
    are not drawn. Nothing here makes a GPU wait.

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
    lots = torch.where(eligible, torch.rand(len(labels), device=points.device), -1)
    # Every row does what the row that was drawn for its class does, so that all of them write the same.
    drawn = torch.where(labels.unsqueeze(1) == labels, lots, -2).argmax(dim=1)
    own_usage = usage[labels]
    dead = own_usage < below * even
    moves = eligible[drawn] & dead.any(dim=1)
    proxy = torch.where(dead, torch.rand(dead.shape, device=points.device), -1).argmax(dim=1)[drawn]
    place = labels, proxy

    proxies[place] = torch.where(moves.unsqueeze(1), points[drawn], proxies[place])
    shared = (own_usage * (1 - even)).scatter_add(1, proxy.unsqueeze(1), torch.full_like(own_usage[:, :1], even))
    usage[labels] = torch.where(moves.unsqueeze(1), shared, own_usage)
