"""The loss, as PyTorch Metric Learning knows losses."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.utils.parametrize import is_parametrized

from . import _nearest as nearest
from . import _saving as saving
from . import _validation as check
from . import functional
from ._layout import LocalLayout
from ._module import ProxyLossModule
from ._outliers import outliers
from ._similarity import is_plain_cosine

__all__ = ["MultiProxyEntropyLoss"]


class MultiProxyEntropyLoss(ProxyLossModule):
    r"""Classification by several proxies per class; entropy terms make each sample commit to one of them, and bring all
    of them into use.

    Its proxies are a parameter: give ``loss_func.parameters()`` to an optimizer, in PML's trainers as
    ``metric_loss_optimizer``. A learning rate about ten times that of the network is a good first try.

    With the symbols of :mod:`pml_multiproxy.functional`, the loss of sample :math:`i` is

    .. math::

        \ell_i = \mathrm{CE}_i
        &+ \lambda_\mathrm{intra}\, H_\mathrm{intra}(i)
        + \lambda_\mathrm{inter}\, \big(\log C - H_\mathrm{inter}(i)\big) \\
        &+ \lambda_\mathrm{balance}\, \Big(\log K + \sum_k q_i(k) \log u_{y_i}(k)\Big)

    - :math:`\mathrm{CE}_i`: cross-entropy of the target class, over class similarities pooled from the proxies
      (:func:`~pml_multiproxy.functional.classification_loss`);
    - :math:`H_\mathrm{intra}`: entropy of the assignment :math:`q_i` of a sample to the proxies of its class,
      minimised: every sample commits to a proxy;
    - :math:`H_\mathrm{inter}`: entropy of the class distribution, maximised: it stays smooth;
    - the last term, the balance, spreads the samples of a class over its proxies: proxies that are used much, by the
      usage :math:`u`, a running mean of the assignment, cost more. With :math:`\lambda_\mathrm{intra} =
      \lambda_\mathrm{balance}`, the within-class terms maximise the mutual information between sample and proxy inside
      each class.

    The constants :math:`\log C` and :math:`\log K` change no gradient. They keep most losses above 0, since reducers
    such as ``AvgNonZeroReducer`` drop losses of 0 and below. The loss of a single sample may still be negative.

    In ``train()`` mode with gradients enabled, each call first updates the usage with the batch, then uses it. In
    ``eval()`` mode or without gradients it only uses it.

    With ``reseed_below`` > 0, such a call begins by moving dead proxies. A proxy is dead if its usage is below this
    part of an even share :math:`1/K`. In each class of the batch, one randomly chosen dead proxy is moved onto a random
    sample of the class, and its usage is set to an even share. This changes the parameter in place, so call
    ``backward`` before the next call. Frozen proxies (``requires_grad=False``) stay where they are.

    **Views.** With ``views=V`` from 2 on, a batch is :math:`V` blocks of equal length, and row :math:`i` of every block
    is a view, a random augmentation, of the same sample. The intra-class entropy of a view then becomes the
    cross-entropy between its assignment and those of the other views
    (:func:`~pml_multiproxy.functional.cross_view_entropy`): views of a sample have to choose the same proxy. All other
    terms are those of each row. :mod:`pml_multiproxy.views` makes such batches from a dataset with a random transform.

    **Defaults.** They are the same for all tasks, with and without views: of the settings that were measured on all
    eight, those with the highest mean of MAP@R, each relative to the best on that task, on validation data
    (benchmarks/retrieval). With any one of the tasks left out, the others choose them, too. Where classes are one
    cluster, take a single proxy, or ``intra_weight=0`` and ``balance_weight=0``.

    Sources. Intra- and inter-class entropy: Yu, Zhang, Li, Zhang, *Multi-Proxy Learning from an Entropy Optimization
    Perspective*, IJCAI 2022, pp. 1594-1600, doi:10.24963/ijcai.2022/222. Only its abstract, the caption of its Figure 1
    and summaries were available to us: the equations are our reading of them, not a copy, and ``balance_weight=0`` is
    our reading of the paper's objective. Balance: mutual-information maximisation as known from discriminative
    clustering, applied within classes: RIM (Krause, Perona, Gomes, *Discriminative Clustering by Regularized
    Information Maximization*, NIPS 2010) and IMSAT (Hu et al., *Learning Discrete Representations via Information
    Maximizing Self-Augmented Training*, ICML 2017). FALCON (ICML 2024) has such a term over batches instead of a
    running mean. Views: the self-augmentation of IMSAT, within classes. Related methods without classes are IIC (Ji,
    Henriques, Vedaldi, *Invariant Information Clustering*, ICCV 2019) and SwAV (Caron et al., NeurIPS 2020).

    Args:
        num_classes: :math:`C`, at least 1.
        embedding_size: :math:`D`, at least 1.
        proxies_per_class: :math:`K`, at least 1.
        scale: :math:`\sigma` > 0, the factor on the class similarities, in units of 1 / similarity.
        margin: :math:`m`, by which the target class has to win, in units of the similarity.
        pooling: how the similarity to a class is computed from those to its proxies: ``"max"``, ``"softmax"`` or
            ``"logsumexp"``, see :data:`~pml_multiproxy.functional.POOLINGS`.
        temperature: :math:`\tau` > 0 of the assignment and of ``pooling="softmax"``, in units of the similarity.
        intra_weight: :math:`\lambda_\mathrm{intra}` >= 0.
        inter_weight: :math:`\lambda_\mathrm{inter}` >= 0.
        balance_weight: :math:`\lambda_\mathrm{balance}` >= 0.
        usage_momentum: per-sample momentum of the running usage, from 0 to 1.
        usage_group: for ``DistributedDataParallel``: the processes whose batches update the usage together. A
            ``torch.distributed.ProcessGroup``, or ``"world"`` for the default group, which need not exist before the
            first call. ``None``: each process keeps the usage of its own batches. Every process of the group has to
            call the loss as often as the others, all in training or none; one that has no samples calls it with none.
            With equal local batches, the mean as reducer and no miner, the result is that of one process with the
            whole batch.
        reseed_below: where above 0, dead proxies are moved, see above: from 0 (never) to below 1. Try 0.1 where many
            proxies are unused.
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
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or range. Labels and indices on a
            GPU are not checked for their range, which would be a device synchronisation; whether they are the same in
            each view, in the first batch alone. For ``reseed_below`` together with ``usage_group``, since the random
            choices would differ between the processes. For pickling a loss that has a process group as its
            ``usage_group``.
        RuntimeError: for a call in training within a backward pass, as ``torch.utils.checkpoint`` around the loss makes
            it, or within a transform of ``torch.func``, since each call in training updates the usage. For
            differentiating the gradient again, except where autograd computes it.

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

    _layout: LocalLayout

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        proxies_per_class: int = 30,
        *,
        scale: float = 10.0,
        margin: float = 0.0,
        pooling: str = "logsumexp",
        temperature: float = 0.1,
        intra_weight: float = 0.25,
        inter_weight: float = 0.0,
        balance_weight: float = 0.5,
        usage_momentum: float = 0.9,
        usage_group: "distributed.ProcessGroup | str | None" = None,
        reseed_below: float = 0.0,
        views: int = 1,
        classes_per_chunk: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_classes,
            embedding_size,
            proxies_per_class,
            scale=scale,
            margin=margin,
            pooling=pooling,
            temperature=temperature,
            intra_weight=intra_weight,
            inter_weight=inter_weight,
            balance_weight=balance_weight,
            usage_momentum=usage_momentum,
            reseed_below=reseed_below,
            views=views,
            classes_per_chunk=classes_per_chunk,
            **kwargs,
        )
        check.process_group("usage_group", usage_group, also="world")
        if usage_group is not None and self.reseed_below > 0:
            raise ValueError(
                f"reseed_below must be 0 with a usage_group, got {self.reseed_below:g}: each process would move its "
                "proxies at random and onto samples of its own, and DistributedDataParallel relies on equal proxies"
            )
        self._start(LocalLayout(self.num_classes, usage_group), *self._drawn(self.num_classes))

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
        check.embeddings(embeddings, self.proxies)
        labels = check.labels(labels, len(embeddings), self.num_classes).to(embeddings.device)
        return functional.assignment(
            nearest.to_target(self.distance, embeddings, labels, self.proxies), self.temperature
        )

    @torch.no_grad()
    def get_outliers(
        self, embeddings: Tensor, labels: Tensor, threshold: float = 75, return_dominant_centers: bool = True
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Samples far from the dominant proxy of their class, which may be mislabeled.

        As PML's ``SubCenterArcFaceLoss`` has it. The dominant proxy is the one that most of the given samples of the
        class are nearest to. Give all training samples, not a batch. Where a class is spread over many proxies on
        purpose, its samples at the other proxies count as outliers, too: look at them before you drop them.

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
            raise ValueError(
                "distance must be PML's CosineSimilarity with p=2 and power=1, since the threshold is an angle, got "
                f"{type(self.distance).__name__} with p={self.distance.p} and power={self.distance.power}"
            )
        degrees = check.real("threshold", threshold, "a number of degrees from 0 to 180", low=0.0, high=180.0)
        check.embeddings(embeddings, self.proxies)
        check.finite("embeddings", embeddings)
        check.finite("proxies", self.proxies)
        labels = check.labels(labels, len(embeddings), self.num_classes).to(embeddings.device)
        found, centers = outliers(self.distance, embeddings, labels, self.proxies, degrees)
        return (found, centers) if return_dominant_centers else found

    def save(self, path: str | Path) -> None:
        """Writes settings and state into one file, for :meth:`load`.

        The weights of the regularizers are settings. The distance, the reducer and the regularizers themselves are
        described in it, not stored.

        Args:
            path: of the file, which is replaced if it is there.

        Raises:
            TypeError: for a ``path`` that is neither a str nor a pathlib.Path.
            ValueError: where the proxies have a parametrization of ``torch.nn.utils``.

        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "loss.pt"
        >>> MultiProxyEntropyLoss(num_classes=4, embedding_size=8, proxies_per_class=3, scale=20).save(path)
        >>> MultiProxyEntropyLoss.load(path).scale
        20.0
        """
        if is_parametrized(self, "proxies"):
            raise ValueError(
                "proxies must be a parameter to be saved by save(), got a parametrization, which a file cannot hold: "
                "save state_dict(), or call torch.nn.utils.parametrize.remove_parametrizations(loss_func, 'proxies')"
            )
        saving.write(self, path)

    @classmethod
    def load(cls, path: str | Path, map_location: Any = None, **kwargs: Any) -> "MultiProxyEntropyLoss":
        """The loss that :meth:`save` wrote: its settings, proxies and usage, in their dtypes. Runs no code of the file.

        Args:
            path: of the file.
            map_location: where to put the tensors, as ``torch.load`` takes it; ``None``: where they were.
            **kwargs: what a file cannot hold, as the constructor takes it: ``distance``, ``reducer``, regularizers and
                ``usage_group``. They have to be as they were.

        Raises:
            ValueError: for a file that :meth:`save` did not write, or a ``distance``, ``reducer`` or regularizer other
                than the one that was saved.
        """
        settings, described, state = saving.read(path, map_location)
        for name in sorted(settings.keys() & kwargs.keys()):
            raise ValueError(f"{name} is in the file as {settings[name]!r}, got {kwargs[name]!r}: set it after loading")
        loss_func = cls(**settings, **kwargs)
        for name, description in described.items():
            if (given := saving.describe(getattr(loss_func, name))) != description:
                raise ValueError(f"{name} must be the one that was saved, {description}, got {given}")
        loss_func.to(state["proxies"].device, state["proxies"].dtype)
        loss_func.load_state_dict(state)
        return loss_func

    @property
    def usage_group(self) -> "distributed.ProcessGroup | str | None":
        """As given."""
        return self._layout.usage_group
