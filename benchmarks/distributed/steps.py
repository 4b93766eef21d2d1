"""The traffic, time and memory of a step of the sharded loss, on processes of one machine.

For 1, 2 and 4 processes (gloo), each with one thread: the bytes that a rank hands to each kind of collective in a step,
which must be those of :func:`formula`; the median time of a step, forward and backward; and the peak memory of a rank
beyond its proxies, their gradient and its samples. The batch of all ranks together and the proxies are the same for any
number of processes. Processes of one machine share its cores and its memory: the times show the cost of the exchange,
not how it scales over machines.

Writes results/distributed.csv and makes results/distributed.md of it. Needs Linux.
"""

import argparse
import csv
import json
import os
import statistics
import tempfile
import time
from collections import Counter, namedtuple
from itertools import groupby, product
from multiprocessing import get_context
from pathlib import Path

import pytorch_metric_learning as pml
import torch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

from pml_multiproxy.distributed import ShardedMultiProxyEntropyLoss

from ..speed.steps import CPU, resident

RESULTS = Path(__file__).parent / "results"
Shape = namedtuple("Shape", "B C K D")
SHAPES = {"sop5": Shape(256, 11318, 5, 512), "many proxies": Shape(256, 100_000, 10, 128)}
PROCESSES = (1, 2, 4)
KINDS = {
    "_allgather_base_": "bytes gathered",
    "allreduce_": "bytes reduced",
    "_reduce_scatter_base_": "bytes scattered",
}
COLUMNS = (*KINDS.values(), "bytes by formula", "step ms", "MB proxies", "MB extra")


def formula(shape, processes):
    """The bytes that a rank hands to collectives in a step, in float32, with b = B / R samples on each rank.

    To gather: four numbers about the call, label and count of each of its samples, and their embeddings. To reduce: six
    numbers for each of all samples. To scatter: a part of the gradient of each of all embeddings.
    """
    local = shape.B // processes
    gathered = 8 * 4 + local * (8 * 2 + 4 * shape.D)
    return gathered + 4 * 6 * shape.B + 4 * shape.B * shape.D


class Counted(TorchDispatchMode):
    """Counts the bytes that are handed to collectives, by kind."""

    def __init__(self):
        super().__init__()
        self.sent = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            given = args[0] if name == "allreduce_" else [args[1]]  # the others take the output first
            self.sent[KINDS[name]] += sum(tensor.nbytes for tensor in given)
        return func(*args, **(kwargs or {}))


def measure_on_rank(rank, processes, shape, repeats, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(os.path.join(folder, "store"), processes)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    make_step(Shape(8 * processes, 4 * processes, 2, 8), processes)()  # libraries allocate some memory once
    step = make_step(shape, processes)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    before = resident("VmRSS")
    step()
    proxies = step.loss_func.proxies.to_local().nbytes
    extra = resident("VmHWM") - before - proxies  # a gradient of each
    with Counted() as counted:
        step()
    seconds = []
    for _ in range(repeats):
        distributed.barrier()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    row = {"step ms": 1e3 * statistics.median(seconds), "MB proxies": proxies / 1e6, "MB extra": extra / 1e6}
    Path(folder, f"{rank}.json").write_text(json.dumps(counted.sent | row))
    distributed.barrier()
    os._exit(0)  # gloo's threads may abort a process in which Python ends: pytorch/pytorch#190489


def make_step(shape, processes):
    torch.manual_seed(0)
    loss_func = ShardedMultiProxyEntropyLoss(shape.C, shape.D, shape.K)
    embeddings = torch.randn(shape.B // processes, shape.D, requires_grad=True)
    labels = torch.randint(shape.C, (len(embeddings),))

    def step():
        embeddings.grad = loss_func.proxies.grad = None
        loss_func(embeddings, labels).backward()

    step.loss_func = loss_func
    return step


def measure(name, shape, processes, repeats):
    """Each column for the rank that has the highest value."""
    with tempfile.TemporaryDirectory() as folder:
        context = get_context("spawn")
        arguments = processes, shape, repeats, folder
        ranks = [context.Process(target=measure_on_rank, args=(rank, *arguments)) for rank in range(processes)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
            if rank.exitcode != 0:
                raise SystemExit(f"a rank of {processes} ended with {rank.exitcode}")
        rows = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    worst = {column: max(row[column] for row in rows) for column in rows[0]}
    worst["bytes by formula"] = formula(shape, processes)
    return (
        {"shape": name, **shape._asdict(), "processes": processes}
        | {column: float(f"{worst[column]:.4g}") if "bytes" not in column else worst[column] for column in COLUMNS}
        | {"repeats": repeats, "machine": f"{CPU}, {os.cpu_count()} cores", "date": time.strftime("%Y-%m-%d")}
        | {"torch": torch.__version__, "PML": pml.__version__}
    )


def make_table(rows):
    title = (
        "**{shape}**: B={B} on all ranks together, C={C}, K={K}, D={D}, float32. {machine}, 1 thread per process, "
        "gloo; torch {torch}, PML {PML}; medians of {repeats}; {date}."
    )
    lines = [title.format(**rows[0]), "", f"| processes | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    for row in rows:
        cells = [f"{float(row[c]):,.{0 if 'bytes' in c else 1}f}" for c in COLUMNS]
        lines.append(f"| {row['processes']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="default: %(default)s")
    repeats = parser.parse_args(argv).repeats
    rows = [measure(*shape, processes, repeats) for shape, processes in product(SHAPES.items(), PROCESSES)]
    with (RESULTS / "distributed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text = "\n".join(make_table(list(of_shape)) for _, of_shape in groupby(rows, lambda row: row["shape"]))
    (RESULTS / "distributed.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
