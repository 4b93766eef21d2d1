"""The loss of each sample with its analytic gradient, some classes at a time.

Plain autograd keeps several tensors of the size of all similarities. Here, chunks of classes are small enough to stay
in a processor's cache from the matrix product that writes their similarities to the one that reads their gradient.
Backward finds the class similarities of each chunk kept, with the derivative of the pooling, or computes them once
more. Both are exact.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import functional
from ._class_softmax import ClassSoftmax
from ._poolings import POOLINGS, Pooling
from ._similarities import Similarity

DENSE_BYTES = 2**28
"""While all similarities would take no more than this, backward finds kept what it needs of them."""

CHUNK_BYTES = 2**22
"""What the similarities of a chunk take."""


class Plan(NamedTuple):
    classes_per_chunk: int
    keep: bool
    """Whether backward finds what forward computed, or computes it once more."""


def make_plan(
    classes_per_chunk: int | None, batch_size: int, num_classes: int, per_class: int, dtype: torch.dtype
) -> Plan:
    """By the sizes alone, and ``classes_per_chunk`` where given, unless it is all of them.

    >>> make_plan(None, 256, 11318, 5, torch.float32), make_plan(None, 256, 100_000, 10, torch.float32)
    (Plan(classes_per_chunk=819, keep=True), Plan(classes_per_chunk=409, keep=False))
    """
    bytes_per_class = max(batch_size, 1) * per_class * dtype.itemsize
    in_cache = max(CHUNK_BYTES // bytes_per_class, 1)
    if classes_per_chunk is None:
        return Plan(in_cache, keep=num_classes * bytes_per_class <= DENSE_BYTES)
    if classes_per_chunk >= num_classes:
        return Plan(in_cache, keep=True)
    return Plan(classes_per_chunk, keep=False)


@dataclass(frozen=True)
class Settings:
    similarity: Similarity
    pooling: str
    scale: float
    temperature: float
    margin: float
    weights: functional.Weights
    update_usage: Callable[[Tensor], Tensor]
    """From the assignments, ``(B, K)``, to the usage of each sample's class, ``(B, K)``."""
    plan: Plan

    def pool(self, similarities: Tensor) -> Pooling:
        return POOLINGS[self.pooling](similarities, self.scale, self.temperature)


def loss_and_terms(
    queries: Tensor, proxies: Tensor, labels: Tensor, settings: Settings
) -> tuple[Tensor, functional.Terms]:
    """The loss of each sample, ``(B,)``, and the terms that it is made of, which carry no gradient.

    Args:
        queries: ``(B, D)``, as ``settings.similarity`` wants them.
        proxies: ``(C, K, D)``, of the same dtype.
        labels: ``(B,)``, long.
        settings: everything else.
    """
    loss, *terms = _Loss.apply(queries, proxies, labels, settings)  # type: ignore[no-untyped-call]
    return loss, functional.Terms(*terms)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, proxies: Tensor, labels: Tensor, settings: Settings) -> Any:
        over_classes = ClassSoftmax(queries.new_empty(len(queries)))
        own, own_pooled = queries.new_zeros(len(queries), proxies.shape[1]), queries.new_zeros(len(queries))
        kept = []
        for chunk in _chunks(proxies, labels, settings):
            similarities = chunk.similarities(queries)
            own = torch.where(chunk.inside.unsqueeze(1), similarities[chunk.place], own)
            pooling = settings.pool(similarities)
            own_pooled = torch.where(chunk.inside, pooling.pooled[chunk.own, chunk.samples], own_pooled)
            over_classes.add(settings.scale * pooling.pooled, chunk.own, chunk.inside)
            if settings.plan.keep:
                kept.append((pooling.pooled, pooling.differentiate()))
        over_classes.close(settings.scale * own_pooled, settings.scale * settings.margin)
        within_class = _WithinClass(own, settings)
        terms = functional.Terms(
            over_classes.classification, within_class.intra, over_classes.entropy, within_class.balance
        )
        ctx.save_for_backward(queries, proxies, labels)
        ctx.settings, ctx.kept, ctx.over_classes, ctx.within_class = settings, kept, over_classes, within_class
        ctx.mark_non_differentiable(*terms)
        loss = functional.sample_loss(terms, settings.weights, proxies.shape[0], proxies.shape[1])
        return loss, *terms

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor, *_: Any) -> Any:
        if torch.is_grad_enabled():  # PyTorch's once_differentiable would let gradients pass that are wrong
            raise RuntimeError("the gradient of MultiProxyEntropyLoss cannot be differentiated: drop create_graph=True")
        queries, proxies, labels = ctx.saved_tensors
        settings: Settings = ctx.settings
        ctx.over_classes.begin(of_loss, -settings.weights.inter * of_loss)
        of_own = ctx.within_class.gradient(of_loss)
        of_queries, of_proxies = torch.zeros_like(queries), torch.empty_like(proxies)
        for i, chunk in enumerate(_chunks(proxies, labels, settings)):
            if settings.plan.keep:
                pooled, unpool = ctx.kept[i]
            else:
                pooling = settings.pool(chunk.similarities(queries))
                pooled, unpool = pooling.pooled, pooling.differentiate()
            of_pooled = ctx.over_classes.gradient(settings.scale * pooled, chunk.own, chunk.inside)
            of_similarities = unpool(of_pooled.mul_(settings.scale))
            of_similarities[chunk.place] += torch.where(chunk.inside.unsqueeze(1), of_own, 0)
            chunk.add_gradients(queries, of_similarities, of_queries, of_proxies)
        return of_queries, of_proxies, None, None


class _WithinClass:
    """The terms over the proxies of the own class, out of the similarities to them, ``(B, K)``, and their gradient."""

    def __init__(self, own: Tensor, settings: Settings) -> None:
        self.settings = settings
        self.log_q = F.log_softmax(own / settings.temperature, dim=1)
        self.q = self.log_q.exp()
        self.intra = -(self.q * self.log_q).sum(dim=1)
        self.log_usage = settings.update_usage(self.q).clamp_min(functional.MIN_USAGE).log()
        self.balance = (self.q * self.log_usage).sum(dim=1)

    def gradient(self, of_loss: Tensor) -> Tensor:
        weights = self.settings.weights
        of_balance = self.log_usage - self.balance.unsqueeze(1)
        of_intra = self.log_q + self.intra.unsqueeze(1)
        of_assignment = weights.balance * of_balance - weights.intra * of_intra
        return of_assignment.mul_(self.q).mul_((of_loss / self.settings.temperature).unsqueeze(1))


class _Chunk:
    """Some classes. ``own`` is where the class of each sample stands among them, if ``inside``; some place if not."""

    def __init__(self, proxies: Tensor, labels: Tensor, start: int, settings: Settings) -> None:
        stop = min(start + settings.plan.classes_per_chunk, len(proxies))
        per_class = proxies.shape[1]
        self.similarity, self.shape = settings.similarity, (stop - start, per_class, len(labels))
        self.proxies, self.rows = proxies[start:stop].flatten(0, 1), slice(start * per_class, stop * per_class)
        self.samples = torch.arange(len(labels), device=labels.device)
        self.own = (labels - start).clamp(0, stop - start - 1)
        self.inside = (labels >= start) & (labels < stop)
        self.place = self.own, slice(None), self.samples

    def similarities(self, queries: Tensor) -> Tensor:
        return self.similarity(queries, self.proxies, self.rows).view(self.shape)

    def add_gradients(self, queries: Tensor, gradient: Tensor, of_queries: Tensor, of_proxies: Tensor) -> None:
        of_rows = of_proxies.flatten(0, 1)[self.rows]
        self.similarity.add_gradients(queries, self.proxies, self.rows, gradient.flatten(0, 1), of_queries, of_rows)


def _chunks(proxies: Tensor, labels: Tensor, settings: Settings) -> Iterator[_Chunk]:
    for start in range(0, len(proxies), settings.plan.classes_per_chunk):
        yield _Chunk(proxies, labels, start, settings)
