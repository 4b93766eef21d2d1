"""The settings of a loss beside its state, in a file and in a ``state_dict``."""

import warnings
import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from . import _validation as check

FORMAT = 1
"""Of the file; a later one that changes what a file holds has another number."""

MODULES = ("distance", "reducer", "embedding_regularizer", "weight_regularizer")
"""What a file describes, but cannot hold."""


REGULARIZER_WEIGHTS = ("embedding_reg_weight", "weight_reg_weight")

NO_SETTINGS = {*vars(torch.nn.Module()), "collect_stats", "_record_these", "_record_these_stats"}
"""Attributes of any module of PML that say how it is used, or watched."""


class Saved(Protocol):
    def settings(self) -> dict[str, Any]: ...

    def state_dict(self) -> dict[str, Any]: ...


def plain(value: Any) -> Any:
    """Without NumPy and torch, whose scalars ``torch.load`` does not take for safe, or does not compare."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray, Tensor)) else value


def describe(module: torch.nn.Module | None) -> str:
    """The class and the settings of a module of PML, and of all modules in it."""
    if module is None:
        return "None"
    return ", ".join(f"{name}: {_describe(part)}".removeprefix(": ") for name, part in module.named_modules())


def write(loss_func: Saved, path: str | Path) -> None:
    check.path("path", path)
    modules = {name: describe(getattr(loss_func, name)) for name in MODULES}
    settings = loss_func.settings() | {name: plain(getattr(loss_func, name)) for name in REGULARIZER_WEIGHTS}
    file = {"format": FORMAT, "settings": settings, "modules": modules, "state": loss_func.state_dict()}
    torch.save(file, path)


def read(path: str | Path, map_location: Any) -> tuple[dict[str, Any], dict[str, str], dict[str, Tensor]]:
    """The settings, the descriptions of modules, and the state."""
    check.path("path", path)
    file = torch.load(path, map_location=map_location, weights_only=True)
    if not isinstance(file, dict) or "format" not in file:
        raise ValueError(f"path must name a file that MultiProxyEntropyLoss.save wrote, got {path}")
    if file["format"] != FORMAT:
        raise ValueError(
            f"path must name a file of format {FORMAT}, got {path} of format {file['format']}, which another version "
            "of pml-multiproxy wrote"
        )
    return file["settings"], file["modules"], file["state"]


def warn_of_other_settings(recorded: dict[str, Any], settings: dict[str, Any]) -> None:
    """Where a state was recorded under other settings than those of the loss that loads it."""
    # How many classes are computed at a time does not change what is computed.
    known = (name for name in settings if name in recorded and name != "classes_per_chunk")
    names = [name for name in known if recorded[name] != settings[name]]
    if names:
        changes = ", ".join(f"{name} was {recorded[name]!r} and is {settings[name]!r}" for name in names)
        warnings.warn(f"the state was saved by a loss of other settings: {changes}", stacklevel=2)


def _describe(module: torch.nn.Module) -> str:
    no_settings = NO_SETTINGS.union(getattr(module, "_record_these_stats", ()))
    settings = {name: _value(value) for name, value in sorted(vars(module).items()) if name not in no_settings}
    return f"{type(module).__qualname__} {settings}"


def _value(value: object) -> object:
    """What tells it from others, in words that are the same in every process."""
    if isinstance(value, (list, tuple)):
        return [_value(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _value(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, Tensor)):
        tensor = torch.as_tensor(value).detach().cpu().contiguous()
        if tensor.is_floating_point():  # PML casts those to the dtype of what it computes
            tensor = tensor.double()
        return f"shape {tuple(tensor.shape)}, checksum {zlib.crc32(tensor.numpy().tobytes())}"
    value = plain(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__qualname__
