"""Ranks that stay: the processes of one group, to which tests send functions, and which answer how they went."""

import functools
import importlib
import inspect
import tempfile
import traceback
import warnings
from concurrent import futures
from datetime import timedelta
from multiprocessing import get_context

import pytest
import torch
from torch import distributed

TIMEOUT = timedelta(seconds=20)
"""After which a rank gives up waiting for the others."""


def on(*sizes):
    """Makes a test of a function of a process group, which every rank of the group calls, for each size of the group.

    Its other arguments are parameters or fixtures, as for any test; they are sent to the ranks.
    """

    def make_test(function):
        @functools.wraps(function)
        def test(pool, size, **arguments):
            pool.run(function, size, **arguments)

        group, *others = inspect.signature(function).parameters.values()
        test.__signature__ = inspect.Signature([group.replace(name="pool"), group.replace(name="size"), *others])
        test = pytest.mark.xdist_group("ranks")(test)  # one pool
        return pytest.mark.parametrize("size", sizes, ids=[f"{size} ranks" for size in sizes])(test)

    return make_test


class Pool:
    """Ranks that start with the first call, and anew with the next call after one that failed."""

    def __init__(self, size=4):
        self.size, self._executors = size, []

    def run(self, function, size=4, **arguments):
        """``function(group, **arguments)`` on the first ``size`` ranks; fails with the traceback of each that fails."""
        outcomes = enumerate(self.outcomes(function, size, **arguments))
        if texts := [f"rank {rank}: {outcome}" for rank, outcome in outcomes if outcome]:
            pytest.fail("\n".join(texts), pytrace=False)

    def outcomes(self, function, size, grace=3.0, wait_for=None, **arguments):
        """What went wrong, by rank, in words.

        Waits for all ranks, or those of ``wait_for``, at most two minutes, or ``grace`` after one has failed.
        """
        if not self._executors:
            self._start()
        call = function.__module__, function.__qualname__, size, arguments
        calls = [executor.submit(_call, *call) for executor in self._executors]
        awaited = calls if wait_for is None else [calls[rank] for rank in wait_for]
        futures.wait(awaited, 120, futures.FIRST_EXCEPTION)
        futures.wait(awaited, grace)
        outcomes = [_outcome(call) for call in calls]
        if any(outcomes):
            self.close()
        return outcomes

    def _start(self):
        context = get_context("forkserver")
        # Once, instead of in every process; the first step of an optimizer imports torch._dynamo.
        context.set_forkserver_preload(["distributed_helpers", "pytest", "torch._dynamo"])
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(self.size):
            arguments = rank, self.size, f"{self._folder.name}/store"
            self._executors.append(futures.ProcessPoolExecutor(1, context, _join, arguments))

    def close(self):
        for executor in self._executors:
            for process in list(executor._processes.values()):
                process.kill()
            executor.shutdown()
        if self._executors:
            self._folder.cleanup()
        self._executors = []


def _join(rank, of, path):
    warnings.simplefilter("error")
    warnings.filterwarnings(
        "ignore", "TypedStorage is deprecated|You are using `torch.load`"
    )  # torch 2.5's checkpoints
    torch.set_num_threads(1)
    store = distributed.FileStore(path, of)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=of, timeout=TIMEOUT)


def _call(module, name, size, arguments):
    group = distributed.new_group(list(range(size)), timeout=TIMEOUT)
    if distributed.get_rank() >= size:
        return
    torch.manual_seed(0)
    try:
        inspect.unwrap(getattr(importlib.import_module(module), name))(group, **arguments)
    except BaseException:  # also an exit of the process, and errors that cannot be pickled
        raise RuntimeError(traceback.format_exc()) from None


def _outcome(call):
    if not call.done():
        return "did not end"
    error = call.exception()
    return "died" if isinstance(error, futures.BrokenExecutor) else str(error or "")
