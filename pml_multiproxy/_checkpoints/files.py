"""The files of PyTorch's distributed checkpoints, written as PyTorch does, and read without executing anything."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save


def write(folder: Path, state: dict[str, Any], process_group: distributed.ProcessGroup | None) -> None:
    with _no_warning_about_one_process():
        save(state, checkpoint_id=folder, process_group=process_group)


def read(
    folder: Path, metadata: Metadata, room: dict[str, Tensor | None], process_group: distributed.ProcessGroup | None
) -> dict[str, Any]:
    """What was written, in the room for each tensor by its key in the metadata."""
    values: dict[str, Any] = dict(room)
    with _no_warning_about_one_process():
        load(
            values,
            storage_reader=_Reader(folder, metadata),
            planner=_Planner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=process_group,
        )
    return _nested({metadata.planner_data[key]: value for key, value in values.items()})


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
    """With metadata that have been read already, since PyTorch would unpickle them."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self) -> Metadata:
        return self._metadata


def _nested(values: dict[tuple[str | int, ...], Any]) -> dict[str, Any]:
    """A tree of dictionaries and lists, from its leaves by their paths; in a list, these have integers."""
    root: dict[Any, Any] = {}
    for path, value in values.items():
        node = root
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return dict(_with_lists(root))


def _with_lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    children = {key: _with_lists(child) for key, child in node.items()}
    return [children[key] for key in sorted(children)] if all(isinstance(key, int) for key in node) else children


@contextmanager
def _no_warning_about_one_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is ")
        yield
