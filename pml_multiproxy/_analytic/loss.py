"""The loss of each sample with its analytic gradient."""

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import _autocast, functional
from .._hyperparameters import Hyperparameters
from .._layout import Layout, Partial
from .._usage import update_usage_, usage_of_target
from . import within_class
from .chunks import Chunk, Plan, chunks
from .class_softmax import ClassTerms, Sums, add_classes, class_terms, logit_gradient, sums_of_none
from .poolings import POOLINGS, Derivative
from .similarities import Similarity

T = TypeVar("T", within_class.Assignment, within_class.Balance, ClassTerms)


class Result(NamedTuple):
    losses: Tensor
    """``(B,)``."""
    terms: functional.Terms
    """What these are made of, to be looked at: the analytic gradient does not pass through them."""
    assignments: Tensor
    """``(B, K)``, to the proxies of the target class; of no meaning where another process holds that."""


class _Computed(NamedTuple):
    """What backward takes of a chunk, and overwrites."""

    chunk: Chunk
    pooled: Tensor
    derivative: Derivative


class _Scan(NamedTuple):
    """What one walk over the classes of this process finds."""

    others: Sums
    target_similarities: Tensor
    """To the proxies of the target class, ``(K, B)``."""
    target_pooled: Tensor
    kept: list[_Computed]


class _Context(NamedTuple):
    """What backward takes beside tensors."""

    hyper: Hyperparameters
    plan: Plan
    layout: Layout
    similarity: Similarity


def losses_and_terms(
    embeddings: Tensor,
    proxies: Tensor,
    usage: Tensor,
    positions: Tensor,
    similarity: Similarity,
    plan: Plan,
    hyper: Hyperparameters,
    layout: Layout,
    training: bool,
) -> Result:
    """One step, from similarities to losses. In training, it updates the usage, in place.

    Args:
        embeddings: ``(B, D)``, those of ``similarity``.
        proxies: ``(c', K, D)``, of the classes of this process, contiguous, of the dtype to compute in.
        usage: ``(c', K)``, likewise.
        positions: ``(B,)``, the target class of each sample among these, or outside of them.
        similarity: of the embeddings to proxies.
        plan: how many classes at a time.
        hyper: what is constant over calls.
        layout: where the other classes are.
        training: whether to update the usage.
    """
    wants_gradient = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (embeddings, proxies, *similarity.parameters)
    )
    with torch.no_grad(), _autocast.without(embeddings.device.type):
        scan = _scan(similarity, proxies, positions, plan, hyper, keep=plan.keep and wants_gradient)
        assignment = within_class.assign(scan.target_similarities, hyper.temperature, hyper.views)
        if training:
            update_usage_(usage, assignment.q.T, positions, hyper.usage_momentum, layout)
        own_usage = usage_of_target(usage, positions, proxies.dtype, layout)
        balance = within_class.balance(assignment.q, own_usage)
        partial = Partial(scan.others, scan.target_pooled, assignment.intra, balance.balance)
        partial = layout.reduce(partial, positions)
        classes = class_terms(partial.others, partial.target_similarity, hyper.scale, hyper.margin)
        terms = functional.Terms(classes.classification, partial.intra, classes.entropy, partial.balance)
        losses = functional.sample_loss(terms, hyper.weights, hyper.num_classes, hyper.proxies_per_class)

    context = _Context(hyper, plan, layout, similarity)
    computed = losses, (positions, *assignment, *balance, *classes, *similarity.saved), scan.kept
    losses = _Gradient.apply(  # type: ignore[no-untyped-call]
        context, computed, embeddings, proxies, *similarity.parameters
    )
    return Result(losses, terms, assignment.q.T)


def _scan(
    similarity: Similarity, proxies: Tensor, positions: Tensor, plan: Plan, hyper: Hyperparameters, keep: bool
) -> _Scan:
    others, kept = None, []
    several = plan.classes_per_chunk < len(proxies)  # a single chunk may still be in the cache
    target_similarities = proxies.new_zeros(proxies.shape[1], len(positions))
    target_pooled = proxies.new_zeros(len(positions))
    for chunk in chunks(proxies, positions, hyper.num_classes, plan.classes_per_chunk):
        similarities = chunk.similarities(similarity)
        target_similarities = chunk.target.gather(similarities, target_similarities)
        pooling = POOLINGS[hyper.pooling](similarities, hyper.scale, hyper.temperature)
        target_pooled = chunk.target.gather(pooling.pooled, target_pooled)
        others = add_classes(others, pooling.pooled, chunk.target, hyper.scale)
        if keep:
            kept.append(_Computed(chunk, pooling.pooled, pooling.derivative(compact=several)))
    return _Scan(others or sums_of_none(target_pooled), target_similarities, target_pooled, kept)


class _Gradient(torch.autograd.Function):
    """The losses, which are computed already, with their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        context: _Context,
        computed: tuple[Tensor, tuple[Tensor, ...], list[_Computed]],
        embeddings: Tensor,
        proxies: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        losses, tensors, kept = computed  # tensors in a tuple are no inputs, which get a gradient
        ctx.save_for_backward(embeddings, proxies, *tensors)
        ctx.context, ctx.kept = context, kept
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> Any:
        _refuse_other_kinds_of_gradient(grad_losses)
        embeddings, proxies, positions, *saved = ctx.saved_tensors
        context: _Context = ctx.context
        rest = iter(saved)
        assignment, balance = _next(within_class.Assignment, rest), _next(within_class.Balance, rest)
        classes = _next(ClassTerms, rest)
        hyper, similarity = context.hyper, context.similarity.restored(embeddings, tuple(rest))
        # What forward kept is used up. Should there be another backward pass, it computes that once more.
        kept, ctx.kept = ctx.kept, []
        with _autocast.without(embeddings.device.type):
            logits = logit_gradient(classes, grad_losses, hyper.scale, -hyper.weights.inter)
            grad_at_target = within_class.gradient(
                assignment, balance, grad_losses, hyper.weights, hyper.temperature, hyper.views
            )
            grad_queries, grad_proxies = None, proxies.new_empty(proxies.shape)
            for chunk, pooled, derivative in kept or _computed_again(context, similarity, proxies, positions):
                grad_pooled = logits.of_pooled_(pooled, chunk.target, hyper.scale)
                gradient = derivative.times_(grad_pooled)
                chunk.target.add_(gradient, grad_at_target)
                rows = grad_proxies.flatten(0, 1)[chunk.rows]
                gradient = gradient.flatten(0, 1)
                grad_queries = similarity.add_gradients(chunk.proxies, chunk.rows, gradient, grad_queries, rows)
            if grad_queries is None:  # this process holds no class
                grad_queries = proxies.new_zeros(len(positions), proxies.shape[2])
            grad_parameters = context.layout.reduce_gradients(similarity.grad_parameters())
            grad_embeddings = similarity.grad_embeddings(grad_queries).to(embeddings.dtype)
        return None, None, grad_embeddings, grad_proxies, *grad_parameters


def _computed_again(
    context: _Context, similarity: Similarity, proxies: Tensor, positions: Tensor
) -> Iterator[_Computed]:
    hyper, plan = context.hyper, context.plan
    for chunk in chunks(proxies, positions, hyper.num_classes, plan.classes_per_chunk):
        pooling = POOLINGS[hyper.pooling](chunk.similarities(similarity), hyper.scale, hyper.temperature)
        yield _Computed(chunk, pooling.pooled, pooling.derivative(compact=False))


def _next(kind: type[T], tensors: Iterator[Tensor]) -> T:
    """The next of these tensors, as fields."""
    return kind(*islice(tensors, len(kind._fields)))


def _refuse_other_kinds_of_gradient(grad_losses: Tensor) -> None:
    if torch.is_grad_enabled():  # PyTorch's once_differentiable would let gradients pass that are wrong
        raise RuntimeError("the gradient of MultiProxyEntropyLoss cannot be differentiated: drop create_graph=True")
    of_vmap = torch._C._functorch
    if of_vmap.is_batchedtensor(grad_losses) or of_vmap.is_legacy_batchedtensor(grad_losses):
        raise RuntimeError("the gradient of MultiProxyEntropyLoss cannot be batched: drop is_grads_batched=True")
