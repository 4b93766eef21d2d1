"""MAP@R of our loss beside PML's, under one protocol for all, as Musgrave et al. ask for.

(*A Metric Learning Reality Check*, ECCV 2020.) Within a task, every loss trains the same network with the same
optimizer, batches and epochs, and where a task has views, on the same views. Each has twelve configurations, the same
on every task (losses.py). Each of them is run once, on the small digits three times, and evaluated on a validation
part; then, with fresh seeds, on the test part: the configuration that was best on validation, the documented defaults,
and the one that was best on the other tasks. For the test, validation data are trained on, too. Where training labels
are coarse, validation uses the fine labels of held-out samples; where the test classes are new, held-out classes.
--sweep evaluates changes of our defaults on validation. --agreement trains what can be chosen without fine labels.

Writes one row per run to results/TASK.csv, and goes on from what these hold. --report makes the tables and pictures of
them alone.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from .losses import COARSE_SWEEPS, FAMILIES, OURS, UNTRAINED, changes, load
from .musts import COUNTS_OF_MUST
from .report import report
from .runs import SWEEP_SEEDS, Runs, validation_seeds
from .selection import applies, candidates, chosen
from .tasks import IMAGE_TASKS, TASKS

TESTED = ["defaults", "best here", "best elsewhere", "defaults before", "by agreement", "by fine labels"]
RESULTS = Path(__file__).parent / "results"


def plan(runs, name, args):
    """The arguments of the runs that there should be, in the order to do them in."""
    losses = [loss for loss in args.losses if applies(loss, name)]
    for seed in validation_seeds(name):
        for index in range(args.configs):
            for loss in losses:
                yield "validation", loss, load()[loss][index], seed
    for seed in SWEEP_SEEDS[: args.sweep]:
        for settings in changes().values() if OURS in losses else ():
            yield "validation", OURS, settings, seed
    if args.agreement and "coarse" in name:
        for loss in (loss for loss in losses if loss in COARSE_SWEEPS):
            for settings in candidates(loss).values():
                for seed in SWEEP_SEEDS:
                    yield "agreement", loss, settings, seed
                for seed in validation_seeds(name):
                    yield "validation", loss, settings, seed
    for seed in range(args.seeds):
        yield "test", UNTRAINED, None, seed
        for table in args.tables:
            for loss in losses:
                settings = chosen(runs, name, loss).get(table)
                if settings:
                    yield "test", loss, settings, seed
        if args.sweep and OURS in losses and name == "digits-coarse-views":
            for count in COUNTS_OF_MUST:
                yield "test", OURS, load()[OURS][0] | {"proxies_per_class": count}, seed


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
    parser.add_argument("--configs", type=int, default=12, metavar="N", help="how many of each loss; default: all 12")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="of the test; default: %(default)s")
    parser.add_argument(
        "--tables", nargs="*", choices=TESTED, default=TESTED[:3], metavar="TABLE", help=f"what to test: {TESTED}"
    )
    parser.add_argument(
        "--agreement", action="store_true", help="on coarse labels, also what the agreement of two seeds chooses from"
    )
    parser.add_argument(
        "--sweep", type=int, choices=[0, 1, 2], default=0, help="changes of our defaults, too, on one or two seeds"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--report", action="store_true", help="tables and pictures of what the CSV files hold")
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
