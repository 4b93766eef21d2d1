"""The tables of the report, as Markdown, made of the CSV files alone."""

import numpy as np
from scipy.stats import spearmanr

from .losses import DEFAULTS_BEFORE, FAMILIES, OURS, UNTRAINED, changes, load, to_text
from .selection import (
    COARSE_SWEEPS,
    PEERS,
    agreements,
    candidates,
    chosen,
    interval,
    measured,
    relative,
    tested,
    validations,
)
from .tasks import TASKS


def table(header, rows):
    """Markdown; None without rows."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) if rows else None


def mean_and_interval(values):
    low, high = interval(values)
    return f"{values.mean():.1f} ({low:.1f} to {high:.1f})"


def of_losses(runs, which, seeds, names):
    rows = []
    for loss in (*FAMILIES, UNTRAINED):
        cells = []
        for name in names:
            found, lacking = measured(runs, name, which, seeds)
            cells.append("open" if loss in lacking else mean_and_interval(found[loss]) if loss in found else "")
        rows.append([loss, *cells])
    return table(["", *names], rows) if names else None


def against_best_peer(runs, which, seeds, names, ours_by="", title="ours"):
    """Ours against the best of the peers, by task; with ``ours_by``, on the tasks where that was chosen."""
    rows = []
    for name in (name for name in names if not ours_by or ours_by in chosen(runs, name, OURS)):
        found, lacking = measured(runs, name, which, seeds)
        mine = tested(runs, name, OURS, ours_by or which, seeds)
        peers = {loss: values for loss, values in found.items() if loss in PEERS}
        if not peers or mine is None:
            rows.append([name, "open", "open" if mine is None else f"{mine.mean():.1f}", "", ""])
            continue
        best = max(peers, key=lambda loss: peers[loss].mean())
        open_peers = [loss for loss in lacking if loss in PEERS]
        note = f" ({len(open_peers)} of {len(open_peers) + len(peers)} peers open)" if open_peers else ""
        label = f"{changes_of(chosen(runs, name, OURS)[ours_by], DEFAULTS_BEFORE)}: " if ours_by else ""
        rows.append([name, f"{best}: {peers[best].mean():.1f}{note}", *compared(mine, peers[best], label)])
    return table(["task", "best peer", title, "difference", "ratio"], rows)


def changes_of(settings, defaults):
    changed = {key: value for key, value in settings.items() if defaults.get(key) != value}
    return f"`{to_text(changed) or 'defaults'}`"


def compared(ours, peer, label=""):
    low, high = interval(ours - peer)
    difference = f"{ours.mean() - peer.mean():+.1f} ({low:+.1f} to {high:+.1f})"
    return [f"{label}{ours.mean():.1f}", difference, f"{ours.mean() / peer.mean():.2f}"]


def choice_of_defaults(runs):
    """Our configurations on validation, and what the other tasks choose, over the tasks that have all."""
    names = [name for name in TASKS if runs[name].validated(OURS)]
    if not names:
        return None
    scores = [runs[name].validated(OURS) for name in names]
    means = np.mean(relative(scores), axis=0)
    keys = list(load()[OURS][0])
    rows = [
        [str(i), *(f"{settings[key]}" for key in keys), *(f"{of_task[i]:.1f}" for of_task in scores), f"{means[i]:.2f}"]
        for i, settings in enumerate(load()[OURS])
    ]
    if len(names) > 1:
        others = (np.delete(relative(scores), i, axis=0) for i in range(len(names)))
        choices = (str(int(np.argmax(np.mean(rest, axis=0)))) for rest in others)
        rows.append(["chosen by the other tasks", *[""] * len(keys), *choices, ""])
    missing = [name for name in TASKS if name not in names]
    title = ["", *(f"`{key}`" for key in keys), *names, "mean, relative"]
    return table(title, rows) + (f"\n\nOpen: {', '.join(missing)}." if missing else "")


def changed_defaults(runs, seeds):
    """Our defaults and each with one change, on validation, by the mean of these seeds; empty where one is missing."""
    found = {
        label: [runs[name].score(OURS, settings, seeds) for name in TASKS] for label, settings in changes().items()
    }
    found = {label: scores for label, scores in found.items() if any(score is not None for score in scores)}
    everywhere = {label: scores for label, scores in found.items() if None not in scores}
    scores = relative(np.transpose(list(everywhere.values()))).mean(axis=0) if everywhere else []
    means = dict(zip(everywhere, scores, strict=True))
    rows = [
        [
            f"`{label}`",
            *("" if x is None else f"{x:.1f}" for x in scores),
            f"{means[label]:.3f}" if label in means else "",
        ]
        for label, scores in found.items()
    ]
    return table(["", *TASKS, "mean, relative to the best that is measured on all"], rows)


def choice_by_agreement(runs, seeds):
    """Chosen by the agreement of two seeds, by fine labels, and not at all, on the test part."""
    rows = []
    for name in (name for name in TASKS if "coarse" in name):
        for loss in COARSE_SWEEPS:
            values = [tested(runs, name, loss, t, seeds) for t in ("by agreement", "by fine labels", "defaults")]
            if any(value is None for value in values):
                rows.append([name, loss, "open", *[""] * 7])
                continue
            means = [value.mean() for value in values]
            found = agreements(runs[name], loss)
            label = max(found, key=found.get)
            rank = spearman(runs[name], loss, found)
            regrets = (f"{mean / means[1] - 1:+.0%}" for mean in (means[0], means[2]))
            cells = (f"{mean:.1f}" for mean in means)
            settings = changes_of(candidates(loss)[label], load()[loss][0])
            rows.append([name, loss, settings, f"{found[label]:.2f}", *cells, *regrets, f"{rank:.2f}"])
    header = ["task", "loss", "chosen by agreement", "agreement, nats", "MAP@R", "chosen by fine labels", "defaults"]
    return table([*header, "regret of agreement", "regret of the defaults", "Spearman"], rows)


def spearman(runs, loss, found):
    scores = validations(runs, loss)
    return spearmanr([found[label] for label in scores], list(scores.values())).statistic
