"""The tables and pictures of the retrieval benchmark, made of its CSV files alone."""

from .pictures import draw_bars, draw_proxies_per_class
from .selection import with_any_test
from .tables import against_best_peer, choice_by_agreement, choice_of_defaults, numbers_of_proxies, of_losses, summary

TABLES = {
    "best here": "Each loss in its configuration that was best on the validation part of the task",
    "best elsewhere": "One configuration per loss: the best on validation of the other tasks with as many views",
    "defaults": "Untouched defaults",
}
OF_OURS = "Our loss on the validation parts, by configuration"
OPEN = "*open: not all runs are there yet; differences are to the best of the peers that have all.*"


def report(runs, out, seeds):
    names = with_any_test(runs)
    parts = {
        title: join(of_losses(runs, which, seeds, names), against_best_peer(runs, which, seeds, names))
        for which, title in TABLES.items()
        if names
    }
    parts |= {
        "Our defaults with other numbers of proxies per class": numbers_of_proxies(runs, seeds),
        "Chosen without fine labels, by the agreement of two seeds": choice_by_agreement(runs, seeds),
        f"{OF_OURS}; without views": choice_of_defaults(runs, views=False),
        f"{OF_OURS}; with views": choice_of_defaults(runs, views=True),
    }
    (out / "summary.md").write_text((summary(runs, seeds, names) or "") + "\n")
    text = join(*(f"**{title}**\n\n{table}" for title, table in parts.items() if table))
    if "open" in text:
        text = join(OPEN, text)
    (out / "tables.md").write_text(text + "\n")
    print(text)
    for which in ("best here", "defaults") if names else ():
        draw_bars(runs, which, TABLES[which], out / f"{which.replace(' ', '_')}.png", seeds)
    draw_proxies_per_class(runs, out / "proxies_per_class.png", seeds)


def join(*parts):
    return "\n\n".join(part for part in parts if part)
