"""The equations of :mod:`pml_multiproxy.functional` once more, by plain autograd: the tests' oracle.

This file shares nothing with the package.
"""

import math
from types import SimpleNamespace

import torch
from torch.nn.functional import one_hot

# Similarities of vectors (..., D): larger is nearer.


def unit(vectors, p=2, shortest=1e-12):
    """Of length 1 by the norm ``p``; vectors below the length ``shortest`` stay shorter."""
    return vectors / torch.linalg.vector_norm(vectors, p, dim=-1, keepdim=True).clamp_min(shortest)


def dot(x, w):
    return (x * w).sum(dim=-1)


def cosine(x, w, p=2, power=1):
    return dot(unit(x, p), unit(w, p)) ** power


def minus_lp(p, power=1, normalized=True):
    def similarity(x, w):
        x, w = (unit(x, p), unit(w, p)) if normalized else (x, w)
        return -(torch.linalg.vector_norm(x - w, p, dim=-1) ** power)

    return similarity


def minus_snr(x, w):
    return -(unit(w) - unit(x)).var(dim=-1) / unit(x).var(dim=-1)


def softmax(values):
    """Of a list of numbers."""
    exponentials = [math.e**value for value in values]
    return [value / sum(exponentials) for value in exponentials]


def pool(similarities, pooling, scale, temperature):
    """Over the last dimension."""
    if pooling == "max":
        return similarities.amax(dim=-1)
    if pooling == "softmax":
        return ((similarities / temperature).softmax(dim=-1) * similarities).sum(dim=-1)
    return (scale * similarities).logsumexp(dim=-1) / scale


def terms(s, labels, usage, settings, training, of_samples, of_proxies):
    """The losses (B,) and what they consist of.

    ``s`` (B, C, K): the similarities of samples and proxies; ``of_samples`` (B, B), ``of_proxies`` (C, K, K): those
    among themselves; ``usage`` (C, K), which ``training`` updates; ``settings``: those of the loss as attributes.
    """
    _, num_classes, per_class = s.shape
    rows, views = torch.arange(len(labels)), settings.views
    log_q = (s[rows, labels] / settings.temperature).log_softmax(dim=1)
    found = SimpleNamespace(usage=usage, q=log_q.exp())
    if training:
        found.usage = updated_usage(usage, found.q, labels, settings.usage_momentum)
    found.z = pool(s, settings.pooling, settings.scale, settings.temperature)
    margin = settings.margin * one_hot(labels, num_classes).to(s.dtype)
    found.classification = -(settings.scale * (found.z - margin)).log_softmax(dim=1)[rows, labels]
    log_p = (settings.scale * found.z).log_softmax(dim=1)
    found.inter = -(log_p.exp() * log_p).sum(dim=1)
    by_view = log_q.unflatten(0, (views, -1))
    across = -torch.einsum("aik,bik->iab", by_view.exp(), by_view)
    others = 1 - torch.eye(views, dtype=s.dtype) if views > 1 else torch.ones(1, 1, dtype=s.dtype)
    found.intra = ((across * others).sum(dim=2) / max(views - 1, 1)).T.flatten()
    log_usage = found.usage.double().clamp_min(1e-6).log()
    found.balance = math.log(per_class) + (found.q * log_usage[labels]).sum(dim=1)
    found.neighbors = torch.zeros_like(found.intra)
    if settings.neighbor_weight and len(labels):
        found.neighbors = neighbor_losses(found.q, of_samples, of_proxies, labels, settings)
    found.losses = (
        found.classification
        + settings.intra_weight * found.intra
        + settings.inter_weight * (math.log(num_classes) - found.inter)
        + settings.balance_weight * found.balance
        + settings.neighbor_weight * found.neighbors
    )
    return found


def neighbor_losses(q, of_samples, of_proxies, labels, settings):
    source, itself = torch.arange(len(labels)) % (len(labels) // settings.views), torch.eye(len(labels)) == 1
    with torch.no_grad():
        own = of_proxies.diagonal(dim1=1, dim2=2)
        kernels = ((of_proxies - (own.unsqueeze(1) + own.unsqueeze(2)) / 2) / settings.temperature).exp()
        mean = q.unflatten(0, (settings.views, -1)).mean(dim=0).repeat(settings.views, 1)
        shared = torch.einsum("ik,ikm,jm->ij", mean, kernels[labels], mean)
        targets = torch.where(labels.unsqueeze(1) == labels, shared, 0)
        targets = torch.where(source.unsqueeze(1) == source, 1, targets).masked_fill(itself, 0)
        targets = targets / targets.sum(dim=1, keepdim=True).clamp_min(1e-300)
    log_p = (of_samples.masked_fill(itself, -math.inf) / settings.neighbor_temperature).log_softmax(dim=1)
    return -(targets * log_p.masked_fill(itself, 0)).sum(dim=1)


def updated_usage(usage, q, labels, momentum):
    """The whole buffer (C, K), of float32, after a batch; rows that are not finite do not count."""
    usage, q, finite = usage.detach().double().clone(), q.detach().double(), q.isfinite().all(dim=1)
    for c in labels.unique():
        rows = q[(labels == c) & finite]
        kept = momentum ** len(rows)
        usage[c] = kept * usage[c] + (1 - kept) * rows.sum(dim=0) / max(len(rows), 1)
    return usage.float().double()


def evaluate(loss_func, similarity, embeddings, labels):
    """:func:`terms` of a loss, ``embeddings`` and proxies ``w`` in float64, with a gradient by ``x`` and ``w``."""
    x, w = (tensor.detach().double().requires_grad_() for tensor in (embeddings, loss_func.proxies))
    settings = SimpleNamespace(**loss_func.settings())
    if settings.neighbor_weight is None:
        settings.neighbor_weight = float(settings.views > 1)
    s = similarity(x[:, None, None], w)
    among = similarity(x[:, None], x), similarity(w[:, :, None], w[:, None])
    result = terms(s, labels, loss_func.proxy_usage, settings, loss_func.training, *among)
    result.x, result.w = x, w
    return result


def miner_weights(indices_tuple, batch_size):
    """How often each sample was mined, over the largest such count; ones if nothing was."""
    counts = torch.zeros(batch_size, dtype=torch.float64)
    for indices in indices_tuple or ():
        for index in indices.tolist():
            counts[index] += 1
    return counts / counts.max() if counts.any() else torch.ones_like(counts)
