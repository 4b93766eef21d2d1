"""Ranks that stay: the processes of one group, to which tests send functions, and which answer how they went."""

import functools
import importlib
import inspect
import os
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing import connection, get_context

import pytest
import torch
from torch import distributed

SIZE = 4
TIMEOUT = timedelta(seconds=20)
"""After which a rank gives up waiting for the others."""


def on(*sizes):
    """Makes a test of a function of a process group, which every rank of the group calls, for each size of the group.

    Its other arguments are parameters or fixtures, as for any test; they are sent to the ranks. Without sizes here,
    ``size`` is a parameter among them, which the function does not get.
    """

    def make_test(function):
        @functools.wraps(function)
        def test(pool, size, **arguments):
            pool.run(function, size, **arguments)

        _, *others = inspect.signature(function).parameters.values()
        own = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("pool", "size")]
        test.__signature__ = inspect.Signature([*own, *others])
        ids = [f"{size} ranks" for size in sizes]
        return pytest.mark.parametrize("size", sizes, ids=ids)(test) if sizes else test

    return make_test


class Pool:
    """Ranks that start with the first call, and anew with the next call after one that failed."""

    def __init__(self, size=SIZE, timeout=TIMEOUT):
        self.size, self.timeout, self._processes = size, timeout, []

    def run(self, function, size=SIZE, **arguments):
        """``function(group, **arguments)`` on the first ``size`` ranks; fails with the traceback of each that fails."""
        outcomes = self.outcomes(function, size, **arguments)
        if any(outcomes):
            texts = [f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if outcome]
            pytest.fail("\n".join(texts), pytrace=False)

    def outcomes(self, function, size, limit=120.0, grace=3.0, wait_for=None, **arguments):
        """What went wrong, by rank, in words.

        Waits for all ranks, or those of ``wait_for``, at most ``limit`` seconds, or ``grace`` after one has failed.
        """
        if not self._processes:
            self._start()
        for connected in self._connections:
            connected.send((function.__module__, function.__qualname__, size, arguments))
        outcomes = ["did not end"] * self.size
        waiting = dict(zip(self._connections, range(self.size), strict=True))
        end = time.monotonic() + limit
        wait_for = set(range(self.size) if wait_for is None else wait_for)
        while wait_for & set(waiting.values()) and (left := end - time.monotonic()) > 0:
            for connected in connection.wait(list(waiting), left):
                rank = waiting.pop(connected)
                try:
                    outcomes[rank] = connected.recv()
                except EOFError:
                    outcomes[rank] = "died"
                if outcomes[rank]:
                    end = min(end, time.monotonic() + grace)
        if any(outcomes):
            self.close()
        return outcomes

    def _start(self):
        context = get_context("forkserver")
        context.set_forkserver_preload(["pml_multiproxy.distributed"])  # once, instead of in every process
        self._folder = tempfile.TemporaryDirectory()
        self._connections = []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            settings = (rank, self.size, self.timeout, self._folder.name, theirs)
            self._processes.append(context.Process(target=_serve, args=settings, daemon=True))
            self._processes[-1].start()
            self._connections.append(ours)
            theirs.close()

    def close(self):
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        if self._processes:
            self._folder.cleanup()
        self._processes = []


def _serve(rank, of, timeout, folder, connected):
    warnings.simplefilter("error")
    for message in ("TypedStorage is deprecated", "You are using `torch.load`"):  # torch 2.5's checkpoints
        warnings.filterwarnings("ignore", message)
    torch.set_num_threads(1)
    store = distributed.FileStore(os.path.join(folder, "store"), of)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=of, timeout=timeout)
    while True:
        module, name, size, arguments = connected.recv()
        group = distributed.new_group(list(range(size)), timeout=timeout)
        outcome = ""
        if rank < size:
            try:
                torch.manual_seed(0)
                function = inspect.unwrap(getattr(importlib.import_module(module), name))
                function(group, **arguments)
            except BaseException:  # also an exit of the process
                outcome = traceback.format_exc()
        connected.send(outcome)
