"""CPU seconds of one call of assignment_agreement, by samples, classes and proxies, on assignments drawn at random.

The least of three calls of one thread. Writes results/cost.csv and cost.md.
"""

import csv
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pml_multiproxy.agreement import assignment_agreement

from .guide import table

RESULTS = Path(__file__).parent / "results"
COLUMNS = ["samples", "classes", "proxies per class", "CPU seconds"]
SHAPES = [(1_000, 1, 10), (10_000, 1, 10), (100_000, 1, 10), (10_000, 1, 50), (10_000, 10, 10), (10_000, 100, 10)]
SHAPES += [(100_000, 1_000, 10), (1_000_000, 10, 10)]


def seconds(samples, classes, proxies_per_class):
    generator = np.random.default_rng(0)
    labels = np.arange(samples) % classes
    first, other = generator.integers(proxies_per_class, size=(2, samples))
    second = np.where(generator.random(samples) < 0.5, first, other)
    taken = []
    for _ in range(3):
        start = time.process_time()
        assignment_agreement([first, second], labels, min_samples=1)
        taken.append(time.process_time() - start)
    return min(taken)


def main():
    rows = [[*shape, f"{seconds(*shape):.2g}"] for shape in tqdm(SHAPES)]
    with (RESULTS / "cost.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    made = table(COLUMNS, [[f"{number:,}" for number in row[:3]] + row[3:] for row in rows])
    (RESULTS / "cost.md").write_text(made)
    print(made)


if __name__ == "__main__":
    main()
