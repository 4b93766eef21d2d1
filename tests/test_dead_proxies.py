"""One sample of a class per batch, the hardest case: enough balance keeps the proxies alive."""

import torch

from pml_multiproxy import MultiProxyEntropyLoss

CLASSES, CLUSTERS, SIZE = 20, 6, 32


def perplexity_after_training(**settings):
    """Over how many of its proxies a class spreads, after batches of one sample of each class."""
    torch.manual_seed(0)
    centers = torch.nn.functional.normalize(torch.randn(CLASSES, CLUSTERS, SIZE), dim=-1)

    def draw(per_class):
        labels = torch.arange(CLASSES).repeat_interleave(per_class)
        clusters = torch.randint(CLUSTERS, (len(labels),))
        return centers[labels, clusters] + 0.2 * torch.randn(len(labels), SIZE), labels

    network, loss_func = torch.nn.Linear(SIZE, SIZE), MultiProxyEntropyLoss(CLASSES, SIZE, CLUSTERS, **settings)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    optimizer.add_param_group({"params": loss_func.parameters(), "lr": 1e-2})
    for _ in range(400):
        samples, labels = draw(per_class=1)
        optimizer.zero_grad()
        loss_func(network(samples), labels).backward()
        optimizer.step()
    samples, labels = draw(per_class=200)
    _, proxies = loss_func.assign(network(samples), labels)
    shares = torch.nn.functional.one_hot(proxies.view(CLASSES, 200), CLUSTERS).double().mean(dim=1)
    return torch.special.entr(shares).sum(dim=1).exp().mean().item()


def test_balance_above_intra_keeps_proxies_alive():
    alive = perplexity_after_training(pooling="max", intra_weight=0.25, balance_weight=0.5)
    assert alive > 0.8 * CLUSTERS
    assert alive > 1.3 * perplexity_after_training(pooling="max", intra_weight=0.25, balance_weight=0.25)
