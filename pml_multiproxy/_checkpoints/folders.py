"""The folder of a checkpoint, written under another name and renamed when it is complete."""

import re
import secrets
from pathlib import Path


def path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}"


def last_step(folder: Path) -> int | None:
    """Of the complete checkpoints; ``None``: there is none."""
    found = (re.fullmatch(r"step-(\d+)", metadata.parent.name) for metadata in folder.glob("step-*/.metadata"))
    return max((int(match[1]) for match in found if match), default=None)


def new_partial(whole: Path) -> Path:
    if whole.exists():
        raise FileExistsError(f"{whole} is there already: take another folder or step, or remove it")
    partial = whole.with_name(f"{whole.name}.partial-{secrets.token_hex(8)}")
    partial.mkdir(parents=True)
    return partial


def rename(partial: Path, whole: Path) -> None:
    try:
        partial.rename(whole)  # fails where another job was faster, since its folder is not empty
    except OSError as error:
        if whole.exists():
            raise FileExistsError(f"{whole} has been written by another job meanwhile") from error
        raise
