"""The loss, as PyTorch Metric Learning knows losses."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses.base_metric_loss_function import BaseMetricLossFunction
from pytorch_metric_learning.losses.mixins import WeightRegularizerMixin
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor, distributed

from . import _kmeans as kmeans
from . import _reseeding as reseeding
from . import _streaming as streaming
from . import _validation as check
from . import functional
from ._similarities import CosineProducts, DistanceCalls, RoundedCosineProducts, Similarity

__all__ = ["MultiProxyEntropyLoss"]

IN_USE = 0.1
"""A proxy counts as in use from this part of an even share of its class."""

ROWS_PER_CHUNK = 256
"""So many samples, sorted by class, are compared to the proxies of their classes at a time."""

SETTINGS = [
    "num_classes",
    "embedding_size",
    "proxies_per_class",
    "scale",
    "margin",
    "pooling",
    "temperature",
    "intra_weight",
    "inter_weight",
    "balance_weight",
    "usage_momentum",
    "reseed_below",
]
"""What PML's hooks record once."""

STATISTICS = [
    "classification_loss",
    "intra_class_entropy",
    "inter_class_entropy",
    "balance",
    "proxies_in_use",
    "usage_perplexity",
    "effective_proxies",
    "min_effective_proxies",
]
"""What ``collect_stats=True`` records of every batch."""


class MultiProxyEntropyLoss(WeightRegularizerMixin, BaseMetricLossFunction):  # type: ignore[misc]
    r"""Classification by several proxies per class, with entropies that keep those proxies apart and in use.

    With the symbols of :mod:`pml_multiproxy.functional`, the loss of sample :math:`i` is

    .. math::

        \ell_i = \mathrm{CE}_i
        &+ \lambda_\mathrm{intra}\, H_\mathrm{intra}(i)
        + \lambda_\mathrm{inter}\, \big(\log C - H_\mathrm{inter}(i)\big) \\
        &+ \lambda_\mathrm{balance}\, \Big(\log K + \sum_k q_i(k) \log u_{y_i}(k)\Big)

    - :math:`\mathrm{CE}_i`: cross-entropy of the true class, over class similarities pooled from the proxies
      (:func:`~pml_multiproxy.functional.classification_loss`);
    - :math:`H_\mathrm{intra}`: entropy of the assignment :math:`q_i` of a sample to the proxies of its class,
      minimised: every sample commits to a proxy;
    - :math:`H_\mathrm{inter}`: entropy of the class distribution, maximised: it stays smooth;
    - the last term spreads the samples of a class over its proxies, against their usage :math:`u`, a running mean of
      the assignment. With :math:`\lambda_\mathrm{intra} = \lambda_\mathrm{balance}`, the within-class terms maximise
      the mutual information between sample and proxy inside each class.

    The two logarithms in it change no gradient. They make the mean of each term at least 0 over the samples that the
    usage is the mean of, so that reducers which drop losses of 0 and below, as ``AvgNonZeroReducer``, drop few. The
    loss of a single sample may still be negative.

    In ``train()`` mode with gradients enabled, each call first updates the usage with the batch, then uses it. In
    ``eval()`` mode or without gradients it only uses it.

    With ``reseed_below`` > 0, such a call begins by moving dead proxies: in each class of the batch that has a proxy
    with less than this part of an even share :math:`1/K` of the usage, one of them, by lot, goes onto one sample of the
    class, by lot, and gets an even share. Parameters change in place, so call ``backward`` before the next call. A
    frozen parameter (``requires_grad=False``) stays.

    **Defaults.** They are the same for all tasks: of twelve configurations, the one with the highest mean of MAP@R over
    five tasks, each relative to the best configuration on that task, on validation data (benchmarks/retrieval.py). With
    any one of the tasks left out, the others choose it, too, except where that is CLINC150 with coarse labels, on which
    it gains most. Where classes are one cluster, take a single proxy, or ``intra_weight=0`` and ``balance_weight=0``.

    Sources. Intra- and inter-class entropy: Yu, Zhang, Li, Zhang, *Multi-Proxy Learning from an Entropy Optimization
    Perspective*, IJCAI 2022, pp. 1594-1600, doi:10.24963/ijcai.2022/222. Only its abstract and the caption of its
    Figure 1 were available to us: the equations are our reading of them, not a copy, and ``balance_weight=0`` is our
    reading of the paper's objective. Balance: mutual-information maximisation as known from discriminative clustering,
    applied within classes: RIM (Krause, Perona, Gomes, *Discriminative Clustering by Regularized Information
    Maximization*, NIPS 2010) and IMSAT (Hu et al., *Learning Discrete Representations via Information Maximizing
    Self-Augmented Training*, ICML 2017).

    Args:
        num_classes: :math:`C`, at least 1.
        embedding_size: :math:`D`, at least 1.
        proxies_per_class: :math:`K`, at least 1.
        scale: :math:`\sigma` > 0, the factor on the class similarities, in units of 1 / similarity.
        margin: :math:`m`, by which the true class has to win, in units of the similarity.
        pooling: how the similarities to the proxies of a class become that to the class: ``"max"``, ``"softmax"``,
            ``"logsumexp"``, see :data:`~pml_multiproxy.functional.POOLINGS`.
        temperature: :math:`\tau` > 0 of the assignment and of ``pooling="softmax"``, in units of the similarity.
        intra_weight: :math:`\lambda_\mathrm{intra}` >= 0.
        inter_weight: :math:`\lambda_\mathrm{inter}` >= 0.
        balance_weight: :math:`\lambda_\mathrm{balance}` >= 0.
        usage_momentum: how much of the usage one sample of a class leaves as it was, from 0 to 1.
        usage_group: a ``torch.distributed.ProcessGroup``: the usage is moved by the batches of all its processes
            together. For ``DistributedDataParallel``, which then computes what one process does with the whole batch,
            where local batches are equal, the reducer is the mean and there is no miner. Every process of the group has
            to call the loss as often as the others, all in training or none; one that has no samples calls it with
            none. ``None``: each process keeps the usage of its own batches.
        reseed_below: each training call first moves, in each class of the batch, one proxy whose usage is below this
            part of an even share onto a sample of the class, from 0 (never) to below 1; 0.1 is a good first try.
        views: :math:`V`, at least 1. From 2 on, a batch is :math:`V` blocks of equal length, and row :math:`i` of every
            block is a view (a random augmentation) of the same sample: the intra-class entropy of a view is then the
            cross-entropy to the assignments of the other views, :func:`~pml_multiproxy.functional.cross_view_entropy`.
        classes_per_chunk: how many classes to hold at a time, exactly: fewer take less memory, and more time in
            backward, which then computes similarities once more. ``None``: all, while their similarities
            (``B * C * K`` numbers) take at most 256 MiB, else as many as take 2 MiB (on a GPU, 64 MiB).
        **kwargs: PML's: ``distance`` (default: ``CosineSimilarity``), ``reducer`` (default: ``MeanReducer``),
            ``weight_regularizer``, ``weight_reg_weight``, ``weight_init_func`` (called on the proxies as
            ``(C * K, D)``; default: random directions of unit length), ``embedding_regularizer``,
            ``embedding_reg_weight``, ``collect_stats``.

    Attributes:
        proxies: parameter ``(C, K, D)``. It needs an optimizer of its own or a place in the network's.
        proxy_usage: buffer ``(C, K)``, :math:`u`, rows sum to 1; stays ``float32``.
        classification_loss, intra_class_entropy, inter_class_entropy, balance: with ``collect_stats=True``, the mean of
            :math:`\mathrm{CE}`, :math:`H_\mathrm{intra}`, :math:`H_\mathrm{inter}` and
            :math:`\log K + \sum_k q \log u` over the last batch, in nats.
        proxies_in_use: with ``collect_stats=True``, the share of all proxies that have at least a tenth of an even
            share of their class.
        usage_perplexity: with ``collect_stats=True``, :math:`\exp H(u_c)`, mean over all classes: over how many proxies
            the samples of a class are spread.
        effective_proxies, min_effective_proxies: with ``collect_stats=True``, how many proxies the assignment tells
            apart, :math:`\exp` of the mean of :math:`\mathrm{KL}(q_i \Vert u_{y_i})` over the samples of a class: mean
            and minimum over the classes of the batch. Identical proxies have an even usage, but count as one here.
            Over few samples of a class it is noisy, and may exceed :math:`K`.

    Calling it: ``loss_func(embeddings, labels, indices_tuple=None)`` with embeddings ``(B, D)``, labels ``(B,)`` of an
    integer dtype in ``[0, C)``, and optionally the tuple of a miner, which weights samples as in PML's other
    classification losses: a sample that was not mined has weight 0, but stays in the mean; a tuple of empty tensors
    counts as none. The loss is in :func:`~pml_multiproxy.functional.compute_dtype` of embeddings and proxies.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or range. Labels and indices that
            lie on a GPU are not checked for their range, which would make it wait. For ``reseed_below`` together with
            ``usage_group``, since the lots would differ between the processes. For copying or pickling a loss that has
            a ``usage_group``, which belongs to its process; its ``state_dict`` can be saved.

    Example:
        >>> import torch
        >>> from pml_multiproxy import losses
        >>> loss_func = losses.MultiProxyEntropyLoss(num_classes=2, embedding_size=8, proxies_per_class=3)
        >>> optimizer = torch.optim.AdamW(loss_func.parameters(), lr=1e-2)
        >>> embeddings, labels = torch.randn(6, 8), torch.tensor([0, 0, 0, 1, 1, 1])
        >>> loss_func(embeddings, labels).backward()
        >>> optimizer.step()
        >>> loss_func.get_logits(embeddings).shape
        torch.Size([6, 2])
    """

    proxies: torch.nn.Parameter
    proxy_usage: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        proxies_per_class: int = 30,
        *,
        scale: float = 10.0,
        margin: float = 0.0,
        pooling: str = "max",
        temperature: float = 0.1,
        intra_weight: float = 0.25,
        inter_weight: float = 0.0,
        balance_weight: float = 0.5,
        usage_momentum: float = 0.9,
        usage_group: "distributed.ProcessGroup | None" = None,
        reseed_below: float = 0.0,
        views: int = 1,
        classes_per_chunk: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_classes = check.positive_int("num_classes", num_classes)
        self.embedding_size = check.positive_int("embedding_size", embedding_size)
        self.proxies_per_class = check.positive_int("proxies_per_class", proxies_per_class)
        self.scale = check.positive("scale", scale)
        self.margin = check.real("margin", margin, "a finite number")
        self.pooling = check.one_of("pooling", pooling, functional.POOLINGS)
        self.temperature = check.positive("temperature", temperature)
        self.intra_weight = check.not_negative("intra_weight", intra_weight)
        self.inter_weight = check.not_negative("inter_weight", inter_weight)
        self.balance_weight = check.not_negative("balance_weight", balance_weight)
        self.usage_momentum = check.real("usage_momentum", usage_momentum, "a number from 0 to 1", low=0.0, high=1.0)
        below_one = math.nextafter(1.0, 0.0)
        self.reseed_below = check.real(
            "reseed_below", reseed_below, "a number from 0 to below 1", low=0.0, high=below_one
        )
        check.process_group("usage_group", usage_group)
        if usage_group is not None and self.reseed_below > 0:
            raise ValueError(
                f"reseed_below must be 0 with a usage_group, got {self.reseed_below:g}: each process would move its "
                "proxies by lots and onto samples of its own, and DistributedDataParallel relies on equal proxies"
            )
        self.usage_group = usage_group
        self.views = check.positive_int("views", views)
        self.classes_per_chunk = classes_per_chunk
        if classes_per_chunk is not None:
            self.classes_per_chunk = check.positive_int("classes_per_chunk", classes_per_chunk)

        proxies, usage = self._start()
        self.proxies = torch.nn.Parameter(proxies)
        self.register_buffer("proxy_usage", usage)

        self.add_to_recordable_attributes(list_of_names=SETTINGS, is_stat=False)
        self.add_to_recordable_attributes(list_of_names=STATISTICS, is_stat=True)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: None = None,
        ref_labels: None = None,
    ) -> Tensor:
        """The reduced loss, as described in the class docstring; ``ref_emb`` and ``ref_labels`` must stay ``None``."""
        labels = self._checked_labels(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        loss: Tensor = super().forward(embeddings, labels, indices_tuple)
        return loss

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: tuple[Tensor, ...] | None, *_: Any
    ) -> dict[str, dict[str, Any]]:
        """PML's hook: one loss per sample, and the weight regularization."""
        if self.reseed_below and self._learns() and self.proxies.requires_grad:
            self._reseed(self._points(embeddings.detach()), labels)
        losses = self._losses(embeddings, labels)
        if indices_tuple is not None:
            losses = losses * self._mined_weights(indices_tuple, labels, losses.dtype)
        loss_dict = {
            "loss": {
                "losses": losses,
                "indices": c_f.torch_arange_from_size(embeddings),
                "reduction_type": "element",
                "divisor": len(embeddings),  # for DivisorReducer
            }
        }
        if self.weight_regularizer is not None:  # PML looks, too, but autograd would have recorded the view by then
            self.add_weight_regularization_to_loss_dict(loss_dict, self._held_proxies().flatten(0, 1))
        return loss_dict

    def get_logits(self, embeddings: Tensor) -> Tensor:
        r"""The logits of the classes, :math:`\sigma z_i(c)`: scale included, margin not. Never updates the usage.

        Args:
            embeddings: ``(B, D)``.

        Returns:
            ``(B, C)``.

        >>> loss_func = MultiProxyEntropyLoss(num_classes=4, embedding_size=8)
        >>> loss_func.get_logits(torch.randn(5, 8)).shape
        torch.Size([5, 4])
        """
        check.embeddings(embeddings, self.proxies)
        pooled = [self._pool(similarities) for _, similarities in self._in_chunks(embeddings)]
        return self.scale * torch.cat(pooled, dim=1)

    @torch.no_grad()
    def assign(self, embeddings: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The nearest proxy of each embedding. Never updates the usage.

        Args:
            embeddings: ``(B, D)``.
            labels: ``(B,)``, integers in ``[0, C)``: look only among the proxies of these classes. ``None``: among all.

        Returns:
            The classes and, within them, the proxies: each ``(B,)``, long.

        >>> loss_func = MultiProxyEntropyLoss(num_classes=4, embedding_size=8, proxies_per_class=3)
        >>> classes, proxies = loss_func.assign(loss_func.proxies[2])
        >>> classes, proxies
        (tensor([2, 2, 2]), tensor([0, 1, 2]))
        """
        check.embeddings(embeddings, self.proxies)
        if labels is not None:
            labels = check.labels(labels, len(embeddings), self.num_classes).to(embeddings.device)
            return labels, self._to_own_proxies(embeddings, labels).argmax(dim=1)
        _, nearest = self._nearest(embeddings)
        return nearest // self.proxies_per_class, nearest % self.proxies_per_class

    @torch.no_grad()
    def init_proxies(self, embeddings: Tensor, labels: Tensor) -> None:
        """Starts the proxies of each class at the centroids of its samples, by k-means.

        The same under the same seed of torch. Where the distance normalizes embeddings, so does this, the proxies get
        unit length, and embeddings of zeros, which have no direction, are left out. Fewer distinct samples than proxies
        are repeated, with a little noise on the repetitions; classes without samples keep their proxies. The usage
        becomes the share of the samples that each proxy is the nearest to. Time is linear in the samples and classes;
        long work shows a progress bar.

        Args:
            embeddings: ``(N, D)``, of the network that will be trained, over enough samples of each class.
            labels: ``(N,)``, integers in ``[0, C)``.

        Raises:
            TypeError, ValueError: as when the loss is called, and for embeddings that are not finite or so large that
                distances to proxies overflow.

        >>> loss_func = MultiProxyEntropyLoss(num_classes=2, embedding_size=2, proxies_per_class=2)
        >>> embeddings = torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [0.0, -4.0]])
        >>> loss_func.init_proxies(embeddings, torch.tensor([0, 0, 0, 1, 1, 1]))
        >>> loss_func.proxies[0].detach().sort(dim=0).values
        tensor([[0., 0.],
                [1., 1.]])
        >>> loss_func.proxy_usage[0].sort().values
        tensor([0.3333, 0.6667])
        """
        check.embeddings(embeddings, self.proxies)
        labels = check.labels(labels, len(embeddings), self.num_classes).to(embeddings.device)
        if not embeddings.isfinite().all():
            raise ValueError("embeddings must be finite, got NaN or infinite values")
        directions = self.distance.normalize_embeddings
        if directions:  # an embedding of zeros has none
            embeddings, labels = embeddings[embeddings.any(dim=1)], labels[embeddings.any(dim=1)]
        classes, centroids = kmeans.start(embeddings, labels, self.proxies_per_class, spherical=directions)
        centroids = centroids.to(self.proxies.dtype)
        usage = self._shares(embeddings, labels, classes, centroids)
        self._held_proxies()[classes], self._held_usage()[classes] = centroids, usage

    def _shares(self, embeddings: Tensor, labels: Tensor, classes: Tensor, proxies: Tensor) -> Tensor:
        """Of the samples of each class, the share that each of these proxies of it is the nearest to: ``(P, K)``."""
        counts = self._held_usage().new_zeros(proxies.shape[:2])
        places = torch.searchsorted(classes, labels)
        by_class = places.argsort()  # so that few classes are in a chunk
        for begin in range(0, len(by_class), ROWS_PER_CHUNK):
            rows = by_class[begin : begin + ROWS_PER_CHUNK]
            first, last = int(places[rows[0]]), int(places[rows[-1]])
            similarities = self._to_proxies(embeddings[rows], proxies[first : last + 1])
            own = similarities[_rows(rows), places[rows] - first]
            if not own.isfinite().all():
                raise ValueError(
                    f"embeddings must be small enough for {type(self.distance).__name__} in {own.dtype}, got values up "
                    f"to {float(embeddings.abs().max()):.3g}, whose distances to proxies in {proxies.dtype} overflow"
                )
            counts.view(-1).index_add_(
                0, places[rows] * proxies.shape[1] + own.argmax(dim=1), counts.new_ones(len(rows))
            )
        return counts / counts.sum(dim=1, keepdim=True)

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()

    def get_default_weight_init_func(self) -> Callable[[Tensor], None]:
        return _unit_directions_

    def _start(self) -> tuple[Tensor, Tensor]:
        """What the proxies and their usage start at."""
        return self._drawn(self.num_classes)

    def _drawn(self, num_classes: int) -> tuple[Tensor, Tensor]:
        """The same for some of the classes: ``(C', K, D)`` and ``(C', K)``."""
        shape = (num_classes, self.proxies_per_class)
        weights = torch.empty(math.prod(shape), self.embedding_size)
        self.weight_init_func(weights)
        usage = torch.full(shape, 1 / self.proxies_per_class, dtype=torch.float32)
        return weights.view(*shape, self.embedding_size), usage

    def _checked_labels(
        self, embeddings: Tensor, labels: object, indices_tuple: object, ref_emb: object, ref_labels: object
    ) -> Tensor:
        for name, reference in (("ref_emb", ref_emb), ("ref_labels", ref_labels)):
            if reference is not None:
                raise ValueError(f"{name} must be None, got {type(reference).__name__}: proxies take its place")
        check.embeddings(embeddings, self.proxies)
        checked = check.labels(labels, len(embeddings), self.num_classes)
        check.indices_tuple(indices_tuple, len(embeddings))
        check.views(checked, self.views)
        return checked

    def _reseed(self, points: Tensor, labels: Tensor) -> None:
        reseeding.reseed_(self.proxies, self.proxy_usage, points, labels, self.reseed_below)

    def _mined_weights(self, mined: Any, labels: Tensor, dtype: torch.dtype) -> Tensor:
        weights: Tensor = lmu.convert_to_weights(mined, labels, dtype=dtype)
        return weights

    def _learns(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _points(self, embeddings: Tensor) -> Tensor:
        """Where proxies should lie that stand for these embeddings."""
        return functional.normalize(embeddings) if self.distance.normalize_embeddings else embeddings

    def _losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        dtype = functional.compute_dtype(embeddings, self.proxies)
        plan = streaming.make_plan(self.classes_per_chunk, len(embeddings), self._held_proxies(), dtype)
        lengths = self._lengths(dtype)
        # A compiler does better on the plain equations; by other distances, so does autograd while all fit at once.
        if torch.compiler.is_compiling() or (plan.keep and lengths is None):
            losses, terms = self._by_autograd(embeddings, labels)
        else:
            losses, terms = self._by_hand(embeddings, labels, lengths, plan)
        if self.collect_stats and len(labels):
            self._record(labels, terms)
        return losses

    def _by_autograd(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, functional.Terms]:
        """The loss of each sample, and the terms in it, by the plain equations."""
        similarities = self._to_proxies(embeddings, self.proxies)
        classes, own = self._pool(similarities), similarities[_rows(labels), labels]
        assignments = functional.assignment(own, self.temperature)
        terms = functional.Terms(
            functional.classification_loss(classes, labels, self.scale, self.margin),
            functional.intra_class_entropy(own, self.temperature)
            if self.views == 1
            else functional.cross_view_entropy(own, self.temperature, self.views),
            functional.inter_class_entropy(classes, self.scale),
            functional.balance(assignments, self._own_usage(assignments, labels, self._learns())),
        )
        return functional.sample_loss(terms, self._weights(), self.num_classes, self.proxies_per_class), terms

    def _by_hand(
        self, embeddings: Tensor, labels: Tensor, lengths: Tensor | None, plan: streaming.Plan
    ) -> tuple[Tensor, functional.Terms]:
        """The same, with the analytic gradient."""
        settings = self._settings(embeddings, labels, lengths, plan)
        dtype = functional.compute_dtype(embeddings, self.proxies)
        return streaming.loss_and_terms(embeddings, self._held_proxies().to(dtype), labels, settings)

    def _settings(
        self, embeddings: Tensor, labels: Tensor, lengths: Tensor | None, plan: streaming.Plan
    ) -> streaming.Settings:
        learns = self._learns()  # which is not the same inside of an autograd function
        dtype, device_type = functional.compute_dtype(embeddings, self.proxies), embeddings.device.type
        similarity: Similarity
        if lengths is None:
            similarity = DistanceCalls(embeddings.to(dtype), self._similarities)
        elif torch.is_autocast_enabled(device_type) and dtype == torch.float32:  # it leaves float64 alone
            similarity = RoundedCosineProducts(embeddings, lengths, torch.get_autocast_dtype(device_type))
        else:
            similarity = CosineProducts(embeddings, lengths)
        return streaming.Settings(
            self.num_classes,
            similarity,
            self.pooling,
            self.scale,
            self.temperature,
            self.margin,
            self._weights(),
            self.views,
            lambda assignments: self._own_usage(assignments, labels, learns),
            plan,
        )

    def _held_proxies(self) -> Tensor:
        """Those of the classes that this process holds, which here is all of them."""
        return self.proxies

    def _held_usage(self) -> Tensor:
        return self.proxy_usage

    def _weights(self) -> functional.Weights:
        return functional.Weights(self.intra_weight, self.inter_weight, self.balance_weight)

    def _own_usage(self, assignments: Tensor, labels: Tensor, learns: bool) -> Tensor:
        """The usage of the class of each sample, ``(B, K)``, which is first moved on by the batch if it ``learns``."""
        usage = self._held_usage()
        if learns:
            # A table of all classes, not the rows of the batch: its size is the same everywhere, so that processes may
            # hold different numbers of samples without telling each other first, for which a GPU would have to wait. It
            # is a small part, 1 / D, of what DistributedDataParallel sends of the proxies' gradient. And a sum that is
            # the same to the last bit everywhere leaves the usage the same everywhere.
            sums = functional.usage_sums(assignments, labels, len(usage))
            if self.usage_group is not None:
                distributed.all_reduce(sums, group=self.usage_group)
            usage.copy_(functional.moved_usage(usage, sums, self.usage_momentum))
        return usage.index_select(0, labels).to(assignments.dtype)

    def _lengths(self, dtype: torch.dtype) -> Tensor | None:
        """Those of all proxies, where the similarities are cosines that need no normalized proxies in memory."""
        if (
            not _is_plain_cosine(self.distance)
            or self.distance.collect_stats  # of which the norms of normalized proxies are a part
            or self.proxies.dtype != dtype
            or torch.compiler.is_compiling()
        ):
            return None
        lengths = torch.linalg.vector_norm(self._held_proxies().detach(), dim=-1).view(-1, 1)
        # Their squares may overflow; elsewhere than on a CPU, looking would make it wait.
        return lengths if lengths.device.type != "cpu" or float(lengths.sum()) < math.inf else None

    def _in_chunks(self, embeddings: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The first of some classes, and the similarities to their proxies, ``(B, c, K)``."""
        proxies, dtype = self._held_proxies(), functional.compute_dtype(embeddings, self.proxies)
        plan = streaming.make_plan(self.classes_per_chunk, len(embeddings), proxies, dtype)
        count = max(len(proxies), 1) if plan.keep else plan.classes_per_chunk
        for start in range(0, len(proxies), count):
            yield start, self._to_proxies(embeddings, proxies[start : start + count])

    def _nearest(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """The largest similarity of each embedding, and where that proxy stands among all, each ``(B,)``."""
        nearest = torch.zeros(len(embeddings), dtype=torch.long, device=embeddings.device)
        similarity = torch.full_like(nearest, -math.inf, dtype=functional.compute_dtype(embeddings, self.proxies))
        for start, similarities in self._in_chunks(embeddings):
            values, places = similarities.flatten(1).max(dim=1)
            nearest = torch.where(values > similarity, start * self.proxies_per_class + places, nearest)
            similarity = torch.maximum(similarity, values)
        return similarity, nearest

    def _to_own_proxies(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The similarities to the proxies of the class of each label, ``(B, K)``, without those of absent classes."""
        classes, position = torch.unique(labels, return_inverse=True)
        return self._to_proxies(embeddings, self._held_proxies()[classes])[_rows(labels), position]

    def _to_proxies(self, embeddings: Tensor, proxies: Tensor) -> Tensor:
        """The similarities to proxies ``(c, K, D)``, ``(B, c, K)``."""
        return self._similarities(embeddings, proxies.flatten(0, 1)).view(len(embeddings), *proxies.shape[:2])

    def _similarities(self, embeddings: Tensor, proxies: Tensor) -> Tensor:
        """``(B, P)``, larger is nearer, in at least float32, also where autocast has the products in less."""
        dtype = functional.compute_dtype(embeddings, proxies)
        if _is_plain_cosine(self.distance):
            queries, references = functional.normalize(embeddings, dtype), functional.normalize(proxies, dtype)
            self.distance.set_default_stats(embeddings, proxies, queries, references)
            similarities = queries @ references.T
        else:
            similarities = self.distance(embeddings.to(dtype), proxies.to(dtype))
            if not self.distance.is_inverted:
                similarities = -similarities
        return similarities.to(dtype)

    def _pool(self, similarities: Tensor) -> Tensor:
        return functional.POOLINGS[self.pooling](similarities, self.scale, self.temperature)

    @torch.no_grad()
    def _record(self, labels: Tensor, terms: functional.Terms) -> None:
        classification, intra, inter, balance = terms
        information = -balance - intra  # KL(q_i || u)
        balance = math.log(self.proxies_per_class) + balance
        classes, position = torch.unique(labels, return_inverse=True)
        of_classes = information.new_zeros(len(classes)).index_add(0, position, information)
        effective = (of_classes / position.bincount()).exp()
        in_use, perplexity = self._usage_statistics()
        values = (classification, intra, inter, balance, in_use, perplexity, effective, effective.min())
        # One transfer from the device for all of them.
        means = torch.stack([value.to(intra.dtype).mean() for value in values]).tolist()
        for name, mean in zip(STATISTICS, means, strict=True):
            setattr(self, name, mean)

    def _usage_statistics(self) -> tuple[Tensor, Tensor]:
        """``proxies_in_use`` and ``usage_perplexity``, whose means over the classes these have."""
        usage = self._held_usage()
        in_use = usage >= IN_USE / self.proxies_per_class
        return in_use.to(usage.dtype).mean(dim=1), functional.perplexity(usage)

    def __getstate__(self) -> dict[str, Any]:
        if self.usage_group is not None:
            raise TypeError(
                "a loss with a usage_group can be neither copied nor pickled, since a process group belongs to its "
                "process: save its state_dict()"
            )
        return self.__dict__

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MultiProxyEntropyLoss":
        """Keeps the usage in float32 through ``half()`` and the like: its momentum would be lost in rounding."""
        usage = self.proxy_usage
        super()._apply(fn, recurse)
        if self.proxy_usage.dtype != usage.dtype:
            self.proxy_usage = usage.to(self.proxy_usage.device)
        return self


@torch.no_grad()
def _unit_directions_(weights: Tensor) -> None:
    """Fills ``(N, D)`` with random directions of unit length."""
    weights.copy_(functional.normalize(torch.nn.init.normal_(weights)))


def _is_plain_cosine(distance: Any) -> bool:
    # Not isinstance: a subclass may compute something else.
    return type(distance) is CosineSimilarity and bool(distance.p == 2 and distance.power == 1)


def _rows(labels: Tensor) -> Tensor:
    return torch.arange(len(labels), device=labels.device)
