r"""Cross-entropy and entropy of a softmax over classes that come some at a time, and their gradient.

The true class stays apart until the end, so that its margin need not be taken out of a sum again. All is exact.

Logits are ``(c, B)``, the batch last.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._own import Own


class Sums(NamedTuple):
    r"""Over the logits :math:`a` of some classes: their maximum :math:`M`, :math:`Z = \sum e^{a - M}` and
    :math:`T = \sum e^{a - M} (a - M)`; each ``(B,)``.
    """

    maximum: Tensor
    z: Tensor
    t: Tensor

    def relative_to(self, maximum: Tensor) -> "Sums":
        r"""For a larger :math:`M'`, with :math:`\alpha = e^{M - M'}`: :math:`Z \leftarrow \alpha Z` and
        :math:`T \leftarrow \alpha (T + (M - M') Z)`.
        """
        shift = self.maximum - maximum
        alpha = shift.exp()
        return Sums(maximum, alpha * self.z, alpha * torch.addcmul(self.t, shift, self.z))


def sums_of_none(like: Tensor) -> Sums:
    """Over no class, for as many samples as in ``like``, ``(B,)``."""
    lowest = torch.finfo(like.dtype).min
    return Sums(torch.full_like(like, lowest / 2), torch.zeros_like(like), torch.zeros_like(like))


class ClassSoftmax:
    """Forward calls :meth:`add` for all classes, then :meth:`close`; backward :meth:`begin`, then :meth:`gradient`.

    Classes may be spread over processes: each adds its own, and all close with the sums over all.
    """

    others: Sums | None = None
    classification: Tensor
    entropy: Tensor

    def add(self, logits: Tensor, own: Own) -> None:
        """Takes in logits but those of the true class; overwrites them."""
        # Not minus infinity, nor anything that a difference takes there: times zero, it is not a number.
        lowest = torch.finfo(logits.dtype).min
        own.put(logits, 0.75 * lowest)
        maximum = logits.amax(dim=0).clamp_min_(lowest / 2)
        if self.others:
            maximum = torch.maximum(maximum, self.others.maximum)
        exponentials = logits.sub_(maximum).exp()
        z = exponentials.sum(dim=0)
        t = exponentials.mul_(logits).sum(dim=0)
        if self.others:
            before = self.others.relative_to(maximum)
            z, t = before.z + z, before.t + t
        self.others = Sums(maximum, z, t)

    def close(self, others: Sums, own_logit: Tensor, margin: float) -> None:
        """``others`` over all classes but the true one; ``own_logit``, ``(B,)``, of the true one; the ``margin`` it has
        to win by, in units of the logits.
        """
        # All relative to the largest logit: differences of large numbers would lose digits.
        self.largest = torch.maximum(others.maximum, own_logit)
        log_others = others.maximum - self.largest + others.z.log()
        others = others.relative_to(self.largest)
        self.log_own = own_logit - self.largest
        own = self.log_own.exp()
        total = others.z + own
        self.log_total = total.log()
        self.entropy = self.log_total - torch.addcmul(others.t, own, self.log_own) / total
        self.log_own_with_margin = self.log_own - margin
        self.classification = -F.logsigmoid(self.log_own_with_margin - log_others)

    def begin(self, of_classification: Tensor, of_entropy: Tensor) -> None:
        # With p the class distribution and p' that with the margin, the gradient of a logit a is
        # of_classification * (p' - 1[own]) - of_entropy * p * (log p + entropy). Of the others, p' = p * to_margin.
        to_margin = (self.log_total - self.log_own_with_margin - self.classification).exp()
        log_p = self.log_own - self.log_total
        of_own = of_classification * torch.expm1(-self.classification)
        self.of_own = of_own - of_entropy * log_p.exp() * (log_p + self.entropy)
        # So theirs is exp(a - largest) * (constant + slope * (a - largest)).
        inverse = (-self.log_total).exp()
        self.slope = -of_entropy * inverse
        self.constant = (of_classification * to_margin + of_entropy * (self.log_total - self.entropy)) * inverse

    def gradient(self, logits: Tensor, own: Own) -> Tensor:
        """Of the logits; overwrites them."""
        logits.sub_(self.largest)
        gradient = logits.exp()
        gradient.mul_(torch.addcmul(self.constant, logits, self.slope))
        own.put(gradient, self.of_own)
        return gradient
