"""Saving a checkpoint: written aside by all ranks, and there only if every rank has finished."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.checkpoint import state_dict as states

from .. import _validation as check
from . import checksums, files, folders, optimizer_state, settings
from .fail_together import FailTogether
from .metadata import file_names


def save_checkpoint(
    folder: str | Path,
    step: int,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    process_group: distributed.ProcessGroup | None = None,
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
    >>> from pml_multiproxy.distributed import load_checkpoint, save_checkpoint
    >>> module = torch.nn.Linear(2, 2)
    >>> optimizer = torch.optim.AdamW(module.parameters())
    >>> folder = tempfile.mkdtemp()
    >>> save_checkpoint(folder, 7, module, optimizer).name
    'step-000000007'
    >>> load_checkpoint(folder, module, optimizer)
    7
    """
    together = FailTogether(process_group)
    steps = together.run("step", lambda: check.integer("step", step, low=0), raises=(TypeError, ValueError))
    if len(set(steps)) > 1:
        raise ValueError(f"step must be the same on all ranks, got {steps}, from rank 0 on")
    whole = folders.path(Path(folder), steps[0])
    problem = f"{whole} could not be written"
    partial = together.first(problem, lambda: folders.new_partial(whole), raises=(FileExistsError,))
    try:
        together.run(problem, lambda: files.write(partial, _state(module, optimizer), process_group))
        together.first(problem, lambda: settings.write(partial, module))
        names = together.first(problem, lambda: [settings.NAME, *file_names(partial)])
        of_ranks = together.run(problem, lambda: checksums.compute(partial, together.share(names)))
        together.first(problem, lambda: _commit(partial, whole, of_ranks), raises=(FileExistsError,))
    except BaseException:
        if together.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return whole


def _state(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = {"module": states.get_model_state_dict(module), "optimizer": optimizer_state.named(module, optimizer)}
    _check_keys(state)
    return state


def _check_keys(state: Any) -> None:
    """PyTorch would silently turn keys into strings."""
    if isinstance(state, Mapping):
        for key in state:
            if not isinstance(key, str):
                raise TypeError(f"the states of module and optimizer must have strings as keys, got {key!r}")
        state = list(state.values())
    for value in state if isinstance(state, list) else ():
        _check_keys(value)


def _commit(partial: Path, whole: Path, of_ranks: list[dict[str, int]]) -> None:
    checksums.write(partial, {name: value for of_rank in of_ranks for name, value in of_rank.items()})
    folders.rename(partial, whole)
