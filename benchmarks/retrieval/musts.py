"""What our loss had to reach, and whether it does; Markdown, made of the CSV files alone."""

from .losses import COARSE_SWEEPS, OURS, load
from .selection import PEERS, PROXY_LOSSES, applies, by_class, interval, measured, tested
from .tables import table
from .tasks import TASKS

HEADER = ["task", "had to be", "measured", "met"]
COUNTS_OF_MUST = 10, 20, 30, 50


def musts(runs, seeds):
    """Our defaults, on the test part, against each peer at its best, and against our defaults before."""
    rows = []
    for name in ("digits-coarse-views", "omniglot-coarse-views"):
        proxy_losses = "at least 1.5 times the best proxy loss of PML"
        rows.append(against_peers(runs, name, seeds, "defaults", PROXY_LOSSES, proxy_losses, factor=1.5))
        rows.append(against_peers(runs, name, seeds, "defaults", PEERS, "not below the best peer"))
        rows.append(against_peers(runs, name, seeds, "best here", PEERS, "our best ahead of the best peer", factor=1))
    for peer in ("SoftTriple", "NormalizedSoftmax", "SubCenterArcFace"):
        rows.append(against_peers(runs, "omniglot-unseen-views", seeds, "defaults", [peer], f"not below {peer}"))
    rows.append(flat_in_number_of_proxies(runs, seeds))
    rows += [as_good_as_before(runs, name, seeds) for name in TASKS if not name.endswith("views")]
    return table(HEADER, rows)


def musts_of_agreement(runs, seeds):
    """Ours as agreement chooses it, on the test part."""
    rows = []
    for name in (name for name in TASKS if "coarse" in name):
        ours = tested(runs, name, OURS, "by agreement", seeds)
        fine = tested(runs, name, OURS, "by fine labels", seeds)
        title = "at least 0.9 times what fine labels choose"
        rows.append(row(name, title, ours, {} if fine is None else {"by fine labels": fine}, factor=0.9))
        rivals = {(loss, "defaults") for loss in PROXY_LOSSES}
        rivals |= {(loss, "by agreement") for loss in PROXY_LOSSES if loss in COARSE_SWEEPS}
        found = {f"{loss} ({way})": tested(runs, name, loss, way, seeds) for loss, way in sorted(rivals)}
        title = "at least 1.3 times the best proxy loss of PML, chosen so or at its defaults"
        rows.append(row(name, title, ours, *with_and_without_runs(found), factor=1.3))
    return table(HEADER, rows)


def with_and_without_runs(found):
    with_runs = {label: values for label, values in found.items() if values is not None}
    return with_runs, [label for label in found if label not in with_runs]


def against_peers(runs, name, seeds, ours_by, peers, title, factor=None):
    if name not in runs:
        return open_row(name, title)
    found, lacking = measured(runs, name, "best here", seeds)
    peers = [loss for loss in peers if applies(loss, name)]
    of_peers = {loss: found[loss] for loss in peers if loss in found}
    missing = [loss for loss in peers if loss in lacking]
    return row(name, title, tested(runs, name, OURS, ours_by, seeds), of_peers, missing, factor)


def open_row(name, title):
    return [name, title, "open", "open"]


def row(name, title, ours, peers, missing=(), factor=None):
    """Without ``factor``, ours must not be below the best of the peers by more than the interval."""
    if ours is None or not peers:
        return open_row(name, title)
    best = max(peers, key=lambda label: peers[label].mean())
    peer = peers[best]
    low, high = interval(ours - peer)
    low_ratio, high_ratio = interval(ours, peer, statistic=lambda a, b: a / b)
    text = (
        f"{ours.mean():.1f}; {best} {peer.mean():.1f}: {ours.mean() - peer.mean():+.1f} ({low:+.1f} to {high:+.1f}), "
        f"ratio {ours.mean() / peer.mean():.2f} ({low_ratio:.2f} to {high_ratio:.2f})"
    )
    met = high >= 0 if factor is None else ours.mean() >= factor * peer.mean()
    return [name, title, text, ("yes" if met else "no") + (f", so far: open {', '.join(missing)}" if missing else "")]


def flat_in_number_of_proxies(runs, seeds):
    name, title = "digits-coarse-views", "K = 10, 20, 30, 50 within 6 % of the best of them"
    if name not in runs:
        return open_row(name, title)
    settings = [load()[OURS][0] | {"proxies_per_class": count} for count in COUNTS_OF_MUST]
    rows = [runs[name].get("test", OURS, of_count) for of_count in settings]
    if min(map(len, rows)) < seeds:
        return open_row(name, title)
    means = [by_class(of_count)[:seeds].mean() for of_count in rows]
    text = f"{', '.join(f'{mean:.1f}' for mean in means)}: lowest {min(means) / max(means) - 1:+.1%}"
    return [name, title, text, "yes" if min(means) >= 0.94 * max(means) else "no"]


def as_good_as_before(runs, name, seeds):
    digits = name.startswith("digits")
    title = "above the defaults before" if digits else "at most 5 % below the defaults before"
    now, before = (tested(runs, name, OURS, which, seeds) for which in ("defaults", "defaults before"))
    return row(name, title, now, {} if before is None else {"before": before}, factor=1 if digits else 0.95)
