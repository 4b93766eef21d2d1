"""Autocast by the kind of device; some kinds have none."""

import contextlib
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch


class Autocast(NamedTuple):
    """What autocast does on a kind of device, to be done again later."""

    device_type: str
    dtype: torch.dtype | None
    """``None``: it is off."""

    def again(self) -> AbstractContextManager[object]:
        if not _is_available(self.device_type):
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None)


def current(device_type: str) -> Autocast:
    enabled = _is_available(device_type) and torch.is_autocast_enabled(device_type)
    return Autocast(device_type, torch.get_autocast_dtype(device_type) if enabled else None)


def without(device_type: str) -> AbstractContextManager[object]:
    is_on = current(device_type).dtype is not None
    return Autocast(device_type, None).again() if is_on else contextlib.nullcontext()


def _is_available(device_type: str) -> bool:
    # Only the other kinds have to be asked about, and PyTorch 2.5 cannot compile the question.
    return device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
