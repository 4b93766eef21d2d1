"""The rows of one task, in its CSV: one per run, told apart by phase, loss, settings and seed."""

import platform
import time
from datetime import date
from importlib.metadata import version
from statistics import fmean

import torch

from .. import csv_rows
from .losses import configurations, from_text, to_text
from .tasks import IMAGE_TASKS, TASKS
from .training import DEVICE, run

AGREEMENT_SEEDS = 100, 101
"""Of the two trainings whose agreement is measured, both of the phase ``validation``."""


def validation_seeds(name):
    """Validation takes the mean over these. One seed alone is too little for the few samples of the digits."""
    return (100, 101, 102) if name.startswith("digits") else (100,)


def identity(settings):
    return frozenset(settings.items()) if settings else frozenset()


class Runs:
    def __init__(self, name, folder, out):
        self.path, self.name, self.folder, self.task = out / f"{name}.csv", name, folder, None
        self.rows, self.found = [], {}
        for row in csv_rows.read(self.path):
            self.remember(row)

    def remember(self, row):
        self.rows.append(row)
        key = row["phase"], row["loss"], identity(from_text(row["settings"]))
        self.found.setdefault(key, {})[int(row["seed"])] = row

    def get(self, phase, loss, settings):
        """By seed."""
        return self.found.get((phase, loss, identity(settings)), {})

    def score(self, loss, settings):
        """MAP@R on validation, mean over the seeds that this task takes, or None where one is missing."""
        rows, seeds = self.get("validation", loss, settings), validation_seeds(self.name)
        return fmean(float(rows[seed]["map_at_r"]) for seed in seeds) if rows.keys() >= set(seeds) else None

    def assigned(self, loss, settings):
        """By seed, the proxies that held-out samples are assigned to, for the two seeds that are compared.

        Some validation runs of the first days did not write them. A row of the phase ``agreement`` is such a run, made
        once more.
        """
        rows, again = (self.get(phase, loss, settings) for phase in ("validation", "agreement"))
        found = {seed: rows[seed]["assigned"] or again.get(seed, rows[seed])["assigned"] for seed in rows}
        return {seed: found[seed] for seed in AGREEMENT_SEEDS if found.get(seed)}

    def validated(self, loss):
        """MAP@R on validation by configuration, or None where some are missing."""
        scores = [self.score(loss, settings) for settings in configurations(loss, self.name)]
        return None if None in scores else scores

    def has(self, phase, loss, settings, seed):
        return seed in self.get(phase, loss, settings)

    def run(self, *arguments):
        self.task = self.task or (TASKS | IMAGE_TASKS)[self.name](self.folder)
        return run(self.task, *arguments)

    def add(self, phase, loss, settings, seed):
        """Runs, and writes the row at once."""
        start = time.perf_counter()
        result = self.run(phase, loss, settings, seed)
        row = {
            "task": self.name,
            "phase": phase,
            "loss": loss,
            "settings": to_text(settings or {}),
            "seed": seed,
            **result,
            "seconds": f"{time.perf_counter() - start:.1f}",
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "PML": version("pytorch-metric-learning"),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {DEVICE}",
        }
        csv_rows.append(self.path, row)
        self.remember({key: str(value) for key, value in row.items()})
