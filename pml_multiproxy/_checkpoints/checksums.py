"""Checksums of a checkpoint's files, by which a change since they were saved is noticed."""

import json
import os
import zlib
from pathlib import Path

NAME = "checksums.json"


def compute(folder: Path, names: list[str]) -> dict[str, int]:
    return {name: _crc32(folder / name) for name in names}


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum


def write(folder: Path, checksums: dict[str, int]) -> None:
    with (folder / NAME).open("w") as file:
        json.dump({"crc32": checksums}, file, indent=0)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[str, int]:
    if not (folder / NAME).exists():  # as in the first checkpoints of this package
        return {}
    return dict(json.loads((folder / NAME).read_text())["crc32"])


def verify(folder: Path, saved: dict[str, int], names: list[str]) -> None:
    for name, checksum in compute(folder, names).items():
        if checksum != saved[name]:
            raise ValueError(f"{name} has changed since it was saved: its checksum is {checksum}, not {saved[name]}")
