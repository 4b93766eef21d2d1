"""Pairs that respect the clusters which the proxies found, as a PyTorch Metric Learning miner."""

from typing import Any

import torch
from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor

from . import _check as check
from ._similarity import similarities
from .losses import MultiProxyEntropyLoss, check_loss

__all__ = ["MultiProxyMiner"]


class MultiProxyMiner(BaseMiner):  # type: ignore[misc]
    r"""Mines pairs within the neighbourhoods of the proxies, for any pair or triplet loss of PML.

    In PML's trainers it is a ``tuple_miner``, in ``CrossBatchMemory`` its ``miner``.

    Pair losses pull all samples of a class together. If a class holds several clusters, they lose the differences
    between them. With :math:`a_i` the proxy nearest to sample :math:`i` within its class, and :math:`s` the
    similarity of ``loss_func`` (for a distance, its negative), this miner takes as

    - positives: the samples :math:`j` of the same class with :math:`a_j = a_i`;
    - negatives: the samples of other classes that are as close to the anchor's proxy as the anchor is,

      .. math:: s(x_j, a_i) \ge s(x_i, a_i) - m;

    - neither: samples of the same class at another proxy.

    Args:
        loss_func: the :class:`~pml_multiproxy.losses.MultiProxyEntropyLoss` whose proxies to use. The miner does not
            train it: train it together with the pair loss, or start it by k-means.
        negative_margin: :math:`m`, in units of the distance of ``loss_func``. Higher mines more negatives.
        **kwargs: PML's: ``collect_stats``.

    Calling it: ``miner(embeddings, labels, ref_emb=None, ref_labels=None)`` with embeddings ``(B, D)``, labels
    ``(B,)``, and optionally references ``(N, D)`` and their labels, which take the place of the other samples. Returns
    PML's tuple of pairs ``(anchors, positives, anchors, negatives)``, each long; where nothing is found, they are
    empty. Pairs of a sample with itself are left out when ``ref_emb`` is ``embeddings``. References without
    ``ref_labels`` are, as in PML, the same samples once more: row :math:`i` has label :math:`i`, and does not pair with
    embedding :math:`i`. Give ``ref_labels=labels`` to have these pairs, too.

    The miner does not own the parameters of ``loss_func``. To copy or pickle the miner, put it and the loss into one
    dict: a miner copied alone gets a copy of the loss, and nobody trains that copy.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or range, or a loss whose proxies
            are spread over processes.

    Example:
        >>> import torch
        >>> from pytorch_metric_learning.losses import MultiSimilarityLoss
        >>> from pml_multiproxy import losses, miners
        >>> loss_func = losses.MultiProxyEntropyLoss(num_classes=2, embedding_size=8, proxies_per_class=3)
        >>> miner = miners.MultiProxyMiner(loss_func)
        >>> embeddings, labels = torch.randn(6, 8), torch.tensor([0, 0, 0, 1, 1, 1])
        >>> pairs = miner(embeddings, labels)
        >>> loss = loss_func(embeddings, labels) + 0.1 * MultiSimilarityLoss()(embeddings, labels, pairs)
    """

    loss_func: MultiProxyEntropyLoss

    def __init__(self, loss_func: MultiProxyEntropyLoss, negative_margin: float = 0.0, **kwargs: Any) -> None:
        check_loss(loss_func)
        super().__init__(distance=loss_func.distance, **kwargs)
        # Not a submodule: whoever saves or trains miner and loss would count its parameters twice.
        self.__dict__["loss_func"] = loss_func
        self.negative_margin = check.real("negative_margin", negative_margin, "a finite number")
        self.add_to_recordable_attributes(name="negative_margin", is_stat=False)

    def forward(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The pairs, as described in the class docstring."""
        proxies, num_classes = self.loss_func.proxies, self.loss_func.num_classes
        check.embeddings(embeddings, proxies)
        check.labels(labels, len(embeddings), num_classes)
        if ref_emb is not None:
            check.embeddings(ref_emb, proxies, "ref_emb")
            if ref_labels is not None or len(ref_emb) != len(embeddings):
                check.labels(ref_labels, len(ref_emb), num_classes, "ref_labels")
        mined: tuple[Tensor, Tensor, Tensor, Tensor] = super().forward(embeddings, labels, ref_emb, ref_labels)
        return mined

    def mine(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """PML's hook."""
        same_samples = ref_emb is embeddings or ref_labels is None
        if ref_labels is None:
            ref_labels = labels
        own_proxy = self._nearest(embeddings, labels)
        ref_proxy = self._nearest(ref_emb, ref_labels)
        anchor_proxies = self.loss_func.proxies.flatten(0, 1)[own_proxy]
        to_anchor_proxies = similarities(self.distance, ref_emb, anchor_proxies).T
        own_similarity = similarities(self.distance, embeddings, anchor_proxies).diagonal()

        positive = own_proxy.unsqueeze(1) == ref_proxy
        if same_samples:
            positive.fill_diagonal_(False)
        intrudes = to_anchor_proxies >= own_similarity.unsqueeze(1) - self.negative_margin
        negative = intrudes & (labels.unsqueeze(1) != ref_labels)
        anchors, positives = torch.where(positive)
        other_anchors, negatives = torch.where(negative)
        return anchors, positives, other_anchors, negatives

    def _nearest(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The position of the nearest proxy of the own class among all proxies, ``(B,)``."""
        classes, proxies = self.loss_func.assign(embeddings, labels)
        return classes * self.loss_func.proxies.shape[1] + proxies
