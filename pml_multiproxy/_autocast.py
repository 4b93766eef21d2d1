"""Full precision, whatever the caller's autocast says."""

import contextlib
from contextlib import AbstractContextManager

import torch


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Turns autocast off. A device that has none, as "meta", refuses even that: there it changes nothing.

    >>> with torch.autocast("cpu", torch.bfloat16), without_autocast("cpu"):
    ...     torch.is_autocast_enabled("cpu")
    False
    """
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    off: AbstractContextManager[None] = torch.autocast(device_type, enabled=False)
    return off
