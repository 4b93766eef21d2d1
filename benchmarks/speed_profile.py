"""What a step at the shape "small" of speed.py spends its time on: by the profiler of PyTorch, mean over many steps.

The profiler itself takes time, with every operation; so its shares say more than its milliseconds. Operations are large
if they read as many numbers as there are similarities. Writes results/speed_profile.md.
"""

from collections import defaultdict
from math import prod
from time import perf_counter

import torch
from speed import MACHINE, RESULTS, SHAPES, Run

STEPS = 300
PRODUCTS = ("aten::mm", "aten::addmm_")
GROUPS = "the three matrix products", "other large operations", "small operations", "Python, autograd, PML"


def group(event, shape):
    if event.key in PRODUCTS:
        return GROUPS[0]
    largest = max((prod(size) for size in event.input_shapes if all(isinstance(n, int) for n in size)), default=0)
    return GROUPS[1] if largest >= shape.B * shape.C * shape.K else GROUPS[2]


def main():
    torch.set_num_threads(2)
    shape = SHAPES["small"]
    run = Run("ours, dense", shape, ("cpu", "float32"))
    for _ in range(STEPS):
        run.step()
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
    lines = [f"**small**, under the profiler, {MACHINE}, torch {torch.__version__}:", ""]
    lines += ["| | calls per step | ms per step | share |", "|---|---:|---:|---:|"]
    for name in GROUPS:
        count = f"{calls[name] / STEPS:.0f}" if name in calls else ""
        share = f"{100 * microseconds[name] / wall:.0f} %"
        lines.append(f"| {name} | {count} | {1e-3 * microseconds[name] / STEPS:.2f} | {share} |")
    (RESULTS / "speed_profile.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
