"""The equations of :mod:`pml_multiproxy.functional`, naively: by samples and proxies, on scalars. The tests' oracle."""

import math

import torch


def cosine(x, w):
    return dot(x / norm(x, 2), w / norm(w, 2))


def dot(x, w):
    return sum(a * b for a, b in zip(x, w, strict=True))


def norm(x, p):
    return sum(a.abs() ** p for a in x) ** (1 / p)


def minus_lp(p, power=1, normalized=True):
    def similarity(x, w):
        if normalized:
            x, w = x / norm(x, p), w / norm(w, p)
        return -(norm(x - w, p) ** power)

    return similarity


def minus_snr(x, w):
    x, w = x / norm(x, 2), w / norm(w, 2)
    return -variance(w - x) / variance(x)


def variance(x):
    mean = sum(x) / len(x)
    return sum((a - mean) ** 2 for a in x) / (len(x) - 1)


def softmax(values):
    exponentials = [math.e**value for value in values]
    return [value / sum(exponentials) for value in exponentials]


def entropy(distribution):
    return -sum(p * p.log() for p in distribution)


def pool(similarities, pooling, scale, temperature):
    if pooling == "max":
        return max(similarities)
    if pooling == "softmax":
        return sum(q * s for q, s in zip(softmax([s / temperature for s in similarities]), similarities, strict=True))
    return sum(math.e ** (scale * s) for s in similarities).log() / scale


def loss(x, y, proxies, usage, others, *, similarity, pooling, scale, temperature, margin, intra, inter, balance):
    """The loss of one sample: embedding ``x`` (D,), label ``y``, proxies (C, K, D), usage (C, K), its other views."""
    num_classes, per_class = usage.shape
    s = [[similarity(x, w) for w in of_class] for of_class in proxies]
    q = softmax([value / temperature for value in s[y]])
    z = [pool(values, pooling, scale, temperature) for values in s]
    p = softmax([scale * value for value in z])
    classification = -softmax([scale * (z[c] - margin * (c == y)) for c in range(num_classes)])[y].log()
    balance_term = sum(q[k] * math.log(max(usage[y, k].item(), 1e-6)) for k in range(per_class))
    views = [softmax([similarity(x, w) / temperature for w in proxies[y]]) for x in others] or [q]
    cross_entropies = [-sum(a * b.log() for a, b in zip(q, other, strict=True)) for other in views]
    return (
        classification
        + intra * sum(cross_entropies) / len(cross_entropies)
        + inter * (math.log(num_classes) - entropy(p))
        + balance * (math.log(per_class) + balance_term)
    )


def losses(embeddings, labels, proxies, usage, *, views=1, **settings):
    count = len(labels) // views

    def others_of(i):
        return [j for j in range(i % count, len(labels), count) if j != i]

    return torch.stack(
        [
            loss(embeddings[i], int(labels[i]), proxies, usage, [embeddings[j] for j in others_of(i)], **settings)
            for i in range(len(labels))
        ]
    )


def updated_usage(embeddings, labels, proxies, usage, *, similarity, temperature, momentum):
    """The whole buffer (C, K) after a batch."""
    usage = usage.detach().clone()
    for c in range(len(usage)):
        rows = [
            torch.stack(softmax([similarity(x, w) / temperature for w in proxies[c]]))
            for x, y in zip(embeddings, labels, strict=True)
            if y == c and x.isfinite().all()
        ]
        if rows:
            kept = momentum ** len(rows)
            usage[c] = kept * usage[c] + (1 - kept) * (sum(rows) / len(rows)).detach()
    return usage


def miner_weights(indices_tuple, batch_size):
    """How often each sample was mined, over the largest such count; ones if nothing was."""
    counts = [0] * batch_size
    for indices in indices_tuple or ():
        for index in indices.tolist():
            counts[index] += 1
    weights = [count / max(counts) if any(counts) else 1.0 for count in counts]
    return torch.tensor(weights, dtype=torch.float64)
