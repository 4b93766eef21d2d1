"""One step of the loss, from embeddings to the loss of each sample: by the analytic gradient or by autograd."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd import forward_ad

from . import _analytic as analytic
from . import _shard as sharding
from . import _similarity as similarity
from . import functional
from ._analytic import online_softmax
from ._analytic import terms as analytic_terms
from ._analytic.chunks import make_plan
from ._analytic.poolings import POOLINGS
from ._analytic.products import DistanceCalls, Products, prepare
from ._check import Settings
from ._shard import Shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Step(NamedTuple):
    """All that one step of the loss computes with."""

    embeddings: Tensor
    """``(B, D)``, of all processes that share the loss."""
    labels: Tensor
    """``(B,)``, long."""
    proxies: Tensor
    """``(c', K, D)``, of the classes of this process."""
    usage: Tensor
    """``(c', K)``, likewise."""
    usage_group: "ProcessGroup | str | None"
    """The processes whose batches update the usage together; ``"world"``: all there are."""
    updates_usage: bool
    """Whether this step updates the usage, in place, before it uses it."""
    distance: Any
    """Of PML."""
    settings: Settings
    shard: Shard
    """The classes of this process."""


class Result(NamedTuple):
    losses: Tensor
    """``(B,)``."""
    terms: functional.Terms
    """For statistics: the analytic gradient does not pass through them."""
    assignments: Tensor
    """``(B, K)``, to the proxies of the target class; of no meaning where another process holds that class."""
    neighbors: Tensor | None = None
    """``(B,)``; ``None``: its weight is 0."""


def sample_losses(step: Step) -> Result:
    """The loss of each sample."""
    if step.distance.collect_stats:
        similarity.record_norms(step.distance, step.embeddings, step.proxies.flatten(0, 1))
    if step.settings.neighbor_weight is None:
        weight = 0.0 if step.settings.views == 1 else 1.0
        step = step._replace(settings=step.settings._replace(neighbor_weight=weight))
    return _by_autograd(step) if _implementation(step) == "autograd" else _by_analytic_gradient(step)


def _implementation(step: Step) -> str:
    if step.shard.group is not None:  # the plain equations have no partial sums
        return "analytic"
    # torch.compile optimises the plain equations better, and the analytic gradient has no rules for transforms.
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return "autograd"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "autograd"
    dtype = functional.compute_dtype(step.embeddings, step.proxies)
    if similarity.is_plain_cosine(step.distance) and step.proxies.dtype == dtype:
        return "analytic"
    # For other distances, autograd is faster while all similarities fit at once.
    plan = make_plan(step.settings.classes_per_chunk, len(step.labels), step.proxies, dtype)
    return "autograd" if plan.keep else "analytic"


def _by_analytic_gradient(step: Step) -> Result:
    settings, positions = step.settings, step.labels - step.shard.start if step.shard.start else step.labels
    embeddings = sharding.scaled_gradient(step.embeddings, step.shard)
    products, embeddings, proxies = prepare(step.distance, embeddings, step.proxies)
    plan = make_plan(settings.classes_per_chunk, len(positions), proxies, proxies.dtype)
    context = analytic.Context(products, plan, settings, step.shard.ranks)
    wants_gradient = torch.is_grad_enabled() and (embeddings.requires_grad or proxies.requires_grad)
    with torch.no_grad(), similarity.without_autocast(embeddings.device.type):
        scan = analytic.scan(context, proxies, positions, keep=plan.keep and wants_gradient)
        assignment = analytic_terms.assign(scan.target_similarities, settings.temperature, settings.views)
        balance = analytic_terms.balance(assignment.q, _updated_usage(step, positions, assignment.q.T))
        partial = sharding.Partial(scan.others, scan.target_pooled, assignment.intra, balance.balance)
        partial = sharding.reduce(partial, positions, step.shard)
        classes = online_softmax.class_terms(partial.others, partial.target_similarity, settings.scale, settings.margin)
        terms = functional.Terms(classes.classification, partial.intra, classes.entropy, partial.balance)
        losses, contrast = _sample_loss(terms, settings), None
        if settings.neighbor_weight:
            left_out = None if products.are_finite else similarity.not_finite(step.embeddings)
            sharing = _neighborhoods(step, products, proxies, positions, assignment.q.T, left_out)
            targets = functional.neighbor_targets(*sharing, step.labels, settings.views, left_out)
            contrast = analytic_terms.contrast(products.among_samples(), targets, left_out, settings)
            losses = torch.add(losses, contrast.losses, alpha=settings.neighbor_weight)
    saved = analytic.Saved(positions, assignment, balance, classes, contrast)
    losses = analytic.with_gradient(losses, embeddings, proxies, context, saved, scan.kept)
    return Result(losses, terms, assignment.q.T, None if contrast is None else contrast.losses)


def _by_autograd(step: Step) -> Result:
    settings, labels, shape = step.settings, step.labels, step.proxies.shape[:2]
    to_proxies = similarity.similarities(step.distance, step.embeddings, step.proxies.flatten(0, 1))
    to_proxies = torch.unflatten(to_proxies, 1, shape)
    to_classes = POOLINGS[settings.pooling].equation(to_proxies, settings.scale, settings.temperature)
    to_target = to_proxies[torch.arange(len(labels), device=labels.device), labels]
    assignments = functional.assignment(to_target, settings.temperature)
    if settings.views == 1:
        intra = functional.intra_class_entropy(to_target, settings.temperature)
    else:
        intra = functional.cross_view_entropy(to_target, settings.temperature, settings.views)
    terms = functional.Terms(
        functional.classification_loss(to_classes, labels, settings.scale, settings.margin),
        intra,
        functional.inter_class_entropy(to_classes, settings.scale),
        functional.balance(assignments, _updated_usage(step, labels, assignments)),
    )
    losses, contrast = _sample_loss(terms, settings), None
    if settings.neighbor_weight:
        products = DistanceCalls(step.embeddings, step.distance)
        with similarity.without_autocast(step.embeddings.device.type):
            with torch.no_grad():
                left_out = similarity.not_finite(step.embeddings)
                sharing = _neighborhoods(step, products, step.proxies, labels, assignments, left_out)
            to_samples, temperature = products.among_samples(), settings.neighbor_temperature
            contrast = functional.neighbor_loss(to_samples, *sharing, labels, temperature, settings.views, left_out)
        losses = torch.add(losses, contrast, alpha=settings.neighbor_weight)
    return Result(losses, terms, assignments, contrast)


def _neighborhoods(
    step: Step, products: Products, proxies: Tensor, positions: Tensor, assignments: Tensor, left_out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The assignment of each sample, averaged over its views, and its product with the kernel between the proxies of
    its class: each ``(B / V, K)``, from the process that holds the class.
    """
    views = step.settings.views
    by_view = torch.unflatten(assignments, 0, (views, -1))
    if left_out is None:
        mean = by_view.mean(dim=0)
    else:
        of_view = torch.unflatten(left_out, 0, (views, -1)).unsqueeze(2)
        mean = by_view.masked_fill(of_view, 0).sum(dim=0) / (~of_view).sum(dim=0).clamp_min(1)
    smoothed, positions = mean, positions[: len(mean)]
    if len(proxies):
        local = sharding.is_local(positions, step.shard)
        classes = positions if local is None else torch.where(local, positions, 0)
        if len(proxies) <= len(mean):
            kernels = _kernels(products.within_classes(proxies), step.settings.temperature)[classes]
        else:
            kernels = _kernels(products.within_classes(proxies, classes), step.settings.temperature)
        smoothed = torch.bmm(mean.unsqueeze(1), kernels.to(mean.dtype)).squeeze(1)
    both = torch.cat([mean, smoothed], dim=1)
    mean, smoothed = sharding.from_target(both.T, positions, step.shard).T.chunk(2, dim=1)
    return mean, smoothed


def _kernels(to_each_other: Tensor, temperature: float) -> Tensor:
    """How near the proxies of a class are to each other, from 0 to 1: ``(c, K, K)`` of their similarities."""
    to_itself = to_each_other.diagonal(dim1=1, dim2=2) / 2
    return (to_each_other - to_itself.unsqueeze(1) - to_itself.unsqueeze(2)).div_(temperature).exp_()


def _sample_loss(terms: functional.Terms, settings: Settings) -> Tensor:
    weights = settings.intra_weight, settings.inter_weight, settings.balance_weight
    return functional.sample_loss(terms, settings.num_classes, settings.proxies_per_class, *weights)


def _updated_usage(step: Step, positions: Tensor, assignments: Tensor) -> Tensor:
    """The usage of each sample's target class, ``(B, K)``, after this batch has updated it, if it does."""
    if len(step.usage) == 0:
        return torch.ones_like(assignments)
    local = sharding.is_local(positions, step.shard)
    if local is not None:
        assignments = torch.where(local.unsqueeze(1), assignments, 0)
        positions = torch.where(local, positions, 0)
    if step.updates_usage:
        # Sums for all classes, not for those of the batch: equally long on all processes, these can be added up
        # without asking how many samples each has. Equal to the last bit everywhere, they keep the usage equal.
        sums = functional.usage_sums(assignments, positions, len(step.usage))
        group = sharding.processes(step.usage_group)
        if group is not None:
            distributed.all_reduce(sums, group=group)
        step.usage.copy_(functional.moved_usage(step.usage, sums, step.settings.usage_momentum))
    return step.usage.index_select(0, positions).to(assignments.dtype)
