"""The rows of one task, in its CSV: one per run, told apart by phase, loss, settings and seed."""

import platform
import time
from datetime import date
from importlib.metadata import version
from statistics import fmean

import torch

from .. import csv_rows
from .losses import from_text, load, to_text
from .tasks import IMAGE_TASKS, TASKS
from .training import DEVICE, run

VALIDATION_SEED = 100
SWEEP_SEEDS = VALIDATION_SEED, 101
"""Of the sweeps, and of the two trainings whose agreement is measured."""


def validation_seeds(name):
    """Of which validation is the mean: on the digits three, since one seed alone chose what it had favoured by luck."""
    return (*SWEEP_SEEDS, 102) if name.startswith("digits") else (VALIDATION_SEED,)


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

    def held_out(self, loss, settings):
        """By seed, the rows of the validation part: runs made for the agreement are evaluated on it, too."""
        return self.get("agreement", loss, settings) | self.get("validation", loss, settings)

    def score(self, loss, settings, seeds=None):
        """MAP@R on validation, mean over the seeds that this task takes, or None where one is missing."""
        rows, seeds = self.held_out(loss, settings), seeds or validation_seeds(self.name)
        return fmean(float(rows[seed]["map_at_r"]) for seed in seeds) if rows.keys() >= set(seeds) else None

    def assigned(self, loss, settings):
        """By seed, the proxies that held-out samples are assigned to, for the two seeds that are compared."""
        again = self.get("agreement", loss, settings)
        rows = self.held_out(loss, settings)
        found = {seed: rows[seed]["assigned"] or again.get(seed, rows[seed])["assigned"] for seed in rows}
        return {seed: found[seed] for seed in SWEEP_SEEDS if found.get(seed)}

    def validated(self, loss, seeds=None):
        """MAP@R on validation by configuration, or None where some are missing."""
        scores = [self.score(loss, settings, seeds) for settings in load()[loss]]
        return None if None in scores else scores

    def has(self, phase, loss, settings, seed):
        if phase == "agreement":
            return seed in self.assigned(loss, settings)
        return seed in (self.held_out(loss, settings) if phase == "validation" else self.get(phase, loss, settings))

    def add(self, phase, loss, settings, seed):
        self.task = self.task or (TASKS | IMAGE_TASKS)[self.name](self.folder)
        start = time.perf_counter()
        result = run(self.task, "validation" if phase == "agreement" else phase, loss, settings, seed)
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
