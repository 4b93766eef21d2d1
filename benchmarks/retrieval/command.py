"""MAP@R of our loss beside PML's, under one protocol for all, as Musgrave et al. ask for.

(*A Metric Learning Reality Check*, ECCV 2020.) Within a task, every loss trains the same network with the same
optimizer, batches and epochs, and where a task has views, on the same views. Each has twelve configurations, the same
on every task (losses.py). Each configuration is trained once, on the small digits three times, and evaluated on a
validation part. Then three of them are trained with fresh seeds and evaluated on the test part: the best on
validation, the documented defaults, and the best on the other tasks. For the test, validation data are trained on, too.
If training labels are coarse, validation uses the fine labels of held-out samples; if the test classes are new,
held-out classes.

Writes one row to results/TASK.csv when a run ends. Runs that the file holds are not made again. --report makes tables
and pictures of the files alone.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from .losses import COMPARED_BY_AGREEMENT, FAMILIES, SWEPT, UNTRAINED, candidates, configurations, proxy_counts
from .report import report
from .runs import AGREEMENT_SEEDS, Runs, validation_seeds
from .selection import applies, chosen
from .tasks import IMAGE_TASKS, TASKS

COUNTED = "proxies per class"
TESTED = ["defaults", "best here", "best elsewhere", "by agreement", "by fine labels", COUNTED]
RESULTS = Path(__file__).parent / "results"


def plan(runs, name, args):
    """The arguments of the runs that there should be, in the order to do them in."""
    losses = [loss for loss in args.losses if applies(loss, name)]
    chooses = not args.tables or set(args.tables) - {"defaults", COUNTED}
    for loss in (loss for loss in losses if chooses and FAMILIES[loss].choices):
        for settings in configurations(loss, name):
            yield from (("validation", loss, settings, seed) for seed in validation_seeds(name))
        if "by agreement" in args.tables and loss in COMPARED_BY_AGREEMENT and "coarse" in name:
            for settings in candidates(loss, name):
                seeds = dict.fromkeys((*validation_seeds(name), *AGREEMENT_SEEDS))
                yield from (("validation", loss, settings, seed) for seed in seeds)
    for seed in range(args.seeds):
        yield "test", UNTRAINED, None, seed
        for loss in losses:
            found = chosen(runs, name, loss)
            yield from (("test", loss, found[table], seed) for table in args.tables if table in found)
            if COUNTED in args.tables and loss in SWEPT:
                yield from (("test", loss, settings, seed) for settings in proxy_counts(loss, name).values())


def main(argv=None):
    tasks = [*TASKS, *IMAGE_TASKS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.retrieval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", nargs="+", choices=tasks, default=[], metavar="NAME", help=", ".join(tasks))
    parser.add_argument("--losses", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--data", metavar="DIR", help="where the files lie that are not part of scikit-learn")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="of the test; default: %(default)s")
    parser.add_argument(
        "--tables",
        nargs="*",
        choices=TESTED,
        default=TESTED[:3],
        metavar="TABLE",
        help=f"what to test, of {TESTED}; nothing: only validation",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--report", action="store_true", help="make tables and pictures of what the CSV files hold")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    runs = {name: Runs(name, args.data, args.out) for name in tasks}
    for name in args.task:
        for _ in range(2):  # in the second round, validation has chosen what to test
            todo = [arguments for arguments in plan(runs, name, args) if not runs[name].has(*arguments)]
            for arguments in tqdm(todo, desc=name, disable=not todo):
                if not runs[name].has(*arguments):  # twice in the plan
                    runs[name].add(*arguments)
    if args.report:
        report(runs, args.out, args.seeds)
