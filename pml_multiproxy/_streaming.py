"""The loss of each sample with its analytic gradient, some classes at a time.

Plain autograd keeps several tensors of the size of all similarities. Here, chunks of classes are small enough to stay
in a processor's cache from the matrix product that writes their similarities to the one that reads their gradient.
Backward finds the class similarities of each chunk kept, with the derivative of the pooling, or computes them once
more. Both are exact.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import functional
from ._class_softmax import ClassSoftmax, Sums, sums_of_none
from ._own import Own
from ._poolings import POOLINGS, Pooling
from ._similarities import Similarity

DENSE_BYTES = 2**28
"""While all similarities would take no more than this, backward finds kept what it needs of them."""

CHUNK_BYTES = 2**21
"""What the similarities of a chunk take on a CPU, in whose cache they stay."""

CHUNK_BYTES_ELSEWHERE = 2**26
"""What they take on a GPU, which less would not keep busy."""


class Plan(NamedTuple):
    classes_per_chunk: int
    keep: bool
    """Whether backward finds what forward computed, or computes it once more."""


def make_plan(classes_per_chunk: int | None, batch_size: int, proxies: Tensor, dtype: torch.dtype) -> Plan:
    """By the sizes and the kind of device alone, and by ``classes_per_chunk`` where it asks for fewer than all.

    >>> make_plan(None, 256, torch.empty(11318, 5, 512), torch.float32)
    Plan(classes_per_chunk=409, keep=True)
    >>> make_plan(None, 256, torch.empty(100_000, 10, 128), torch.float32)
    Plan(classes_per_chunk=204, keep=False)
    """
    num_classes, per_class, _ = proxies.shape
    if classes_per_chunk is not None and classes_per_chunk < num_classes:
        return Plan(classes_per_chunk, keep=False)
    bytes_per_class = max(batch_size, 1) * per_class * dtype.itemsize
    chunk_bytes = CHUNK_BYTES if proxies.device.type == "cpu" else CHUNK_BYTES_ELSEWHERE
    keep = classes_per_chunk is not None or num_classes * bytes_per_class <= DENSE_BYTES
    return Plan(max(chunk_bytes // bytes_per_class, 1), keep)


class State(NamedTuple):
    """What the loss of each sample takes from all classes; each ``(B,)``, or made of such."""

    others: Sums
    """Over the classes that are not its own."""
    own_pooled: Tensor
    """The similarity to its own class, and the terms within that class. Not set where that class is in no chunk."""
    intra: Tensor
    balance: Tensor


def whole(state: State) -> State:
    """Where the chunks hold all classes, nothing is missing."""
    return state


class Settings(NamedTuple):
    num_classes: int
    """Of the loss: chunks may hold fewer, if ``complete`` adds the others."""
    similarity: Similarity
    pooling: str
    scale: float
    temperature: float
    margin: float
    weights: functional.Weights
    views: int
    update_usage: Callable[[Tensor], Tensor]
    """From the assignments, ``(B, K)``, to the usage of each sample's class, ``(B, K)``."""
    plan: Plan
    complete: Callable[[State], State] = whole
    """From the state over the classes of the chunks to that over all."""

    def pool(self, similarities: Tensor) -> Pooling:
        return POOLINGS[self.pooling](similarities, self.scale, self.temperature)


def loss_and_terms(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, settings: Settings
) -> tuple[Tensor, functional.Terms]:
    """The loss of each sample, ``(B,)``, and the terms that it is made of, which carry no gradient.

    Args:
        embeddings: ``(B, D)``, those of ``settings.similarity``.
        proxies: ``(C', K, D)``, of the dtype to compute in.
        labels: ``(B,)``, long: positions among the :math:`C'`, or outside of them.
        settings: everything else.
    """
    loss, *terms = _Loss.apply(embeddings, proxies, labels, settings)  # type: ignore[no-untyped-call]
    return loss, functional.Terms(*terms)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, proxies: Tensor, labels: Tensor, settings: Settings) -> Any:
        over_classes, kept = ClassSoftmax(settings.scale), []
        several = settings.plan.classes_per_chunk < len(proxies)  # a single chunk may still be in the cache
        own, own_pooled = proxies.new_zeros(proxies.shape[1], len(labels)), proxies.new_zeros(len(labels))
        for chunk in _chunks(proxies, labels, settings):
            similarities = chunk.similarities()
            own = chunk.own.get(similarities, own)
            pooling = settings.pool(similarities)
            own_pooled = chunk.own.get(pooling.pooled, own_pooled)
            over_classes.add(pooling.pooled, chunk.own)
            if settings.plan.keep:
                kept.append((chunk, pooling.pooled, pooling.differentiate(compact=several)))
        within_class = _WithinClass(own, settings)
        others = over_classes.others or sums_of_none(own_pooled)
        state = settings.complete(State(others, own_pooled, within_class.intra, within_class.balance))
        over_classes.close(state.others, state.own_pooled, settings.margin)
        terms = functional.Terms(over_classes.classification, state.intra, over_classes.entropy, state.balance)
        ctx.save_for_backward(proxies, labels)
        ctx.settings, ctx.kept, ctx.over_classes, ctx.within_class = settings, kept, over_classes, within_class
        ctx.mark_non_differentiable(*terms)
        ctx.set_materialize_grads(False)  # of the terms
        loss = functional.sample_loss(terms, settings.weights, settings.num_classes, proxies.shape[1])
        return loss, *terms

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor | None, *_: Any) -> Any:
        if of_loss is None:
            return None, None, None, None
        if torch.is_grad_enabled():  # PyTorch's once_differentiable would let gradients pass that are wrong
            raise RuntimeError("the gradient of MultiProxyEntropyLoss cannot be differentiated: drop create_graph=True")
        proxies, labels = ctx.saved_tensors
        settings: Settings = ctx.settings
        ctx.over_classes.begin(of_loss, -settings.weights.inter)
        of_own = ctx.within_class.gradient(of_loss)
        of_queries, of_proxies = proxies.new_zeros(len(labels), proxies.shape[2]), torch.empty_like(proxies)
        # What forward kept is used up. Should there be another backward, it computes that once more.
        kept, ctx.kept = ctx.kept, None
        for chunk, pooled, unpool in kept or _computed_again(proxies, labels, settings):
            of_similarities = unpool(ctx.over_classes.gradient(pooled, chunk.own))
            chunk.own.add(of_similarities, of_own)
            chunk.add_gradients(of_similarities, of_queries, of_proxies)
        return settings.similarity.of_embeddings(of_queries), of_proxies, None, None


def _computed_again(
    proxies: Tensor, labels: Tensor, settings: Settings
) -> Iterator[tuple["_Chunk", Tensor, Callable[[Tensor], Tensor]]]:
    for chunk in _chunks(proxies, labels, settings):
        pooling = settings.pool(chunk.similarities())
        yield chunk, pooling.pooled, pooling.differentiate(compact=False)


class _WithinClass:
    """The terms over the proxies of the own class, out of the similarities to them, ``(K, B)``, and their gradient."""

    def __init__(self, own: Tensor, settings: Settings) -> None:
        self.settings = settings
        self.log_q = F.log_softmax(own / settings.temperature, dim=0)
        self.q = self.log_q.exp()
        # Of the other views of the same sample; of a single view, its own.
        self.log_q_compared = self._mean_of_others(self.log_q)
        self.intra = (self.q * self.log_q_compared).sum(dim=0).neg_()
        self.log_usage = settings.update_usage(self.q.T).T.clamp_min(functional.MIN_USAGE).log_()
        self.balance = (self.q * self.log_usage).sum(dim=0)

    def gradient(self, of_loss: Tensor) -> Tensor:
        # That of the mean of a potential under q is q * (potential - mean). This holds for the entropy, too.
        weights, temperature = self.settings.weights, self.settings.temperature
        intra, balance = weights.intra / temperature, weights.balance / temperature
        potential = torch.sub(balance * self.log_usage, self.log_q_compared, alpha=intra)
        mean = torch.add(balance * self.balance, self.intra, alpha=intra)
        gradient = potential.sub_(mean).mul_(self.q).mul_(of_loss)
        if self.settings.views > 1:  # as what other views are compared with
            weight = of_loss * intra
            gradient += self._mean_of_others(weight.expand_as(self.q)) * self.q - self._mean_of_others(weight * self.q)
        return gradient

    def _mean_of_others(self, values: Tensor) -> Tensor:
        """The mean over the other views of each sample, ``(K, B)``; of a single view, itself."""
        if self.settings.views == 1:
            return values
        by_view = values.reshape(len(values), self.settings.views, -1)
        return ((by_view.sum(dim=1, keepdim=True) - by_view) / (self.settings.views - 1)).flatten(1)


class _Chunk:
    """The classes from ``start`` to before ``stop``, and where those of the samples stand among them."""

    def __init__(self, proxies: Tensor, labels: Tensor, start: int, stop: int, settings: Settings) -> None:
        per_class = proxies.shape[1]
        self.own = Own(labels, start, stop, settings.num_classes)
        self.similarity, self.shape = settings.similarity, (stop - start, per_class, len(labels))
        self.rows = slice(start * per_class, stop * per_class)
        self.proxies = proxies.flatten(0, 1)[self.rows]

    def similarities(self) -> Tensor:
        return self.similarity(self.proxies, self.rows).view(self.shape)

    def add_gradients(self, gradient: Tensor, of_queries: Tensor, of_proxies: Tensor) -> None:
        of_rows = of_proxies.flatten(0, 1)[self.rows]
        self.similarity.add_gradients(self.proxies, self.rows, gradient.flatten(0, 1), of_queries, of_rows)


def _chunks(proxies: Tensor, labels: Tensor, settings: Settings) -> Iterator[_Chunk]:
    for start in range(0, len(proxies), settings.plan.classes_per_chunk):
        stop = min(start + settings.plan.classes_per_chunk, len(proxies))
        yield _Chunk(proxies, labels, start, stop, settings)
