"""The tables of the report, as Markdown, made of the CSV files alone."""

import numpy as np

from .losses import DEFAULTS_BEFORE, FAMILIES, OURS, UNTRAINED, changes, load
from .selection import (
    COARSE_SWEEPS,
    PEERS,
    PROXY_LOSSES,
    agreements,
    applies,
    by_class,
    by_seed_and_class,
    candidates,
    chosen,
    interval,
    measured,
    relative,
    with_any_test,
)
from .tasks import TASKS


def table(header, rows):
    """Markdown; None without rows."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) if rows else None


def mean_and_interval(values):
    low, high = interval(values)
    return f"{values.mean():.1f} ({low:.1f} to {high:.1f})"


def of_losses(runs, which, seeds):
    names = with_any_test(runs)
    rows = []
    for loss in (*FAMILIES, UNTRAINED):
        cells = []
        for name in names:
            found, lacking = measured(runs, name, which, seeds)
            cells.append("open" if loss in lacking else mean_and_interval(found[loss]) if loss in found else "")
        rows.append([loss, *cells])
    return table(["", *names], rows) if names else None


def against_best_peer(runs, which, seeds, ours_by="", title="ours"):
    """Ours against the best of the peers, by task."""
    rows = []
    for name in with_any_test(runs):
        found, lacking = measured(runs, name, which, seeds)
        mine = by_seed_and_class(runs, name, OURS, ours_by or which)
        peers = {loss: values for loss, values in found.items() if loss in PEERS}
        if not peers or mine is None or len(mine) < seeds:
            continue
        best = max(peers, key=lambda loss: peers[loss].mean())
        open_peers = [loss for loss in lacking if loss in PEERS]
        note = f" ({len(open_peers)} of {len(open_peers) + len(peers)} peers open)" if open_peers else ""
        label = f"`{label_of(runs, name, ours_by)}`: " if ours_by else ""
        rows.append([name, f"{best}: {peers[best].mean():.1f}{note}", *compared(mine[:seeds], peers[best], label)])
    return table(["task", "best peer", title, "difference", "ratio"], rows)


def label_of(runs, name, which):
    settings = chosen(runs, name, OURS)[which]
    return " ".join(f"{key}={value}" for key, value in settings.items() if DEFAULTS_BEFORE.get(key) != value)


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
        label: [mean_of_seeds(runs[name].get("validation", OURS, settings), seeds) for name in TASKS]
        for label, settings in changes().items()
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


def mean_of_seeds(rows, seeds):
    return np.mean([float(rows[seed]["map_at_r"]) for seed in seeds]) if rows.keys() >= set(seeds) else None


def musts(runs, seeds):
    """What the defaults were to reach, and whether they do."""
    rows = []
    for name in ("digits-coarse-views", "omniglot-coarse-views"):
        rows += [
            must(
                runs, name, seeds, "defaults", PROXY_LOSSES, "at least 1.5 times the best proxy loss of PML", factor=1.5
            ),
            must(runs, name, seeds, "defaults", PEERS, "not below the best peer"),
            must(runs, name, seeds, "best here", PEERS, "our best ahead of the best peer", ahead=True),
        ]
    for peer in ("SoftTriple", "NormalizedSoftmax", "SubCenterArcFace"):
        rows.append(must(runs, "omniglot-unseen-views", seeds, "defaults", [peer], f"not below {peer}"))
    rows.append(flat_in_number_of_proxies(runs, seeds))
    rows += [as_good_as_before(runs, name, seeds) for name in TASKS if not name.endswith("views")]
    return table(["task", "our defaults, test part, each peer at its best", "measured", "met"], rows)


def must(runs, name, seeds, ours_by, peers, title, factor=None, ahead=False):
    if name not in runs:
        return [name, title, "open", "open"]
    found, lacking = measured(runs, name, "best here", seeds)
    mine = by_seed_and_class(runs, name, OURS, ours_by)
    peers = [loss for loss in peers if applies(loss, name)]
    measured_peers = {loss: found[loss] for loss in peers if loss in found}
    if mine is None or len(mine) < seeds or not measured_peers:
        return [name, title, "open", "open"]
    mine = mine[:seeds]
    best = max(measured_peers, key=lambda loss: measured_peers[loss].mean())
    peer = measured_peers[best]
    low, high = interval(mine - peer)
    difference = mine.mean() - peer.mean()
    text = f"{mine.mean():.1f}; {best} {peer.mean():.1f}: {difference:+.1f} ({low:+.1f} to {high:+.1f})"
    met = difference > 0 if ahead else high >= 0
    if factor:
        low, high = interval(mine, peer, statistic=lambda a, b: a / b)
        text += f", ratio {mine.mean() / peer.mean():.2f} ({low:.2f} to {high:.2f})"
        met = mine.mean() >= factor * peer.mean()
    lacking = [loss for loss in peers if loss in lacking]
    return [name, title, text, ("yes" if met else "no") + (f", so far: open {', '.join(lacking)}" if lacking else "")]


COUNTS_OF_MUST = 10, 20, 30, 50


def flat_in_number_of_proxies(runs, seeds):
    name, title = "digits-coarse-views", "K = 10, 20, 30, 50 within 6 % of the best of them"
    rows = (
        {}
        if name not in runs
        else {
            count: runs[name].get("test", OURS, load()[OURS][0] | {"proxies_per_class": count})
            for count in COUNTS_OF_MUST
        }
    )
    if not rows or min(map(len, rows.values())) < seeds:
        return [name, title, "open", "open"]
    means = [by_class(of_count).mean() for of_count in rows.values()]
    return [name, title, ", ".join(f"{mean:.1f}" for mean in means), "yes" if min(means) >= 0.94 * max(means) else "no"]


def as_good_as_before(runs, name, seeds):
    digits = name.startswith("digits")
    title = "above the defaults before" if digits else "at most 5 % below the defaults before"
    now, before = (by_seed_and_class(runs, name, OURS, which) for which in ("defaults", "defaults before"))
    if now is None or before is None or min(len(now), len(before)) < seeds:
        return [name, title, "open", "open"]
    now, before = now[:seeds], before[:seeds]
    value, difference, ratio = compared(now, before)
    met = now.mean() > before.mean() if digits else now.mean() >= 0.95 * before.mean()
    return [name, title, f"{value}; before {before.mean():.1f}: {difference}, ratio {ratio}", "yes" if met else "no"]


def choice_by_agreement(runs, seeds):
    """Chosen by the agreement of two seeds, by fine labels, and not at all, on the test part."""
    rows = []
    for name in (name for name in TASKS if "coarse" in name):
        for loss in COARSE_SWEEPS:
            tables = chosen(runs, name, loss)
            if "by agreement" not in tables:
                continue
            values = [by_seed_and_class(runs, name, loss, t) for t in ("by agreement", "by fine labels", "defaults")]
            if any(value is None or len(value) < seeds for value in values):
                continue
            means = [value[:seeds].mean() for value in values]
            found = agreements(runs[name], loss)
            label = max(found, key=found.get)
            rank = spearman(runs[name], loss, found)
            regrets = (f"{mean / means[1] - 1:+.0%}" for mean in (means[0], means[2]))
            cells = (f"{mean:.1f}" for mean in means)
            rows.append([name, loss, f"`{label}`", f"{found[label]:.2f}", *cells, *regrets, f"{rank:.2f}"])
    header = ["task", "loss", "chosen by agreement", "agreement, nats", "MAP@R", "chosen by fine labels", "defaults"]
    return table([*header, "regret of agreement", "regret of the defaults", "Spearman"], rows)


def spearman(runs, loss, found):
    scores = [runs.score(loss, candidates(loss)[label]) or 0.0 for label in found]
    ranks = [np.argsort(np.argsort(values)) for values in (list(found.values()), scores)]
    return np.corrcoef(*ranks)[0, 1]
