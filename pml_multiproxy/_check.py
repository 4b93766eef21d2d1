"""Checks of arguments: each names the argument, what came and what is allowed."""

import difflib
import math
from collections.abc import Iterable
from functools import lru_cache
from numbers import Integral, Real
from typing import Annotated, NamedTuple, get_type_hints

import torch
from torch import Tensor, distributed


def positive_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int of at least 1, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    return int(value)


def positive_int_or_none(name: str, value: object) -> int | None:
    return None if value is None else positive_int(name, value)


def real(name: str, value: object, allowed: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number within ``[low, high]``; ``allowed`` says so in words."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}")
    number = float(value)
    if not (math.isfinite(number) and low <= number <= high):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return number


def positive(name: str, value: object) -> float:
    return real(name, value, "a finite number above 0", low=math.ulp(0.0))


def not_negative(name: str, value: object) -> float:
    return real(name, value, "a finite number of at least 0", low=0.0)


def not_negative_or_none(name: str, value: object) -> float | None:
    return None if value is None else not_negative(name, value)


def finite_number(name: str, value: object) -> float:
    return real(name, value, "a finite number")


def share(name: str, value: object) -> float:
    return real(name, value, "a number from 0 to 1", low=0.0, high=1.0)


def pooling(name: str, value: object) -> str:
    from ._analytic.poolings import POOLINGS  # whose package imports this file

    names = list(POOLINGS)
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, names))}, got {value!r}")
    return names[names.index(value)]  # not the value itself: it may be an Enum


class Settings(NamedTuple):
    """The settings of a loss by name, each with its check. All but the sizes may be set between calls."""

    num_classes: Annotated[int, positive_int]
    embedding_size: Annotated[int, positive_int]
    proxies_per_class: Annotated[int, positive_int]
    scale: Annotated[float, positive]
    margin: Annotated[float, finite_number]
    pooling: Annotated[str, pooling]
    temperature: Annotated[float, positive]
    intra_weight: Annotated[float, not_negative]
    inter_weight: Annotated[float, not_negative]
    balance_weight: Annotated[float, not_negative]
    neighbor_weight: Annotated[float | None, not_negative_or_none]
    neighbor_temperature: Annotated[float, positive]
    usage_momentum: Annotated[float, share]
    views: Annotated[int, positive_int]
    classes_per_chunk: Annotated[int | None, positive_int_or_none]


CHECKS = {name: hint.__metadata__[0] for name, hint in get_type_hints(Settings, include_extras=True).items()}


def settings(owner: object) -> Settings:
    """The attributes of ``owner``, checked."""
    values = [getattr(owner, name) for name in Settings._fields]
    if torch.compiler.is_compiling():  # which takes them for constants
        return Settings(*values)
    try:
        return _checked(*values)
    except TypeError:  # also of a value that cannot be hashed
        return _checked.__wrapped__(*values)


@lru_cache(typed=True)
def _checked(*values: object) -> Settings:
    return Settings(*(CHECKS[name](name, value) for name, value in zip(Settings._fields, values, strict=True)))


def keywords(given: Iterable[str], allowed: Iterable[str], owner: str) -> None:
    """Names the nearest argument to a mistyped one."""
    names = list(allowed)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{owner} got an unexpected argument {name!r}{hint}")


def process_group(name: str, value: object, also: str | None = None) -> None:
    """``also``: a word that is allowed, too."""
    if value is None or (also is not None and value == also):
        return
    # To processes outside of the group, new_group returns a number.
    if not distributed.is_available() or not isinstance(value, distributed.ProcessGroup):
        words = "None" if also is None else f"None, {also!r}"
        raise TypeError(f"{name} must be {words} or a ProcessGroup that this process is in, got {value!r}")


def embeddings(value: object, proxies: Tensor, name: str = "embeddings") -> None:
    size = proxies.shape[-1]
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape (batch_size, {size}), got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be of a floating-point dtype, got {value.dtype}")
    if value.ndim != 2 or value.shape[1] != size:
        raise ValueError(f"{name} must be of shape (batch_size, {size}), got {tuple(value.shape)}")
    if value.device != proxies.device:
        raise ValueError(f"{name} must be on the device of the proxies, {proxies.device}, got {value.device}")


def finite(name: str, value: Tensor) -> None:
    """A device synchronisation: not for training."""
    if not value.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinite values")


def integers(name: str, value: object, count: int) -> Tensor:
    """The integers, one for each embedding, as ``torch.long``: an index of ``uint8`` would be taken for a mask."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape ({count},), got {type(value).__name__}")
    if not _is_integer(value):
        raise TypeError(f"{name} must be of an integer dtype, got {value.dtype}")
    if tuple(value.shape) != (count,):
        raise ValueError(f"{name} must be of shape ({count},), one for each embedding, got {tuple(value.shape)}")
    return value.long()


def _is_integer(value: Tensor) -> bool:
    return not (value.dtype == torch.bool or value.is_floating_point() or value.is_complex())


def in_range(name: str, indices: Tensor, size: int, size_name: str) -> None:
    """Only on the CPU: looking at values on a GPU is a device synchronisation, and would break a compiled graph."""
    if torch.compiler.is_compiling() or indices.device.type != "cpu" or indices.numel() == 0:
        return
    low, high = (int(extreme) for extreme in indices.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"{name} must lie in [0, {size - 1}] ({size_name} is {size}), got values from {low} to {high}")


def labels(value: object, batch_size: int, num_classes: int, name: str = "labels") -> Tensor:
    if value is None:
        raise ValueError(f"{name} must be given, a tensor of shape ({batch_size},), got None")
    checked = integers(name, value, batch_size)
    in_range(name, checked, num_classes, "num_classes")
    return checked


def indices_tuple(value: object, batch_size: int) -> tuple[Tensor, ...] | None:
    """The indices, as ``torch.long``."""
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or not all(isinstance(indices, Tensor) for indices in value):
        kinds = [type(item).__name__ for item in value] if isinstance(value, (tuple, list)) else type(value).__name__
        raise TypeError(f"indices_tuple must be None or a tuple of 2 to 4 tensors, as PML's miners return, got {kinds}")
    if len(value) not in (2, 3, 4):
        raise ValueError(f"indices_tuple must hold 2 tensors, 3 (triplets) or 4 (pairs), got {len(value)}")
    for position, indices in enumerate(value):
        name = f"indices_tuple[{position}]"
        if indices.ndim != 1:
            raise ValueError(f"{name} must be in one dimension, got shape {tuple(indices.shape)}")
        # torch.tensor([]) is of floats.
        if len(indices) and not _is_integer(indices):
            raise TypeError(f"{name} must be of an integer dtype, got {indices.dtype}")
        in_range(name, indices, batch_size, "the batch size")
    return tuple(indices.long() for indices in value)


def views(labels: Tensor, count: int, look: bool) -> None:
    """Whether a batch consists of so many blocks; ``look``: and whether these have equal labels."""
    if len(labels) % positive_int("views", count):
        raise ValueError(f"the batch must be views = {count} blocks of equal length, got {len(labels)} embeddings")
    blocks = labels.view(count, len(labels) // count)
    if look and not blocks.equal(blocks[:1].expand_as(blocks)):
        raise ValueError(f"labels must be the same in each of the views = {count} blocks of the batch, got others")


def references(embeddings: object, labels: object, ref_emb: object, ref_labels: object, views: int) -> None:
    """PML's wrappers give the embeddings as their own references; other references have no meaning for proxies."""
    for name, reference, itself in (("ref_emb", ref_emb, embeddings), ("ref_labels", ref_labels, labels)):
        if reference is not None and reference is not itself:
            stacked = "; views of the same samples go into one batch: torch.cat([first, second])" if views > 1 else ""
            raise ValueError(f"{name} must be None, got {type(reference).__name__}: proxies take its place{stacked}")


def training_call() -> None:
    """Whether this call may update the usage."""
    if torch.compiler.is_compiling():
        return
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError("the loss must not be called within a backward pass while training: it updates the usage")
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("a transform of torch.func must not call the loss while training: call loss_func.eval()")
