"""The state of an optimizer, by the names of its parameters instead of their numbers, and back."""

from typing import Any

import torch
from torch.distributed.checkpoint import state_dict as states


def named(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """As the optimizer's ``state_dict``, with the parameters' names in place of their numbers."""
    strangers = {p for group in optimizer.param_groups for p in group["params"]} - set(module.parameters())
    if strangers:
        shapes = sorted(tuple(p.shape) for p in strangers)
        raise ValueError(f"optimizer must hold parameters of module only, got others, of shape {shapes}")
    return states.get_optimizer_state_dict(module, [_AsItIs(optimizer)])  # type: ignore[list-item]


class _AsItIs:
    """Stands for an optimizer, for PyTorch, which would make a step of an optimizer that has no state yet."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.state = {"not": "empty"}
        self.param_groups, self.state_dict = optimizer.param_groups, optimizer.state_dict


def numbered(saved: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """As the ``state_dict`` of the optimizer whose groups are given with names, with the state that was saved."""
    saved_groups = {frozenset(group["params"]): group for group in saved["param_groups"]}
    if set(saved_groups) != {frozenset(group["params"]) for group in groups}:
        raise ValueError(
            "the optimizer must have the parameter groups of the checkpoint, "
            f"{[group['params'] for group in saved['param_groups']]}, got {[group['params'] for group in groups]}"
        )
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group["params"])}
    new_groups = [
        {**group, **saved_groups[frozenset(group["params"])], "params": [numbers[name] for name in group["params"]]}
        for group in groups
    ]
    states_by_name = saved.get("state", {})  # absent where it is empty
    state = {number: states_by_name[name] for name, number in numbers.items() if name in states_by_name}
    return {"state": state, "param_groups": new_groups}
