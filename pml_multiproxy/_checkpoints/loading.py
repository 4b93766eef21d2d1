"""Loading a checkpoint: the last complete one, into module and optimizer of every rank or of none."""

from pathlib import Path

import torch
from torch import distributed

from . import checksums, folders, settings
from .fail_together import FailTogether
from .target import Target


def load_checkpoint(
    folder: str | Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    process_group: distributed.ProcessGroup | None = None,
) -> int | None:
    """Reads the last complete checkpoint, written by any number of ranks, into module and optimizer.

    The sharded loss loads what the ordinary one has saved, and the other way round. After an error, module and
    optimizer are on every rank what they were before. For that, a second copy of both, and a third of the module, are
    held in memory until the end.

    It warns where the settings of a loss are others than when it was saved.

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

    >>> from pml_multiproxy.distributed import load_checkpoint
    >>> module = torch.nn.Linear(2, 2)
    >>> load_checkpoint("nowhere", module, torch.optim.AdamW(module.parameters())) is None
    True
    """
    together = FailTogether(process_group)
    # Of one rank: another may see a folder that has gone on meanwhile.
    step = together.first(f"{folder} could not be searched", lambda: folders.last_step(Path(folder)))
    if step is None:
        return None
    whole = folders.path(Path(folder), step)
    problem = f"{whole} could not be loaded, nothing was changed"
    saved = together.first(problem, lambda: checksums.read(whole))
    together.run(problem, lambda: checksums.verify(whole, saved, together.share(sorted(saved))))
    of_losses = together.first(problem, lambda: settings.read(whole))
    target = Target(module, optimizer)
    together.run(problem, lambda: target.read(whole, process_group))
    try:
        together.run(problem, target.replace)
    except BaseException:
        target.restore()
        raise
    settings.warn_of_others(of_losses, module)
    return step
