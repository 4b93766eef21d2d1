"""The settings of the losses in a module, beside their state, so that another setting does not pass silently."""

import json
from pathlib import Path
from typing import Any

import torch

from .. import _saving
from .._module import ProxyLossModule

NAME = "settings.json"

WRAPPERS = {"module", "_orig_mod"}
"""What ``DistributedDataParallel`` and ``torch.compile`` put into names."""


def write(folder: Path, module: torch.nn.Module) -> None:
    (folder / NAME).write_text(json.dumps(_settings(module), indent=0))


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """By the name of each loss."""
    if not (folder / NAME).exists():  # as in the first checkpoints of this package
        return {}
    return dict(json.loads((folder / NAME).read_text()))


def warn_of_others(saved: dict[str, dict[str, Any]], module: torch.nn.Module) -> None:
    for name, settings in _settings(module).items():
        _saving.warn_of_other_settings(saved.get(name, {}), settings)


def _settings(module: torch.nn.Module) -> dict[str, dict[str, Any]]:
    losses = ((name, part) for name, part in module.named_modules() if isinstance(part, ProxyLossModule))
    return {".".join(p for p in name.split(".") if p not in WRAPPERS): loss.settings() for name, loss in losses}
