"""Random cases for the fuzz: what is drawn, and the loss, the tensors and their memory that come of it."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import fuzz_reference as reference
import torch
from pytorch_metric_learning import distances, reducers, regularizers
from pytorch_metric_learning.distances import BaseDistance
from torch.nn.utils import parametrizations, parametrize

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.regularizers import ProxyEntropyRegularizer


class LearnedFactor(BaseDistance):
    """A distance of PML, times a parameter."""

    def __init__(self):
        super().__init__(normalize_embeddings=False)
        self.factor = torch.nn.Parameter(torch.tensor(0.7))

    def compute_mat(self, query_emb, ref_emb):
        return self.factor * (query_emb.unsqueeze(1) - ref_emb).abs().sum(dim=2)


class Mahalanobis(BaseDistance):
    def __init__(self, size):
        super().__init__(normalize_embeddings=False)
        self.matrix = torch.nn.Parameter(torch.eye(size) + 0.3 * torch.randn(size, size))

    def compute_mat(self, query_emb, ref_emb):
        return ((query_emb @ self.matrix).unsqueeze(1) - ref_emb @ self.matrix).square().sum(dim=2)


class InverseDistance(BaseDistance):
    """An own one of which larger is nearer, with a parameter."""

    def __init__(self):
        super().__init__(normalize_embeddings=False, is_inverted=True)
        self.offset = torch.nn.Parameter(torch.tensor(1.5))

    def compute_mat(self, query_emb, ref_emb):
        return 1 / (self.offset + (query_emb.unsqueeze(1) - ref_emb).square().sum(dim=2))


class BentCosine(distances.CosineSimilarity):
    """A subclass of the cosine that computes something else."""

    def compute_mat(self, query_emb, ref_emb):
        return super().compute_mat(query_emb, ref_emb) + 0.1 * query_emb.square() @ ref_emb.T


@dataclass(frozen=True)
class Kind:
    """A distance: how to make it for an embedding size, and the reference, which takes its parameters, too."""

    make: Callable[[int], BaseDistance]
    similarity: Callable
    any_length: bool = True
    """Whether embeddings may be long: the similarity grows at most as they do."""
    sharp: bool = False
    """Whether its slope depends on the direction that two points at the same place are apart in."""


def lp(p, power, normalize):
    return Kind(
        lambda size: distances.LpDistance(p=p, power=power, normalize_embeddings=normalize),
        lambda x, w: reference.minus_lp(x, w, p, power, normalize),
        any_length=normalize or power == 1,
        sharp=True,
    )


KINDS = {
    "cosine": Kind(lambda size: distances.CosineSimilarity(), reference.cosine),
    "cosine, p=1, cubed": Kind(
        lambda size: distances.CosineSimilarity(p=1, power=3), lambda x, w: reference.cosine(x, w, 1, 3)
    ),
    "dot product": Kind(lambda size: distances.DotProductSimilarity(normalize_embeddings=False), reference.products),
    "L2": lp(2, 1, True),
    "L2 of any length": lp(2, 1, False),
    "L2 squared of any length": lp(2, 2, False),
    "L1": lp(1, 1, True),
    "L3 to the 1.5": lp(3, 1.5, True),
    "SNR": Kind(lambda size: distances.SNRDistance(), reference.minus_snr),
    "learned factor": Kind(
        lambda size: LearnedFactor(), lambda x, w, factor: factor * reference.minus_lp(x, w, 1, 1, False), sharp=True
    ),
    "Mahalanobis": Kind(Mahalanobis, reference.minus_mahalanobis, any_length=False),
    "inverse distance": Kind(lambda size: InverseDistance(), reference.inverse_distance, any_length=False),
    "bent cosine": Kind(lambda size: BentCosine(), reference.bent_cosine),
}

SCENARIOS = {  # and how often
    "step": 8,
    "sequence": 2,
    "edit": 3,
    "twice": 1,
    "several": 2,
    "checkpoint": 1,
    "reseed": 2,
    "not finite": 1,
    "refusal": 1,
}
EMBEDDING_LAYOUTS = (
    "contiguous",
    "transposed",
    "transposed leaf",
    "every other column",
    "every other row",
    "inner columns",
    "not a leaf",
    "labels in the same memory",
    "one row, expanded",
    "overlapping rows",
)
SUMMING_LAYOUTS = ("one row, expanded", "overlapping rows")
LABEL_LAYOUTS = ("contiguous", "every other", "expanded", "int32", "int16", "uint8")
PROXY_LAYOUTS = (
    "as made",
    "classes and proxies transposed",
    "dimensions first",
    "every other column",
    "assigned from a state_dict",
    "functional_call",
    "functional_call, expanded",
    "orthogonal",
    "weight_norm",
    "transposed by a parametrization",
)
DATA_LAYOUTS = PROXY_LAYOUTS[:5]
REDUCERS = {
    "mean": reducers.MeanReducer,
    "sum": reducers.SumReducer,
    "positive": reducers.AvgNonZeroReducer,
    "class weights": reducers.ClassWeightedReducer,
    "divisor": reducers.DivisorReducer,
    "per anchor": reducers.PerAnchorReducer,
}
LENGTHS = (0.3, 1.0, 3.0, 30.0, 300.0, 3000.0)
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
"""By the size of an item."""


@dataclass(frozen=True)
class Case:
    seed: int
    scenario: str
    num_classes: int
    per_class: int
    size: int
    batch: int
    views: int
    pooling: str
    scale: float
    temperature: float
    margin: float
    intra: float
    inter: float
    balance: float
    momentum: float
    distance: str
    per_chunk: int | None
    dtype: torch.dtype
    embedding_dtype: torch.dtype
    length: float
    training: bool
    embedding_layout: str
    label_layout: str
    proxy_layout: str
    alias: bool
    mined: int | None
    reducer: str
    collect_stats: bool
    weight_regularizer: str | None
    embedding_regularizer: bool
    wants: str
    autocast: tuple[bool, bool]
    autocast_dtype: torch.dtype

    @property
    def settings(self):
        return reference.Settings(
            self.pooling, self.scale, self.temperature, self.margin, self.intra, self.inter, self.balance, self.views
        )

    @property
    def rounded(self):
        """Whether products are in a dtype of less precision."""
        return any(self.autocast) and self.dtype == torch.float32


def draw(seed):
    """The case of this seed."""
    rng = random.Random(seed)
    scenario = rng.choices(list(SCENARIOS), list(SCENARIOS.values()))[0]
    distance = rng.choice(["cosine"] * 8 + list(KINDS))
    dtype = rng.choice([torch.float64, torch.float64, torch.float32])
    embedding_dtype = rng.choice([dtype] * 4 + [torch.float32, torch.bfloat16, torch.float16])
    if torch.promote_types(dtype, embedding_dtype) != dtype or scenario in ("sequence", "reseed"):
        embedding_dtype = dtype
    if long := rng.random() < 0.05:
        distance, dtype, embedding_dtype = "dot product", torch.float32, torch.float32
    large = distance == "cosine" and scenario == "step" and rng.random() < 0.03
    views = rng.choice([1, 1, 1, 2, 3])
    layouts = EMBEDDING_LAYOUTS if embedding_dtype == dtype else set(EMBEDDING_LAYOUTS) - set(SUMMING_LAYOUTS)
    autocast = rng.choice([(True, True), (True, False), (False, True)]) if rng.random() < 0.15 else (False, False)
    reducer = rng.choice(["mean"] * 5 + list(REDUCERS))
    num_classes = 600 if large else rng.choice([1, 2, 3, 4, 5, 7])
    regularized = rng.random() < 0.2 and embedding_dtype == dtype and not any(autocast)
    plain = scenario in ("sequence", "reseed", "not finite")
    length = rng.choice(LENGTHS[-2:] if long else LENGTHS) if KINDS[distance].any_length else 1.0
    return Case(
        seed=seed,
        scenario=scenario,
        num_classes=num_classes,
        per_class=8 if large else rng.choice([1, 2, 3, 4, 5]),
        # The variance of two or three numbers is now and then next to nothing, and what is divided by it unbounded.
        size=rng.choice([4, 6, 8] if distance == "SNR" else [2, 3, 4, 6, 8]),
        batch=60 if large else views * rng.choice([0, 1, 1, 2, 3, 4, 5]),
        views=views,
        pooling=rng.choice(["max", "softmax", "logsumexp"]),
        scale=rng.choice([0.5, 3.0, 10.0, 30.0]),
        temperature=rng.choice([0.05, 0.1, 0.5, 2.0]),
        margin=rng.choice([0.0, 0.1, 0.5, -0.2]),
        intra=rng.choice([0.0, 0.25, 1.0]),
        inter=rng.choice([0.0, 0.0, 0.3]),
        balance=rng.choice([0.0, 0.5, 1.0]),
        momentum=rng.choice([0.0, 0.5, 0.9, 0.99, 1.0]),
        distance=distance,
        per_chunk=None if large else rng.choice([None, None, 1, 2, 3, num_classes, num_classes + 1]),
        dtype=dtype,
        embedding_dtype=embedding_dtype,
        length=length,
        training=rng.random() < 0.7,
        embedding_layout="contiguous" if plain else rng.choice(sorted(layouts)),
        label_layout=rng.choice(LABEL_LAYOUTS[:3] if large else LABEL_LAYOUTS),
        proxy_layout=rng.choice(DATA_LAYOUTS if plain else ("as made", *PROXY_LAYOUTS)),
        alias=rng.random() < 0.2,
        mined=rng.choice([None, None, None, 0, 3, 4]),
        reducer=reducer,
        collect_stats=rng.random() < 0.2,
        weight_regularizer=rng.choice([None, "length", "entropy"]) if regularized else None,
        embedding_regularizer=regularized and rng.random() < 0.5,
        wants=rng.choice(["all", "all", "all", "embeddings", "proxies", "nothing"]),
        autocast=autocast,
        # In float16, gradients of long vectors overflow.
        autocast_dtype=torch.bfloat16 if length > 100 else rng.choice([torch.bfloat16, torch.float16]),
    )


class Drawn:
    """The loss and the tensors of a case."""

    def __init__(self, case, reseed_below=0.0, reducer=None):
        torch.manual_seed(case.seed)
        self.case, self.kind = case, KINDS[case.distance]
        self.class_weights = 0.5 + torch.rand(case.num_classes)
        self.loss_func = make_loss(case, self.class_weights, reseed_below, reducer)
        self.place_proxies()
        self.draw_batch()
        self.set_requires_grad()

    def draw_batch(self):
        self.source, self.view, self.labels = make_batch(self.case)
        self.mined = make_tuple(self.case)

    def place_proxies(self):
        self.call, self.current_proxies, self.proxy_leaves = place_proxies(self.loss_func, self.case)

    def set_requires_grad(self):
        wants = self.case.wants
        self.source.requires_grad_(wants in ("all", "embeddings"))
        for leaf in self.proxy_leaves:
            leaf.requires_grad_(wants in ("all", "proxies"))

    @property
    def distance_leaves(self):
        return list(self.loss_func.distance.parameters())

    @property
    def leaves(self):
        """By name, those that should get a gradient."""
        named = {"embeddings": self.source}
        named |= {f"proxies {i}": leaf for i, leaf in enumerate(self.proxy_leaves)}
        named |= {f"distance {i}": leaf for i, leaf in enumerate(self.distance_leaves)}
        return {name: leaf for name, leaf in named.items() if leaf.requires_grad}

    def embeddings(self):
        return self.view(self.source)

    def alias_term(self):
        """Something else that the memory of the embeddings takes part in."""
        return 0.1 * self.source.square().mean() if self.case.alias else 0.0


def make_loss(case, class_weights, reseed_below, reducer):
    distance = KINDS[case.distance].make(case.size)
    distance.collect_stats = case.collect_stats
    if reducer is None:
        kind = REDUCERS[case.reducer]
        reducer = kind(weights=class_weights) if case.reducer == "class weights" else kind()
    loss_func = MultiProxyEntropyLoss(
        case.num_classes,
        case.size,
        case.per_class,
        pooling=case.pooling,
        scale=case.scale,
        temperature=case.temperature,
        margin=case.margin,
        intra_weight=case.intra,
        inter_weight=case.inter,
        balance_weight=case.balance,
        usage_momentum=case.momentum,
        reseed_below=reseed_below,
        views=case.views,
        classes_per_chunk=case.per_chunk,
        distance=distance,
        reducer=reducer,
        collect_stats=case.collect_stats,
        weight_regularizer=make_weight_regularizer(case),
        weight_reg_weight=0.3,
        embedding_regularizer=regularizers.LpRegularizer() if case.embedding_regularizer else None,
        embedding_reg_weight=0.2,
    ).to(case.dtype)
    loss_func.train(case.training)
    loss_func.proxies.data *= 0.5 + torch.rand(case.num_classes, case.per_class, 1)
    loss_func.proxy_usage.copy_((3 * torch.randn_like(loss_func.proxy_usage)).softmax(dim=1))
    return loss_func


def make_weight_regularizer(case):
    if case.weight_regularizer is None:
        return None
    if case.weight_regularizer == "length":
        return regularizers.LpRegularizer()
    return ProxyEntropyRegularizer(case.per_class, temperature=0.5)


def make_batch(case):
    """A leaf, the function from it to the embeddings, and labels."""
    values = torch.randint(case.num_classes, (case.batch // case.views,)).repeat(case.views)
    source, view = lay_out_embeddings(case)
    source = (case.length * source / math.sqrt(case.size)).to(case.embedding_dtype)
    if case.embedding_layout == "transposed leaf":
        source = source.T
    if case.embedding_layout == "labels in the same memory":
        labels = source[:, -1].view(INTEGERS[source.itemsize])
        labels.copy_(values)
        return source, view, labels
    return source, view, lay_out_labels(values, case.label_layout)


def lay_out_embeddings(case):
    rows, size = case.batch, case.size
    return {
        "contiguous": lambda: (torch.randn(rows, size), lambda s: s),
        "transposed": lambda: (torch.randn(size, rows), lambda s: s.T),
        "transposed leaf": lambda: (torch.randn(size, rows), lambda s: s),
        "every other column": lambda: (torch.randn(rows, 2 * size), lambda s: s[:, ::2]),
        "every other row": lambda: (torch.randn(2 * rows, size), lambda s: s[1::2]),
        "inner columns": lambda: (torch.randn(rows, size + 3), lambda s: s[:, 2 : 2 + size]),
        "not a leaf": lambda: (torch.randn(rows, size), lambda s: s + 0),
        "labels in the same memory": lambda: (torch.randn(rows, size + 1), lambda s: s[:, :size]),
        "one row, expanded": lambda: (torch.randn(1, size), lambda s: s.expand(rows, size)),
        "overlapping rows": lambda: (torch.randn(rows + size), lambda s: s.unfold(0, size, 1)[:rows]),
    }[case.embedding_layout]()


def lay_out_labels(values, layout):
    if layout == "every other":
        return values.repeat_interleave(2)[::2]
    if layout == "expanded":
        return values[:1].expand(len(values))
    if layout == "contiguous":
        return values
    return values.to(getattr(torch, layout))


def make_tuple(case):
    """What a miner of triplets or pairs might return; of length 0: it found nothing."""
    if case.mined is None or not case.batch:
        return None
    if case.mined == 0:
        return (torch.zeros(0, dtype=torch.long),) * 4
    positive, negative = (torch.randint(1, 6, ()).item() for _ in range(2))
    counts = (positive,) * 3 if case.mined == 3 else (positive, positive, negative, negative)
    return tuple(torch.randint(case.batch, (count,)) for count in counts)


class Transposed(torch.nn.Module):
    """A parametrization whose classes and proxies cannot be merged into rows without a copy."""

    def forward(self, original):
        return original.transpose(0, 1)

    def right_inverse(self, proxies):
        return proxies.transpose(0, 1).contiguous()


def strided(proxies, layout):
    """The same values, laid out otherwise."""
    if layout == "classes and proxies transposed" or layout == "assigned from a state_dict":
        return proxies.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "dimensions first":
        return proxies.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    return proxies.repeat_interleave(2, dim=2)[..., ::2]


def place_proxies(loss_func, case):
    """How to call the loss, how to read its proxies with their graph, and the leaves behind them."""
    layout, proxies = case.proxy_layout, loss_func.proxies.detach().clone()
    if layout.startswith("functional_call"):
        if layout.endswith("expanded"):
            source, view = proxies[:, :1].clone(), lambda s: s.expand(proxies.shape)
        else:
            source, view = proxies.transpose(0, 1).contiguous(), lambda s: s.transpose(0, 1)
        loss_func.proxies.data = view(source).clone()
        return (
            lambda *args: torch.func.functional_call(loss_func, {"proxies": view(source)}, args),
            lambda: view(source),
            [source],
        )
    if layout == "assigned from a state_dict":
        loss_func.load_state_dict(loss_func.state_dict() | {"proxies": strided(proxies, layout)}, assign=True)
    elif layout in DATA_LAYOUTS[1:]:
        loss_func.proxies.data = strided(proxies, layout)
    elif layout == "orthogonal":
        parametrizations.orthogonal(loss_func, "proxies")
    elif layout == "weight_norm":
        parametrizations.weight_norm(loss_func, "proxies")
    elif layout == "transposed by a parametrization":
        parametrize.register_parametrization(loss_func, "proxies", Transposed(), unsafe=True)
    of_distance = {id(parameter) for parameter in loss_func.distance.parameters()}
    leaves = [parameter for parameter in loss_func.parameters() if id(parameter) not in of_distance]
    return loss_func, lambda: loss_func.proxies, leaves
