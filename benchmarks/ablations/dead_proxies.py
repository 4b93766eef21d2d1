"""How many proxies are used where a batch holds few samples of a class, or where there are many proxies.

On the features and the network of clinc.py: its ten domains as classes, with a batch of 16 (1.6 samples of each class)
and ten proxies, and with a batch of 128 and thirty proxies; its 150 intents as classes, with a batch of 128 (0.85
samples of each class) and ten proxies. "Perplexity" is exp of the entropy of how the training samples spread over their
nearest proxies, mean over the classes; "used" counts the proxies with at least a tenth of an even share. Writes
results/dead_proxies.csv, one row per run, goes on from what it holds, and makes results/dead_proxies.md of it.
"""

import torch

from pml_multiproxy import MultiProxyEntropyLoss, functional

from ..clinc import (
    SIZE,
    Data,
    ResidualHead,
    make_optimizer,
    make_parser,
    map_at_r,
    publish,
    run_all,
    train,
)

CASES = {
    "10 classes, batch 16, K=10": {"classes": "domain", "batch_size": 16, "epochs": 3, "lr": 3e-4, "proxies_lr": 3e-3},
    "10 classes, batch 128, K=30": {"classes": "domain", "proxies_per_class": 30},
    "150 classes, batch 128, K=10": {"classes": "intent"},
}
CHANGES = {
    "defaults": {},
    "k-means": {"k_means": True},
    "temperature=0.05": {"temperature": 0.05},
    "usage_momentum=0.99": {"usage_momentum": 0.99},
    "reseed_below=0.1": {"reseed_below": 0.1},
    "balance_weight=1": {"balance_weight": 1.0},
    "balance_weight=1, k-means": {"balance_weight": 1.0, "k_means": True},
    "balance_weight=1, reseed_below=0.1": {"balance_weight": 1.0, "reseed_below": 0.1},
    "k-means, reseed_below=0.1": {"k_means": True, "reseed_below": 0.1},
}
CONFIGURATIONS = {
    f"{case}: {change}": {**CASES[case], "settings": settings} for case in CASES for change, settings in CHANGES.items()
}


@torch.no_grad()
def spread(features, labels, head, loss_func):
    _, proxies = loss_func.assign(head(features), labels)
    count = loss_func.proxies_per_class
    shares = torch.stack([proxies[labels == c].bincount(minlength=count) for c in labels.unique()]).double()
    shares /= shares.sum(dim=1, keepdim=True)
    perplexity = functional.perplexity(shares)
    return {"perplexity": perplexity.mean().item(), "used": (shares >= 0.1 / count).sum(dim=1).double().mean().item()}


def main(argv=None):
    args = make_parser(__doc__, seeds=3).parse_args(argv)
    data = Data(args.data)

    def run(seed, classes, settings, proxies_per_class=10, batch_size=128, epochs=10, lr=1e-3, proxies_lr=1e-2):
        labels = data.domain_train if classes == "domain" else data.intent_train
        settings = dict(settings)
        k_means = settings.pop("k_means", False)
        head = ResidualHead()
        loss_func = MultiProxyEntropyLoss(len(labels.unique()), SIZE, proxies_per_class, **settings)
        if k_means:
            loss_func.init_proxies(data.x_train, labels)
        optimizer = make_optimizer(head, loss_func, lr, proxies_lr)
        train(data.x_train, labels, head, loss_func, optimizer, epochs, batch_size)
        return {**spread(data.x_train, labels, head, loss_func), "map_at_r": map_at_r(data, head)}

    rows = run_all("dead_proxies", CONFIGURATIONS, args.seeds, run)
    publish("dead_proxies", rows, CONFIGURATIONS, {"perplexity": "perplexity", "used": "used", "map_at_r": "MAP@R"})


if __name__ == "__main__":
    main()
