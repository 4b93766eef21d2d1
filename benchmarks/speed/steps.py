"""How long a step of the loss takes and what memory it needs, next to PML's proxy losses with as many proxies.

The floor is three bare matrix products of the same sizes and dtype, into memory that is there already: similarities,
gradient of the embeddings, gradient of the proxies; "floor, batch last" has the similarities transposed, as our loss
does. All terms of our loss are on, but for the neighbour term, which has a row of its own; the distance is the cosine,
and the pooling is "max" unless the row names another. Times are medians over repeats. In each repeat, the floor and all
rows take turns in a random order, since the first steps after another row are slower; the ratio to the floor is the
median of the ratios within a repeat. Extra memory is the peak of one step beyond the parameters, one gradient of each,
and the inputs, in MB of 10^6 bytes; on the CPU, each in a fresh process. If PyTorch sees a GPU, all is measured on it,
in float32 and under bfloat16 autocast.

Writes results/speed.csv, replacing the rows of the shapes that it measures, and makes results/speed.md of it; --growth
writes results/speed_growth.csv, of which results/speed_growth.png is made. Needs Linux.
"""

import argparse
import contextlib
import csv
import math
import os
import re
import subprocess
import sys
import time
from collections import namedtuple
from itertools import groupby, product
from pathlib import Path

import numpy as np
import pytorch_metric_learning as pml
import torch
from matplotlib.figure import Figure
from pytorch_metric_learning import losses
from tqdm import tqdm

from pml_multiproxy import MultiProxyEntropyLoss

from .. import csv_rows

RESULTS = Path(__file__).parent / "results"
MEMORY_LIMIT_MB = 20_000
CHUNK_BYTES = 2**21  # of the similarities that the loss streams at a time on a CPU
Shape = namedtuple("Shape", "B C K D repeats warm_up", defaults=(15, 3))
SHAPES = {
    "small": Shape(128, 100, 10, 128, repeats=200),
    "medium": Shape(128, 2829, 5, 128, repeats=50),
    "sop": Shape(256, 11318, 2, 512, repeats=21),
    "sop5": Shape(256, 11318, 5, 512),
    "million": Shape(256, 100_000, 10, 128, repeats=7, warm_up=1),
}
SERIES = {"C": [(250 * 2**i, 5) for i in range(7)], "K": [(1000, k) for k in (1, 2, 5, 10, 20, 50)]}
GROWTH = {f"C={c}, K={k}": Shape(128, c, k, 128) for series in SERIES.values() for c, k in series}
NUMBERS = ("forward ms", "backward ms", "both ms", "ratio to floor", "extra MB", "GFLOP/s")


class Floor(torch.nn.Module):
    def __init__(self, shape, batch_last):
        super().__init__()
        self.proxies = torch.nn.Parameter(torch.randn(shape.C * shape.K, shape.D), requires_grad=False)
        self.batch_last, self.outputs = batch_last, None

    def forward(self, embeddings, labels):
        self.embeddings = embeddings.detach().to(self.proxies.dtype)
        left, right = (self.proxies, self.embeddings) if self.batch_last else (self.embeddings, self.proxies)
        if self.outputs is None:
            similarities = self.proxies.new_empty(len(left), len(right))
            self.outputs = similarities, torch.empty_like(self.embeddings), torch.empty_like(self.proxies)
        torch.mm(left, right.T, out=self.outputs[0])
        return self

    def backward(self):
        similarities, of_embeddings, of_proxies = self.outputs
        by_proxy = similarities if self.batch_last else similarities.T
        torch.mm(by_proxy.T, self.proxies, out=of_embeddings)
        torch.mm(by_proxy, self.embeddings, out=of_proxies)


def ours(shape, classes_per_chunk, pooling="max", views=1, neighbor_weight=0):
    weights = {"intra_weight": 0.5, "inter_weight": 0.1, "balance_weight": 0.5, "neighbor_weight": neighbor_weight}
    settings = {"pooling": pooling, "classes_per_chunk": classes_per_chunk, "views": views}
    return MultiProxyEntropyLoss(shape.C, shape.D, shape.K, **settings, **weights)


ROWS = {
    "floor": lambda s: Floor(s, batch_last=False),
    "floor, batch last": lambda s: Floor(s, batch_last=True),
    # Left to itself, the loss would stream where there are many proxies.
    "ours, dense": lambda s: ours(s, s.C),
    "ours, streamed": lambda s: ours(s, min(CHUNK_BYTES // (4 * s.B * s.K), math.ceil(s.C / 4)) or 1),
    "ours, softmax": lambda s: ours(s, s.C, "softmax"),
    "ours, logsumexp": lambda s: ours(s, s.C, "logsumexp"),
    "ours, two views": lambda s: ours(s, s.C, views=2),
    "ours, two views, neighbours": lambda s: ours(s, s.C, views=2, neighbor_weight=1),
    "SoftTripleLoss": lambda s: losses.SoftTripleLoss(s.C, s.D, centers_per_class=s.K),
    "SubCenterArcFaceLoss": lambda s: losses.SubCenterArcFaceLoss(num_classes=s.C, embedding_size=s.D, sub_centers=s.K),
    "NormalizedSoftmaxLoss": lambda s: losses.NormalizedSoftmaxLoss(s.C * s.K, s.D),
    "ProxyAnchorLoss": lambda s: losses.ProxyAnchorLoss(s.C * s.K, s.D),
}
GROWTH_ROWS = {
    "floor": "black",
    "ours, dense": "tab:blue",
    "ours, streamed": "tab:cyan",
    "SoftTripleLoss": "tab:red",
    "SubCenterArcFaceLoss": "tab:orange",
}
"""With their colours."""
CPU = re.search(r"model name\s*:\s*(.+)|$", Path("/proc/cpuinfo").read_text())[1] or "CPU"
MACHINE = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{CPU}, {os.cpu_count()} cores"
MODES = [("cuda", "float32"), ("cuda", "bfloat16")] if torch.cuda.is_available() else [("cpu", "float32")]


class Run:
    """A row of the table, ready to take steps. ``mode``: device and dtype."""

    def __init__(self, row, shape, mode):
        torch.manual_seed(0)
        device, dtype = mode[0], getattr(torch, mode[1])
        self.loss_func = ROWS[row](shape).to(device, dtype if row.startswith("floor") else torch.float32)
        self.embeddings = torch.randn(shape.B, shape.D, device=device, requires_grad=True)
        self.labels = torch.randint(shape.C, (shape.B,), device=device)
        if row.startswith("ours, two views"):
            self.labels = self.labels[: shape.B // 2].repeat(2)
        if row in ("NormalizedSoftmaxLoss", "ProxyAnchorLoss"):  # here, each proxy is a class
            self.labels *= shape.K
        self.context = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype)
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def step(self):
        """Seconds of forward, of backward, and of both, with no gradient there before."""
        self.forget()
        self.wait()
        start = time.perf_counter()
        with self.context:
            loss = self.loss_func(self.embeddings, self.labels)
        self.wait()
        middle = time.perf_counter()
        loss.backward()
        self.wait()
        end = time.perf_counter()
        return middle - start, end - middle, end - start

    def forget(self):
        for tensor in (self.embeddings, *self.loss_func.parameters()):
            tensor.grad = None


def extra_mb(row, shape, mode):
    Run(row, Shape(8, 4, 2, 8), mode).step()  # libraries allocate some memory once
    run = Run(row, shape, mode)
    if mode[0] == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
        before, peak = resident("VmRSS"), lambda: resident("VmHWM")
    run.step()
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in run.loss_func.parameters())
    return (peak() - before - gradients) / 1e6


def resident(field):
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def extra_mb_alone(row, shape, mode):
    """On the CPU in a fresh process, since its memory is that of the process."""
    if mode[0] == "cuda":
        return extra_mb(row, shape, mode)
    command = [sys.executable, "-m", "benchmarks.speed.steps", "--threads", torch.get_num_threads()]
    # With this threshold, each buffer is a mapping of its own, and memory that set-up frees does not stay resident.
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_MMAP_THRESHOLD_": "4096"}
    command = map(str, [*command, "--memory-of", row, *shape[:4]])
    result = subprocess.run([*command], env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return float(result.stdout)


def why_not(row, shape, mode):
    if shape.B * shape.C * shape.K < 1e8 or mode[0] == "cuda":
        return ""
    step = 100 * extra_mb_alone(row, shape._replace(C=shape.C // 100), mode)
    # While times are measured, the parameters of all rows are in memory at once, and the outputs of the floor.
    needed = step + 4e-6 * shape.C * shape.K * (shape.D * (len(ROWS) + 2) + shape.B)
    return f"skipped: needs about {needed / 1000:.0f} GB" if needed > MEMORY_LIMIT_MB else ""


def taking_turns(runs, steps):
    """The seconds of one step of each, as often as there are steps."""
    order = np.random.default_rng(0)
    for _ in range(steps):
        taken = {}
        for i in order.permutation(len(runs)):
            taken[i] = runs[i].step()
            runs[i].forget()  # the gradients of all at once may not fit
        yield [taken[i] for i in range(len(runs))]


def summary(seconds):
    """Of :func:`taking_turns`: the medians in ms, and those of the ratio to the first run within each step."""
    seconds = np.array(seconds)
    return 1e3 * np.median(seconds, axis=0), np.median(seconds[:, :, 2] / seconds[:, :1, 2], axis=0)


def measure(name, shape, mode, rows, repeats):
    notes, memory, seconds = {}, {}, []
    with tqdm(desc=f"{name} {' '.join(mode)}", total=len(rows) + shape.warm_up + repeats) as bar:
        for row in rows:
            notes[row] = why_not(row, shape, mode)
            if not notes[row]:
                memory[row] = extra_mb_alone(row, shape, mode)
            bar.update()
        runs = [Run(row, shape, mode) for row in memory]
        for of_runs in taking_turns(runs, shape.warm_up + repeats):
            seconds.append(of_runs)
            bar.update()
    medians, ratios = summary(seconds[shape.warm_up :])
    gflops = 6e-6 * math.prod(shape[:4]) / medians[:, 2]
    values = dict(zip(memory, np.column_stack([medians, ratios, [*memory.values()], gflops]).tolist(), strict=True))
    return [
        {"shape": name, **dict(zip("BCKD", shape, strict=False)), "device": mode[0], "dtype": mode[1], "row": row}
        | {column: float(f"{values[row][i]:.4g}") if row in values else None for i, column in enumerate(NUMBERS)}
        | {"note": notes[row], "repeats": repeats, "machine": MACHINE, "threads": torch.get_num_threads()}
        | {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "PML": pml.__version__}
        for row in rows
    ]


def table_of(row):
    return row["shape"], row["device"], row["dtype"]


def read(name):
    return csv_rows.read(RESULTS / f"{name}.csv")


def store(name, new, shapes):
    """Puts rows into the CSV, in place of those of the same tables."""
    replaced, order = {table_of(row) for row in new}, list(shapes)
    rows = [row for row in read(name) if table_of(row) not in replaced] + new
    rows.sort(key=lambda row: (row["device"], row["dtype"] != "float32", order.index(row["shape"])))
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, new[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(rows):
    title = (
        "**{shape}**: B={B}, C={C}, K={K}, D={D}, {dtype}. {machine}, {threads} threads; torch {torch}, PML {PML}; "
        "medians of {repeats}; {date}."
    )
    lines = [title.format(**rows[0]), "", f"| | {' | '.join(NUMBERS)} |", "|---|" + "---:|" * len(NUMBERS)]
    for row in rows:
        cells = [row["note"], *" " * 5] if row["note"] else [rounded(row[column]) for column in NUMBERS]
        lines.append(f"| {row['row']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rounded(number):
    return f"{float(number):,.{2 if float(number) < 100 else 0}f}"


def draw_growth(rows):
    numbers = {(row["shape"], row["row"]): row for row in rows if table_of(row)[1:] == table_of(rows[0])[1:]}
    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    for (i, letter), (j, column) in product(enumerate(SERIES), enumerate(("both ms", "extra MB"))):
        for name, color in GROWTH_ROWS.items():
            found = [numbers.get((f"C={c}, K={k}", name), {}).get(column) for c, k in SERIES[letter]]
            x, y = [pair[i] for pair in SERIES[letter]], [float(number or "nan") for number in found]
            axes[j, i].loglog(x, y, "o-", color=color, label=name)
        axes[j, i].set(xlabel=letter, ylabel=column, title=f"{column}: {'KC'[i]} = {SERIES[letter][0][1 - i]}")
        axes[j, i].set_xticks(x, labels=x)
        axes[j, i].minorticks_off()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    figure.savefig(RESULTS / "speed_growth.png", dpi=100)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, metavar="NAME", help=f"default: {' '.join(SHAPES)}")
    parser.add_argument("--growth", action="store_true", help="with C at fixed K, and with K at fixed C")
    parser.add_argument("--repeats", type=int, metavar="N", help="default: from 200 (small) to 7 (million)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing; make table and picture of the CSV files"
    )
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        row, *sizes = args.memory_of
        print(extra_mb(row, Shape(*map(int, sizes)), ("cpu", "float32")))
        return
    chosen = args.shape or ([] if args.growth or args.report else SHAPES)
    for file, shapes, names, rows in (
        ("speed", SHAPES, chosen, ROWS),
        ("speed_growth", GROWTH, GROWTH if args.growth else [], GROWTH_ROWS),
    ):
        for name, mode in product(names, MODES):
            new = measure(name, shapes[name], mode, rows, args.repeats or shapes[name].repeats)
            store(file, new, shapes)
            print(table(new))
    (RESULTS / "speed.md").write_text("\n".join(table(list(rows)) for _, rows in groupby(read("speed"), table_of)))
    if read("speed_growth"):
        draw_growth(read("speed_growth"))


if __name__ == "__main__":
    main()
