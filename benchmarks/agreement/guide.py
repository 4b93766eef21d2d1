"""The agreement of two seeds as a guide: beside MAP@R, over pairs of seeds, and by number of held-out samples.

Trains with coarse labels, and compares trainings that differ only in their seed on held-out samples, as a user without
fine labels can. It compares two seeds for each setting of a grid: ours over K and temperature, and losses that do not
balance their proxies, most of which end with one proxy that takes nearly all samples. For three settings, it trains
--seeds seeds and forms pairs that share no seed. MAP@R of the held-out samples stands beside the agreement.

Writes one row to results/trainings.csv when a training ends, and goes on from what that holds; then, from these rows
alone, the tables guide.md (the choices of two measures), pairs.md and samples.md.
"""

import argparse
import platform
from datetime import date
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

from pml_multiproxy.agreement import assignment_agreement

from .. import csv_rows
from ..retrieval.losses import DEFAULT_LR, FAMILIES, NO_NEIGHBORS, OURS
from ..retrieval.tables import table
from ..retrieval.tasks import TASKS, Data, joined
from ..retrieval.training import assigned, evaluate, train

RESULTS = Path(__file__).parent / "results"
COARSE = [task for task in TASKS if "coarse" in task]
SETTINGS = {"scale": 10.0, "pooling": "logsumexp", "intra_weight": 0.5, "inter_weight": 0.0, "balance_weight": 0.5}
"""Of ours, beside K and temperature. The neighbour term is off."""
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
    settings = {FAMILIES[key.loss].several: key.proxies_per_class, "proxies_lr": DEFAULT_LR}
    if key.loss in (OURS, NO_BALANCE):
        settings |= SETTINGS | {"temperature": key.temperature}
        settings |= NO_NEIGHBORS if key.task.endswith("views") else {}
    return settings | ({"balance_weight": 0.0} if key.loss == NO_BALANCE else {})


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


def key_of(row):
    count, temperature, seed = int(row["proxies_per_class"]), float(row["temperature"]), int(row["seed"])
    return Key(row["task"], row["loss"], count, temperature, seed)


def pairs_of(rows, task, setting):
    """Of one setting, pairs of rows that share no seed. ``rows`` by key."""
    found = [row for key, row in sorted(rows.items()) if (key.task, key[1:4]) == (task, setting)]
    return list(zip(found[::2], found[1::2], strict=False))


def grid(rows, task, settings):
    """The first pair of each setting; nothing, if any is missing."""
    found = {setting: pairs_of(rows, task, setting) for setting in settings}
    return {setting: of_setting[0] for setting, of_setting in found.items()} if all(found.values()) else {}


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


def guide(trained):
    """Each measure as a guide: its choice among our settings, and among all."""
    rows = []
    for task in COARSE:
        for what, settings in (("ours", GRID), ("and unbalanced", GRID + UNBALANCED)):
            found = grid(trained, task, settings)
            rows += [[task, what, *chosen_by(measure, found)] for measure in MEASURES if found]
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


def pairs(trained):
    """The spread over pairs of seeds."""
    rows = []
    for task, setting in product(COARSE, OFTEN):
        found = pairs_of(trained, task, setting)
        if len(found) > 1:
            values, score = [compare(pair).mean for pair in found], np.mean([map_at_r(pair) for pair in found])
            spread = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
            extremes = f"{min(values):.2f} to {max(values):.2f}"
            rows.append([task, f"{setting[1]}", f"{len(found)}", spread, extremes, f"{score:.1f}"])
    return table(["task", "K", "pairs of seeds", "agreement", "range", "MAP@R"], rows)


def samples(trained):
    """By number of held-out samples per class: the agreement with the spread over subsets, and its choice."""
    rows, generator = [], np.random.default_rng(0)
    for task in COARSE:
        for setting in OFTEN:
            found = pairs_of(trained, task, setting)
            if len(found) > 1:
                cells = [subset_cell(found, count, generator) for count in SAMPLES]
                mean = np.mean([compare(pair).mean for pair in found])
                rows.append([task, f"agreement, K={setting[1]}", *cells, f"{mean:.2f}"])
        found = list(grid(trained, task, GRID).values())
        if found:
            cells = [chosen_cell(found, count, generator) for count in (*SAMPLES, None)]
            rows.append([task, "MAP@R of the choice", *cells])
    return table(["task", "samples per class", *map(str, SAMPLES), "all"], rows)


def subset_cell(pairs, count, generator):
    values = np.array([[compare(pair, count, generator).mean for _ in range(SUBSETS)] for pair in pairs])
    return f"{values.mean():.2f} ± {values.std(axis=1, ddof=1).mean():.2f}"


def chosen_cell(pairs, count, generator):
    """Mean MAP@R of the choice from the grid, over subsets that differ from setting to setting."""
    chosen = [
        np.argmax([compare(pair, count, generator).mean for pair in pairs]) for _ in range(SUBSETS if count else 1)
    ]
    return f"{np.mean([map_at_r(pairs[i]) for i in chosen]):.1f}"


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
    path = args.out / "trainings.csv"
    rows = {key_of(row): row for row in csv_rows.read(path)}
    todo = [Key(task, *setting, seed) for task in args.task for setting in GRID + UNBALANCED for seed in range(2)]
    todo += [Key(task, *setting, seed) for task in args.task for setting in OFTEN for seed in range(args.seeds)]
    for key in tqdm([key for key in dict.fromkeys(todo) if key not in rows]):
        row = key._asdict() | run(key, args.data) | {"date": date.today().isoformat(), "torch": torch.__version__}
        rows[key] = row | {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads"}
        csv_rows.append(path, rows[key])
    for make in (guide, pairs, samples):
        made = f"{make(rows)}\n"
        (args.out / f"{make.__name__}.md").write_text(made)
        print(made)


if __name__ == "__main__":
    main()
