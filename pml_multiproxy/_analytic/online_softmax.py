r"""Cross-entropy and entropy of a softmax over classes, computed some classes at a time, and their gradient. Exact.

The sums leave the target class out: so its margin never has to be subtracted from a sum, and no difference of large
numbers loses digits.

Class similarities are ``(c, B)``. Logits are in bits, since PyTorch computes ``2^x`` faster than ``e^x``.

:math:`M` and :math:`Z` are the maximum and the sum over the other classes, :math:`a_y` is the logit of the target
class. The log-odds of the others are :math:`u = \log Z + (M - a_y) \log 2`, in nats. The target class has the
probability :math:`\operatorname{sigmoid}(-u)`, another class :math:`\operatorname{sigmoid}(u)\, 2^{a - M} / Z`. The
margin adds to :math:`u`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunks import Target

NATS = math.log(2)
"""Nats per bit."""


class Sums(NamedTuple):
    r"""Over the logits :math:`a` of some classes, in bits: their maximum :math:`M`, :math:`Z = \sum 2^{a - M}` and
    :math:`T = \sum 2^{a - M} (a - M)`; each ``(B,)``.
    """

    maximum: Tensor
    z: Tensor
    t: Tensor

    def relative_to(self, maximum: Tensor) -> "Sums":
        r"""The sums for a larger :math:`M'`: with :math:`\alpha = 2^{M - M'}`, :math:`Z \leftarrow \alpha Z` and
        :math:`T \leftarrow \alpha (T + (M - M') Z)`.
        """
        shift = self.maximum - maximum
        alpha = shift.exp2()
        return Sums(maximum, alpha * self.z, alpha * torch.addcmul(self.t, shift, self.z))


def lowest(dtype: torch.dtype) -> float:
    """A logit so low that its class adds nothing to the sums."""
    # Minus infinity would do, but times zero it is NaN. Differences of this number stay finite.
    return 0.75 * torch.finfo(dtype).min


def sums_of_none(like: Tensor) -> Sums:
    """The sums over no class, for as many samples as in ``like``, ``(B,)``."""
    # At the lowest maximum, Z = 1 adds nothing to other sums; without other classes, its logarithm stays finite.
    return Sums(torch.full_like(like, lowest(like.dtype)), torch.ones_like(like), torch.zeros_like(like))


def add_classes(sums: Sums | None, pooled: Tensor, target: Target, scale: float) -> Sums:
    """Adds the classes of a chunk, except the target classes."""
    logits = (scale / NATS) * pooled
    target.put_(logits, lowest(logits.dtype))
    maximum = logits.amax(dim=0)
    if sums:
        maximum = torch.maximum(maximum, sums.maximum)
    powers = logits.sub_(maximum).exp2()
    z = powers.sum(dim=0)
    t = powers.mul_(logits).sum(dim=0)
    if sums:
        before = sums.relative_to(maximum)
        z, t = before.z + z, before.t + t
    return Sums(maximum, z, t)


class ClassTerms(NamedTuple):
    """The terms over the classes, and the numbers that their gradient needs; each ``(B,)``."""

    classification: Tensor
    entropy: Tensor
    maximum: Tensor
    z: Tensor
    mean: Tensor
    max_minus_target: Tensor
    p_others: Tensor
    p_target: Tensor
    log_odds_with_margin: Tensor


def class_terms(others: Sums, target_pooled: Tensor, scale: float, margin: float) -> ClassTerms:
    """From the sums over all other classes, and the similarity to the target class, ``(B,)``."""
    mean, log_z = others.t / others.z, others.z.log()
    max_minus_target = torch.sub(others.maximum, target_pooled, alpha=scale / NATS)
    log_odds = torch.add(log_z, max_minus_target, alpha=NATS)
    log_odds_of_target = -log_odds
    p_others, p_target = log_odds.sigmoid(), log_odds_of_target.sigmoid()
    entropy_of_others = torch.sub(log_z, mean, alpha=NATS)
    # Both summands are positive, so that no digits cancel.
    entropy = torch.addcmul(p_target * _softplus(log_odds), p_others, _softplus(log_odds_of_target) + entropy_of_others)
    log_odds_with_margin = log_odds + scale * margin
    classification = _softplus(log_odds_with_margin)
    maximum, z, _ = others
    return ClassTerms(
        classification, entropy, maximum, z, mean, max_minus_target, p_others, p_target, log_odds_with_margin
    )


class LogitGradient(NamedTuple):
    """Numbers that give the gradient of the class similarities; tensors ``(B,)``."""

    maximum: Tensor
    constant: Tensor
    slope: Tensor
    at_target: Tensor
    weight: float

    def of_pooled_(self, pooled: Tensor, target: Target, scale: float) -> Tensor:
        """``(c, B)``; overwrites ``pooled``."""
        logits = pooled.mul_(scale / NATS).sub_(self.maximum)
        gradient = logits.exp2()
        gradient.mul_(torch.addcmul(self.constant, logits, self.slope, value=-self.weight))
        target.put_(gradient, self.at_target)
        return gradient


def logit_gradient(terms: ClassTerms, grad_losses: Tensor, scale: float, entropy_weight: float) -> LogitGradient:
    """Of losses that are the classification and ``entropy_weight`` times the entropy."""
    # With p the class distribution, and p' the one with the margin, the gradient of a logit is
    # grad_losses * (p' - 1[target] - entropy_weight * p * (log p + entropy)).
    grad_losses = scale * grad_losses
    weight = NATS * entropy_weight
    missed = grad_losses * terms.log_odds_with_margin.sigmoid()
    spread = grad_losses * terms.p_others
    push = terms.p_target * (terms.max_minus_target + terms.mean)
    at_target = torch.addcmul(missed, spread, push, value=-weight).neg_()
    # For the other classes, it is 2^(a - M) * (constant - weight * slope * (a - M)).
    constant = torch.addcmul(missed, spread, terms.mean - push, value=weight).div_(terms.z)
    return LogitGradient(terms.maximum, constant, spread.div_(terms.z), at_target, weight)


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40)  # above, softplus is the identity, also in float64
