"""The settings of a loss beside its state: in a file, and as a warning in a ``state_dict``."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch

FORMAT = 2
"""Number of the file's format."""

MODULES = ("distance", "embedding_regularizer", "weight_regularizer", "reducer")
"""Parts of a loss that a file cannot hold; it holds the names of their classes."""


def write(path: str | Path, contents: dict[str, Any]) -> None:
    """Replaces the file when the new one is whole: a killed process or a full disk leaves the old file."""
    target = Path(path).resolve()
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            torch.save({"format": FORMAT, **contents}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def read(path: str | Path, map_location: Any) -> dict[str, Any]:
    """The contents of a file of :func:`write`. Runs no code of the file."""
    with open(path, "rb") as file:
        try:
            contents = torch.load(file, map_location=map_location, weights_only=True)
            if contents["format"] == FORMAT and contents["state"]:
                return dict(contents)
        except Exception as error:  # torch has many for damaged files
            raise ValueError(f"path must name a whole file of MultiProxyEntropyLoss.save, got {path}") from error
    raise ValueError(f"path must name a file of format {FORMAT}, got {path} of format {contents['format']}")


def names_of_modules(loss_func: torch.nn.Module) -> dict[str, str]:
    """The classes of the parts; PML may have wrapped a reducer in others."""
    parts = {name: getattr(loss_func, name) or torch.nn.Identity() for name in MODULES}
    return {name: " ".join(type(module).__name__ for module in part.modules()) for name, part in parts.items()}


def warn_of_other_settings(recorded: dict[str, Any], settings: dict[str, Any]) -> None:
    """Warns if a state was saved with other settings than those of the loss that loads it."""
    # classes_per_chunk does not change the result.
    known = (name for name in settings if name in recorded and name != "classes_per_chunk")
    names = [name for name in known if recorded[name] != settings[name]]
    if names:
        changes = ", ".join(f"{name} was {recorded[name]!r} and is {settings[name]!r}" for name in names)
        warnings.warn(f"the state was saved by a loss of other settings: {changes}", stacklevel=2)
