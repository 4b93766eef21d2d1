"""One run: the pretrained network trained with a loss on a task, and evaluated."""

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from pml_multiproxy import MultiProxyEntropyLoss

from ..retrieval.losses import cluster
from ..retrieval.training import DEVICE, batches, by_class, embed, means, of_classes
from .losses import FAMILIES, UNTRAINED

HEAD_LR = 1e-3


def run(task, phase, name, settings, seed, folder=None):
    """A row of results. With a folder, embeddings and loss are written to it."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # for the sampler
    data, unseen = task.phase(phase)
    network, loss_func = (pretrained(task), None) if name == UNTRAINED else train(task, data, name, settings, seed)
    embeddings = embed(network, unseen.x)
    if folder:
        save(folder, embeddings, unseen, loss_func)
    found = by_class(embeddings, unseen.fine)
    return means(found) | {f"{metric}_by_class": of_classes(values) for metric, values in found.items()}


def pretrained(task):
    """Without the new head."""
    network = task.make_network().to(DEVICE)
    network.head = nn.Identity()
    return network


def train(task, data, name, settings, seed):
    """The trained network and loss."""
    settings = dict(settings)
    lr, epochs, proxies_lr, clusters = (settings.pop(key, None) for key in ("lr", "epochs", "proxies_lr", "clusters"))
    labels = torch.unique(data.coarse, return_inverse=True)[1]
    if clusters:
        features = embed(pretrained(task), data.x)
        labels = torch.unique(cluster(features, labels, clusters, seed), return_inverse=True)[1]
    network = task.make_network().to(DEVICE)
    loss_func = FAMILIES[name].build(int(labels.max()) + 1, task.embedding_size, task.views, **settings).to(DEVICE)
    modules = (network.body, lr), (network.head, HEAD_LR), (loss_func, proxies_lr)
    groups = [{"params": params, "lr": of} for module, of in modules if (params := trained(module))]
    optimizer = torch.optim.AdamW(groups)
    # Once more, and generators of their own, so that batches, views and dropout are the same for all losses.
    torch.manual_seed(seed)
    np.random.seed(seed)
    generator = torch.Generator().manual_seed(seed)
    order = [batch for _ in range(epochs) for batch in batches(task, data.coarse, generator)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in groups], len(order))
    network.train()
    for batch in tqdm(order, desc=name, leave=False):
        optimizer.zero_grad()
        embeddings = network(data.x[batch], task.views, generator)
        loss_func(embeddings, labels[batch].repeat(task.views).to(DEVICE)).backward()
        optimizer.step()
        schedule.step()
    return network, loss_func


def trained(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def save(folder, embeddings, data, loss_func):
    """``embeddings.npz``: embeddings, coarse and fine labels, numbers of the samples. ``loss.pt``: the trained loss."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"embeddings": embeddings, "coarse": data.coarse, "fine": data.fine, "numbers": data.x}
    np.savez(folder / "embeddings.npz", **{name: value.numpy() for name, value in arrays.items()})
    if isinstance(loss_func, MultiProxyEntropyLoss):
        loss_func.save(folder / "loss.pt")
    elif loss_func is not None:
        torch.save(loss_func.state_dict(), folder / "loss.pt")
