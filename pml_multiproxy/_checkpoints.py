"""Checkpoints that are there as a whole or not at all, for any number of processes."""

import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save


def save_checkpoint(
    folder: str | Path,
    step: int,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    process_group: "distributed.ProcessGroup | None" = None,
) -> Path:
    """Writes module and optimizer to ``folder/step-STEP``, each rank what it holds.

    All is written under another name first, which changes when every rank is done. So whatever ends the processes
    meanwhile, :func:`load_checkpoint` finds only checkpoints that are whole.

    Args:
        folder: seen by all ranks.
        step: 0 or more; the checkpoint must not be there yet.
        module: holds the network, also under ``DistributedDataParallel``, and the loss, sharded or not.
        optimizer: of all parameters.
        process_group: whose ranks all call this; ``None``: all processes, or this one without ``torch.distributed``.

    Returns:
        The checkpoint's folder.

    Raises:
        FileExistsError: for a checkpoint that is there.
        RuntimeError: on every rank, where one cannot write.

    >>> import tempfile
    >>> module = torch.nn.Linear(2, 2)
    >>> optimizer = torch.optim.AdamW(module.parameters())
    >>> folder = tempfile.mkdtemp()
    >>> save_checkpoint(folder, 7, module, optimizer).name
    'step-000000007'
    >>> load_checkpoint(folder, module, optimizer)
    7
    """
    whole = _path(Path(folder), step)
    if whole.exists():
        raise FileExistsError(f"{whole} is there already: take another folder or step, or remove it")
    aside = whole.with_suffix(".partial")
    _barrier(process_group)  # Nothing may be there yet when the slowest rank looks.
    model_state, optimizer_state = states.get_state_dict(module, optimizer)
    if _is_first(process_group):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    _barrier(process_group)
    state = {"module": model_state, "optimizer": optimizer_state}
    try:
        with _one_process_is_fine():
            save(state, checkpoint_id=aside, process_group=process_group)
    except CheckpointException as error:  # which is no Exception
        raise RuntimeError(f"{whole} could not be written: {error}") from error
    if _is_first(process_group):
        aside.rename(whole)
    _barrier(process_group)
    return whole


def load_checkpoint(
    folder: str | Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    process_group: "distributed.ProcessGroup | None" = None,
) -> int | None:
    """Reads the last whole checkpoint, written by however many ranks, into module and optimizer.

    Between the ordinary loss and the sharded one, it goes both ways.

    Args:
        folder: seen by all ranks.
        module: made as the one that was saved; in it, the sharded loss may stand for the ordinary one, or the other
            way.
        optimizer: of the same parameters in the same groups.
        process_group: whose ranks all call this; ``None``: all processes, or this one without ``torch.distributed``.

    Returns:
        The step; ``None`` if there is no whole checkpoint, and nothing was read.

    >>> module = torch.nn.Linear(2, 2)
    >>> load_checkpoint("nowhere", module, torch.optim.AdamW(module.parameters())) is None
    True
    """
    steps = [_last_step(Path(folder))]  # Of one rank: another may see a folder that has gone on meanwhile.
    if _is_distributed():
        group = process_group or distributed.group.WORLD
        assert group is not None
        distributed.broadcast_object_list(steps, distributed.get_global_rank(group, 0), group)
    step = steps[0]
    if step is None:
        return None
    model_state, optimizer_state = states.get_state_dict(module, optimizer)
    state: dict[str, Any] = {"module": model_state, "optimizer": optimizer_state}
    with _one_process_is_fine():
        load(state, checkpoint_id=_path(Path(folder), step), process_group=process_group)
    states.set_state_dict(module, optimizer, model_state_dict=state["module"], optim_state_dict=state["optimizer"])
    return step


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}"


def _last_step(folder: Path) -> int | None:
    found = (re.fullmatch(r"step-(\d+)", path.parent.name) for path in folder.glob("step-*/.metadata"))
    return max((int(match[1]) for match in found if match), default=None)


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _is_first(group: "distributed.ProcessGroup | None") -> bool:
    return not _is_distributed() or distributed.get_rank(group) == 0


def _barrier(group: "distributed.ProcessGroup | None") -> None:
    if _is_distributed():
        distributed.barrier(group)


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is ")
        yield
