r"""The terms that run over all classes, with their analytic gradient, some classes at a time.

Plain autograd keeps several tensors of the size of all similarities. Here, forward keeps per row what a softmax over
the other classes needs: the maximum :math:`M` of their logits :math:`a`, :math:`Z = \sum e^{a - M}` and
:math:`T = \sum e^{a - M} (a - M)`. With a new maximum :math:`M'` and :math:`\alpha = e^{M - M'}`, they become
:math:`Z \leftarrow \alpha Z` and :math:`T \leftarrow \alpha (T + (M - M') Z)`. The true class stays out of them, so
that its margin need not be taken out of a sum again, and joins at the end. Backward computes the similarities of each
chunk once more. All is exact. Where one chunk holds all classes, its similarities are kept, and nothing is computed
twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

DENSE_BYTES = 2**28
"""Similarities of more bytes than this are not held at once, unless ``classes_per_chunk`` says so."""

CHUNK_BYTES = 2**23
"""What a chunk takes then."""


@dataclass(frozen=True)
class Settings:
    """What does not change from chunk to chunk."""

    similarity: "CosineProducts | DistanceCalls"
    pooling: str
    scale: float
    temperature: float
    margin: float
    classes_per_chunk: int


def chunk_size(batch_size: int, num_classes: int, per_class: int, dtype: torch.dtype) -> int:
    """How many classes to take at a time: all, if their similarities fit in :data:`DENSE_BYTES`.

    >>> chunk_size(256, 11318, 5, torch.float32), chunk_size(256, 100_000, 10, torch.float32)
    (11318, 819)
    """
    bytes_per_class = max(batch_size, 1) * per_class * dtype.itemsize
    if num_classes * bytes_per_class <= DENSE_BYTES:
        return num_classes
    return max(CHUNK_BYTES // bytes_per_class, 1)


def class_terms(queries: Tensor, proxies: Tensor, labels: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy ``(B,)``, inter-class entropy ``(B,)`` and similarities to the proxies of the own class ``(B, K)``.

    Args:
        queries: ``(B, D)``, as ``settings.similarity`` wants them.
        proxies: ``(C, K, D)``, of the same dtype.
        labels: ``(B,)``, long.
        settings: everything else.
    """
    terms: tuple[Tensor, Tensor, Tensor] = _ClassTerms.apply(queries, proxies, labels, settings)  # type: ignore[no-untyped-call]
    return terms


class CosineProducts:
    """Cosine similarities of queries of unit length, without normalized proxies in memory.

    The columns of the product are scaled by the inverse lengths of the proxies. From the gradient of a proxy, the part
    along the proxy is taken away, which changes its length only.
    """

    def __call__(self, queries: Tensor, proxies: Tensor) -> Tensor:
        return (queries @ proxies.T).mul_(_inverse(lengths(proxies)))

    def add_gradients(
        self,
        queries: Tensor,
        proxies: Tensor,
        gradient: Tensor,
        of_queries: Tensor,
        of_proxies: Tensor,
    ) -> None:
        """Adds to ``of_queries``, fills ``of_proxies``; overwrites ``gradient``."""
        length = lengths(proxies)
        inverse = _inverse(length)
        gradient.mul_(inverse)
        of_queries.addmm_(gradient, proxies)
        torch.mm(gradient.T, queries, out=of_proxies)
        along = torch.einsum("pd,pd->p", of_proxies, proxies)
        # Shorter proxies are divided by a constant, so that their length counts.
        along = torch.where(length > EPS, along * inverse**2, 0)
        of_proxies.addcmul_(proxies, along.unsqueeze(1), value=-1)


EPS = 1e-12
"""The shortest length that a proxy is divided by, that of :func:`torch.nn.functional.normalize`."""


def lengths(proxies: Tensor) -> Tensor:
    """Of the rows; infinite where their squares overflow."""
    length: Tensor = torch.linalg.vector_norm(proxies, dim=-1)
    return length


def _inverse(length: Tensor) -> Tensor:
    return length.clamp_min(EPS).reciprocal()


class DistanceCalls:
    """Similarities by any distance of PML, differentiated through its own autograd graph."""

    def __init__(self, similarity: Callable[[Tensor, Tensor], Tensor], device_type: str) -> None:
        self.similarity = similarity
        # Backward runs outside of the autocast of forward, but has to compute the same.
        self.device_type = device_type
        self.enabled, self.dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

    def __call__(self, queries: Tensor, proxies: Tensor) -> Tensor:
        with torch.autocast(self.device_type, self.dtype, self.enabled):
            return self.similarity(queries, proxies)

    def add_gradients(
        self,
        queries: Tensor,
        proxies: Tensor,
        gradient: Tensor,
        of_queries: Tensor,
        of_proxies: Tensor,
    ) -> None:
        """Adds to ``of_queries``, fills ``of_proxies``."""
        with torch.enable_grad():
            inputs = queries.detach().requires_grad_(), proxies.detach().requires_grad_()
            for_queries, for_proxies = torch.autograd.grad(self(*inputs), inputs, gradient)
        of_queries.add_(for_queries)
        of_proxies.copy_(for_proxies)


class _Others:
    """The softmax over the other classes, chunk by chunk: see the top of this file."""

    def __init__(self, like: Tensor) -> None:
        # Not minus infinity, nor anything that a difference takes there: times zero, it is not a number.
        self.lowest = torch.finfo(like.dtype).min / 2
        self.maximum = torch.full_like(like, self.lowest)
        self.z, self.t = torch.zeros_like(like), torch.zeros_like(like)

    def add(self, logits: Tensor, position: Tensor, inside: Tensor) -> None:
        """Takes in ``(B, c)`` logits, without those at ``position`` where ``inside``; overwrites them."""
        own = position.unsqueeze(1)
        logits.scatter_(1, own, torch.where(inside.unsqueeze(1), self.lowest, logits.gather(1, own)))
        maximum = torch.maximum(self.maximum, logits.amax(dim=1))
        shift = self.maximum - maximum
        self.t += shift * self.z
        rescaled = shift.exp()
        self.t *= rescaled
        self.z *= rescaled
        self.maximum = maximum
        logits.sub_(maximum.unsqueeze(1))
        exponentials = logits.exp()
        exponentials.scatter_(1, own, torch.where(inside.unsqueeze(1), 0, exponentials.gather(1, own)))
        self.z += exponentials.sum(dim=1)
        self.t += exponentials.mul_(logits).sum(dim=1)

    def entropy(self) -> Tensor:
        """0 where there is no other class."""
        return torch.where(self.z > 0, self.z.log() - self.t / self.z, 0)


class _ClassTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, proxies: Tensor, labels: Tensor, settings: Settings) -> Any:
        others = _Others(queries.new_empty(len(queries)))
        own, own_pooled = queries.new_zeros(len(queries), proxies.shape[1]), queries.new_zeros(len(queries))
        ctx.kept = None
        for start in range(0, len(proxies), settings.classes_per_chunk):
            chunk = _Chunk(queries, proxies, labels, start, settings)
            own = torch.where(chunk.inside.unsqueeze(1), chunk.similarities[chunk.own], own)
            own_pooled = torch.where(chunk.inside, chunk.pooled[chunk.own], own_pooled)
            others.add(settings.scale * chunk.pooled, chunk.own[1], chunk.inside)
            if settings.classes_per_chunk >= len(proxies):
                ctx.kept = chunk
        # Logarithms of sums, all relative to the largest logit: differences of large numbers would lose digits.
        own_logit = settings.scale * own_pooled
        largest = torch.maximum(others.maximum, own_logit)
        log_own, log_others = own_logit - largest, others.maximum - largest + others.z.log()
        log_sum = torch.logaddexp(log_own, log_others)
        share = (log_others - log_sum).exp()
        of_others = torch.where(share > 0, share * (others.entropy() - log_others + log_sum), 0)
        entropy = of_others - (log_own - log_sum).exp() * (log_own - log_sum)

        log_own_with_margin = log_own - settings.scale * settings.margin
        classification = -F.logsigmoid(log_own_with_margin - log_others)
        ctx.settings = settings
        ctx.save_for_backward(queries, proxies, labels, largest, log_own, log_sum, classification, entropy)
        return classification, entropy, own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor, of_entropy: Tensor, of_own: Tensor) -> Any:
        queries, proxies, labels, largest, log_own, log_sum, classification, entropy = ctx.saved_tensors
        settings: Settings = ctx.settings
        log_own_with_margin = log_own - settings.scale * settings.margin
        # With p the class distribution and p' that with the margin, the gradient of a logit a is
        # of_loss * (p' - 1[own]) - of_entropy * p * (log p + entropy). Of the others, p' = p * to_margin.
        to_margin = (log_sum - log_own_with_margin - classification).exp()
        own_log_p = log_own - log_sum
        own_gradient = of_loss * torch.expm1(-classification) - of_entropy * own_log_p.exp() * (own_log_p + entropy)
        # So theirs is exp(a - largest) * (constant + slope * (a - largest)).
        slope = -of_entropy * (-log_sum).exp()
        constant = (of_loss * to_margin + of_entropy * (log_sum - entropy)) * (-log_sum).exp()

        of_queries, of_proxies = torch.zeros_like(queries), torch.empty_like(proxies)
        for start in range(0, len(proxies), settings.classes_per_chunk):
            chunk = ctx.kept or _Chunk(queries, proxies, labels, start, settings)
            logits = settings.scale * chunk.pooled
            logits.sub_(largest.unsqueeze(1))
            gradient = logits.exp()
            gradient.mul_(logits.mul_(slope.unsqueeze(1)).add_(constant.unsqueeze(1)))
            gradient[chunk.own] = torch.where(chunk.inside, own_gradient, gradient[chunk.own])
            of_similarities = chunk.unpool(gradient.mul_(settings.scale))
            of_similarities[chunk.own] += torch.where(chunk.inside.unsqueeze(1), of_own, 0)
            settings.similarity.add_gradients(
                queries,
                chunk.proxies.flatten(0, 1),
                of_similarities.flatten(1),
                of_queries,
                of_proxies[start : start + settings.classes_per_chunk].flatten(0, 1),
            )
        return of_queries, of_proxies, None, None


class _Chunk:
    """The similarities to some classes, ``(B, c, K)``, and pooled ``(B, c)``.

    ``own`` is where the own class of each row stands if ``inside``, and some place in the chunk else: choosing rows
    would make a GPU wait.
    """

    def __init__(self, queries: Tensor, proxies: Tensor, labels: Tensor, start: int, settings: Settings) -> None:
        self.settings = settings
        self.proxies = proxies[start : start + settings.classes_per_chunk]
        count, per_class, _ = self.proxies.shape
        self.own = torch.arange(len(labels), device=labels.device), (labels - start).clamp(0, count - 1)
        self.inside = (labels >= start) & (labels < start + count)
        similarities = settings.similarity(queries, self.proxies.flatten(0, 1))
        self.similarities = similarities.view(len(queries), count, per_class)
        self.winner: Tensor | None = None
        if settings.pooling == "max":
            self.pooled, self.winner = self.similarities.max(dim=-1)
        elif settings.pooling == "softmax":
            self.pooled = (self._weights() * self.similarities).sum(dim=-1)
        else:
            self.pooled = torch.logsumexp(settings.scale * self.similarities, dim=-1) / settings.scale

    def unpool(self, gradient: Tensor) -> Tensor:
        """The gradient of the similarities, ``(B, c, K)``, out of that of the pooled ones, ``(B, c)``."""
        gradient = gradient.unsqueeze(-1)
        if self.winner is not None:
            # Nothing reads these similarities again, and new memory of their size takes time.
            return self.similarities.zero_().scatter_(2, self.winner.unsqueeze(-1), gradient)
        difference = self.similarities - self.pooled.unsqueeze(-1)
        if self.settings.pooling == "softmax":
            return difference.div_(self.settings.temperature).add_(1).mul_(self._weights()).mul_(gradient)
        return difference.mul_(self.settings.scale).exp_().mul_(gradient)

    def _weights(self) -> Tensor:
        return torch.softmax(self.similarities / self.settings.temperature, dim=-1)
