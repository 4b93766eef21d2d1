"""One run: a network trained with a loss on a task, and evaluated."""

import numpy as np
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import nn

from pml_multiproxy import MultiProxyEntropyLoss

from .losses import FAMILIES, UNTRAINED, cluster, fit_clusters
from .views import stack_views

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METRICS = "map_at_r", "r_precision", "precision_at_1"
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+/" + "".join(map(chr, range(0xC0, 0x100)))
"""One for each proxy of a class, up to 128."""


def run(task, phase, name, settings, seed):
    """A row of results; on validation, also the proxy of its class that each sample is assigned to."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # for the sampler
    data, unseen = task.phase(phase)
    if name == UNTRAINED:
        return evaluate(task.make_network().to(DEVICE), unseen) | {"assigned": ""}
    network, loss_func = train(task, data, FAMILIES[name], settings, seed)
    result = evaluate(network, unseen)
    if phase != "validation" or not task.has_coarse_labels:
        return result | {"assigned": ""}
    if "clusters" in settings:
        return result | {"assigned": assigned_to_clusters(data, unseen, settings["clusters"], seed)}
    return result | {"assigned": assigned(network, loss_func, unseen)}


def train(task, data, family, settings, seed):
    """The trained network and loss."""
    settings = dict(settings)
    proxies_lr, from_kmeans = settings.pop("proxies_lr"), settings.pop("from_kmeans", False)
    labels = torch.unique(data.coarse, return_inverse=True)[1]
    count = settings.pop("clusters", None)
    if count:
        labels = torch.unique(cluster(data.x, labels, count, seed), return_inverse=True)[1]
    network = task.make_network().to(DEVICE)
    loss_func = family.build(int(labels.max()) + 1, task.embedding_size, task.views, **settings).to(DEVICE)
    if from_kmeans:
        loss_func.init_proxies(embed(network, data.x).to(DEVICE), labels)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    if list(loss_func.parameters()):
        optimizer.add_param_group({"params": loss_func.parameters(), "lr": proxies_lr})
    # A generator of their own, so that batches and views are the same for losses that draw random numbers.
    generator = torch.Generator().manual_seed(seed) if task.views > 1 else None
    for _ in range(task.epochs):
        for batch in batches(task, data.coarse, generator):
            x = data.x[batch] if task.views == 1 else stack_views(data.x[batch], task.views, generator)
            optimizer.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=task.half_precision):
                embeddings = network(x.to(DEVICE))
            loss_func(embeddings.float(), labels[batch].repeat(task.views).to(DEVICE)).backward()
            optimizer.step()
    return network, loss_func


def batches(task, labels, generator):
    if task.per_class is None:
        return torch.randperm(len(labels), generator=generator).split(task.batch_size)
    sampler = MPerClassSampler(labels, task.per_class, length_before_new_iter=len(labels))
    return torch.tensor(list(sampler)).split(task.batch_size)


@torch.no_grad()
def embed(network, x):
    network.eval()
    parts = [nn.functional.normalize(network(x[batch].to(DEVICE))) for batch in torch.arange(len(x)).split(1024)]
    network.train()
    return torch.cat(parts).cpu()


def evaluate(network, data):
    """Each metric as the mean over the classes, in %; MAP@R of each class, too."""
    found = by_class(embed(network, data.x), data.fine)
    return means(found) | {"map_at_r_by_class": of_classes(found["map_at_r"])}


def by_class(embeddings, labels):
    """Each metric of each class, in %."""
    calculator = AccuracyCalculator(
        include=("mean_average_precision_at_r", *METRICS[1:]), k="max_bin_count", return_per_class=True
    )
    found = calculator.get_accuracy(embeddings, labels)
    found["map_at_r"] = found["mean_average_precision_at_r"]
    return {name: 100 * np.array(found[name]) for name in METRICS}


def means(found):
    return {name: f"{np.mean(values):.2f}" for name, values in found.items()}


def of_classes(values):
    return " ".join(f"{value:.1f}" for value in values)


def assigned(network, loss_func, data):
    """Which proxy of its class is nearest: per class a word, per sample a digit; "" without several proxies."""
    proxies = proxies_of(loss_func)
    if proxies is None:
        return ""
    labels = torch.unique(data.coarse, return_inverse=True)[1]
    directions = nn.functional.normalize(proxies.detach(), dim=2).cpu()
    nearest = torch.einsum("bd,bkd->bk", embed(network, data.x), directions[labels]).argmax(dim=1)
    return " ".join(word(nearest[labels == c]) for c in labels.unique())


def assigned_to_clusters(data, unseen, clusters, seed):
    """As ``assigned``, but which cluster of the inputs of its class is nearest."""
    found = fit_clusters(data.x, data.coarse, clusters, seed).items()
    return " ".join(word(fitted.predict(unseen.x[unseen.coarse == c].flatten(1).numpy())) for c, fitted in found)


def word(numbers):
    return "".join(DIGITS[k] for k in numbers)


def proxies_of(loss_func):
    """``(classes, proxies, size)`` of a loss that has several proxies per class, else ``None``."""
    if isinstance(loss_func, MultiProxyEntropyLoss):
        return loss_func.proxies
    if hasattr(loss_func, "centers_per_class"):
        return loss_func.fc.T.unflatten(0, (loss_func.num_classes, loss_func.centers_per_class))
    if hasattr(loss_func, "sub_centers"):
        return loss_func.W.T.unflatten(0, (loss_func.num_classes, loss_func.sub_centers))
    return None
