"""The loss, as PyTorch Metric Learning knows losses."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from torch import Tensor

from . import _check as check
from . import _kmeans as kmeans
from . import _nearest as nearest
from . import _shard as sharding
from . import functional
from ._analytic.chunks import make_plan
from ._analytic.poolings import POOLINGS
from ._check import Settings
from ._monitor import Statistics, UntrainedProxies, statistics
from ._pml import ARGUMENTS, ProxyLoss
from ._shard import Shard
from ._similarity import is_plain_cosine, record_norms, similarities
from ._step import Step, sample_losses

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["MultiProxyEntropyLoss"]


class MultiProxyEntropyLoss(ProxyLoss):
    r"""Classification by several proxies per class. Entropy terms make each sample commit to one proxy and bring all
    proxies into use; with several views, samples that share a proxy attract each other.

    The proxies are a parameter: give ``loss_func.parameters()`` to an optimizer, in PML's trainers as
    ``metric_loss_optimizer``. A learning rate about ten times that of the network is a good first try.

    With the symbols of :mod:`pml_multiproxy.functional`, the loss of sample :math:`i` is

    .. math::

        \ell_i = \mathrm{CE}_i
        &+ \lambda_\mathrm{intra}\, H_\mathrm{intra}(i)
        + \lambda_\mathrm{inter}\, \big(\log C - H_\mathrm{inter}(i)\big) \\
        &+ \lambda_\mathrm{balance}\, \Big(\log K + \sum_k q_i(k) \log u_{y_i}(k)\Big)
        + \lambda_\mathrm{neighbor}\, N_i

    - :math:`\mathrm{CE}_i`: cross-entropy of the target class, over class similarities pooled from the proxies
      (:func:`~pml_multiproxy.functional.classification_loss`);
    - :math:`H_\mathrm{intra}`: entropy of the assignment :math:`q_i` of a sample to the proxies of its class,
      minimised: every sample commits to a proxy;
    - :math:`H_\mathrm{inter}`: entropy of the class distribution, maximised: it stays smooth;
    - the balance spreads the samples of a class over its proxies: a proxy costs more the more it is used. The usage
      :math:`u` is a running mean of the assignment. With :math:`\lambda_\mathrm{intra} = \lambda_\mathrm{balance}`,
      the within-class terms maximise the mutual information between sample and proxy inside each class;
    - :math:`N_i`: a contrast between the samples of the batch, whose targets come from the proxies
      (:func:`~pml_multiproxy.functional.neighbor_loss`).

    The constants :math:`\log C` and :math:`\log K` change no gradient. They keep most losses above 0, since reducers
    such as ``AvgNonZeroReducer`` drop losses of 0 and below. The loss of a single sample may still be negative.

    In ``train()`` mode with gradients enabled, each call first updates the usage with the batch, then uses it: so
    optimizers that call the loss several times a step (SAM, LBFGS) update it each time. In ``eval()`` mode or without
    gradients a call only uses it. An empty batch has a loss of 0.

    **Views.** With ``views=V`` from 2 on, a batch is :math:`V` blocks of equal length, and row :math:`i` of every block
    is a view, a random augmentation, of the same sample. The intra-class entropy of a view then becomes the
    cross-entropy between its assignment and those of the other views
    (:func:`~pml_multiproxy.functional.cross_view_entropy`): views of a sample have to choose the same proxy.
    :mod:`pml_multiproxy.views` makes such batches from a dataset with a random transform.

    **Your labels are what you want to retrieve** (new classes of the same kind): take ``proxies_per_class=1``,
    ``intra_weight=0`` and ``balance_weight=0``.

    Sources. Intra- and inter-class entropy: Yu, Zhang, Li, Zhang, *Multi-Proxy Learning from an Entropy Optimization
    Perspective*, IJCAI 2022, pp. 1594-1600, doi:10.24963/ijcai.2022/222. Only its abstract, the caption of its Figure 1
    and summaries were available to us: the equations are our reading of them, not a copy, and ``balance_weight=0`` and
    ``neighbor_weight=0`` are our reading of the paper's objective. Balance: mutual-information maximisation as known
    from discriminative clustering, applied within classes: RIM (Krause, Perona, Gomes, *Discriminative Clustering by
    Regularized Information Maximization*, NIPS 2010) and IMSAT (Hu et al., *Learning Discrete Representations via
    Information Maximizing Self-Augmented Training*, ICML 2017). FALCON (ICML 2024) has such a term over batches instead
    of a running mean. Views: the self-augmentation of IMSAT, within classes. Related methods without classes are IIC
    (Ji, Henriques, Vedaldi, *Invariant Information Clustering*, ICCV 2019) and SwAV (Caron et al., NeurIPS 2020).

    Args:
        num_classes: :math:`C`, at least 1.
        embedding_size: :math:`D`, at least 1.
        proxies_per_class: :math:`K`, at least 1.
        scale: :math:`\sigma` > 0, the factor on the class similarities, in units of 1 / similarity.
        margin: :math:`m`, by which the target class has to win, in units of the similarity.
        pooling: how the similarity to a class is computed from those to its proxies: ``"max"``
            (:func:`~pml_multiproxy.functional.pool_max`), ``"softmax"``
            (:func:`~pml_multiproxy.functional.pool_softmax`) or ``"logsumexp"``
            (:func:`~pml_multiproxy.functional.pool_logsumexp`).
        temperature: :math:`\tau` > 0 of the assignment and of ``pooling="softmax"``, in units of the similarity.
        intra_weight: :math:`\lambda_\mathrm{intra}` >= 0.
        inter_weight: :math:`\lambda_\mathrm{inter}` >= 0.
        balance_weight: :math:`\lambda_\mathrm{balance}` >= 0.
        neighbor_weight: :math:`\lambda_\mathrm{neighbor}` >= 0. ``None``: 1 with several views, 0 with one. With one
            view the term reinforces the first clusters that the proxies find: this helps on some data and harms on
            other.
        neighbor_temperature: :math:`\tau_N` > 0, in units of the similarity.
        usage_momentum: per-sample momentum of the running usage, from 0 to 1.
        usage_group: for ``DistributedDataParallel``: the processes whose batches update the usage together. A
            ``torch.distributed.ProcessGroup``, or ``"world"`` for the default group, which need not exist before the
            first call. ``None``: each process keeps the usage of its own batches. Every process of the group has to
            call the loss as often as the others, all in training or none; one that has no samples calls it with none.
            With equal local batches, the mean as reducer, no miner and no neighbour term, the result is that of one
            process with the whole batch. The neighbour term contrasts the samples of each process on their own.
        views: :math:`V`, at least 1: how many views of each sample a batch holds, see above.
        classes_per_chunk: how many classes to hold in memory at a time. The result is the same: fewer take less memory,
            and more time in backward, which then computes similarities once more. ``None``: all, while their
            similarities (``B * C * K`` numbers) take at most 256 MiB, else as many as take 2 MiB (on a GPU, 64 MiB).
        **kwargs: PML's: ``distance`` (default: ``CosineSimilarity``), ``reducer`` (default: ``MeanReducer``),
            ``weight_regularizer``, ``weight_reg_weight``, ``weight_init_func`` (called on the proxies as
            ``(C * K, D)``; default: random directions of unit length), ``embedding_regularizer``,
            ``embedding_reg_weight``, ``collect_stats``.

    Attributes:
        proxies: parameter ``(C, K, D)``.
        proxy_usage: buffer ``(C, K)``, :math:`u`, rows sum to 1; stays ``float32``.
        classification_loss: with ``collect_stats=True``, the mean of :math:`\mathrm{CE}` over the last batch, in nats.
        intra_class_entropy: likewise, the mean of :math:`H_\mathrm{intra}`.
        inter_class_entropy: likewise, the mean of :math:`H_\mathrm{inter}`.
        balance: likewise, the mean of :math:`\log K + \sum_k q \log u`.
        neighbor_loss: likewise, the mean of :math:`N`; 0 if its weight is 0.
        proxies_in_use: with ``collect_stats=True``, the share of all proxies that have at least a tenth of an even
            share of their class.
        usage_perplexity: with ``collect_stats=True``, :math:`\exp H(u_c)`, mean over all classes: over how many proxies
            the samples of a class are spread.
        effective_proxies: with ``collect_stats=True``, how many proxies the assignment tells apart: :math:`\exp` of the
            mean of :math:`\mathrm{KL}(q_i \Vert u_{y_i})` over the samples of a class, mean over the classes of the
            batch. Identical proxies have an even usage, but count as one here. Over few samples of a class it is noisy,
            and may exceed :math:`K`.
        min_effective_proxies: with ``collect_stats=True``, the same, but the minimum over the classes of the batch.
        views_agree: with ``collect_stats=True``, the share of samples all of whose views are nearest to the same proxy
            of their class; 1 with a single view.

    Calling it: ``loss_func(embeddings, labels, indices_tuple=None)`` with embeddings ``(B, D)``, labels ``(B,)`` of an
    integer dtype in ``[0, C)``, and optionally the tuple of a miner, which weights samples as in PML's other
    classification losses: a sample that was not mined has weight 0, but stays in the mean; a tuple of empty tensors
    counts as none. The loss is in :func:`~pml_multiproxy.functional.compute_dtype` of embeddings and proxies. With a
    weight or embedding regularizer, it is in the dtype of the embeddings, in which PML adds the terms: with ``float16``
    and a ``GradScaler``, gradients may then overflow.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or range; for a setting changed
            later, at the next call. Settings cannot be learned. On a GPU, the range of labels and indices is not
            checked, which would be a device synchronisation; equal labels in all views only in the first batch. For a
            ``distance`` that learns where the classes are computed some at a time.
        RuntimeError: for a call in training within a backward pass, as by ``torch.utils.checkpoint`` around the loss,
            or within a transform of ``torch.func``, since each call in training updates the usage. For differentiating
            the gradient again, except where autograd computes it.

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
        proxies_per_class: int = 50,
        *,
        scale: float = 10.0,
        margin: float = 0.0,
        pooling: str = "logsumexp",
        temperature: float = 0.1,
        intra_weight: float = 0.25,
        inter_weight: float = 0.0,
        balance_weight: float = 0.5,
        neighbor_weight: float | None = None,
        neighbor_temperature: float = 0.2,
        usage_momentum: float = 0.9,
        usage_group: "ProcessGroup | str | None" = None,
        views: int = 1,
        classes_per_chunk: int | None = None,
        **kwargs: Any,
    ) -> None:
        given = locals()
        check.keywords(kwargs, [*Settings._fields, "usage_group", *ARGUMENTS], type(self).__name__)
        check.process_group("usage_group", usage_group, also="world")
        super().__init__(**kwargs)
        for name in Settings._fields:
            setattr(self, name, check.CHECKS[name](name, given[name]))
        self.usage_group = usage_group
        self.add_to_recordable_attributes(list_of_names=RESULT_SETTINGS, is_stat=False)
        self.add_to_recordable_attributes(list_of_names=list(Statistics._fields), is_stat=True)
        self._untrained, self._has_seen_views = UntrainedProxies(), False
        self._make_proxies()

    def _make_proxies(self) -> None:
        self._shard = Shard(0, self.num_classes, self.num_classes)
        shape = self.num_classes, self.proxies_per_class
        self.proxies = torch.nn.Parameter(torch.empty(*shape, self.embedding_size))
        self.register_buffer("proxy_usage", torch.empty(shape, dtype=torch.float32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new proxies by ``weight_init_func`` and makes the usage even: after ``to_empty`` from the meta device.

        >>> with torch.device("meta"):
        ...     loss_func = MultiProxyEntropyLoss(num_classes=4, embedding_size=8)
        >>> loss_func = loss_func.to_empty(device="cpu")
        >>> loss_func.reset_parameters()
        >>> loss_func.proxies.isfinite().all()
        tensor(True)
        """
        proxies, usage = self._written_to()
        self.weight_init_func(proxies.flatten(0, 1))
        usage.fill_(1 / self.proxies_per_class)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The reduced loss, as described in the class docstring; ``ref_emb`` and ``ref_labels`` must stay ``None`` or
        be the embeddings and the labels themselves.
        """
        self.reset_stats()
        check.references(embeddings, labels, ref_emb, ref_labels, self.views)
        batch = self._checked(embeddings, labels, indices_tuple)
        batch, _ = sharding.gather(batch, self._shard, self.views, self.proxies, self.distance, self._is_training())
        loss_dict = self.compute_loss(*batch, batch.embeddings, batch.labels)
        return self.reduced(loss_dict, batch.embeddings, batch.labels)

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> dict[str, dict[str, Any]]:
        """One loss per sample, and the weight regularization, before the reducer. Override it to extend the loss.

        Calling the loss calls this method with checked arguments; with the sharded loss, these hold the samples of all
        ranks.
        """
        check.references(embeddings, labels, ref_emb, ref_labels, self.views)
        settings, parameter, training = check.settings(self), self.proxies, self._is_training()
        proxies, usage = self._local(parameter), self._local(self.proxy_usage)
        # Proxies that a parametrization computes are no leaf, and belong to no optimizer.
        if training and parameter.requires_grad and parameter.is_leaf and not torch.compiler.is_compiling():
            self._untrained.look(proxies, parameter.grad)
        result = sample_losses(
            Step(embeddings, labels, proxies, usage, self.usage_group, training, self.distance, settings, self._shard)
        )
        if self.collect_stats and len(labels):
            recorded = statistics(result, labels, usage, self.views, self._shard)
            for name, value in recorded._asdict().items():
                setattr(self, name, value)
        return self.loss_dict(result.losses, labels, indices_tuple, proxies)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        r"""The logits of the classes, :math:`\sigma z_i(c)`: scale included, margin not. Never updates the usage.

        The sharded loss computes those of the classes that its rank holds, of its own embeddings.

        Args:
            embeddings: ``(B, D)``.

        Returns:
            ``(B, C)``; of the sharded loss, ``(B, len(classes))``.

        >>> loss_func = MultiProxyEntropyLoss(num_classes=4, embedding_size=8)
        >>> loss_func.get_logits(torch.randn(5, 8)).shape
        torch.Size([5, 4])
        """
        check.embeddings(embeddings, self.proxies)
        settings, proxies = check.settings(self), self._local(self.proxies)
        dtype, count = functional.compute_dtype(embeddings, proxies), len(proxies)
        if count == 0:
            return embeddings.new_empty(len(embeddings), 0, dtype=dtype)
        record_norms(self.distance, embeddings, proxies.flatten(0, 1))
        if not torch.compiler.is_compiling():  # compiled code serves batches of any length, for which plans differ
            count = make_plan(settings.classes_per_chunk, len(embeddings), proxies, dtype).classes_per_chunk
        pooling, pooled = POOLINGS[settings.pooling].equation, []
        for chunk in torch.split(proxies, count):
            to_proxies = similarities(self.distance, embeddings, chunk.flatten(0, 1))
            to_proxies = torch.unflatten(to_proxies, 1, chunk.shape[:2])
            pooled.append(pooling(to_proxies, settings.scale, settings.temperature))
        return settings.scale * torch.cat(pooled, dim=1)

    @torch.no_grad()
    def assign(self, embeddings: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The nearest proxy of each embedding. Never updates the usage.

        With the sharded loss, every rank has to call it, each with its own embeddings. It compares them to the proxies
        of all ranks.

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
        proxies = self._local(self.proxies)
        if labels is None:
            check.embeddings(embeddings, proxies)
            classes = torch.zeros(len(embeddings), dtype=torch.long, device=embeddings.device)
        else:
            classes = self._own_classes(embeddings, labels)
        batch = sharding.Batch(embeddings, classes, None)
        batch, sizes = sharding.gather(batch, self._shard, 1, proxies, self.distance, self._is_training())
        if labels is None:
            found = nearest.nearest_of_all(self.distance, batch.embeddings, proxies, self._shard)
        else:
            found = nearest.nearest_of_target(self.distance, batch.embeddings, batch.labels, proxies, self._shard)
        found = sharding.own_rows(found, sizes, self._shard)
        return found // self.proxies_per_class, found % self.proxies_per_class

    @torch.no_grad()
    def soft_assign(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        r"""How each embedding is distributed over the proxies of its class, :math:`q_i`. Never updates the usage.

        .. math:: q_i(k) = \operatorname{softmax}_k\!\big(s(x_i, w_{y_i,k}) / \tau\big)

        Carries no gradient; :func:`~pml_multiproxy.functional.assignment` does.

        Args:
            embeddings: ``(B, D)``.
            labels: ``(B,)``, integers in ``[0, C)``.

        Returns:
            ``(B, K)``, rows sum to 1, in :func:`~pml_multiproxy.functional.compute_dtype` of embeddings and proxies.

        Raises:
            TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or range.

        >>> loss_func = MultiProxyEntropyLoss(num_classes=4, embedding_size=8, proxies_per_class=3, temperature=1e-3)
        >>> loss_func.soft_assign(loss_func.proxies[2], torch.tensor([2, 2, 2])).round().int()
        tensor([[1, 0, 0],
                [0, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
        """
        own = nearest.to_target(self.distance, embeddings, self._own_classes(embeddings, labels), self._whole())
        return functional.assignment(own, check.settings(self).temperature)

    @torch.no_grad()
    def get_outliers(
        self, embeddings: Tensor, labels: Tensor, threshold: float = 75, return_dominant_centers: bool = True
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Samples far from the dominant proxy of their class, which may be mislabeled.

        As PML's ``SubCenterArcFaceLoss`` has it. The dominant proxy is the one that most of the given samples of the
        class are nearest to. Give all training samples, not a batch. Where a class is spread over several proxies,
        as at the defaults, its samples at the other proxies count as outliers, too: there, compare
        ``assign(embeddings)[0]`` with the labels instead.

        Args:
            embeddings: ``(B, D)``, finite.
            labels: ``(B,)``, integers in ``[0, C)``.
            threshold: an outlier is farther than this angle from its dominant proxy, in degrees, from 0 to 180.
            return_dominant_centers: whether to return the dominant proxies, too. PML returns them in any case.

        Returns:
            The indices of the outliers, long, ordered by class and, within a class, as given; and the dominant proxies,
            ``(D, C)``, NaN where a class has no sample.

        Raises:
            TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or range; for a distance
                other than the cosine, which has no angle.

        >>> loss_func = MultiProxyEntropyLoss(num_classes=1, embedding_size=2, proxies_per_class=2)
        >>> loss_func.proxies.data = torch.eye(2).unsqueeze(0)
        >>> embeddings, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]), torch.tensor([0, 0, 0])
        >>> loss_func.get_outliers(embeddings, labels, return_dominant_centers=False)
        tensor([1])
        """
        if not is_plain_cosine(self.distance):
            raise ValueError(f"distance must be CosineSimilarity(p=2, power=1) for an angle, got {self.distance}")
        degrees = check.real("threshold", threshold, "a number of degrees from 0 to 180", low=0.0, high=180.0)
        labels, proxies = self._own_classes(embeddings, labels), self._whole()
        check.finite("embeddings", embeddings)
        check.finite("proxies", proxies)
        found, centers = nearest.outliers(self.distance, embeddings, labels, proxies, degrees)
        return (found, centers) if return_dominant_centers else found

    @torch.no_grad()
    def init_proxies(self, embeddings: Tensor, labels: Tensor) -> None:
        """Starts the proxies of each class at the centroids of its samples, by k-means.

        The k-means is scikit-learn's, one class at a time, with a progress bar if it takes long. The same seed of torch
        gives the same result. If the distance normalizes embeddings, so does this method: the proxies get unit length,
        and embeddings of zeros, which have no direction, are left out. If a class has no more distinct samples than
        proxies, samples are repeated, with a little noise. Classes without samples keep their proxies. The usage
        becomes the share of the samples that each proxy is the nearest to.

        On several processes: with a ``usage_group``, every process of the group calls it, and all get the result of its
        first process. With the sharded loss, each rank uses the samples of the classes that it holds, and ignores
        others.

        Args:
            embeddings: ``(N, D)``, of the network that will be trained, over enough samples of each class.
            labels: ``(N,)``, integers in ``[0, C)``.

        Raises:
            TypeError, ValueError: as when the loss is called; for embeddings that are not finite or so large that
                distances to proxies overflow; if the proxies are no plain parameter; and on several processes without
                a ``usage_group``, whose copies of the loss would then differ.

        >>> loss_func = MultiProxyEntropyLoss(num_classes=2, embedding_size=2, proxies_per_class=2)
        >>> embeddings = torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [0.0, -4.0]])
        >>> loss_func.init_proxies(embeddings, torch.tensor([0, 0, 0, 1, 1, 1]))
        >>> loss_func.proxies[0].detach().sort(dim=0).values
        tensor([[0., 0.],
                [1., 1.]])
        >>> loss_func.proxy_usage[0].sort().values
        tensor([0.3333, 0.6667])
        """
        labels = self._own_classes(embeddings, labels)
        check.finite("embeddings", embeddings)
        proxies, usage = self._written_to()
        positions = labels - self._shard.start
        local = sharding.is_local(positions, self._shard)
        if local is not None:
            embeddings, positions = embeddings[local], positions[local]
        else:
            sharding.check_replicas(self.usage_group)
        kmeans.start_(proxies, usage, embeddings, positions, self.distance)
        if local is None:
            sharding.copy_from_first_((proxies, usage), self.usage_group)

    def save(self, path: str | Path) -> None:
        """Writes settings and state into one file, for :meth:`load`.

        The file holds all that the constructor takes except the distance, the reducer, the regularizers and the
        ``usage_group``, and whether the loss is in training mode and its proxies require a gradient. It replaces an
        older file when it is whole.

        Args:
            path: of the file.

        Raises:
            ValueError: if the proxies are no plain parameter.

        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "loss.pt"
        >>> MultiProxyEntropyLoss(num_classes=4, embedding_size=8, proxies_per_class=3, scale=20).save(path)
        >>> MultiProxyEntropyLoss.load(path).scale
        20.0
        """
        self._whole()
        self._written_to()  # refuses proxies that a file cannot hold
        contents = {
            "settings": self.settings() | {name: _plain(getattr(self, name)) for name in SAVED_ARGUMENTS},
            "modules": _names_of_modules(self),
            "training": self.training,
            "requires_grad": self.proxies.requires_grad,
            "state": self.state_dict(),
        }
        _write(path, contents)

    @classmethod
    def load(cls, path: str | Path, map_location: Any = None, **kwargs: Any) -> "MultiProxyEntropyLoss":
        """The loss that :meth:`save` wrote: its settings, proxies and usage, in their dtypes. Runs no code of the file.

        Args:
            path: of the file.
            map_location: where to put the tensors, as in ``torch.load``; ``None``: where they were.
            **kwargs: ``distance``, ``reducer``, regularizers and ``usage_group``, which the file does not hold. Make
                them as they were: only their classes are compared.

        Raises:
            ValueError: for a damaged or foreign file, and for a ``distance``, ``reducer`` or regularizer of another
                class than the one that was saved.
        """
        contents = _read(path, map_location)
        settings, state = contents["settings"], contents["state"]
        loss_func = cls(**settings, **kwargs)
        given = _names_of_modules(loss_func)
        for name, saved in contents["modules"].items():
            if given[name] != saved:
                raise ValueError(f"{name} must be of the class that was saved, {saved}, got {given[name]}")
        loss_func.to(state["proxies"].device, state["proxies"].dtype)
        loss_func.load_state_dict(state)
        loss_func.proxies.requires_grad_(contents["requires_grad"])
        loss_func.train(contents["training"])
        return loss_func

    def settings(self) -> dict[str, Any]:
        """The hyperparameters by name, as the constructor takes them.

        >>> MultiProxyEntropyLoss(num_classes=4, embedding_size=8, scale=20).settings()["scale"]
        20.0
        """
        return {name: _plain(getattr(self, name)) for name in Settings._fields}

    def extra_repr(self) -> str:
        """The settings, which ``print`` shows."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()

    def get_default_weight_init_func(self) -> Callable[[Tensor], None]:
        return _unit_directions_

    def _checked(self, embeddings: Tensor, labels: object, indices_tuple: object) -> sharding.Batch:
        """The samples of this process, checked."""
        check.embeddings(embeddings, self.proxies)
        checked = check.labels(labels, len(embeddings), self.num_classes)
        mined = check.indices_tuple(indices_tuple, len(embeddings))
        if self.views != 1:
            # Forgotten views show in the first batch. Looking at every batch would synchronise a GPU.
            look = checked.device.type == "cpu" or not (self._has_seen_views or checked.is_meta)
            look = look and not torch.compiler.is_compiling()
            check.views(checked, self.views, look)
            self._has_seen_views = self._has_seen_views or look
        if self._is_training():
            check.training_call()
        return sharding.Batch(_saveable(embeddings), _saveable(checked.to(embeddings.device)), mined)

    def _own_classes(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The labels of the embeddings, both checked."""
        check.embeddings(embeddings, self.proxies)
        return check.labels(labels, len(embeddings), self.num_classes).to(embeddings.device)

    def _is_training(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _local(self, tensor: Tensor) -> Tensor:
        """The part of proxies or usage that this process holds, ``(c', ...)``."""
        return tensor if self._shard.group is None else tensor.to_local()  # type: ignore[attr-defined]

    def _whole(self) -> Tensor:
        """The proxies ``(C, K, D)``, for methods that need all of them."""
        if self._shard.group is not None:
            raise ValueError("loss_func must hold all classes for this, got one that is sharded over processes")
        return self.proxies

    def _written_to(self) -> tuple[Tensor, Tensor]:
        """Proxies and usage of this process, to be changed in place."""
        proxies = self._parameters.get("proxies")
        if proxies is None or (hasattr(proxies, "to_local") and self._shard.group is None):
            raise ValueError(
                "proxies must be a plain parameter to be set or saved, got one that is computed from others, by a "
                "parametrization, pruning or fully_shard: do it before, or remove that"
            )
        return self._local(proxies), self._local(self.proxy_usage)

    def __getattr__(self, name: str) -> Any:
        if name in Statistics._fields:
            raise AttributeError(f"{name} is recorded by calls of a loss that was made with collect_stats=True")
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:  # not among the keys: these stay names of tensors
            metadata["settings"] = self.settings()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        recorded, changes = local_metadata.get("settings", {}), []
        for name, value in self.settings().items():
            if name in RESULT_SETTINGS and recorded.get(name, value) != value:
                changes.append(f"{name} was {recorded[name]!r} and is {value!r}")
        if changes:
            warnings.warn(f"the state was saved by a loss of other settings: {', '.join(changes)}", stacklevel=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MultiProxyEntropyLoss":
        """Keeps the usage in float32 through ``half()`` and the like: rounding would swallow its momentum."""
        usage = self.proxy_usage
        super()._apply(fn, recurse)
        if self.proxy_usage.dtype != usage.dtype:
            self.proxy_usage = usage.to(self.proxy_usage.device)
        return self


def check_loss(value: object) -> "MultiProxyEntropyLoss":
    """The value, if it is a loss that holds all classes."""
    if not isinstance(value, MultiProxyEntropyLoss):
        raise TypeError(f"loss_func must be a MultiProxyEntropyLoss, got {type(value).__name__}")
    value._whole()
    return value


RESULT_SETTINGS = [name for name in Settings._fields if name != "classes_per_chunk"]
"""Settings that change the result: PML's hooks record them once."""

FORMAT = 2
"""Number of the format of the file that ``save`` writes."""

SAVED_ARGUMENTS = ("weight_reg_weight", "embedding_reg_weight", "collect_stats")

MODULES = ("distance", "embedding_regularizer", "weight_regularizer", "reducer")
"""Parts of a loss that the file cannot hold; it holds the names of their classes."""


def _write(path: str | Path, contents: dict[str, Any]) -> None:
    """Replaces the file when the new one is whole: a killed process or a full disk leaves the old file."""
    target = Path(path).resolve()
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            torch.save({"format": FORMAT, **contents}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def _read(path: str | Path, map_location: Any) -> dict[str, Any]:
    """The contents of a file of :func:`_write`. Runs no code of the file."""
    with open(path, "rb") as file:
        try:
            contents = torch.load(file, map_location=map_location, weights_only=True)
            if contents["format"] == FORMAT and contents["state"]:
                return dict(contents)
        except Exception as error:  # torch has many for damaged files
            raise ValueError(f"path must name a whole file of MultiProxyEntropyLoss.save, got {path}") from error
    raise ValueError(f"path must name a file of format {FORMAT}, got {path} of format {contents['format']}")


def _names_of_modules(loss_func: torch.nn.Module) -> dict[str, str]:
    """The classes of the parts; PML may have wrapped a reducer in others."""
    parts = {name: getattr(loss_func, name) or torch.nn.Identity() for name in MODULES}
    return {name: " ".join(type(module).__name__ for module in part.modules()) for name, part in parts.items()}


def _plain(value: Any) -> Any:
    """A number instead of a scalar of NumPy or torch."""
    return value.tolist() if isinstance(value, (np.generic, Tensor)) else value


def _saveable(tensor: Tensor) -> Tensor:
    """A tensor that autograd can save: those made under ``torch.inference_mode`` are copied."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not tensor.is_inference():
        return tensor
    return tensor.clone()


@torch.no_grad()
def _unit_directions_(weights: Tensor) -> None:
    """Fills ``(N, D)`` with random directions of unit length."""
    weights.copy_(functional.normalize(torch.nn.init.normal_(weights)))
