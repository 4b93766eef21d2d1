r"""Cross-entropy and entropy of a softmax over classes that come some at a time, and their gradient.

Of the other classes, it keeps per sample the maximum :math:`M` of their logits :math:`a`, :math:`Z = \sum e^{a - M}`
and :math:`T = \sum e^{a - M} (a - M)`. With a new maximum :math:`M'` and :math:`\alpha = e^{M - M'}`, they become
:math:`Z \leftarrow \alpha Z` and :math:`T \leftarrow \alpha (T + (M - M') Z)`. The true class stays out of them, so
that its margin need not be taken out of a sum again, and joins at the end. All is exact.

Logits are ``(c, B)``, the batch last. The true class of each sample is at ``own``, ``(B,)``, where ``inside``; at some
other place where not: choosing samples would make a GPU wait.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


class ClassSoftmax:
    """Forward calls :meth:`add` for all classes, then :meth:`close`; backward :meth:`begin`, then :meth:`gradient`."""

    classification: Tensor
    entropy: Tensor

    def __init__(self, like: Tensor) -> None:
        """``like``: ``(B,)``."""
        # Not minus infinity, nor anything that a difference takes there: times zero, it is not a number.
        lowest = torch.finfo(like.dtype).min
        self.maximum, self.left_out = torch.full_like(like, lowest / 2), 0.75 * lowest
        self.z, self.t = torch.zeros_like(like), torch.zeros_like(like)

    def add(self, logits: Tensor, own: Tensor, inside: Tensor) -> None:
        """Takes in logits but those of the true class; overwrites them."""
        at = own.unsqueeze(0)
        logits.scatter_(0, at, torch.where(inside, self.left_out, logits.gather(0, at)))
        self._rescale(torch.maximum(self.maximum, logits.amax(dim=0)))
        exponentials = logits.sub_(self.maximum).exp()
        self.z += exponentials.sum(dim=0)
        self.t += exponentials.mul_(logits).sum(dim=0)

    def _rescale(self, maximum: Tensor) -> None:
        shift = self.maximum - maximum
        alpha = shift.exp()
        self.t = torch.addcmul(self.t, shift, self.z).mul_(alpha)
        self.z, self.maximum = self.z * alpha, maximum

    def close(self, own_logit: Tensor, margin: float) -> None:
        """``own_logit``, ``(B,)``, of the true class; the ``margin`` it has to win by, in units of the logits."""
        # All relative to the largest logit: differences of large numbers would lose digits.
        largest = torch.maximum(self.maximum, own_logit)
        log_others = self.maximum - largest + self.z.log()
        self._rescale(largest)
        self.log_own = own_logit - largest
        own = self.log_own.exp()
        total = self.z + own
        self.log_sum = total.log()
        self.entropy = self.log_sum - torch.addcmul(self.t, own, self.log_own) / total
        self.log_own_with_margin = self.log_own - margin
        self.classification = -F.logsigmoid(self.log_own_with_margin - log_others)

    def begin(self, of_classification: Tensor, of_entropy: Tensor) -> None:
        # With p the class distribution and p' that with the margin, the gradient of a logit a is
        # of_classification * (p' - 1[own]) - of_entropy * p * (log p + entropy). Of the others, p' = p * to_margin.
        to_margin = (self.log_sum - self.log_own_with_margin - self.classification).exp()
        log_p = self.log_own - self.log_sum
        of_own = of_classification * torch.expm1(-self.classification)
        self.of_own = of_own - of_entropy * log_p.exp() * (log_p + self.entropy)
        # So theirs is exp(a - maximum) * (constant + slope * (a - maximum)).
        inverse = (-self.log_sum).exp()
        self.slope = -of_entropy * inverse
        self.constant = (of_classification * to_margin + of_entropy * (self.log_sum - self.entropy)) * inverse

    def gradient(self, logits: Tensor, own: Tensor, inside: Tensor) -> Tensor:
        """Of the logits; overwrites them."""
        logits.sub_(self.maximum)
        gradient = logits.exp()
        gradient.mul_(torch.addcmul(self.constant, logits, self.slope))
        at = own.unsqueeze(0)
        return gradient.scatter_(0, at, torch.where(inside, self.of_own, gradient.gather(0, at)))
