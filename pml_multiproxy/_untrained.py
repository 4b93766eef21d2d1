"""Notices proxies that get gradients but are in no optimizer, the most common mistake with losses that have proxies."""

import warnings

import torch
from torch import Tensor

PATIENCE = 100
"""Calls with gradients on the proxies that nothing has used, before it is said."""


class UntrainedProxies:
    """Looked at once in each training call; warns once.

    That the proxies never changed is read from the version that PyTorch counts of them, without a look at a value.
    """

    def __init__(self) -> None:
        self.calls, self.version, self.first = 0, -1, torch.empty(0)
        self.warned = False

    def look(self, proxies: Tensor, gradient: Tensor | None) -> None:
        """``proxies`` that want a gradient, and theirs so far, ``None`` before the first backward pass."""
        if self.warned or proxies.numel() == 0:
            return
        if proxies._version != self.version or gradient is None:
            self.calls, self.version = 0, proxies._version
            return
        if self.calls == 0:
            self.first = proxies.detach()[0, 0].clone()
        self.calls += 1
        # Optimizers that go past the version, by ``param.data``, show in the values: a device synchronisation, but one
        # that trained proxies seldom come to.
        if self.calls == PATIENCE and self.first.to(proxies).equal(proxies.detach()[0, 0]):
            self.warned = True
            warnings.warn(
                f"the proxies have had gradients in {PATIENCE} training calls, but never changed: they seem to be in "
                "no optimizer. Give loss_func.parameters() to one, in PML's trainers as metric_loss_optimizer; or "
                "freeze them with loss_func.proxies.requires_grad_(False). If you accumulate gradients over more calls "
                "than that, ignore this",
                stacklevel=4,
            )
