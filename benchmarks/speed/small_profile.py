"""What a step at the shape "small" of steps.py spends its time on.

First, beside the floor and our loss, a loss that computes nothing: what PML and autograd take around any; and our step
without PML and checks. Medians of steps that take turns. Then by the profiler of PyTorch, mean over many steps. The
profiler itself takes time, with every operation; so its shares say more than its milliseconds. Operations are large if
they read as many numbers as there are similarities. Writes results/speed_profile.md.
"""

from collections import defaultdict
from math import prod
from time import perf_counter

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.utils import common_functions as c_f

from pml_multiproxy import _step as step

from . import steps
from .steps import MACHINE, RESULTS, SHAPES, Run, ours, summary, taking_turns

STEPS = 300
NOTHING = "a loss of PML that computes nothing"
ALONE = "ours, dense, without PML and checks"
PRODUCTS = ("aten::mm", "aten::addmm_")
GROUPS = "the three matrix products", "other large operations", "small operations", "Python, autograd, PML"


class Unset(torch.autograd.Function):
    """Whatever the memory holds, and as its gradient, too."""

    @staticmethod
    def forward(ctx, embeddings, proxies):
        ctx.save_for_backward(embeddings, proxies)
        return embeddings.new_empty(len(embeddings))

    @staticmethod
    def backward(ctx, _):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)


class Nothing(BaseMetricLossFunction):
    def __init__(self, shape):
        super().__init__()
        self.proxies = torch.nn.Parameter(torch.randn(shape.C, shape.K, shape.D))

    def compute_loss(self, embeddings, labels, *_):
        losses, indices = Unset.apply(embeddings, self.proxies), c_f.torch_arange_from_size(embeddings)
        return {"loss": {"losses": losses, "indices": indices, "reduction_type": "element"}}


class Alone(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.loss_func = ours(shape, shape.C)

    def forward(self, embeddings, labels):
        of = self.loss_func
        result = step.losses_and_terms(
            embeddings, of.proxies, of.proxy_usage, labels, of.distance, of.classes_per_chunk, of._hyperparameters(),
            of._layout, training=True,
        )  # fmt: skip
        return result.losses.mean()


def group(event, shape):
    if event.key in PRODUCTS:
        return GROUPS[0]
    largest = max((prod(size) for size in event.input_shapes if all(isinstance(n, int) for n in size)), default=0)
    return GROUPS[1] if largest >= shape.B * shape.C * shape.K else GROUPS[2]


def around(shape):
    """The table of what a step takes, and our part of it, ready to take more."""
    steps.ROWS |= {NOTHING: Nothing, ALONE: Alone}
    names = "floor", NOTHING, ALONE, "ours, dense"
    runs = [Run(name, shape, ("cpu", "float32")) for name in names]
    medians, ratios = summary(list(taking_turns(runs, 2 * STEPS))[STEPS:])
    lines = ["| | forward ms | backward ms | both ms | ratio to floor |", "|---|---:|---:|---:|---:|"]
    for name, values, ratio in zip(names, medians, ratios, strict=True):
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} | {ratio:.2f} |")
    return lines, runs[-1]


def main():
    torch.set_num_threads(2)
    shape = SHAPES["small"]
    table, run = around(shape)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        start = perf_counter()
        for _ in range(STEPS):
            run.step()
        wall = 1e6 * (perf_counter() - start)
    calls, microseconds = defaultdict(int), defaultdict(float)
    for event in profile.key_averages(group_by_input_shape=True):
        if event.key.startswith("aten::"):
            calls[group(event, shape)] += event.count
            microseconds[group(event, shape)] += event.self_cpu_time_total
    microseconds[GROUPS[3]] = wall - sum(microseconds.values())
    lines = [f"**small**, {MACHINE}, torch {torch.__version__}:", "", *table, "", "Under the profiler:", ""]
    lines += ["| | calls per step | ms per step | share |", "|---|---:|---:|---:|"]
    for name in GROUPS:
        count = f"{calls[name] / STEPS:.0f}" if name in calls else ""
        share = f"{100 * microseconds[name] / wall:.0f} %"
        lines.append(f"| {name} | {count} | {1e-3 * microseconds[name] / STEPS:.2f} | {share} |")
    (RESULTS / "speed_profile.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
