"""The metadata of PyTorch's distributed checkpoints, read without executing anything: PyTorch would unpickle them."""

import pickle
import sys
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

NAME = ".metadata"


def read_metadata(folder: Path) -> Metadata:
    with (folder / NAME).open("rb") as file:
        metadata = _Unpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"no metadata of a checkpoint, got {type(metadata).__name__}")
    return metadata


def file_names(folder: Path) -> list[str]:
    """Of all files that PyTorch has written."""
    data: dict[Any, Any] = read_metadata(folder).storage_data
    return sorted({NAME, *(stored.relative_path for stored in data.values())})


class _Unpickler(pickle.Unpickler):
    """Admits what describes a checkpoint, and nothing that acts."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib") and name.endswith("Path") and "." not in name:
            return PurePath  # where it was written, perhaps on another operating system
        found = getattr(sys.modules.get(module), name, None)
        if _describes_a_checkpoint(found, module) or _describes_a_tensor(found, module, name):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into the metadata of a checkpoint")


def _describes_a_checkpoint(found: object, module: str) -> bool:
    return (
        isinstance(found, type)
        and found.__module__ == module
        and module.startswith("torch.distributed.checkpoint.")
        and (is_dataclass(found) or issubclass(found, Enum))
    )


def _describes_a_tensor(found: object, module: str, name: str) -> bool:
    of_torch = found is torch.Size or isinstance(found, torch.dtype)
    return of_torch or (module, name) == ("torch.serialization", "_get_layout")
