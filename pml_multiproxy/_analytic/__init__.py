"""The loss with its gradient written out, computed some classes at a time, exactly.

Plain autograd keeps several tensors of the size of all similarities. Here, chunks of classes are so small that their
similarities stay in a processor's cache from the matrix product that writes them to the one that reads their gradient.
Forward keeps its results for backward, or backward computes them again.

Tensors over classes and proxies have the batch last, ``(c, B)`` and ``(c, K, B)``: operations over the proxies of a
class then run along rows of the memory, and the matrix products are faster, too.
"""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._check import Settings
from .._similarity import without_autocast
from .chunks import Chunk, Plan, chunks_of
from .online_softmax import ClassTerms, Sums, add_classes, logit_gradient, sums_of_none
from .poolings import POOLINGS, Analytic, Derivative
from .products import Products
from .terms import Assignment, Balance, Neighbors, contrast_gradient, within_class_gradient

T = TypeVar("T", Assignment, Balance, ClassTerms, Neighbors)


class Computed(NamedTuple):
    """Results of one chunk for backward, which overwrites them."""

    chunk: Chunk
    pooled: Tensor
    derivative: Derivative


class Scan(NamedTuple):
    """Results of one walk over the classes of this process."""

    others: Sums
    target_similarities: Tensor
    """To the proxies of the target class, ``(K, B)``."""
    target_pooled: Tensor
    """To the target class, ``(B,)``."""
    kept: list[Computed]


class Context(NamedTuple):
    products: Products
    plan: Plan
    settings: Settings
    ranks: int
    """How many processes compute a share of the gradient each."""


def scan(context: Context, proxies: Tensor, positions: Tensor, keep: bool) -> Scan:
    """Walks over the classes once. ``keep``: whether to keep each chunk's results for backward."""
    products, plan, settings, _ = context
    others, kept = None, []
    several = plan.classes_per_chunk < len(proxies)  # a single chunk may still be in the cache
    target_similarities = proxies.new_zeros(proxies.shape[1], len(positions))
    target_pooled = proxies.new_zeros(len(positions))
    for chunk in chunks_of(proxies, positions, settings.num_classes, plan.classes_per_chunk):
        similarities = products(chunk.proxies, chunk.rows).view(chunk.shape)
        target_similarities = chunk.target.gather(similarities, target_similarities)
        pooling = _pool(similarities, settings)
        target_pooled = chunk.target.gather(pooling.pooled, target_pooled)
        others = add_classes(others, pooling.pooled, chunk.target, settings.scale)
        if keep:
            kept.append(Computed(chunk, pooling.pooled, pooling.derivative(compact=several)))
    return Scan(others or sums_of_none(target_pooled), target_similarities, target_pooled, kept)


def _pool(similarities: Tensor, settings: Settings) -> Analytic:
    return POOLINGS[settings.pooling].analytic(similarities, settings.scale, settings.temperature)


class Saved(NamedTuple):
    """Results of forward that backward needs."""

    positions: Tensor
    assignment: Assignment
    balance: Balance
    classes: ClassTerms
    neighbors: Neighbors | None
    """``None``: their weight is 0."""


def with_gradient(
    losses: Tensor, embeddings: Tensor, proxies: Tensor, context: Context, saved: Saved, kept: list[Computed]
) -> Tensor:
    """The losses ``(B,)``, computed already, with their gradient for embeddings and proxies."""
    positions, *terms = saved
    tensors = (losses, positions, *chain(*filter(None, terms)), *context.products.saved)
    result: Tensor = _Gradient.apply(context, kept, tensors, embeddings, proxies)  # type: ignore[no-untyped-call]
    return result


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        context: Context,
        kept: list[Computed],
        tensors: tuple[Tensor, ...],  # in a tuple, autograd does not take them for inputs
        embeddings: Tensor,
        proxies: Tensor,
    ) -> Tensor:
        losses, *saved = tensors
        ctx.save_for_backward(embeddings, proxies, *saved)
        ctx.context, ctx.kept = context, kept
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> Any:
        _refuse_other_kinds_of_gradient(grad_losses)
        embeddings, proxies, positions, *saved = ctx.saved_tensors
        rest = iter(saved)
        assignment, balance = _next(Assignment, rest), _next(Balance, rest)
        classes, settings = _next(ClassTerms, rest), ctx.context.settings
        of_neighbors = _next(Neighbors, rest) if settings.neighbor_weight else None
        products = ctx.context.products.restored(embeddings, tuple(rest))
        context = ctx.context._replace(products=products)
        # Used up here; another backward pass computes them again.
        kept, ctx.kept = ctx.kept, []
        with without_autocast(embeddings.device.type):
            logits = logit_gradient(classes, grad_losses, settings.scale, -settings.inter_weight)
            grad_at_target = within_class_gradient(assignment, balance, grad_losses, settings)
            grad_queries, grad_proxies = None, proxies.new_empty(proxies.shape)
            for chunk, pooled, derivative in kept or _computed_again(context, proxies, positions):
                grad_pooled = logits.of_pooled_(pooled, chunk.target, settings.scale)
                gradient = derivative.times_(grad_pooled)
                chunk.target.add_(gradient, grad_at_target)
                rows = grad_proxies.flatten(0, 1)[chunk.rows]
                gradient = gradient.flatten(0, 1)
                grad_queries = products.add_gradients(chunk.proxies, chunk.rows, gradient, grad_queries, rows)
            if grad_queries is None:  # this process holds no class
                grad_queries = proxies.new_zeros(len(positions), proxies.shape[2])
            if of_neighbors is not None:
                gradient = contrast_gradient(of_neighbors, grad_losses, settings, context.ranks)
                grad_queries = products.add_gradients_among_samples(gradient, grad_queries)
            grad_embeddings = products.grad_embeddings(grad_queries)
        return None, None, None, grad_embeddings, grad_proxies


def _computed_again(context: Context, proxies: Tensor, positions: Tensor) -> Iterator[Computed]:
    products, plan, settings, _ = context
    for chunk in chunks_of(proxies, positions, settings.num_classes, plan.classes_per_chunk):
        pooling = _pool(products(chunk.proxies, chunk.rows).view(chunk.shape), settings)
        yield Computed(chunk, pooling.pooled, pooling.derivative(compact=False))


def _next(kind: type[T], tensors: Iterator[Tensor]) -> T:
    """The next of the tensors, as the fields of ``kind``."""
    return kind(*islice(tensors, len(kind._fields)))


def _refuse_other_kinds_of_gradient(grad_losses: Tensor) -> None:
    if torch.is_grad_enabled():  # PyTorch's once_differentiable would let wrong gradients pass
        raise RuntimeError("the gradient of MultiProxyEntropyLoss cannot be differentiated: drop create_graph=True")
    of_vmap = torch._C._functorch
    if of_vmap.is_batchedtensor(grad_losses) or of_vmap.is_legacy_batchedtensor(grad_losses):
        raise RuntimeError("the gradient of MultiProxyEntropyLoss cannot be batched: drop is_grads_batched=True")
