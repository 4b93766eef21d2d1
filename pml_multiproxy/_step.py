"""One call of the loss, from a batch to the loss of each sample; here it is chosen how that is computed."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import functional
from ._analytic import loss as analytic
from ._analytic.chunks import make_plan
from ._analytic.similarities import has_products, prepare
from ._hyperparameters import Hyperparameters
from ._layout import Layout, LocalLayout
from ._similarity import similarities
from ._usage import update_usage_, usage_of_target

Implementation = Literal["analytic", "autograd"]


def losses_and_terms(
    embeddings: Tensor,
    proxies: Tensor,
    usage: Tensor,
    labels: Tensor,
    distance: Any,
    classes_per_chunk: int | None,
    hyper: Hyperparameters,
    layout: Layout,
    training: bool,
) -> analytic.Result:
    """The loss of each sample. In training, the usage is updated first, in place.

    Args:
        embeddings: ``(B, D)``, of all processes that share the loss.
        proxies: ``(c', K, D)``, of the classes of this process.
        usage: ``(c', K)``, likewise.
        labels: ``(B,)``, long.
        distance: of PML.
        classes_per_chunk: how many at a time; ``None``: by their size.
        hyper: what is constant over calls.
        layout: where the classes are.
        training: whether to update the usage.
    """
    dtype, positions = functional.compute_dtype(embeddings, proxies), layout.positions(labels)
    if _implementation(len(embeddings), proxies, dtype, distance, classes_per_chunk, layout) == "autograd":
        return _by_autograd(embeddings, proxies, usage, positions, distance, hyper, layout, training)
    embeddings, proxies = layout.share_of_gradient(embeddings), proxies.to(dtype).contiguous()
    plan = make_plan(classes_per_chunk, len(embeddings), proxies, dtype)
    similarity, proxies = prepare(distance, embeddings, proxies)
    return analytic.losses_and_terms(embeddings, proxies, usage, positions, similarity, plan, hyper, layout, training)


def _implementation(
    batch_size: int,
    proxies: Tensor,
    dtype: torch.dtype,
    distance: Any,
    classes_per_chunk: int | None,
    layout: Layout,
) -> Implementation:
    if not isinstance(layout, LocalLayout):  # the plain equations have no partial sums
        return "analytic"
    # A compiler makes more of the plain equations, and the analytic gradient is not written for transforms.
    if torch.compiler.is_compiling() or _is_transformed():
        return "autograd"
    if has_products(distance) and proxies.dtype == dtype:
        return "analytic"
    # By other distances, autograd does better while all similarities fit at once.
    return "autograd" if make_plan(classes_per_chunk, batch_size, proxies, dtype).keep else "analytic"


def _is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation goes on."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _by_autograd(
    embeddings: Tensor,
    proxies: Tensor,
    usage: Tensor,
    positions: Tensor,
    distance: Any,
    hyper: Hyperparameters,
    layout: Layout,
    training: bool,
) -> analytic.Result:
    """By the plain equations, of which a compiler makes more than of the analytic gradient."""
    to_proxies = torch.unflatten(similarities(distance, embeddings, proxies.flatten(0, 1)), 1, proxies.shape[:2])
    to_classes = functional.POOLINGS[hyper.pooling](to_proxies, hyper.scale, hyper.temperature)
    to_target = to_proxies[torch.arange(len(positions), device=positions.device), positions]
    assignments = functional.assignment(to_target, hyper.temperature)
    if training:
        update_usage_(usage, assignments, positions, hyper.usage_momentum, layout)
    own_usage = usage_of_target(usage, positions, assignments.dtype, layout)
    terms = functional.Terms(
        functional.classification_loss(to_classes, positions, hyper.scale, hyper.margin),
        _intra_class_entropy(to_target, hyper),
        functional.inter_class_entropy(to_classes, hyper.scale),
        functional.balance(assignments, own_usage),
    )
    losses = functional.sample_loss(terms, hyper.weights, hyper.num_classes, hyper.proxies_per_class)
    return analytic.Result(losses, terms, assignments)


def _intra_class_entropy(to_target: Tensor, hyper: Hyperparameters) -> Tensor:
    if hyper.views == 1:
        return functional.intra_class_entropy(to_target, hyper.temperature)
    return functional.cross_view_entropy(to_target, hyper.temperature, hyper.views)
