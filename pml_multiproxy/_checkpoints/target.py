"""A module and an optimizer whose contents a checkpoint replaces, or leaves as they were."""

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.metadata import Metadata

from . import files, optimizer_state
from .metadata import read_metadata
from .room import Room


class Target:
    """First ``read``, which changes nothing, then ``replace``; if that fails, here or elsewhere, ``restore``."""

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = module, optimizer

    def read(self, folder: Path, process_group: distributed.ProcessGroup | None) -> None:
        """Reads everything into memory of its own, and copies what it will replace."""
        self._old_state, self._old_groups = self.optimizer.state, self.optimizer.param_groups
        module_state = states.get_model_state_dict(self.module)
        groups = optimizer_state.named(self.module, self.optimizer)["param_groups"]
        parameters = self._parameters_by_name(groups)
        metadata = read_metadata(folder)
        room = Room(module_state, parameters, groups).make(metadata)
        loaded = files.read(folder, metadata, room, process_group)
        # PyTorch does not save containers that are empty, such as an extra state or the state of an optimizer.
        others = {name: value for name, value in module_state.items() if not isinstance(value, Tensor)}
        self._new_module = {**others, **loaded.get("module", {})}
        self._new_optimizer = optimizer_state.numbered(loaded["optimizer"], groups)
        self._of_another_dtype = _differing_in_dtype(parameters, metadata)
        self._old_module = {name: _copied(value) for name, value in module_state.items()}

    def replace(self) -> None:
        self.optimizer.load_state_dict(self._new_optimizer)
        self._keep_dtypes()
        states.set_model_state_dict(self.module, self._new_module)

    def restore(self) -> None:
        self.optimizer.state, self.optimizer.param_groups = self._old_state, self._old_groups
        with suppress(Exception):  # of a hook of the module, which has failed at the same place before
            states.set_model_state_dict(self.module, self._old_module)

    def _parameters_by_name(self, groups: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {
            name: parameter
            for named, group in zip(groups, self.optimizer.param_groups, strict=True)
            for name, parameter in zip(named["params"], group["params"], strict=True)
        }

    def _keep_dtypes(self) -> None:
        """PyTorch casts states to the dtype of their parameter, also those that had another one when saved."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for number, saved in self._new_optimizer["state"].items():
            if parameters[number] in self._of_another_dtype:
                continue
            state: dict[str, Any] = self.optimizer.state[parameters[number]]
            for name, value in saved.items():
                cast = state.get(name)
                if isinstance(value, Tensor) and isinstance(cast, Tensor) and value.dtype != cast.dtype:
                    state[name] = value.to(cast.device)


def _differing_in_dtype(parameters: dict[str, Tensor], metadata: Metadata) -> set[Tensor]:
    """Parameters whose dtype is not the one that was saved."""
    stored = metadata.state_dict_metadata
    return {
        parameter
        for name, parameter in parameters.items()
        if stored[f"module.{name}"].properties.dtype != parameter.dtype  # type: ignore[union-attr]
    }


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
