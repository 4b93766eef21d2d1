"""The memory that a checkpoint is read into, distributed as the module and the optimizer that it has to fit."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import tensor as dtensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

KeyPath = tuple[str | int, ...]
"""Of a value in the nested state that was saved."""


class Room:
    """Of a module's state, and of an optimizer's parameters by name and groups with names."""

    def __init__(
        self, module_state: dict[str, Any], parameters: dict[str, Tensor], groups: list[dict[str, Any]]
    ) -> None:
        self.module_state, self.parameters, self.groups = module_state, parameters, groups

    def make(self, metadata: Metadata) -> dict[str, Tensor | None]:
        """By key in the metadata; ``None`` for what is no tensor."""
        paths: dict[str, KeyPath] = metadata.planner_data
        self._check_names(set(paths.values()))
        return {
            key: self._of_tensor(stored, paths[key]) if isinstance(stored, TensorStorageMetadata) else None
            for key, stored in metadata.state_dict_metadata.items()
        }

    def _check_names(self, paths: set[KeyPath]) -> None:
        saved = {path[1] for path in paths if path[0] == "module"}
        if missing := sorted({name for name, value in self.module_state.items() if isinstance(value, Tensor)} - saved):
            raise ValueError(f"the checkpoint lacks {missing} of the module")
        if unexpected := sorted(map(str, saved - set(self.module_state))):
            raise ValueError(f"the module lacks {unexpected} of the checkpoint")
        with_state = {path[2] for path in paths if path[:2] == ("optimizer", "state")}
        if unexpected := sorted(map(str, with_state - set(self.parameters))):
            raise ValueError(f"the optimizer lacks the parameters {unexpected} of the checkpoint")

    def _of_tensor(self, stored: TensorStorageMetadata, path: KeyPath) -> Tensor:
        size, dtype = stored.size, stored.properties.dtype
        match path:
            case ("module", str(name)) if isinstance(now := self.module_state[name], Tensor):
                if now.shape != size:
                    raise ValueError(f"{name} has shape {tuple(size)} in the checkpoint, {tuple(now.shape)} here")
                return torch.empty_like(now)
            case ("optimizer", "state", str(name), *_) if size:
                return _beside(self.parameters[name], size, dtype)
            case ("optimizer", "param_groups", int(group), str(setting)) if group < len(self.groups):
                now = self.groups[group].get(setting)
                return torch.empty(size, dtype=dtype, device=now.device if isinstance(now, Tensor) else "cpu")
        return torch.empty(size, dtype=dtype)


def _beside(parameter: Tensor, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """For a state of the parameter: distributed as the parameter is, or the same on all ranks if its shape differs."""
    if size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    if not isinstance(parameter, dtensor.DTensor):
        return torch.empty(size, dtype=dtype, device=parameter.device)
    everywhere = [dtensor.Replicate()] * parameter.device_mesh.ndim
    return dtensor.empty(size, dtype=dtype, device_mesh=parameter.device_mesh, placements=everywhere)
