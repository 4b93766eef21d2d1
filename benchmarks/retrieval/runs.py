"""The rows of one task, in its CSV: one per run, told apart by phase, loss, settings and seed."""

import csv
import platform
import time
from datetime import date
from importlib.metadata import version

import torch

from .losses import from_text, load, to_text
from .tasks import IMAGE_TASKS, TASKS
from .training import DEVICE, run

VALIDATION_SEED = 100
SWEEP_SEEDS = VALIDATION_SEED, 101


def identity(settings):
    return frozenset(settings.items()) if settings else frozenset()


class Runs:
    def __init__(self, name, folder, out):
        self.path, self.name, self.folder, self.task = out / f"{name}.csv", name, folder, None
        self.rows, self.found = [], {}
        for row in csv.DictReader(self.path.read_text().splitlines()) if self.path.exists() else []:
            self.remember(row)

    def remember(self, row):
        self.rows.append(row)
        key = row["phase"], row["loss"], identity(from_text(row["settings"]))
        self.found.setdefault(key, {})[int(row["seed"])] = row

    def get(self, phase, loss, settings):
        """By seed."""
        return self.found.get((phase, loss, identity(settings)), {})

    def score(self, loss, settings):
        """MAP@R on validation with the first seed, or None."""
        row = self.get("validation", loss, settings).get(VALIDATION_SEED)
        return row and float(row["map_at_r"])

    def assigned(self, loss, settings):
        """By seed, the proxies that held-out samples are assigned to."""
        rows = self.get("agreement", loss, settings) | self.get("validation", loss, settings)
        again = self.get("agreement", loss, settings)
        found = {seed: (row["assigned"] or again.get(seed, row)["assigned"]) for seed, row in rows.items()}
        return {seed: text for seed, text in sorted(found.items()) if text}

    def validated(self, loss):
        """MAP@R on validation by configuration, or None where some are missing."""
        scores = [self.score(loss, settings) for settings in load()[loss]]
        return None if None in scores else scores

    def has(self, phase, loss, settings, seed):
        return seed in self.get(phase, loss, settings)

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
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.remember({key: str(value) for key, value in row.items()})
