"""Runs functions on several processes at once, in one spawn of them, within a time limit."""

import os
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing import get_context

import torch
from torch import distributed

SIZE = 4
TIMEOUT = timedelta(seconds=20)
"""After which a rank gives up waiting for the others."""

CASES = {}
"""By name: the function, and on how many ranks it runs."""


def on(*sizes, **arguments):
    """Registers a function of a process group as a case for each size of the group; ``arguments`` are its own."""

    def register(function):
        for size in sizes:
            label = ", ".join([function.__name__, *map(str, arguments.values()), f"{size} ranks"])
            assert label not in CASES, label
            CASES[label] = (function, size, arguments)
        return function

    return register


def run(target, *arguments, size=SIZE, limit=180.0, wait_for=None):
    """Calls ``target(rank, *arguments)`` on ``size`` processes; returns their exit codes, ``None`` where it hangs.

    Waits for all, or those of ``wait_for``, at most ``limit`` seconds; then kills what is left.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["pml_multiproxy.distributed"])  # once, instead of in every process
    processes = [context.Process(target=target, args=(rank, *arguments)) for rank in range(size)]
    end = time.monotonic() + limit
    for process in processes:
        process.start()
    for rank in wait_for or range(size):
        processes[rank].join(max(end - time.monotonic(), 0))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def join(rank, folder, size=SIZE, timeout=TIMEOUT):
    warnings.simplefilter("error")
    for message in ("TypedStorage is deprecated", "You are using `torch.load`"):  # torch 2.4's own checkpoints
        warnings.filterwarnings("ignore", message)
    torch.set_num_threads(1)
    store = distributed.FileStore(os.path.join(folder, "store"), size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)


def run_all(cases):
    """Runs all cases one after the other on one spawn. By name: what went wrong, by rank, in words."""
    with tempfile.TemporaryDirectory() as folder:
        run(_run_all_on, folder, cases)
        outcomes = {}
        for name in cases:
            size = CASES[name][1]
            outcomes[name] = [_read(os.path.join(folder, f"{rank} {_file(name)}")) for rank in range(size)]
        return outcomes


def _run_all_on(rank, folder, names):
    import distributed_cases  # noqa: F401, which registers the cases where the process is a new one

    join(rank, folder)
    for name in names:
        function, size, arguments = CASES[name]
        group = distributed.new_group(list(range(size)), timeout=TIMEOUT)
        if rank >= size:
            continue
        outcome = ""
        try:
            torch.manual_seed(0)
            function(group, **arguments)
        except BaseException:  # of which PyTorch's checkpoints raise some
            outcome = traceback.format_exc()
        with open(os.path.join(folder, f"{rank} {_file(name)}"), "w") as file:
            file.write(outcome)
    os._exit(0)  # past the shut-down of gloo, which waits for its other ends


def _file(name):
    return "".join(character if character.isalnum() else "_" for character in name)


def _read(path):
    try:
        with open(path) as file:
            return file.read()
    except FileNotFoundError:
        return "did not end"
