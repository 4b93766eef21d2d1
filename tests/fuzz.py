"""Random cases for the fuzz, the results they should have by the reference, and how far rounding may take them."""

import math
import random
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import reference
import torch
from cases import DISTANCES
from pytorch_metric_learning import distances, reducers, regularizers

from pml_multiproxy import MultiProxyEntropyLoss

REDUCERS = {
    "mean": (lambda _: reducers.MeanReducer(), lambda losses, weights: losses.mean()),
    "class weights": (reducers.ClassWeightedReducer, lambda losses, weights: (losses * weights).mean()),
}
"""By name: PML's, made with the weights of classes, and the result, with the weights of samples."""

LAYOUTS = {
    "plain": (lambda b, d: (b, d), lambda s, b, d: s),
    "not a leaf": (lambda b, d: (b, d), lambda s, b, d: s * 1),
    "every other": (lambda b, d: (2 * b, 2 * d), lambda s, b, d: s[1::2, ::2]),
    "inference": (lambda b, d: (b, d), lambda s, b, d: torch.inference_mode()(s.mul)(1)),
    "one row, expanded": (lambda b, d: (1, d), lambda s, b, d: s.expand(b, d)),
    "overlapping rows": (lambda b, d: (b + d,), lambda s, b, d: s.unfold(0, d, 1)[:b]),
}
"""By name: the shape of a leaf, and the embeddings made of it. The last two add gradients up."""


def draw(seed):
    rng = random.Random(seed)

    def one_of(*values):
        return rng.choice(values)

    dtypes = f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    same, views, num_classes = one_of(f64, f64, f32, f32, *dtypes), one_of(1, 1, 1, 2, 3), one_of(1, 2, 3, 4, 5, 7)
    dtype, proxy_dtype = one_of((same, same), (same, same), (same, f32), (same, one_of(*dtypes)))
    precise = torch.promote_types(torch.promote_types(dtype, proxy_dtype), f32)
    distance, batch = one_of(*["cosine"] * 8, *DISTANCES), views * one_of(0, 1, 1, 2, 3, 4, 5)
    # Axes make proxies and similarities that are equal to the last bit.
    kinds = {"cosine": ["plain"] * 5 + ["any length"] * 3 + ["axes"] * 2, "L2 squared, raw": ["far"]}
    vectors = one_of(*kinds.get(distance, ["plain"]))
    # Proxies may be so far apart that float32 calls samples with one view no neighbours at all.
    unbounded = views == 1 and distance in ("dot product", "L3, raw", "L2 squared, raw", "SNR")
    settings = {
        "pooling": one_of("max", "softmax", "logsumexp"),
        "scale": one_of(0.5, 3.0, 10.0, 30.0),
        "temperature": one_of(0.05, 0.1, 0.5, 2.0),
        "margin": one_of(0.0, 0.1, 0.5, -0.2),
        "intra_weight": one_of(0.0, 0.25, 1.0),
        "inter_weight": one_of(0.0, 0.0, 0.3),
        "balance_weight": one_of(0.0, 0.5, 1.0),
        "neighbor_weight": 0.0 if unbounded else one_of(0.0, 0.7),
        "neighbor_temperature": one_of(0.1, 0.2, 1.0),
        "usage_momentum": one_of(0.0, 0.5, 0.9, 0.99, 1.0),
        "views": views,
    }
    return SimpleNamespace(
        seed=seed,
        settings=settings,
        set_later=rng.random() < 0.3,
        num_classes=num_classes,
        # PyTorch computes many distances by a matrix product, unless it is told not to.
        proxies_per_class=30 if vectors == "far" else one_of(1, 2, 3, 4, 5),
        # The variance of a few numbers may be next to nothing, and the SNR unbounded.
        embedding_size=one_of(5, 6, 8) if distance == "SNR" else one_of(2, 3, 4, 6, 8),
        batch=batch,
        distance=distance,
        vectors=vectors,
        chunk=rng.randint(1, num_classes),
        dtype=dtype,
        proxy_dtype=proxy_dtype,
        precise=precise,
        layout=one_of(*list(LAYOUTS)[: None if dtype == precise else -2]),
        integers=one_of(torch.int64, torch.int32, torch.uint8),
        strides=one_of((0, 0), (0, 0), (0, 1), (1, 2)),
        not_finite=batch > 0 and rng.random() < 0.1,
        mined=one_of(None, None, None, (0, 0, 0), (3, 3), (1, 1, 1), (2, 2, 5, 5)) if batch else None,
        reducer=one_of("mean", *REDUCERS),
        class_weights=torch.linspace(0.5, 1.5, num_classes),
        statistics=rng.random() < 0.3,
        regularized=batch > 0 and vectors != "any length" and rng.random() < 0.2,
        wants=one_of("both", "both", "both", "embeddings", "proxies"),
        mode=one_of("train", "train", "train", "eval", "no_grad"),
        autocast=one_of(*[None] * 6, bf16, f16) if precise == f32 else None,
        autocast_backward=rng.random() < 0.3,
        doubled=rng.random() < 0.2,
    )


class Doubled(MultiProxyEntropyLoss):
    """Extends the loss as PML's users do."""

    def compute_loss(self, *args):
        result = super().compute_loss(*args)
        result["loss"]["losses"] = 2 * result["loss"]["losses"]
        return result


def make(case, chunk=None):
    """The loss, the leaf of the embeddings, the function from it to the embeddings, labels and a miner's tuple."""
    torch.manual_seed(case.seed)
    cls, arguments, _ = DISTANCES[case.distance]
    regularizer = regularizers.LpRegularizer() if case.regularized else None
    loss_func = (Doubled if case.doubled else MultiProxyEntropyLoss)(
        *(case.num_classes, case.embedding_size, case.proxies_per_class),
        **({} if case.set_later else case.settings),
        classes_per_chunk=chunk,
        distance=cls(collect_stats=case.statistics, **arguments),
        reducer=REDUCERS[case.reducer][0](case.class_weights),
        collect_stats=case.statistics,
        **{"weight_regularizer": regularizer, "weight_reg_weight": 0.3},
        **{"embedding_regularizer": regularizer, "embedding_reg_weight": 0.2},
    ).to(case.proxy_dtype)
    for name, value in case.settings.items() if case.set_later else ():
        setattr(loss_func, name, value)
    loss_func.train(case.mode != "eval")
    proxies = vectors_of(case, loss_func.proxies.shape, case.proxy_dtype)
    loss_func.proxies.data = proxies.transpose(*case.strides).contiguous().transpose(*case.strides)
    loss_func.proxies.requires_grad_(case.wants != "embeddings")
    loss_func.proxy_usage.copy_((3 * torch.randn_like(loss_func.proxy_usage)).softmax(dim=1))
    (shape, view), views = LAYOUTS[case.layout], case.settings["views"]
    source = vectors_of(case, shape(case.batch, case.embedding_size), case.dtype)
    if case.not_finite:
        source.view(-1)[-1] = math.nan
    source.requires_grad_(case.wants != "proxies" and case.layout != "inference")
    with torch.inference_mode(case.layout == "inference"):
        labels = torch.randint(case.num_classes, (case.batch // views,), dtype=case.integers).repeat(views)
        mined = case.mined and tuple(torch.randint(case.batch, (n,), dtype=case.integers) for n in case.mined)
    return loss_func, source, partial(view, b=case.batch, d=case.embedding_size), labels, mined


def vectors_of(case, shape, dtype):
    """Of lengths that their dtype can just hold, along the axes, or far from the origin."""
    lengths, vectors = (*shape[:-1], 1), torch.randn(shape)
    if case.vectors == "axes" and len(shape) == 3:
        return torch.eye(shape[-1], dtype=dtype)[torch.randint(shape[-1], shape[:-1])]
    if case.vectors == "any length":
        allowed = [0, 2**-12, 2**-8, 1, 1e4] if dtype == torch.float16 else [0, 1e-13, 1e-4, 1, 1e10, 1e30]
        return (reference.unit(vectors) * torch.tensor(allowed)[torch.randint(len(allowed), lengths)]).to(dtype)
    return (vectors * (0.5 + torch.rand(lengths)) + (100 if case.vectors == "far" else 0)).to(dtype)


def evaluate(case, made, noise=0.0, seed=0):
    """The values and gradients that a call should have. ``noise``: of vectors and similarities, relative."""
    loss_func, source, view, labels, mined = made
    generator, labels = torch.Generator().manual_seed(seed), labels.long().clone()
    settings, shape = SimpleNamespace(**case.settings), loss_func.proxies.shape
    x, w = view(source).detach().clone().double(), loss_func.proxies.detach().double().flatten(0, 1)
    count = len(w)
    # Noise takes equal proxies for one: so they stay equal.
    equals = (w.unsqueeze(1) == w).all(dim=2).int().argmax(dim=1)
    equals = torch.cat([equals, count + torch.arange(case.batch)])

    def noisy(values, size, dim):
        draws = torch.randn(values.shape, dtype=torch.float64, generator=generator)
        return values + noise * size * draws.index_select(dim, equals)

    x.requires_grad_(), w.requires_grad_()
    shortest = [2.0**-10 if dtype == torch.float16 else 1e-12 for dtype in (case.proxy_dtype, case.dtype)]
    counts = torch.tensor([count, case.batch])
    shortest = torch.tensor(shortest, dtype=torch.float64).repeat_interleave(counts).unsqueeze(1)

    def directions(vectors, shortest):
        return reference.unit(vectors, shortest=shortest) if case.distance == "cosine" else vectors

    similarity = reference.dot if case.distance == "cosine" else DISTANCES[case.distance][2]
    vectors = torch.cat([w, x])
    vectors = noisy(vectors, vectors.detach(), 0)
    rows, columns = vectors[count:].unsqueeze(1).expand(-1, len(vectors), -1), vectors.expand(case.batch, -1, -1)
    pairs = similarity(directions(rows, shortest[count:].unsqueeze(1)), directions(columns, shortest))
    largest = pairs.detach().nan_to_num().abs().amax(dim=1, keepdim=True)
    s, of_samples = noisy(pairs, largest, 1).split([count, case.batch], dim=1)
    s, points = s.unflatten(1, shape[:2]), directions(vectors[:count], shortest[:count]).view(shape)
    of_proxies = similarity(points.unsqueeze(2), points.unsqueeze(1))

    terms = reference.terms(s, labels, loss_func.proxy_usage, settings, case.mode == "train", of_samples, of_proxies)
    weighted = terms.losses * reference.miner_weights(mined, case.batch) * (2 if case.doubled else 1)
    loss = REDUCERS[case.reducer][1](weighted, case.class_weights.double()[labels]) if case.batch else 0 * x.sum()
    if case.regularized:
        loss = loss + 0.3 * w.norm(dim=1).mean() + 0.2 * x.norm(dim=1).mean()

    slopes = torch.autograd.grad(pairs.sum(), [rows, columns], retain_graph=True)
    of_losses, *gradients = torch.autograd.grad(loss, [terms.losses, x, w], allow_unused=True, materialize_grads=True)
    # The largest sum of terms that may have cancelled to a gradient: by these, rounding is measured.
    of_proxy = settings.scale * (1 + settings.inter_weight)
    of_proxy += (settings.intra_weight + 14 * settings.balance_weight) / settings.temperature
    of_sample = settings.neighbor_weight / settings.neighbor_temperature
    steepness = torch.tensor([of_proxy, of_sample]).repeat_interleave(counts)
    # Each view is in the losses of all.
    of_losses = of_losses.abs().view(settings.views, -1).amax(dim=0).repeat(settings.views).unsqueeze(1)
    by_row, by_column = (
        # Normalizing takes a part along the vector away.
        of_losses * steepness * (slope.abs().amax(dim=2) + pairs.abs() / v.norm(dim=2).clamp_min(short))
        for slope, v, short in zip(slopes, (rows, columns), (shortest[count:], shortest.T), strict=True)
    )
    cancelled = [by_row.sum(dim=1) + by_column[:, count:].sum(dim=0), by_column[:, :count].sum(dim=0)]

    # How far the case is from each jump of a gradient, relative to the size of the numbers that decide.
    gaps = [s.topk(min(2, shape[1])).values.diff().abs() / largest.unsqueeze(2)] if settings.pooling == "max" else []
    if case.distance == "L1 squared":
        gaps.append((reference.unit(rows, p=1) - reference.unit(columns, p=1)).abs())
    gaps = torch.cat([gap.detach().flatten() for gap in gaps] or [torch.zeros(0)])
    values = {"loss": loss, "usage": terms.usage, "logits": settings.scale * terms.z, "assignments": terms.q}
    values |= statistics(case, terms, labels) | norms(loss_func.distance, x, w)
    values = {name: value.detach().double() for name, value in values.items()}
    return SimpleNamespace(values=values, gradients=gradients, cancelled=cancelled, gaps=gaps[gaps != 0])


def statistics(case, terms, labels):
    """Those that the loss records."""
    constant, nearest = math.log(case.proxies_per_class), terms.q.argmax(dim=1).view(case.settings["views"], -1)
    information = constant - torch.special.entr(terms.q).sum(dim=1) - terms.balance
    effective = torch.stack([information[labels == c].mean().exp() for c in labels.unique()] or [torch.ones(())])
    return {
        "classification_loss": terms.classification.mean(),
        "intra_class_entropy": terms.intra.mean(),
        "inter_class_entropy": terms.inter.mean(),
        "balance": terms.balance.mean(),
        "neighbor_loss": terms.neighbors.mean(),
        "proxies_in_use": (terms.usage >= 0.1 / case.proxies_per_class).double().mean(),
        "usage_perplexity": torch.special.entr(terms.usage).sum(dim=1).exp().mean(),
        "effective_proxies": effective.mean(),
        "min_effective_proxies": effective.min(),
        "views_agree": (nearest == nearest[0]).all(dim=0).double().mean(),
    }


def norms(distance, x, w):
    """Those that the distance records."""
    found = {}
    for name, vectors in (("query", x), ("ref", w)):
        found[f"initial_avg_{name}_norm"] = lengths = vectors.norm(distance.p, dim=1).mean()
        found[f"final_avg_{name}_norm"] = torch.ones(()) if distance.normalize_embeddings else lengths
    return found


class Expected:
    """The values and gradients that a call should have, and how far rounding may take them from there."""

    TIMES, UNITS = 4, 32
    """How many times the change by inputs that are a unit of rounding off, and how many units of rounding beside."""

    def __init__(self, case, made):
        # In the neighbour term, embeddings and proxies have a dtype each.
        each = case.settings["neighbor_weight"] and {case.dtype, case.proxy_dtype} != {torch.float64}
        self.eps = torch.finfo(case.autocast if is_rounded(case) else torch.float32 if each else case.precise).eps
        exact = evaluate(case, made)
        others = [evaluate(case, made, self.eps, seed) for seed in (1, 2, 3)]
        self.is_clear = not case.not_finite and bool((exact.gaps > 16 * self.eps).all())
        of_leaves = [torch.finfo(dtype).eps for dtype in (case.dtype, case.proxy_dtype)]
        self.values, self.gradients = {}, []
        for name, value in exact.values.items():
            change = max(size(other.values[name] - value) for other in others)
            unit = self.eps if name in ("loss", "logits", "assignments") else max(self.eps, 1.2e-7)
            if name.endswith("_norm") or (name == "loss" and case.regularized):
                unit = max(unit, *of_leaves)  # PML adds in the dtype of the embeddings
            self.values[name] = value, self.TIMES * change + self.UNITS * unit * max(1.0, size(value))
        for i, dtype in enumerate((case.dtype, case.proxy_dtype)):
            gradient, of_leaf = exact.gradients[i], torch.finfo(dtype)
            changes = torch.stack([(other.gradients[i] - gradient).abs() for other in others])
            allowed = self.TIMES * changes.amax(dim=(0, -1)) + self.UNITS * self.eps * exact.cancelled[i]
            allowed = allowed + (self.UNITS * self.eps + 4 * of_leaf.eps) * gradient.abs().amax(dim=-1) + of_leaf.tiny
            self.gradients.append((gradient, allowed.unsqueeze(1).expand_as(gradient)))


def is_rounded(case):
    """Whether the similarities are rounded to the dtype of autocast."""
    in_backward = case.autocast_backward and DISTANCES[case.distance][0] is not distances.LpDistance
    return case.autocast is not None and (case.distance == "cosine" or in_backward)


def size(values):
    return values.nan_to_num().abs().max().item() if values.numel() else 0.0


def autocast(case, enabled=True):
    return torch.autocast("cpu", case.autocast) if case.autocast and enabled else nullcontext()
