"""The tables of the report, as Markdown, made of the CSV files alone."""

import numpy as np
from scipy.stats import spearmanr

from .losses import (
    COMPARED_BY_AGREEMENT,
    COUNTS,
    FAMILIES,
    ONE_PROXY,
    OURS,
    SWEPT,
    UNTRAINED,
    candidates,
    configurations,
    proxy_counts,
    to_text,
)
from .selection import (
    PEERS,
    agreements,
    applies,
    by_class,
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
    found = {name: measured(runs, name, which, seeds) for name in names}
    rows = []
    for loss in (*FAMILIES, UNTRAINED):
        cells = [
            "open" if loss in lacking else mean_and_interval(values[loss]) if loss in values else ""
            for values, lacking in found.values()
        ]
        rows += [[loss, *cells]] if any(cells) else []
    return table(["", *names], rows)


def against_best_peer(runs, which, seeds, names):
    """Ours against the best of the peers, by task; where labels are to be retrieved, also K=1 at its defaults."""
    rows = []
    for name in names:
        found, lacking = measured(runs, name, which, seeds)
        peers = {loss: values for loss, values in found.items() if loss in PEERS}
        open_peers = [loss for loss in lacking if loss in PEERS]
        best = max(peers, key=lambda loss: peers[loss].mean()) if peers else None
        note = f" ({len(open_peers)} of {len(open_peers) + len(peers)} peers open)" if open_peers else ""
        ours = {name: found.get(OURS)}
        if applies(ONE_PROXY, name):
            ours[f"{name}, K=1"] = tested(runs, name, ONE_PROXY, "defaults", seeds)
        for title, values in ours.items():
            cells = ["open", "", ""] if values is None else [f"{values.mean():.1f}", "", ""]
            if values is not None and peers:
                cells = compared(values, peers[best])
            rows.append([title, f"{best}: {peers[best].mean():.1f}{note}" if peers else "open", *cells])
    return table(["task", "best peer", "ours", "difference", "ratio"], rows)


def summary(runs, seeds, names):
    """Ours at its untouched defaults against the strongest rival in its best configuration, k-means included."""
    rows = []
    for name in names:
        found, _ = measured(runs, name, "best here", seeds)
        rivals = {loss: values for loss, values in found.items() if not loss.startswith(OURS)}
        if rivals:
            best = max(rivals, key=lambda loss: rivals[loss].mean())
            for ours in (loss for loss in (OURS, ONE_PROXY) if applies(loss, name)):
                values = tested(runs, name, ours, "defaults", seeds)
                cells = ["open", ""] if values is None else compared(values, rivals[best])[:2]
                rows.append(
                    [name, ours.removeprefix(f"{OURS}, "), cells[0], f"{best}: {rivals[best].mean():.1f}", cells[1]]
                )
    return table(["task", "ours, untouched defaults", "MAP@R", "strongest rival, at its best", "difference"], rows)


def compared(ours, peer):
    """The interval is of the difference: both are resampled with the same seeds and classes."""
    low, high = interval(ours - peer)
    difference = f"{ours.mean() - peer.mean():+.1f} ({low:+.1f} to {high:+.1f})"
    return [f"{ours.mean():.1f}", difference, f"{ours.mean() / peer.mean():.2f}"]


def changes_of(settings, defaults):
    changed = {key: value for key, value in settings.items() if defaults.get(key) != value}
    return f"`{to_text(changed) or 'defaults'}`"


def numbers_of_proxies(runs, seeds):
    """Our defaults with other numbers of proxies per class, on the test part."""
    counts = sorted({count for of_task in COUNTS.values() for count in of_task})
    rows = []
    for name in (name for name in COUNTS if name in runs):
        for loss in SWEPT:
            settings = proxy_counts(loss, name)
            found = {count: by_class(runs[name], loss, of, seeds) for count, of in settings.items()}
            cells = {k: "open" if values is None else mean_and_interval(values) for k, values in found.items()}
            rows.append([name, loss, *(cells.get(count, "") for count in counts)])
    return table(["task", "loss", *(f"K={count}" for count in counts)], rows)


def choice_of_defaults(runs, views):
    """Our configurations on validation, and what the other tasks choose; tasks without all runs are left out."""
    tasks = [name for name in TASKS if name.endswith("views") == views]
    names = [name for name in tasks if runs[name].validated(OURS)]
    if not names:
        return None
    scores = [runs[name].validated(OURS) for name in names]
    means = np.mean(relative(scores), axis=0)
    of_ours = configurations(OURS, names[0])
    keys = list(of_ours[0])
    rows = [
        [str(i), *(f"{settings[key]}" for key in keys), *(f"{of_task[i]:.1f}" for of_task in scores), f"{means[i]:.2f}"]
        for i, settings in enumerate(of_ours)
    ]
    if len(names) > 1:
        others = (np.delete(relative(scores), i, axis=0) for i in range(len(names)))
        choices = (str(int(np.argmax(np.mean(rest, axis=0)))) for rest in others)
        rows.append(["chosen by the other tasks", *[""] * len(keys), *choices, ""])
    missing = [name for name in tasks if name not in names]
    title = ["", *(f"`{key}`" for key in keys), *names, "mean, relative"]
    return table(title, rows) + (f"\n\nOpen: {', '.join(missing)}." if missing else "")


def choice_by_agreement(runs, seeds):
    """Chosen by the agreement of two seeds, by fine labels, and not at all, on the test part."""
    rows = []
    for name in (name for name in TASKS if "coarse" in name):
        for loss in COMPARED_BY_AGREEMENT:
            values = [tested(runs, name, loss, t, seeds) for t in ("by agreement", "by fine labels", "defaults")]
            if any(value is None for value in values):
                rows.append([name, loss, "open", *[""] * 7])
                continue
            means = [value.mean() for value in values]
            found = agreements(runs[name], loss)
            settings = candidates(loss, name)[int(np.argmax(found))]
            rank = spearmanr(found, validations(runs[name], loss)).statistic
            regrets = (f"{mean / means[1] - 1:+.0%}" for mean in (means[0], means[2]))
            cells = (f"{mean:.1f}" for mean in means)
            label = changes_of(settings, configurations(loss, name)[0])
            rows.append([name, loss, label, f"{max(found):.2f}", *cells, *regrets, f"{rank:.2f}"])
    header = ["task", "loss", "chosen by agreement", "agreement, nats", "MAP@R", "chosen by fine labels", "defaults"]
    return table([*header, "regret of agreement", "regret of the defaults", "Spearman"], rows)
