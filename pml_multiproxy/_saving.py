"""The settings of a loss beside its state, in a file and in a ``state_dict``."""

import warnings
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _validation as check

FORMAT = 1
"""Of the file; a later one that changes what a file holds has another number."""

MODULES = ("distance", "reducer", "embedding_regularizer", "weight_regularizer")
"""What a file describes, but cannot hold."""


class Saved(Protocol):
    def settings(self) -> dict[str, Any]: ...

    def state_dict(self) -> dict[str, Any]: ...


def describe(module: torch.nn.Module | None) -> str:
    """The class and the plain settings of a module of PML."""
    statistics = getattr(module, "_record_these_stats", [])
    settings = {name: value for name, value in sorted(vars(module).items()) if _is_plain(value)} if module else {}
    return f"{type(module).__qualname__} { ({name: settings[name] for name in settings if name not in statistics}) }"


def write(loss_func: Saved, path: str | Path) -> None:
    check.path("path", path)
    modules = {name: describe(getattr(loss_func, name)) for name in MODULES}
    file = {"format": FORMAT, "settings": loss_func.settings(), "modules": modules, "state": loss_func.state_dict()}
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
    names = [name for name in settings if name in recorded and recorded[name] != settings[name]]
    if names:
        changes = ", ".join(f"{name} was {recorded[name]!r} and is {settings[name]!r}" for name in names)
        warnings.warn(f"the state was saved by a loss of other settings: {changes}", stacklevel=2)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
