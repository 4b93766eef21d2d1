"""Losses compared on pretrained networks that are fine-tuned: leaves, cars and text.

Every loss trains the same network with the same batches, two views of each sample, optimizer, schedule and number of
epochs. Of the image network, the stem and the lower blocks are frozen, and their activations of six random views of
each image are kept in the folder --cache. Batch norm stays in evaluation mode. Validation on held-out photographs,
sentences or classes chooses one schedule for all losses, and for each loss the best of three configurations.

Writes one row to results/TASK.csv when a run ends. Runs that the file holds are not made again. --report makes tables
of the files alone.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from .losses import FAMILIES, SETTLING, UNTRAINED, applies, configurations
from .report import report
from .runs import SEEDS, VALIDATION_SEED, FinetuningRuns
from .tasks import SCHEDULES, TASKS, Options

TABLES = "defaults", "best of three"
RESULTS = Path(__file__).parent / "results"
CACHE = Path.home() / ".cache" / "pml-multiproxy"


def plan(runs, args):
    """The arguments of the runs that there should be, in the order to do them in."""
    yield "test", UNTRAINED, None, 0
    for schedule in SCHEDULES[runs.name]:
        for loss in SETTLING:
            yield "validation", loss, schedule | configurations(loss, runs.name)[0], VALIDATION_SEED
    if not runs.schedule():
        return
    losses = [loss for loss in args.losses if applies(loss, runs.name)]
    for loss in losses if "best of three" in args.tables else ():
        settings = runs.settings(loss)
        yield from (("validation", loss, of, VALIDATION_SEED) for of in settings if len(settings) > 1)
    for seed in args.seeds:
        for loss in losses:
            found = [runs.chosen(loss, table) for table in args.tables]
            yield from (("test", loss, settings, seed) for settings in found if settings)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", metavar="DIR", help="holds the folders leaves, cars196, clinc150")
    add("--task", nargs="+", choices=TASKS, default=[], metavar="NAME", help=", ".join(TASKS))
    add("--losses", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME", help=", ".join(FAMILIES))
    add("--seeds", nargs="+", type=int, default=SEEDS, metavar="N", help="of the test; default: 0 1 2")
    add("--tables", nargs="+", choices=TABLES, default=TABLES, metavar="TABLE", help=f"what to test, of {TABLES}")
    add("--out", type=Path, default=RESULTS, metavar="DIR")
    add("--cache", type=Path, default=CACHE, metavar="DIR", help="of activations; default: %(default)s")
    add("--save", type=Path, metavar="DIR", help="write embeddings and loss of each new run at the defaults")
    add("--whole", type=int, metavar="SIZE", help="train all blocks, on images of this size, for a GPU")
    add("--threads", type=int, default=2, metavar="N", help="default: %(default)s")
    add("--report", action="store_true", help="make the tables of what the CSV files hold")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    out = args.out / f"whole-{args.whole}" if args.whole else args.out
    out.mkdir(parents=True, exist_ok=True)
    options = Options(args.data, args.cache, bool(args.whole), args.whole or Options._field_defaults["size"])
    runs = {name: FinetuningRuns(name, options, out, args.save) for name in TASKS}
    for name in args.task:
        while todo := [arguments for arguments in plan(runs[name], args) if not runs[name].has(*arguments)]:
            for arguments in tqdm(todo, desc=name):
                if not runs[name].has(*arguments):  # twice in the plan
                    runs[name].add(*arguments)
    if args.report:
        report(runs.values(), out)
