"""Checkpoints of all ranks together: written whole or not at all, loaded whole or not at all."""

import copy
import json
import os
import pickle
import re
import secrets
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from enum import Enum
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed
from torch.distributed import tensor as dtensor
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from .. import _validation as check

T = TypeVar("T")

CHECKSUMS = "checksums.json"


def save_checkpoint(
    folder: str | Path,
    step: int,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    process_group: "distributed.ProcessGroup | None" = None,
) -> Path:
    """Writes module and optimizer to ``folder/step-STEP``, each rank its own part.

    Saving changes neither the module nor the optimizer, even before the optimizer's first step.

    The files are first written to a folder ``step-STEP.partial-*`` of this call alone, which is renamed when every rank
    has finished. So :func:`load_checkpoint` finds only complete checkpoints, even if processes are killed or another
    job writes to ``folder``. If two jobs save the same step, the first one that finishes wins. A call that fails
    removes its partial folder, unless its first rank was killed. A partial folder is never read, and never removed
    automatically, since it may belong to a job that is still writing: remove ``folder/*.partial*`` when no job is.

    Args:
        folder: on a file system that all ranks share.
        step: at least 0, the same on all ranks.
        module: holds the network, also under ``DistributedDataParallel``, and the loss, sharded or not.
        optimizer: of parameters of ``module``.
        process_group: every rank of it has to call this; ``None``: all processes, or this one without
            ``torch.distributed``.

    Returns:
        The checkpoint's folder.

    Raises:
        FileExistsError: on every rank, if the step has been saved already, also by another job meanwhile.
        RuntimeError: on every rank, if one of them cannot write or does not answer within the timeout of the group.
        TypeError, ValueError: on every rank, for a step that is no integer from 0 on, or differs between ranks.

    >>> import tempfile
    >>> module = torch.nn.Linear(2, 2)
    >>> optimizer = torch.optim.AdamW(module.parameters())
    >>> folder = tempfile.mkdtemp()
    >>> save_checkpoint(folder, 7, module, optimizer).name
    'step-000000007'
    >>> load_checkpoint(folder, module, optimizer)
    7
    """
    ranks = _AllRanks(process_group)
    steps = ranks.run("step", lambda: check.integer("step", step, low=0), raises=(TypeError, ValueError))
    if len(set(steps)) > 1:
        raise ValueError(f"step must be the same on all ranks, got {steps}, from rank 0 on")
    whole = _path(Path(folder), steps[0])
    problem = f"{whole} could not be written"
    partial = ranks.first(problem, lambda: _new_partial_folder(whole), raises=(FileExistsError,))
    try:
        ranks.run(problem, lambda: _write(partial, module, optimizer, process_group))
        files = ranks.first(problem, lambda: _file_names(partial))
        checksums = ranks.run(problem, lambda: _checksums(partial, ranks.share(files)))
        ranks.first(problem, lambda: _commit(partial, whole, checksums), raises=(FileExistsError,))
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return whole


def load_checkpoint(
    folder: str | Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    process_group: "distributed.ProcessGroup | None" = None,
) -> int | None:
    """Reads the last complete checkpoint, written by any number of ranks, into module and optimizer.

    The sharded loss loads what the ordinary one has saved, and the other way round. After an error, module and
    optimizer are on every rank what they were before. For that, a second copy of both, and a third of the module, are
    held in memory until the end.

    A changed file is noticed by its checksum. The first checkpoints of this package had none; they load unchecked.

    No code of a checkpoint is executed: it is read as by ``torch.load(..., weights_only=True)``, which takes tensors,
    numbers, strings and containers of them. If an extra state of a module or a setting of the optimizer is of another
    class, allow it with ``torch.serialization.add_safe_globals`` first.

    Args:
        folder: on a file system that all ranks share.
        module: with the names and shapes of the module that was saved; the sharded loss may stand for the ordinary one,
            or the other way round.
        optimizer: of the same class, with the same parameters in the same groups. Its state and settings become those
            that were saved, whether it has made a step or not.
        process_group: every rank of it has to call this; ``None``: all processes, or this one without
            ``torch.distributed``.

    Returns:
        The step; ``None`` if there is no complete checkpoint, and nothing was loaded.

    Raises:
        RuntimeError: on every rank, if one of them cannot read the checkpoint, finds it damaged, or cannot load it into
            its module and optimizer, or does not answer within the timeout of the group.

    >>> module = torch.nn.Linear(2, 2)
    >>> load_checkpoint("nowhere", module, torch.optim.AdamW(module.parameters())) is None
    True
    """
    ranks = _AllRanks(process_group)
    # Of one rank: another may see a folder that has gone on meanwhile.
    step = ranks.first(f"{folder} could not be searched", lambda: _last_step(Path(folder)))
    if step is None:
        return None
    whole = _path(Path(folder), step)
    problem = f"{whole} could not be loaded, nothing was changed"
    checksums = ranks.first(problem, lambda: _saved_checksums(whole))
    ranks.run(problem, lambda: _verify(whole, checksums, ranks.share(sorted(checksums))))
    target = _Target(module, optimizer)
    ranks.run(problem, lambda: target.read(whole, process_group))
    try:
        ranks.run(problem, target.replace)
    except BaseException:
        target.restore()
        raise
    return step


class _AllRanks:
    """The ranks that save or load together. All of its methods except ``share`` have to be called on every rank."""

    def __init__(self, group: "distributed.ProcessGroup | None") -> None:
        check.process_group("process_group", group)
        self.group, self.rank, self.size = group, 0, 1
        if distributed.is_available() and distributed.is_initialized():
            self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)

    def run(self, problem: str, action: Callable[[], T], raises: tuple[type[Exception], ...] = ()) -> list[T]:
        """The action's result on every rank, in their order; if it fails on one, an error on every rank at once.

        The error is a RuntimeError that begins with the problem, except for those that are to be raised as they are.
        """
        result: T | None = None
        error: BaseException | None = None
        failure: tuple[type[Exception], str] | None = None
        try:
            result = action()
        except CheckpointException as caught:  # of PyTorch, which is no Exception, and has exchanged errors already
            error = caught
            rank, (reason, _) = next(iter(caught.failures.items()))
            failure = RuntimeError, f"{problem}: on rank {rank}, {type(reason).__name__}: {reason}"
        except Exception as caught:
            error = caught
            described = f"{problem}: on rank {self.rank}, {type(caught).__name__}: {caught}"
            failure = (type(caught), str(caught)) if isinstance(caught, raises) else (RuntimeError, described)
        outcomes: list[Any] = [(result, failure)]
        if self.size > 1:
            outcomes = [None] * self.size
            distributed.all_gather_object(outcomes, (result, failure), group=self.group)
        for _, failure in outcomes:
            if failure is not None:
                kind, message = failure
                raise kind(message) from error
        return [result for result, _ in outcomes]

    def first(self, problem: str, action: Callable[[], T], raises: tuple[type[Exception], ...] = ()) -> T:
        """As ``run``, but the first rank alone acts, and every rank gets its result."""
        result = self.run(problem, lambda: action() if self.rank == 0 else None, raises)[0]
        return result  # type: ignore[return-value]

    def share(self, items: list[str]) -> list[str]:
        """This rank's share of a work that is to be done once."""
        return items[self.rank :: self.size]


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}"


def _last_step(folder: Path) -> int | None:
    found = (re.fullmatch(r"step-(\d+)", path.parent.name) for path in folder.glob("step-*/.metadata"))
    return max((int(match[1]) for match in found if match), default=None)


# Saving


def _new_partial_folder(whole: Path) -> Path:
    if whole.exists():
        raise FileExistsError(f"{whole} is there already: take another folder or step, or remove it")
    partial = whole.with_name(f"{whole.name}.partial-{secrets.token_hex(8)}")
    partial.mkdir(parents=True)
    return partial


def _write(
    partial: Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    process_group: "distributed.ProcessGroup | None",
) -> None:
    state = {"module": states.get_model_state_dict(module), "optimizer": _optimizer_state(module, optimizer)}
    _check_keys(state)
    with _no_warning_about_one_process():
        save(state, checkpoint_id=partial, process_group=process_group)


def _commit(partial: Path, whole: Path, checksums: list[dict[str, int]]) -> None:
    with (partial / CHECKSUMS).open("w") as file:
        json.dump({"crc32": {name: value for of_rank in checksums for name, value in of_rank.items()}}, file, indent=0)
        file.flush()
        os.fsync(file.fileno())
    try:
        partial.rename(whole)  # fails where another job was faster, since its folder is not empty
    except OSError as error:
        if whole.exists():
            raise FileExistsError(f"{whole} has been written by another job meanwhile") from error
        raise


def _optimizer_state(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
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


def _check_keys(state: Any) -> None:
    """PyTorch would silently turn keys into strings."""
    values = state.values() if isinstance(state, Mapping) else state if isinstance(state, list) else ()
    for key in state if isinstance(state, Mapping) else ():
        if not isinstance(key, str):
            raise TypeError(f"the states of module and optimizer must have strings as keys, got {key!r}")
    for value in values:
        _check_keys(value)


# Checksums


def _file_names(folder: Path) -> list[str]:
    data: dict[Any, Any] = _read_metadata(folder).storage_data
    return sorted({".metadata", *(stored.relative_path for stored in data.values())})


def _checksums(folder: Path, names: list[str]) -> dict[str, int]:
    return {name: _checksum(folder / name) for name in names}


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _saved_checksums(folder: Path) -> dict[str, int]:
    if not (folder / CHECKSUMS).exists():  # as in the first checkpoints of this package
        return {}
    return dict(json.loads((folder / CHECKSUMS).read_text())["crc32"])


def _verify(folder: Path, saved: dict[str, int], names: list[str]) -> None:
    for name, checksum in _checksums(folder, names).items():
        if checksum != saved[name]:
            raise ValueError(f"{name} has changed since it was saved: its checksum is {checksum}, not {saved[name]}")


# Loading


class _Target:
    """A module and an optimizer whose contents are to be replaced, and those that replace them."""

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = module, optimizer

    def read(self, folder: Path, process_group: "distributed.ProcessGroup | None") -> None:
        """Reads everything into memory of its own, and copies what it will replace."""
        self._old_state, self._old_groups = self.optimizer.state, self.optimizer.param_groups
        module_state = states.get_model_state_dict(self.module)
        groups = _optimizer_state(self.module, self.optimizer)["param_groups"]
        room = _Room(module_state, groups, self.optimizer.param_groups)
        loaded = room.read(folder, process_group)
        # PyTorch does not save containers that are empty, such as an extra state or the state of an optimizer.
        others = {name: value for name, value in module_state.items() if not isinstance(value, Tensor)}
        self._new_module = {**others, **loaded.get("module", {})}
        self._new_optimizer = _numbered(loaded["optimizer"], groups)
        self._of_another_dtype = room.parameters_of_another_dtype
        self._old_module = {name: _copied(value) for name, value in module_state.items()}

    def replace(self) -> None:
        self.optimizer.load_state_dict(self._new_optimizer)
        self._keep_dtypes()
        states.set_model_state_dict(self.module, self._new_module)

    def _keep_dtypes(self) -> None:
        """PyTorch casts states to the dtype of their parameter, also those that had another one when saved."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for number, saved in self._new_optimizer["state"].items():
            state: dict[str, Any] = self.optimizer.state[parameters[number]]
            for name, value in saved.items() if parameters[number] not in self._of_another_dtype else ():
                cast = state.get(name)
                if isinstance(value, Tensor) and isinstance(cast, Tensor) and value.dtype != cast.dtype:
                    state[name] = value.to(cast.device)

    def restore(self) -> None:
        self.optimizer.state, self.optimizer.param_groups = self._old_state, self._old_groups
        with suppress(Exception):  # of a hook of the module, which has failed at the same place before
            states.set_model_state_dict(self.module, self._old_module)


class _Room:
    """Memory for what a checkpoint holds: distributed over the ranks as the module and its parameters are."""

    def __init__(self, module_state: dict[str, Any], names: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        self.module_state, self.names = module_state, names
        self.parameters = {
            name: parameter
            for named, group in zip(names, groups, strict=True)
            for name, parameter in zip(named["params"], group["params"], strict=True)
        }

    def read(self, folder: Path, process_group: "distributed.ProcessGroup | None") -> dict[str, Any]:
        metadata = _read_metadata(folder)
        paths: dict[str, tuple[str | int, ...]] = metadata.planner_data
        self._check_names(set(paths.values()))
        self.parameters_of_another_dtype = {
            parameter
            for name, parameter in self.parameters.items()
            if metadata.state_dict_metadata[f"module.{name}"].properties.dtype != parameter.dtype  # type: ignore[union-attr]
        }
        state = {key: self._room(stored, paths[key]) for key, stored in metadata.state_dict_metadata.items()}
        with _no_warning_about_one_process():
            load(
                state,
                storage_reader=_Reader(folder, metadata),
                planner=_Planner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=process_group,
            )
        return _nested({paths[key]: value for key, value in state.items()})

    def _check_names(self, paths: set[tuple[str | int, ...]]) -> None:
        saved = {path[1] for path in paths if path[0] == "module"}
        if missing := sorted({name for name, value in self.module_state.items() if isinstance(value, Tensor)} - saved):
            raise ValueError(f"the checkpoint lacks {missing} of the module")
        if unexpected := sorted(map(str, saved - set(self.module_state))):
            raise ValueError(f"the module lacks {unexpected} of the checkpoint")
        with_state = {path[2] for path in paths if path[:2] == ("optimizer", "state")}
        if unexpected := sorted(map(str, with_state - set(self.parameters))):
            raise ValueError(f"the optimizer lacks the parameters {unexpected} of the checkpoint")

    def _room(self, stored: Any, path: tuple[str | int, ...]) -> Tensor | None:
        """For one tensor; other objects need none."""
        if not isinstance(stored, TensorStorageMetadata):
            return None
        size, dtype = stored.size, stored.properties.dtype
        match path:
            case ("module", str(name)) if isinstance(now := self.module_state[name], Tensor):
                if now.shape != size:
                    raise ValueError(f"{name} has shape {tuple(size)} in the checkpoint, {tuple(now.shape)} here")
                return torch.empty_like(now)
            case ("optimizer", "state", str(name), *_) if size:
                return _room_beside(self.parameters[name], size, dtype)
            case ("optimizer", "param_groups", int(group), str(setting)) if group < len(self.names):
                now = self.names[group].get(setting)
                return torch.empty(size, dtype=dtype, device=now.device if isinstance(now, Tensor) else "cpu")
        return torch.empty(size, dtype=dtype)


def _room_beside(parameter: Tensor, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """For a state of the parameter: distributed as the parameter is, or the same on all ranks if its shape differs."""
    if size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    if not isinstance(parameter, dtensor.DTensor):
        return torch.empty(size, dtype=dtype, device=parameter.device)
    everywhere = [dtensor.Replicate()] * parameter.device_mesh.ndim
    return dtensor.empty(size, dtype=dtype, device_mesh=parameter.device_mesh, placements=everywhere)


def _numbered(saved: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """From names of parameters to their numbers in the optimizer, whose groups are given with names."""
    numbers: dict[str, int] = {}
    new_groups = []
    saved_groups = {frozenset(group["params"]): group for group in saved["param_groups"]}
    if set(saved_groups) != {frozenset(group["params"]) for group in groups}:
        raise ValueError(
            "the optimizer must have the parameter groups of the checkpoint, "
            f"{[group['params'] for group in saved['param_groups']]}, got {[group['params'] for group in groups]}"
        )
    for group in groups:
        numbers.update((name, number) for number, name in enumerate(group["params"], start=len(numbers)))
        settings = saved_groups[frozenset(group["params"])]
        new_groups.append({**group, **settings, "params": [numbers[name] for name in group["params"]]})
    states_by_name = saved.get("state", {})  # absent where it is empty
    state = {number: states_by_name[name] for name, number in numbers.items() if name in states_by_name}
    return {"state": state, "param_groups": new_groups}


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _nested(values: dict[tuple[str | int, ...], Any]) -> dict[str, Any]:
    """A tree of dictionaries and lists, from its leaves by their paths; in a list, these have integers."""
    root: dict[Any, Any] = {}
    for path, value in values.items():
        node = root
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value

    def with_lists(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        children = {key: with_lists(child) for key, child in node.items()}
        return [children[key] for key in sorted(children)] if all(isinstance(key, int) for key in node) else children

    return dict(with_lists(root))


# Reading without executing


class _Planner(DefaultLoadPlanner):
    """Reads what is no tensor with ``weights_only=True``, and puts it into a dictionary that is flat."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        with torch.serialization.safe_globals(_OF_NUMPY_SCALARS):
            self.original_state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


_OF_NUMPY_SCALARS = [
    np.dtype,
    np.float64(0).__reduce__()[0],
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"},
]
"""A learning rate may be one."""


class _Reader(FileSystemReader):
    """With metadata that have been read already: PyTorch would unpickle them, whatever they are."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self) -> Metadata:
        return self._metadata


def _read_metadata(folder: Path) -> Metadata:
    with (folder / ".metadata").open("rb") as file:
        metadata = _MetadataUnpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"no metadata of a checkpoint, got {type(metadata).__name__}")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Admits what describes a checkpoint, and nothing that acts."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib") and name.endswith("Path") and "." not in name:
            return PurePath  # where it was written, perhaps on another operating system
        found = getattr(sys.modules.get(module), name, None)
        if (
            isinstance(found, type)
            and found.__module__ == module
            and module.startswith("torch.distributed.checkpoint.")
        ):
            admitted = is_dataclass(found) or issubclass(found, Enum)
        else:
            of_torch = found is torch.Size or isinstance(found, torch.dtype)
            admitted = of_torch or (module, name) == ("torch.serialization", "_get_layout")
        if admitted:
            return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into the metadata of a checkpoint")


@contextmanager
def _no_warning_about_one_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is ")
        yield
