"""The loss for the fuzz, once more from the equations of the documentation, vectorised, by plain autograd.

It shares nothing with the package, nor with the scalar ``reference`` of the other tests. All functions work in the
dtype of what they get: float64 for what is right, float32 for the error that rounding alone makes.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Settings:
    pooling: str
    scale: float
    temperature: float
    margin: float
    intra: float
    inter: float
    balance: float
    views: int


# Similarities: (B, D) and (P, D) to (B, P), larger is nearer.


def unit(vectors, p=2):
    return vectors / vectors.abs().pow(p).sum(dim=1, keepdim=True).pow(1 / p)


def products(x, w):
    return (x.unsqueeze(1) * w).sum(dim=2)


def cosine(x, w, p=2, power=1):
    return products(unit(x, p), unit(w, p)) ** power


def minus_lp(x, w, p=2, power=1, normalize=True):
    if normalize:
        x, w = unit(x, p), unit(w, p)
    return -(torch.linalg.vector_norm(x.unsqueeze(1) - w, ord=p, dim=2) ** power)


def minus_snr(x, w, normalize=True):
    if normalize:
        x, w = unit(x), unit(w)
    return -_variance(x.unsqueeze(1) - w) / _variance(x).unsqueeze(1)


def minus_mahalanobis(x, w, matrix):
    """Squared, of the transposed vectors: ``matrix`` is (D, D)."""
    return -((x @ matrix).unsqueeze(1) - w @ matrix).square().sum(dim=2)


def inverse_distance(x, w, offset):
    return 1 / (offset + (x.unsqueeze(1) - w).square().sum(dim=2))


def bent_cosine(x, w):
    return cosine(x, w) + 0.1 * products(unit(x).square(), unit(w))


def _variance(x):
    return (x - x.mean(dim=-1, keepdim=True)).square().sum(dim=-1) / (x.shape[-1] - 1)


# Terms.


def pool(s, settings):
    """(B, C, K) to (B, C)."""
    if settings.pooling == "max":
        return s.amax(dim=2)
    # Large similarities would swallow the scale in the rounding of the exponents.
    largest = s.detach().amax(dim=2)
    below = s - largest.unsqueeze(2)
    if settings.pooling == "softmax":
        return largest + ((below / settings.temperature).softmax(dim=2) * below).sum(dim=2)
    return largest + (settings.scale * below).logsumexp(dim=2) / settings.scale


def own(values, labels):
    """(B, C, ...) at the class of each sample, (B, ...)."""
    return values[torch.arange(len(labels)), labels]


def assignment(s, labels, settings):
    return (own(s, labels) / settings.temperature).softmax(dim=1)


def classification(s, labels, settings):
    z = pool(s, settings)
    margins = settings.margin * F.one_hot(labels, z.shape[1]).to(z.dtype)
    return -own((settings.scale * (z - margins)).log_softmax(dim=1), labels)


def intra_class_entropy(s, labels, settings):
    log_q = (own(s, labels) / settings.temperature).log_softmax(dim=1)
    if settings.views == 1:
        return -(log_q.exp() * log_q).sum(dim=1)
    blocks = log_q.chunk(settings.views) if len(log_q) else [log_q] * settings.views
    of_views = []
    for a, chooser in enumerate(blocks):
        compared = [-(chooser.exp() * other).sum(dim=1) for b, other in enumerate(blocks) if b != a]
        of_views.append(sum(compared) / (settings.views - 1))
    return torch.cat(of_views)[: len(log_q)]


def inter_class_entropy(s, settings):
    log_p = (settings.scale * pool(s, settings)).log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


def balance(s, labels, usage, settings):
    log_usage = usage.detach().to(s.dtype)[labels].clamp_min(1e-6).log()
    return (assignment(s, labels, settings) * log_usage).sum(dim=1)


def losses(s, labels, usage, settings):
    """(B,) of similarities (B, C, K) and the usage (C, K)."""
    _, num_classes, per_class = s.shape
    return (
        classification(s, labels, settings)
        + settings.intra * intra_class_entropy(s, labels, settings)
        + settings.inter * (math.log(num_classes) - inter_class_entropy(s, settings))
        + settings.balance * (math.log(per_class) + balance(s, labels, usage, settings))
    )


def statistics(s, labels, usage, settings):
    """What ``collect_stats`` records of a batch."""
    per_class = s.shape[2]
    intra, term = intra_class_entropy(s, labels, settings), balance(s, labels, usage, settings)
    information = -term - intra_class_entropy(s, labels, replace(settings, views=1))
    effective = [information[labels == c].mean().exp() for c in labels.unique()]
    usage = usage.to(s.dtype)
    return {
        "classification_loss": classification(s, labels, settings).mean(),
        "intra_class_entropy": intra.mean(),
        "inter_class_entropy": inter_class_entropy(s, settings).mean(),
        "balance": math.log(per_class) + term.mean(),
        "usage_perplexity": torch.special.entr(usage).sum(dim=1).exp().mean(),
        "effective_proxies": sum(effective) / len(effective),
        "min_effective_proxies": min(effective),
    }


# What is around them.


def moved_usage(usage, q, labels, momentum):
    """The buffer after a batch; rows of ``q`` (B, K) that are not finite do not count."""
    usage = usage.double().clone()
    for c in labels.unique().tolist():
        rows = q[(labels == c) & q.isfinite().all(dim=1)].double()
        if len(rows):
            kept = momentum ** len(rows)
            usage[c] = kept * usage[c] + (1 - kept) * rows.mean(dim=0)
    return usage.detach()


def reseeded_usage(usage, moved):
    """Of classes with a moved proxy, (class, proxy): an even share for it, the others in proportion."""
    usage, even = usage.double().clone(), 1 / usage.shape[1]
    for c, k in moved:
        usage[c] *= 1 - even
        usage[c, k] += even
    return usage


def mined_weights(indices_tuple, batch_size, dtype):
    """How often each sample was mined, over the largest such count; ones where nothing was."""
    mined = torch.cat([indices.long() for indices in indices_tuple]) if indices_tuple is not None else torch.tensor([])
    if not len(mined):
        return torch.ones(batch_size, dtype=dtype)
    counts = torch.bincount(mined, minlength=batch_size)
    return counts.to(dtype) / counts.max()


def reduce(name, values, labels, class_weights):
    """The reducers of PML, by the names of the fuzz."""
    if name == "sum":
        return values.sum()
    if name == "positive":
        kept = values[values > 0]
        return kept.mean() if len(kept) else 0 * values.sum()
    if name == "class weights":
        return (values * class_weights.to(values.dtype)[labels]).mean()
    if name == "divisor":
        return values.sum() / max(len(values), 1)
    return values.mean()


def proxy_entropy(w, temperature):
    """The entropy regularizer by the cosine of proxies (C, K, D)."""
    directions = w / w.norm(dim=2, keepdim=True)
    return -(directions @ directions.mT / temperature).log_softmax(dim=2).diagonal(dim1=1, dim2=2).mean()


def mean_length(rows):
    return rows.norm(dim=1).mean()
