"""Random cases for the fuzz, and the results they should have: the equations, vectorised, by autograd in float64.

This file shares nothing with the package.
"""

import math
import random
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from pytorch_metric_learning import distances, reducers, regularizers
from reference import miner_weights

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.regularizers import ProxyEntropyRegularizer

# The similarities of pairs (..., D), larger is nearer. ``eps``: the shortest lengths that vectors are divided by.


def unit(vectors, eps=1e-12, p=2):
    return vectors / torch.linalg.vector_norm(vectors, p, dim=-1, keepdim=True).clamp_min(eps)


def cosine(p=2, power=1):
    return lambda x, w, eps: (unit(x, eps[0], p) * unit(w, eps[1], p)).sum(dim=-1) ** power


def minus_lp(p=2, power=1, normalized=True):
    def similarity(x, w, eps):
        x, w = (unit(x, p=p), unit(w, p=p)) if normalized else (x, w)
        return -(torch.linalg.vector_norm(x - w, p, dim=-1) ** power)

    return similarity


def minus_snr(x, w, eps):
    return -(unit(w) - unit(x)).var(dim=-1) / unit(x).var(dim=-1)


class BentCosine(distances.CosineSimilarity):
    """A subclass of the cosine that computes something else."""

    def compute_mat(self, query_emb, ref_emb):
        return super().compute_mat(query_emb, ref_emb) + 0.1 * query_emb.square() @ ref_emb.T


def bent_cosine(x, w, eps):
    return ((unit(x) + 0.1 * unit(x).square()) * unit(w)).sum(dim=-1)


L2 = {"normalize_embeddings": False}
DISTANCES = {
    "cosine": (distances.CosineSimilarity, {}, cosine()),
    "L1 cosine cubed": (distances.CosineSimilarity, {"p": 1, "power": 3}, cosine(1, 3)),
    "bent cosine": (BentCosine, {}, bent_cosine),
    "dot product": (distances.DotProductSimilarity, L2, lambda x, w, eps: (x * w).sum(dim=-1)),
    "L2": (distances.LpDistance, {}, minus_lp()),
    "L1": (distances.LpDistance, {"p": 1}, minus_lp(1)),
    "L3 to the 1.5": (distances.LpDistance, {"p": 3, "power": 1.5}, minus_lp(3, 1.5)),
    "L2 of any length": (distances.LpDistance, L2, minus_lp(normalized=False)),
    "L2 squared of any length": (distances.LpDistance, {"power": 2, **L2}, minus_lp(2, 2, normalized=False)),
    "SNR": (distances.SNRDistance, {}, minus_snr),
}
"""By name: the class, its arguments, and the similarity."""


def mean_between(losses, low, high=math.inf):
    kept = losses[(losses > low) & (losses < high)]
    return kept.mean() if len(kept) else 0 * losses.sum()


def class_weights(num_classes):
    return torch.linspace(0.5, 1.5, num_classes)


REDUCERS = {
    "mean": (lambda _: reducers.MeanReducer(), lambda losses, weights: losses.mean()),
    "sum": (lambda _: reducers.SumReducer(), lambda losses, weights: losses.sum()),
    "positive": (lambda _: reducers.AvgNonZeroReducer(), lambda losses, weights: mean_between(losses, 0)),
    "threshold": (
        lambda _: reducers.ThresholdReducer(low=0.5, high=3.0),
        lambda losses, weights: mean_between(losses, 0.5, 3.0),
    ),
    "class weights": (reducers.ClassWeightedReducer, lambda losses, weights: (losses * weights).mean()),
    "per anchor": (lambda _: reducers.PerAnchorReducer(), lambda losses, weights: losses.mean()),
    "divisor": (lambda _: reducers.DivisorReducer(), lambda losses, weights: losses.mean()),
}
"""By name: PML's, made with the weights of classes, and the result, with the weights of samples."""

WEIGHT_REGULARIZERS = {
    None: lambda per_class: None,
    "length": lambda per_class: regularizers.LpRegularizer(),
    "entropy": lambda per_class: ProxyEntropyRegularizer(per_class, temperature=0.5),
    "face": lambda per_class: regularizers.RegularFaceRegularizer(),
}

LAYOUTS = {
    "plain": (lambda b, d: (b, d), lambda s, b, d: s),
    "not a leaf": (lambda b, d: (b, d), lambda s, b, d: s * 1),
    "transposed": (lambda b, d: (d, b), lambda s, b, d: s.T),
    "every other": (lambda b, d: (2 * b, 2 * d), lambda s, b, d: s[1::2, ::2]),
    "inference": (lambda b, d: (b, d), lambda s, b, d: made_in_inference_mode(s)),
    "one row, expanded": (lambda b, d: (1, d), lambda s, b, d: s.expand(b, d)),
    "overlapping rows": (lambda b, d: (b + d,), lambda s, b, d: s.unfold(0, d, 1)[:b]),
}
"""By name: the shape of a leaf, and the embeddings made of it. The last two add gradients up."""


def made_in_inference_mode(source):
    with torch.inference_mode():
        return source * 1


def draw(seed):
    rng = random.Random(seed)

    def one_of(*values):
        return rng.choice(values)

    dtypes = f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    same, views, num_classes = one_of(f64, f64, f32, f32, *dtypes), one_of(1, 1, 1, 2, 3), one_of(1, 2, 3, 4, 5, 7)
    dtype, proxy_dtype = one_of((same, same), (same, same), (same, f32), (same, one_of(*dtypes)))
    precise = torch.promote_types(torch.promote_types(dtype, proxy_dtype), f32)
    distance = one_of(*["cosine"] * 8, *DISTANCES)
    extreme, batch = distance == "cosine" and rng.random() < 0.3, views * one_of(0, 1, 1, 2, 3, 4, 5)
    # Rounding in a short dtype would change which proxy is nearest.
    weight_regularizers = [None] * 4 + ["length", "entropy", "face" if proxy_dtype in (f32, f64) else None]
    settings = {
        "num_classes": num_classes,
        # The variance of a few numbers may be next to nothing, and the SNR unbounded.
        "embedding_size": one_of(5, 6, 8) if distance == "SNR" else one_of(2, 3, 4, 6, 8),
        "proxies_per_class": one_of(1, 2, 3, 4, 5),
        "pooling": one_of("max", "softmax", "logsumexp"),
        "scale": one_of(0.5, 3.0, 10.0, 30.0),
        "temperature": one_of(0.05, 0.1, 0.5, 2.0),
        "margin": one_of(0.0, 0.1, 0.5, -0.2),
        "intra_weight": one_of(0.0, 0.25, 1.0),
        "inter_weight": one_of(0.0, 0.0, 0.3),
        "balance_weight": one_of(0.0, 0.5, 1.0),
        "neighbor_weight": 0.0,  # test_neighbors.py has that term
        "usage_momentum": one_of(0.0, 0.5, 0.9, 0.99, 1.0),
        "views": views,
    }
    return SimpleNamespace(
        seed=seed,
        settings=settings,
        **settings,
        batch=batch,
        distance=distance,
        chunk=rng.randint(1, num_classes),
        dtype=dtype,
        proxy_dtype=proxy_dtype,
        precise=precise,
        extreme=extreme,
        layout=one_of(*list(LAYOUTS)[: None if dtype == precise else -2]),
        label_dtype=one_of(torch.int64, torch.int32, torch.uint8),
        strided_proxies=rng.random() < 0.2,
        alias=rng.random() < 0.2,
        mined=one_of(None, None, None, 0, 2, 3, 4),
        reducer=one_of(*["mean"] * 4, *REDUCERS),
        statistics=rng.random() < 0.3,
        distance_statistics=rng.random() < 0.2,
        # Near 100, all directions are alike, and rounding decides which proxy is the nearest other one.
        weight_regularizer=None if extreme or distance == "L2 of any length" else rng.choice(weight_regularizers),
        embedding_regularizer=batch > 0 and not extreme and rng.random() < 0.15,
        wants=one_of("both", "both", "both", "embeddings", "proxies"),
        mode=one_of("train", "train", "train", "eval", "no_grad"),
        autocast=one_of(*[None] * 6, bf16, f16) if precise == f32 else None,
        autocast_backward=rng.random() < 0.3,
        doubled=rng.random() < 0.2,
        edit=one_of(None, None, None, None, "proxies", "embeddings"),
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
    loss_func = (Doubled if case.doubled else MultiProxyEntropyLoss)(
        **case.settings,
        classes_per_chunk=chunk,
        distance=cls(collect_stats=case.distance_statistics, **arguments),
        reducer=REDUCERS[case.reducer][0](class_weights(case.num_classes)),
        collect_stats=case.statistics,
        weight_regularizer=WEIGHT_REGULARIZERS[case.weight_regularizer](case.proxies_per_class),
        weight_reg_weight=0.3,
        embedding_regularizer=regularizers.LpRegularizer() if case.embedding_regularizer else None,
        embedding_reg_weight=0.2,
    ).to(case.proxy_dtype)
    loss_func.train(case.mode != "eval")
    proxies = lengthened(
        case, torch.randn(case.num_classes, case.proxies_per_class, case.embedding_size), case.proxy_dtype
    )
    loss_func.proxies.data = proxies.mT.contiguous().mT if case.strided_proxies else proxies
    loss_func.proxies.requires_grad_(case.wants != "embeddings")
    loss_func.proxy_usage.copy_((3 * torch.randn_like(loss_func.proxy_usage)).softmax(dim=1))
    shape, view = LAYOUTS[case.layout]
    source = lengthened(case, torch.randn(shape(case.batch, case.embedding_size)), case.dtype)
    source.requires_grad_(case.wants != "proxies" and case.layout != "inference")
    labels = torch.randint(case.num_classes, (case.batch // case.views,)).repeat(case.views).to(case.label_dtype)
    mined = None
    if case.mined is not None and case.batch:
        count = 0 if case.mined == 0 else int(torch.randint(1, 6, ()))
        mined = tuple(torch.randint(case.batch, (count,)) for _ in range(case.mined or 4))
    return loss_func, source, lambda source: view(source, case.batch, case.embedding_size), labels, mined


def lengthened(case, vectors, dtype):
    """The vectors at lengths that their dtype can just hold, or where they should be by the distance."""
    shape = *vectors.shape[:-1], 1
    vectors = vectors * (0.5 + torch.rand(shape)) + (100 if case.distance == "L2 of any length" else 0)
    if case.extreme:
        lengths = [0, 2**-12, 2**-8, 1, 1e4] if dtype == torch.float16 else [0, 1e-13, 1e-4, 1, 1e10, 1e30]
        vectors = unit(vectors) * torch.tensor(lengths)[torch.randint(len(lengths), shape)]
    return vectors.to(dtype)


def evaluate(case, made, noise=0.0, seed=0):
    """The values and gradients that a call should have. ``noise``: of inputs and similarities, relative."""
    loss_func, source, view, labels, mined = made
    generator = torch.Generator().manual_seed(seed)
    labels, samples = labels.long(), torch.arange(case.batch)
    x = view(source).detach().clone().double().requires_grad_()
    w = loss_func.proxies.detach().double().requires_grad_()

    def noisy(values, size):
        return values + noise * size * torch.randn(values.shape, dtype=torch.float64, generator=generator)

    short = [2.0**-10 if dtype == torch.float16 else 1e-12 for dtype in (case.dtype, case.proxy_dtype)]
    rows = noisy(x, x.detach()).unsqueeze(1).expand(-1, case.num_classes * case.proxies_per_class, -1)
    columns = noisy(w, w.detach()).flatten(0, 1).expand(case.batch, -1, -1)
    pairs = DISTANCES[case.distance][2](rows, columns, short)
    largest = pairs.detach().abs().amax(dim=1, keepdim=True)
    s = noisy(pairs, largest).unflatten(1, (case.num_classes, case.proxies_per_class))

    own = s[samples, labels]
    log_q = (own / case.temperature).log_softmax(dim=1)
    q = log_q.exp()
    if case.pooling == "max":
        z = s.amax(dim=2)
    elif case.pooling == "softmax":
        z = ((s / case.temperature).softmax(dim=2) * s).sum(dim=2)
    else:
        z = (case.scale * s).logsumexp(dim=2) / case.scale
    target = torch.nn.functional.one_hot(labels, case.num_classes).double()
    classification = -(case.scale * (z - case.margin * target)).log_softmax(dim=1)[samples, labels]
    log_p = (case.scale * z).log_softmax(dim=1)
    inter = -(log_p.exp() * log_p).sum(dim=1)
    blocks = log_q.unflatten(0, (case.views, -1))
    compared = -torch.einsum("aik,bik->iab", blocks.exp(), blocks)
    other = 1 - torch.eye(case.views) if case.views > 1 else torch.ones(1, 1)
    intra = ((compared * other).sum(dim=2) / max(case.views - 1, 1)).T.flatten()

    usage = loss_func.proxy_usage.detach().double().clone()
    for c in labels.unique() if case.mode == "train" else ():
        kept = case.usage_momentum ** int((labels == c).sum())
        usage[c] = kept * usage[c] + (1 - kept) * q[labels == c].detach().mean(dim=0)
    log_usage = usage.float().double().clamp_min(1e-6).log()[labels]
    balance = (q * log_usage).sum(dim=1)

    spread = case.inter_weight * (math.log(case.num_classes) - inter)
    losses = (
        classification
        + case.intra_weight * intra
        + spread
        + case.balance_weight * (math.log(case.proxies_per_class) + balance)
    )
    mined_weights = miner_weights(mined, case.batch)
    weighted = losses * mined_weights * (2 if case.doubled else 1)
    loss = REDUCERS[case.reducer][1](weighted, class_weights(case.num_classes).double()[labels])
    loss = loss if case.batch else 0 * x.sum()
    face, directions = 0.0, unit(w.flatten(0, 1))
    if case.weight_regularizer == "length":
        loss = loss + 0.3 * w.norm(dim=2).mean()
    elif case.weight_regularizer == "entropy":
        within = unit(w) @ unit(w).mT / 0.5
        loss = loss - 0.3 * within.log_softmax(dim=2).diagonal(dim1=1, dim2=2).mean()
    elif case.weight_regularizer == "face":
        others = directions @ directions.T - 3 * torch.eye(len(directions))
        face = others.topk(min(2, len(others))).values
        loss = loss + 0.3 * (face[:, 0] + (3 if len(others) == 1 else 0)).mean()
    if case.embedding_regularizer:
        loss = loss + 0.2 * x.norm(dim=1).mean()

    slopes = torch.autograd.grad(pairs.sum(), [rows, columns], retain_graph=True)
    of_losses, *gradients = torch.autograd.grad(loss, [losses, x, w], allow_unused=True, materialize_grads=True)
    # The largest sum of terms that may have cancelled to a gradient: by these, rounding is measured.
    steepest = case.scale * (1 + case.inter_weight) + (case.intra_weight + 14 * case.balance_weight) / case.temperature
    of_samples = of_losses.abs().view(case.views, -1).amax(dim=0).repeat(case.views)  # each view is in all their losses
    steepness = (of_samples * steepest).unsqueeze(1)
    terms = []
    for i, (vectors, slope) in enumerate(zip((rows, columns), slopes, strict=True)):
        along = pairs.abs() / vectors.norm(dim=2).clamp_min(short[i])  # normalizing takes this part of a slope away
        terms.append((steepness * (slope.abs().amax(dim=2) + along)).sum(dim=1 - i))
    terms = [terms[0].unsqueeze(1), terms[1].view(*w.shape[:2], 1)]
    if case.weight_regularizer:
        rounding = torch.finfo(case.proxy_dtype).eps / torch.finfo(case.precise).eps
        terms[1] = terms[1] + rounding / w.norm(dim=2, keepdim=True)

    # How far the case is from each jump of a gradient, relative to the size of the numbers that decide.
    gaps = [face[:, 0] - face[:, -1]] if case.weight_regularizer == "face" else []
    if case.pooling == "max":
        gaps.append((s.topk(min(2, case.proxies_per_class)).values.diff().abs()) / largest.unsqueeze(2))
    if case.reducer in ("positive", "threshold"):
        size, counted = 2 * (1 + steepest * largest), mined_weights > 0
        # One evaluation may round to 0 what is above it in another.
        gaps += [((weighted - jump).abs() + 1e-99)[counted] / size[counted, 0] for jump in (0.0, 0.5, 3.0)]
    if case.distance == "L1":
        gaps.append((unit(rows, p=1) - unit(columns, p=1)).abs())
    gaps = torch.cat([gap.detach().flatten() for gap in gaps] or [torch.zeros(0)])

    negative_entropy, nearest = (q * log_q).sum(dim=1), q.argmax(dim=1).view(case.views, -1)
    information = negative_entropy - balance
    effective = torch.stack([information[labels == c].mean().exp() for c in labels.unique()] or [torch.ones(())])
    statistics = {
        "classification_loss": classification.mean(),
        "intra_class_entropy": intra.mean(),
        "inter_class_entropy": inter.mean(),
        "balance": math.log(case.proxies_per_class) + balance.mean(),
        "proxies_in_use": (usage >= 0.1 / case.proxies_per_class).double().mean(),
        "usage_perplexity": torch.special.entr(usage).sum(dim=1).exp().mean(),
        "effective_proxies": effective.mean(),
        "min_effective_proxies": effective.min(),
        "views_agree": (nearest == nearest[0]).all(dim=0).double().mean(),
    }
    p, normalized = loss_func.distance.p, loss_func.distance.normalize_embeddings
    for name, vectors in (("query", x), ("ref", w.flatten(0, 1))):
        lengths = vectors.norm(p, dim=1).mean()
        statistics |= {f"initial_avg_{name}_norm": lengths}
        statistics |= {f"final_avg_{name}_norm": torch.ones(()) if normalized else lengths}
    values = {"loss": loss, "usage": usage, "logits": case.scale * z, "assignments": q, **statistics}
    values = {name: value.detach().double() for name, value in values.items()}
    return SimpleNamespace(values=values, gradients=gradients, terms=terms, gaps=gaps[gaps != 0])


class Expected:
    """The values and gradients that a call should have, and how far rounding may take them from there."""

    TIMES, UNITS = 4, 32
    """How many times the change by inputs that are a unit of rounding off, and how many units of rounding beside."""

    def __init__(self, case, made):
        self.eps = torch.finfo(case.autocast if is_rounded(case) else case.precise).eps
        exact = evaluate(case, made)
        others = [evaluate(case, made, self.eps, seed) for seed in (1, 2, 3)]
        self.is_clear = bool((exact.gaps > 16 * self.eps).all())
        self.values, self.gradients = {}, []
        of_leaves = [torch.finfo(dtype).eps for dtype in (case.dtype, case.proxy_dtype)]
        for name, value in exact.values.items():
            change = max(size(other.values[name] - value) for other in others)
            unit = self.eps if name in ("loss", "logits", "assignments") else max(self.eps, 1.2e-7)
            if name.endswith("_norm"):
                unit = max(unit, *of_leaves)
            if name == "loss" and (case.weight_regularizer or case.embedding_regularizer):
                unit = max(unit, *of_leaves)  # PML adds in the dtype of the embeddings
            self.values[name] = value, self.TIMES * change + self.UNITS * unit * max(1.0, size(value))
        for i, dtype in enumerate((case.dtype, case.proxy_dtype)):
            gradient, of_leaf = exact.gradients[i], torch.finfo(dtype)
            changes = [(other.gradients[i] - gradient).abs() for other in others]
            largest = gradient.abs().amax(dim=-1, keepdim=True)
            allowed = self.TIMES * torch.stack(changes).amax(dim=(0, -1)).unsqueeze(-1)
            allowed = allowed + (self.UNITS * self.eps + 4 * of_leaf.eps) * largest + of_leaf.tiny
            allowed = allowed + self.UNITS * self.eps * exact.terms[i]
            self.gradients.append((gradient, allowed.expand_as(gradient)))


def is_rounded(case):
    """Whether the similarities are rounded to the dtype of autocast."""
    in_backward = case.autocast_backward and DISTANCES[case.distance][0] is not distances.LpDistance
    return case.autocast is not None and (case.distance == "cosine" or in_backward)


def size(values):
    return values.abs().max().item() if values.numel() else 0.0


def autocast(case, enabled=True):
    return torch.autocast("cpu", case.autocast) if case.autocast and enabled else nullcontext()
