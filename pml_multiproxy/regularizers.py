"""The regularizer of proxies, as PyTorch Metric Learning knows weight regularizers."""

from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
from pytorch_metric_learning.regularizers import BaseRegularizer
from torch import Tensor

from . import _check as check
from ._pml import element_losses
from ._similarity import record_norms, within_classes, without_autocast

__all__ = ["ProxyEntropyRegularizer"]


class ProxyEntropyRegularizer(BaseRegularizer):  # type: ignore[misc]
    r"""Keeps the proxies of a class apart. Pass it to a loss of PML, or to ours, as ``weight_regularizer``.

    Proxy :math:`k` of class :math:`c`, taken as a sample of its class, is assigned to the proxies :math:`j` of the
    class. The penalty is 0 only where it is assigned to itself alone:

    .. math::

        a_c(j \mid k) = \operatorname{softmax}_j\!\big(s(w_{ck}, w_{cj}) / \tau\big), \qquad
        \ell_{ck} = -\log a_c(k \mid k)

    The symbols are those of :mod:`pml_multiproxy.functional`. The penalty is in nats: 0 for a proxy far from the others
    of its class, and for the only proxy of a class; :math:`\log K` where all proxies of a class are equal. There the
    gradient is zero, too: proxies must not start equal.

    Why entropy: where a point is nearest to itself, as by cosine, ``LpDistance`` and ``SNRDistance``,
    :math:`a_c(k \mid k)` is the largest of the :math:`a_c(j \mid k)`, and so :math:`\ell_{ck}` the min-entropy (Rényi
    entropy of order :math:`\infty`) of the assignment, from 0 to :math:`\log K`. By the dot product of vectors that are
    not normalized a point need not be nearest to itself, and growing norms satisfy the penalty while all proxies point
    the same way: this distance is refused. (Under ``LpDistance`` with ``normalize_embeddings=False``, growing helps as
    well, but it does move proxies apart.)

    Memory is :math:`O(C K^2)` beside that of the proxies: similarities between classes are not computed. Distances
    other than ``CosineSimilarity``, ``DotProductSimilarity`` and ``LpDistance`` themselves are called on a few classes
    at a time, which is slower and takes more memory: ``SNRDistance`` needs :math:`D` times as much.

    Works on every loss of PML that has ``weight_regularizer`` and lays out its proxies class by class:
    :class:`~pml_multiproxy.losses.MultiProxyEntropyLoss`, ``SoftTripleLoss`` with ``proxies_per_class`` its
    ``centers_per_class``, ``SubCenterArcFaceLoss`` with its ``sub_centers``. But before PML 2.9.0,
    ``SubCenterArcFaceLoss`` silently drops ``weight_regularizer``, as all other arguments of its base classes.

    Args:
        proxies_per_class: :math:`K`, at least 1.
        temperature: :math:`\tau` > 0, in units of the similarity. The default suits cosines, and is the one that
            ``SoftTripleLoss`` assigns samples with. For 10 proxies with the same cosine to each other, the penalty is
            1.9 nats at a cosine of 0.95, 0.8 at 0.8, 0.06 at 0.5 (with a slope of 0.6 nats per unit of cosine) and
            0.0004 at 0. With a temperature of 0.05, the slope at 0.5 is 0.008, too little to part proxies. With 0.2,
            orthogonal proxies are still pushed, into the other classes. Distances of another range, as ``LpDistance``,
            need another temperature.
        **kwargs: PML's: ``distance`` (default: ``CosineSimilarity``), ``reducer`` (default: ``MeanReducer``),
            ``collect_stats``.

    Calling it: ``regularizer(weights)`` with weights ``(C * K, D)``, the proxies of one class after those of the other,
    as PML's losses have them. There is one penalty per proxy, ``(C * K,)``, which goes to the reducer. It is in
    :func:`~pml_multiproxy.functional.compute_dtype` of the weights, also under autocast.

    Raises:
        TypeError: if an argument is of the wrong kind, or the weights are not of a floating-point dtype.
        ValueError: if an argument is out of its range, the distance is a dot product of vectors that are not
            normalized, or the weights do not have ``C * proxies_per_class`` rows.

    Example:
        >>> import torch
        >>> from pytorch_metric_learning.losses import SoftTripleLoss
        >>> from pml_multiproxy.regularizers import ProxyEntropyRegularizer
        >>> regularizer = ProxyEntropyRegularizer(proxies_per_class=2)
        >>> loss_func = SoftTripleLoss(3, 8, centers_per_class=2, weight_regularizer=regularizer, weight_reg_weight=0.1)
        >>> loss_func(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).backward()

        Two equal proxies and two orthogonal ones:

        >>> regularizer(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))  # log 2
        tensor(0.6931)
        >>> regularizer(torch.tensor([[1.0, 0.0], [0.0, 1.0]])) < 1e-4
        tensor(True)
    """

    def __init__(self, proxies_per_class: int, temperature: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.proxies_per_class = check.positive_int("proxies_per_class", proxies_per_class)
        self.temperature = check.positive("temperature", temperature)
        if isinstance(self.distance, DotProductSimilarity) and not self.distance.normalize_embeddings:
            raise ValueError(
                "distance must not be a DotProductSimilarity with normalize_embeddings=False, whose penalty longer "
                "proxies satisfy"
            )
        self.add_to_recordable_attributes(list_of_names=["proxies_per_class", "temperature"], is_stat=False)

    def compute_loss(self, weights: Tensor) -> dict[str, dict[str, Any]]:
        """PML's hook: one penalty per proxy."""
        _check_weights(weights, self.proxies_per_class)
        blocks = torch.unflatten(weights, 0, (-1, self.proxies_per_class))
        # The products are few, and in bfloat16 close proxies could not be told apart.
        with without_autocast(weights.device.type):
            similarities = within_classes(self.distance, blocks)
        record_norms(self.distance, weights, weights)
        return {"loss": element_losses(_min_entropy(similarities, self.temperature).flatten())}

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()


def _min_entropy(similarities: Tensor, temperature: float) -> Tensor:
    """``(C, K)`` of ``(C, K, K)``: the negated logarithm of the diagonal of the softmax."""
    own = similarities.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    return torch.logsumexp((similarities - own) / temperature, dim=-1)


def _check_weights(weights: object, per_class: int) -> None:
    allowed = f"(num_classes * proxies_per_class, embedding_size) with proxies_per_class = {per_class}"
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a torch.Tensor of shape {allowed}, got {type(weights).__name__}")
    if not weights.is_floating_point():
        raise TypeError(f"weights must be of a floating-point dtype, got {weights.dtype}")
    if weights.ndim != 2 or len(weights) % per_class:
        raise ValueError(f"weights must be of shape {allowed}, got {tuple(weights.shape)}")
