"""The rows of one task, and the settings that validation chose from them."""

from statistics import fmean

from ..retrieval.runs import Runs, validation_seeds
from .losses import SETTLING, UNTRAINED, configurations
from .tasks import SCHEDULES, TASKS
from .training import run

SEEDS = 0, 1, 2
(VALIDATION_SEED,) = validation_seeds("leaves")


class FinetuningRuns(Runs):
    def __init__(self, name, options, out, saved=None):
        super().__init__(name, options, out)
        self.saved = saved

    def run(self, phase, loss, settings, seed):
        self.task = self.task or TASKS[self.name](self.folder)
        folder = None
        if self.saved and (settings or {}) == self.chosen(loss, "defaults"):
            folder = self.saved / f"{self.name}_{loss}_{phase}_seed{seed}".replace(" ", "_")
        return run(self.task, phase, loss, settings, seed, folder)

    def schedule(self):
        """Of all losses: the best mean on validation at the defaults of two losses; None where runs are missing."""
        scores = [
            [self.score(loss, schedule | configurations(loss, self.name)[0]) for loss in SETTLING]
            for schedule in SCHEDULES[self.name]
        ]
        if any(None in of for of in scores):
            return None
        return max(zip(map(fmean, scores), SCHEDULES[self.name], strict=True), key=lambda pair: pair[0])[1]

    def settings(self, loss):
        """The configurations at the chosen schedule."""
        return [self.schedule() | settings for settings in configurations(loss, self.name)]

    def chosen(self, loss, table):
        """The settings that a table takes, or None where validation has not chosen yet."""
        if loss == UNTRAINED:
            return {}
        if not self.schedule():
            return None
        settings = self.settings(loss)
        if table == "defaults" or len(settings) == 1:
            return settings[0]
        scores = [self.score(loss, of) for of in settings]
        return None if None in scores else settings[scores.index(max(scores))]
