r"""Cross-entropy and entropy of a softmax over classes that come some at a time, and their gradient.

The true class stays apart, so that its margin need not be taken out of a sum again, and so that no difference of large
numbers loses digits. All is exact.

Class similarities are ``(c, B)``, the batch last. Logits are in bits, since PyTorch finds powers of two faster
than those of e.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._own import Own

NATS = math.log(2)
"""In a bit."""


class Sums(NamedTuple):
    r"""Over the logits :math:`a` of some classes, in bits: their maximum :math:`M`, :math:`Z = \sum 2^{a - M}` and
    :math:`T = \sum 2^{a - M} (a - M)`; each ``(B,)``.
    """

    maximum: Tensor
    z: Tensor
    t: Tensor

    def relative_to(self, maximum: Tensor) -> "Sums":
        r"""For a larger :math:`M'`, with :math:`\alpha = 2^{M - M'}`: :math:`Z \leftarrow \alpha Z` and
        :math:`T \leftarrow \alpha (T + (M - M') Z)`.
        """
        shift = self.maximum - maximum
        alpha = shift.exp2()
        return Sums(maximum, alpha * self.z, alpha * torch.addcmul(self.t, shift, self.z))


def lowest(dtype: torch.dtype) -> float:
    """In place of minus infinity: a logit so low that its class adds nothing to others."""
    # Not that, nor anything that a difference takes there: times zero, it is not a number.
    return 0.75 * torch.finfo(dtype).min


def sums_of_none(like: Tensor) -> Sums:
    """Over no class, for as many samples as in ``like``, ``(B,)``."""
    # Beside other classes, this Z counts for nothing; and where there are none, its logarithm is finite.
    return Sums(torch.full_like(like, lowest(like.dtype)), torch.ones_like(like), torch.zeros_like(like))


class ClassSoftmax:
    r"""Forward calls :meth:`add` for all classes, then :meth:`close`; backward :meth:`begin`, then :meth:`gradient`.

    Classes may be spread over processes: each adds its own, and all close with the sums over all.

    With :math:`M` and :math:`Z` of the other classes and :math:`a_y` of the true one, the log-odds of the others are
    :math:`u = \log Z + (M - a_y) \log 2`, in nats. The true class has the probability
    :math:`\operatorname{sigmoid}(-u)`, another :math:`\operatorname{sigmoid}(u)\, 2^{a - M} / Z`. The margin adds to
    :math:`u`.
    """

    others: Sums | None = None
    classification: Tensor
    entropy: Tensor

    def __init__(self, scale: float) -> None:
        self.scale, self.bits = scale, scale / NATS

    def add(self, pooled: Tensor, own: Own) -> None:
        """Takes in class similarities but those of the true class."""
        logits = self.bits * pooled
        own.put(logits, lowest(logits.dtype))
        maximum = logits.amax(dim=0)
        if self.others:
            maximum = torch.maximum(maximum, self.others.maximum)
        powers = logits.sub_(maximum).exp2()
        z = powers.sum(dim=0)
        t = powers.mul_(logits).sum(dim=0)
        if self.others:
            before = self.others.relative_to(maximum)
            z, t = before.z + z, before.t + t
        self.others = Sums(maximum, z, t)

    def close(self, others: Sums, own_pooled: Tensor, margin: float) -> None:
        """``others`` over all classes but the true one; ``own_pooled``, ``(B,)``, of the true one; the ``margin`` it
        has to win by, in units of the similarity.
        """
        self.maximum, self.z = others.maximum, others.z
        self.mean, log_z = others.t / others.z, others.z.log()
        self.behind = torch.sub(others.maximum, own_pooled, alpha=self.bits)
        log_odds = torch.add(log_z, self.behind, alpha=NATS)
        log_odds_of_own = -log_odds
        self.p_others, self.p_own = log_odds.sigmoid(), log_odds_of_own.sigmoid()
        entropy_of_others = torch.sub(log_z, self.mean, alpha=NATS)
        # Both parts are positive: no digits are lost.
        self.entropy = torch.addcmul(
            self.p_own * _softplus(log_odds), self.p_others, _softplus(log_odds_of_own) + entropy_of_others
        )
        self.log_odds_with_margin = log_odds + self.scale * margin
        self.classification = _softplus(self.log_odds_with_margin)

    def begin(self, of_classification: Tensor, entropy_weight: float) -> None:
        """The gradient of the first, and how many times as large that of the entropy is."""
        # With p the class distribution and p' that with the margin, the gradient of a logit is
        # of_classification * (p' - 1[own] - entropy_weight * p * (log p + entropy)).
        of_classification = self.scale * of_classification
        self.weight = NATS * entropy_weight
        missed = of_classification * self.log_odds_with_margin.sigmoid()
        spread = of_classification * self.p_others
        push = self.p_own * (self.behind + self.mean)
        self.of_own = torch.addcmul(missed, spread, push, value=-self.weight).neg_()
        # That of the others is 2^(a - M) * (constant - weight * slope * (a - M)).
        self.constant = torch.addcmul(missed, spread, self.mean - push, value=self.weight).div_(self.z)
        self.slope = spread.div_(self.z)

    def gradient(self, pooled: Tensor, own: Own) -> Tensor:
        """Of the class similarities; overwrites them."""
        logits = pooled.mul_(self.bits).sub_(self.maximum)
        gradient = logits.exp2()
        gradient.mul_(torch.addcmul(self.constant, logits, self.slope, value=-self.weight))
        own.put(gradient, self.of_own)
        return gradient


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40)  # from where on it is the identity, also in float64
