"""Actions of all ranks of a group: an error on one rank becomes an error on every rank."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException

from .. import _validation as check

T = TypeVar("T")


class FailTogether:
    """The ranks that save or load together. All of its methods except ``share`` have to be called on every rank."""

    def __init__(self, group: distributed.ProcessGroup | None) -> None:
        check.process_group("process_group", group)
        self.group, self.rank, self.size = group, 0, 1
        if distributed.is_initialized():
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
        except (Exception, CheckpointException) as caught:  # PyTorch's is no Exception
            error, failure = caught, self._failure(problem, caught, raises)
        outcomes: list[Any] = self._gathered((result, failure))
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

    def _failure(
        self, problem: str, error: BaseException, raises: tuple[type[Exception], ...]
    ) -> tuple[type[Exception], str]:
        if isinstance(error, raises):
            return type(error), str(error)
        rank = self.rank
        if isinstance(error, CheckpointException):  # which PyTorch raises on every rank, for those that failed
            rank, (error, _) = next(iter(error.failures.items()))
        return RuntimeError, f"{problem}: on rank {rank}, {type(error).__name__}: {error}"

    def _gathered(self, value: T) -> list[T]:
        values = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value, group=self.group)
        return values
