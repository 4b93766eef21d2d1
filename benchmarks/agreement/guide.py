"""The agreement of two seeds as a guide: beside MAP@R, over pairs of seeds, and by number of held-out samples.

Trains with coarse labels, and compares trainings that differ in their seed alone on held-out samples, as a user without
fine labels can. Ours over a grid of K and temperature, two seeds each; losses whose proxies are not balanced, of which
most end with one proxy that takes nearly all samples; and three settings on --seeds seeds, from which pairs are formed
that share no seed. MAP@R of the held-out samples stands beside it.

Writes one row per training to results/trainings.csv, and goes on from what that holds; then, from these rows alone, the
tables guide.md (what each of two measures chooses), pairs.md and samples.md.
"""

import argparse
import platform
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

from pml_multiproxy.agreement import assignment_agreement

from .. import csv_rows
from ..retrieval.losses import DEFAULT_LR, FAMILIES, OURS
from ..retrieval.tasks import TASKS, Data, joined
from ..retrieval.training import assigned, evaluate, train

RESULTS = Path(__file__).parent / "results"
COARSE = [task for task in TASKS if "coarse" in task]
SETTINGS = {"scale": 10.0, "pooling": "logsumexp", "intra_weight": 0.5, "inter_weight": 0.0, "balance_weight": 0.5}
"""Of ours, beside what is tried."""
NO_BALANCE = "MultiProxyEntropy, no balance"
GRID = [(OURS, count, temperature) for count in (2, 5, 10, 30) for temperature in (0.05, 0.1, 0.2)]
UNBALANCED = [(loss, count, 0.1) for loss in (NO_BALANCE, "SoftTriple", "SubCenterArcFace") for count in (5, 30)]
OFTEN = [(OURS, count, 0.1) for count in (2, 10, 30)]
SAMPLES = [5, 10, 20, 50, 100, 200]
SUBSETS = 20


class Key(NamedTuple):
    task: str
    loss: str
    proxies_per_class: int
    temperature: float
    seed: int


def settings_of(key):
    if key.loss == NO_BALANCE:
        ours = SETTINGS | {"balance_weight": 0.0, "temperature": key.temperature}
    else:
        ours = SETTINGS | {"temperature": key.temperature} if key.loss == OURS else {}
    return ours | {FAMILIES[key.loss].several: key.proxies_per_class, "proxies_lr": DEFAULT_LR}


def run(key, folder):
    """MAP@R in %, and the proxy of each held-out sample: per class a word, per sample a letter."""
    task = TASKS[key.task](folder)
    held_out = Data(*(joined(*parts) for parts in zip(task.validation, task.test, strict=True)))
    torch.manual_seed(key.seed)
    network, loss_func = train(task, task.train, FAMILIES[key.loss], settings_of(key), key.seed)
    return {
        "map_at_r": evaluate(network, held_out)["map_at_r"],
        "assigned": assigned(network, loss_func, held_out),
    }


class Trainings:
    """The rows of trainings.csv."""

    def __init__(self, out):
        self.path = out / "trainings.csv"
        self.rows = {key_of(row): row for row in csv_rows.read(self.path)}

    def add(self, key, folder):
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
        row = key._asdict() | run(key, folder)
        row |= {"date": date.today().isoformat(), "torch": torch.__version__, "machine": machine}
        csv_rows.append(self.path, row)
        self.rows[key] = row

    def pairs(self, task, setting):
        """Of one setting, pairs of rows that share no seed."""
        rows = [row for key, row in sorted(self.rows.items()) if (key.task, key[1:4]) == (task, setting)]
        return list(zip(rows[::2], rows[1::2], strict=False))

    def grid(self, task, settings):
        """The first pair of each setting; nothing, if any is missing."""
        found = {setting: self.pairs(task, setting) for setting in settings}
        return {setting: of_setting[0] for setting, of_setting in found.items()} if all(found.values()) else {}


def key_of(row):
    count, temperature, seed = int(row["proxies_per_class"]), float(row["temperature"]), int(row["seed"])
    return Key(row["task"], row["loss"], count, temperature, seed)


def compare(pair, samples=None, generator=None):
    """The agreement of two rows; of so many samples per class, drawn at random."""
    words = [row["assigned"].split() for row in pair]
    labels = np.repeat(np.arange(len(words[0])), [len(word) for word in words[0]])
    assignments = [np.frombuffer("".join(word).encode(), dtype=np.uint8) for word in words]
    if samples:
        order = generator.permutation(len(labels))
        order = order[np.argsort(labels[order], kind="stable")]
        rank = np.arange(len(order)) - np.searchsorted(labels[order], labels[order])
        kept = order[rank < samples]
        labels, assignments = labels[kept], [assignment[kept] for assignment in assignments]
    return assignment_agreement(assignments, labels, min_samples=1)


def map_at_r(pair):
    return np.mean([float(row["map_at_r"]) for row in pair])


def largest_share(pair):
    """The mean share of a class that its most used proxy takes."""
    words = [word for row in pair for word in row["assigned"].split()]
    return np.mean([max(word.count(letter) for letter in set(word)) / len(word) for word in words])


def table(columns, rows):
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def guide(trainings):
    """Each measure as a guide: what it chooses among our settings, and what among all."""
    rows = []
    for task in COARSE:
        for what, settings in (("ours", GRID), ("and unbalanced", GRID + UNBALANCED)):
            pairs = trainings.grid(task, settings)
            rows += [[task, what, *chosen_by(measure, pairs)] for measure in MEASURES if pairs]
    columns = ["task", "losses", "measure", "Spearman with MAP@R", "chosen", "its most used proxy takes"]
    return table([*columns, "its MAP@R", "best MAP@R"], rows)


MEASURES = {"mean": "agreement, in nats", "normalized": "adjusted mutual information"}


def chosen_by(measure, pairs):
    values = [getattr(compare(pair), measure) for pair in pairs.values()]
    scores = [map_at_r(pair) for pair in pairs.values()]
    (loss, count, temperature), pair = list(pairs.items())[int(np.argmax(values))]
    name = f"{loss}, K={count}" + (f", τ={temperature:g}" if loss == OURS else "")
    share = f"{100 * largest_share(pair):.0f} %"
    return [
        MEASURES[measure],
        f"{spearmanr(values, scores)[0]:.2f}",
        f"{name}: {max(values):.2f}",
        share,
        f"{map_at_r(pair):.1f}",
        f"{max(scores):.1f}",
    ]


def pairs(trainings):
    """The spread over pairs of seeds."""
    rows = []
    for task in COARSE:
        for setting in OFTEN:
            found = trainings.pairs(task, setting)
            if len(found) > 1:
                values = [compare(pair).mean for pair in found]
                spread = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
                scores = [map_at_r(pair) for pair in found]
                extremes = f"{min(values):.2f} to {max(values):.2f}"
                rows.append([task, setting[1], len(found), spread, extremes, f"{np.mean(scores):.1f}"])
    return table(["task", "K", "pairs of seeds", "agreement", "range", "MAP@R"], rows)


def samples(trainings):
    """By number of held-out samples per class: the agreement with the spread over subsets, and what it chooses."""
    rows, generator = [], np.random.default_rng(0)
    for task in COARSE:
        for setting in OFTEN:
            found = trainings.pairs(task, setting)
            if len(found) > 1:
                cells = [subset_cell(found, count, generator) for count in SAMPLES]
                rows.append(
                    [task, f"agreement, K={setting[1]}", *cells, f"{np.mean([compare(p).mean for p in found]):.2f}"]
                )
        pairs = list(trainings.grid(task, GRID).values())
        if pairs:
            cells = [chosen_cell(pairs, count, generator) for count in SAMPLES]
            rows.append([task, "MAP@R of the choice", *cells, chosen_cell(pairs, None, generator)])
    return table(["task", "samples per class", *map(str, SAMPLES), "all"], rows)


def subset_cell(pairs, count, generator):
    values = np.array([[compare(pair, count, generator).mean for _ in range(SUBSETS)] for pair in pairs])
    return f"{values.mean():.2f} ± {values.std(axis=1, ddof=1).mean():.2f}"


def chosen_cell(pairs, count, generator):
    """Mean MAP@R of what is chosen from the grid, over subsets that differ from setting to setting."""
    scores = [map_at_r(pair) for pair in pairs]
    draws = SUBSETS if count else 1
    return (
        f"{np.mean([scores[np.argmax([compare(p, count, generator).mean for p in pairs])] for _ in range(draws)]):.1f}"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    digits = [task for task in COARSE if task.startswith("digits")]
    parser.add_argument("--task", nargs="*", choices=COARSE, default=digits, metavar="NAME", help=", ".join(COARSE))
    parser.add_argument("--data", metavar="DIR", help="where the files lie that are not part of scikit-learn")
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="of three settings; default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: results, beside this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    trainings = Trainings(args.out)
    todo = [Key(task, *setting, seed) for task in args.task for setting in GRID + UNBALANCED for seed in range(2)]
    todo += [Key(task, *setting, seed) for task in args.task for setting in OFTEN for seed in range(args.seeds)]
    for key in tqdm([key for key in dict.fromkeys(todo) if key not in trainings.rows]):
        trainings.add(key, args.data)
    for make in (guide, pairs, samples):
        made = make(trainings)
        (args.out / f"{make.__name__}.md").write_text(made)
        print(made)


if __name__ == "__main__":
    main()
