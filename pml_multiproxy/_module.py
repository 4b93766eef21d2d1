"""What :class:`~pml_multiproxy.losses.MultiProxyEntropyLoss` and its sharded sibling have in common.

They differ in the layout alone: where the classes are, and what processes tell each other.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses.base_metric_loss_function import BaseMetricLossFunction
from pytorch_metric_learning.losses.mixins import WeightRegularizerMixin
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor

from . import _nearest as nearest
from . import _reseeding as reseeding
from . import _saving as saving
from . import _starting as starting
from . import _step as step
from . import _validation as check
from . import functional
from ._analytic.chunks import make_plan
from ._hyperparameters import Hyperparameters
from ._layout import Batch, Layout
from ._similarity import points, similarities
from ._statistics import Statistics, statistics
from ._untrained import UntrainedProxies

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
    "views",
]
"""What PML's hooks record once."""


class ProxyLossModule(WeightRegularizerMixin, BaseMetricLossFunction):  # type: ignore[misc]
    proxies: torch.nn.Parameter
    proxy_usage: Tensor
    _layout: Layout

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        proxies_per_class: int,
        *,
        scale: float,
        margin: float,
        pooling: str,
        temperature: float,
        intra_weight: float,
        inter_weight: float,
        balance_weight: float,
        usage_momentum: float,
        reseed_below: float,
        views: int,
        classes_per_chunk: int | None,
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
        self.views = check.positive_int("views", views)
        self.classes_per_chunk = classes_per_chunk
        if classes_per_chunk is not None:
            self.classes_per_chunk = check.positive_int("classes_per_chunk", classes_per_chunk)
        self._untrained, self._has_seen_views = UntrainedProxies(), False
        self.add_to_recordable_attributes(list_of_names=SETTINGS, is_stat=False)
        self.add_to_recordable_attributes(list_of_names=list(Statistics._fields), is_stat=True)

    def _start(self, layout: Layout, proxies: Tensor, usage: Tensor) -> None:
        """The last part of the constructor."""
        self._layout = layout
        self.proxies = torch.nn.Parameter(proxies)
        self.register_buffer("proxy_usage", usage)

    def _drawn(self, num_classes: int) -> tuple[Tensor, Tensor]:
        """What the proxies and the usage of some classes start at: ``(c, K, D)`` and ``(c, K)``."""
        shape = (num_classes, self.proxies_per_class)
        weights = torch.empty(math.prod(shape), self.embedding_size)
        self.weight_init_func(weights)
        usage = torch.full(shape, 1 / self.proxies_per_class, dtype=torch.float32)
        return weights.view(*shape, self.embedding_size), usage

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
        batch = self._batch(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        loss_dict = self._loss_dict(batch)
        self.add_embedding_regularization_to_loss_dict(loss_dict, batch.embeddings)
        loss: Tensor = self.reducer(loss_dict, batch.embeddings, batch.labels)
        return loss

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> dict[str, dict[str, Any]]:
        """One loss per sample, and the weight regularization, before the reducer, as PML's losses have it.

        Calling the loss does the same; it does not call this method.
        """
        return self._loss_dict(self._batch(embeddings, labels, indices_tuple, ref_emb, ref_labels))

    def get_logits(self, embeddings: Tensor) -> Tensor:
        r"""The logits of the classes, :math:`\sigma z_i(c)`: scale included, margin not. Never updates the usage.

        The sharded loss computes those of the classes that its rank holds, of its own embeddings.

        Args:
            embeddings: ``(B, D)``.

        Returns:
            ``(B, C)``; of the sharded loss, ``(B, len(classes))``.

        >>> from pml_multiproxy import MultiProxyEntropyLoss
        >>> loss_func = MultiProxyEntropyLoss(num_classes=4, embedding_size=8)
        >>> loss_func.get_logits(torch.randn(5, 8)).shape
        torch.Size([5, 4])
        """
        check.embeddings(embeddings, self.proxies)
        proxies = self._layout.local(self.proxies)
        dtype = functional.compute_dtype(embeddings, proxies)
        if len(proxies) == 0:
            return embeddings.new_empty(len(embeddings), 0, dtype=dtype)
        count = len(proxies)
        if not torch.compiler.is_compiling():  # which is with a batch of any length, and so of any plan
            plan = make_plan(self.classes_per_chunk, len(embeddings), proxies, dtype)
            count = len(proxies) if plan.keep else plan.classes_per_chunk
        pooled = [self._pooled(embeddings, some) for some in torch.split(proxies, count)]
        return self.scale * torch.cat(pooled, dim=1)

    @torch.no_grad()
    def assign(self, embeddings: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The nearest proxy of each embedding. Never updates the usage.

        Of equally near proxies, the first is returned. With the sharded loss, every rank has to call it, each with its
        own embeddings, which are compared to the proxies of all ranks.

        Args:
            embeddings: ``(B, D)``.
            labels: ``(B,)``, integers in ``[0, C)``: look only among the proxies of these classes. ``None``: among all.

        Returns:
            The classes and, within them, the proxies: each ``(B,)``, long.

        >>> from pml_multiproxy import MultiProxyEntropyLoss
        >>> loss_func = MultiProxyEntropyLoss(num_classes=4, embedding_size=8, proxies_per_class=3)
        >>> classes, proxies = loss_func.assign(loss_func.proxies[2])
        >>> classes, proxies
        (tensor([2, 2, 2]), tensor([0, 1, 2]))
        """
        check.embeddings(embeddings, self.proxies)
        if labels is not None:
            labels = check.labels(labels, len(embeddings), self.num_classes).to(embeddings.device)
        proxies, layout = self._layout.local(self.proxies), self._layout
        dtype = functional.compute_dtype(embeddings, proxies)
        rows, row_labels, sizes = layout.gather_rows(embeddings, labels, dtype, self._is_training())
        if row_labels is None:
            largest, position = nearest.nearest_of_all(self.distance, rows, proxies, layout)
        else:
            largest, position = nearest.nearest_of_target(self.distance, rows, row_labels, proxies, layout)
        found = layout.nearest(largest, position, sizes)
        return found // self.proxies_per_class, found % self.proxies_per_class

    @torch.no_grad()
    def init_proxies(self, embeddings: Tensor, labels: Tensor) -> None:
        """Starts the proxies of each class at the centroids of its samples, by k-means.

        The result is the same under the same seed of torch. Where the distance normalizes embeddings, so does this: the
        proxies get unit length, and embeddings of zeros, which have no direction, are left out. If a class has fewer
        distinct samples than proxies, samples are repeated, with a little noise. Classes without samples keep their
        proxies. The usage becomes the share of the samples that each proxy is the nearest to. Time is linear in the
        samples and classes; if it takes long, a progress bar is shown.

        With the sharded loss, each rank uses the samples of the classes that it holds, and ignores others.

        Args:
            embeddings: ``(N, D)``, of the network that will be trained, over enough samples of each class.
            labels: ``(N,)``, integers in ``[0, C)``.

        Raises:
            TypeError, ValueError: as when the loss is called, and for embeddings that are not finite or so large that
                distances to proxies overflow.

        >>> from pml_multiproxy import MultiProxyEntropyLoss
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
        check.finite("embeddings", embeddings)
        positions = self._layout.positions(labels)
        is_local = self._layout.is_local(positions)
        if is_local is not None:
            embeddings, positions = embeddings[is_local], positions[is_local]
        proxies, usage = self._layout.local(self.proxies), self._layout.local(self.proxy_usage)
        starting.start_(proxies, usage, embeddings, positions, self.distance)

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()

    def get_default_weight_init_func(self) -> Callable[[Tensor], None]:
        return _unit_directions_

    def settings(self) -> dict[str, Any]:
        """The hyperparameters by name, as the constructor takes them.

        >>> from pml_multiproxy import MultiProxyEntropyLoss
        >>> MultiProxyEntropyLoss(num_classes=4, embedding_size=8, scale=20).settings()["scale"]
        20.0
        """
        return {name: saving.plain(getattr(self, name)) for name in [*SETTINGS, "classes_per_chunk"]}

    def extra_repr(self) -> str:
        """The settings, which ``print`` shows."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())

    def _batch(
        self, embeddings: Tensor, labels: object, indices_tuple: object, ref_emb: object, ref_labels: object
    ) -> Batch:
        """The samples of all processes that share the loss, checked."""
        check.references(embeddings, labels, ref_emb, ref_labels, self.views)
        check.embeddings(embeddings, self.proxies)
        checked = check.labels(labels, len(embeddings), self.num_classes)
        mined = check.indices_tuple(indices_tuple, len(embeddings))
        self._check_views(checked)
        if self._is_training():
            check.training_call()
        dtype = functional.compute_dtype(embeddings, self.proxies)
        return self._layout.gather(
            embeddings, checked.to(embeddings.device), mined, self.views, dtype, self._is_training()
        )

    def _check_views(self, labels: Tensor) -> None:
        check.views(labels, self.views)
        if self.views == 1 or torch.compiler.is_compiling() or labels.is_meta:
            return
        # Who forgets to stack views does so from the first batch on. A look at every batch is for the CPU alone, since
        # elsewhere it is a device synchronisation.
        if labels.device.type == "cpu" or not self._has_seen_views:
            check.labels_of_views(labels, self.views)
        self._has_seen_views = True

    def _loss_dict(self, batch: Batch) -> dict[str, dict[str, Any]]:
        embeddings, labels, weights = batch
        if self._is_training():
            self._before_training(embeddings, labels)
        proxies, usage = self._layout.local(self.proxies), self._layout.local(self.proxy_usage)
        result = step.losses_and_terms(
            embeddings,
            proxies,
            usage,
            labels,
            self.distance,
            self.classes_per_chunk,
            self._hyperparameters(),
            self._layout,
            self._is_training(),
        )
        if self.collect_stats and len(labels):
            self._record(statistics(result, labels, usage, self.views, self._layout))
        loss_dict = {
            "loss": {
                "losses": result.losses if weights is None else result.losses * weights,
                "indices": c_f.torch_arange_from_size(embeddings),
                "reduction_type": "element",
                "divisor": len(embeddings),  # for DivisorReducer
            }
        }
        if self.weight_regularizer is not None:  # PML looks, too, but autograd would have recorded the view by then
            self.add_weight_regularization_to_loss_dict(loss_dict, proxies.flatten(0, 1))
        return loss_dict

    def _record(self, found: Statistics) -> None:
        for name, value in found._asdict().items():
            setattr(self, name, value)

    def _before_training(self, embeddings: Tensor, labels: Tensor) -> None:
        """Notices proxies that nothing trains, and moves dead ones, in place."""
        proxies = self.proxies
        # Proxies that are computed, by a parametrization, are no leaf and belong to no optimizer.
        if proxies.requires_grad and proxies.is_leaf and not torch.compiler.is_compiling():
            self._untrained.look(self._layout.local(proxies), proxies.grad)
        if self.reseed_below and proxies.requires_grad and len(self._layout.classes):
            self._reseed(embeddings, labels)

    @torch.no_grad()
    def _reseed(self, embeddings: Tensor, labels: Tensor) -> None:
        proxies, usage = self._layout.local(self.proxies), self._layout.local(self.proxy_usage)
        where, positions = points(self.distance, embeddings), self._layout.positions(labels)
        is_local = self._layout.is_local(positions)
        if is_local is not None:  # a sample that is not finite is not drawn
            where = torch.where(is_local.unsqueeze(1), where, torch.nan)
            positions = torch.where(is_local, positions, 0)
        reseeding.reseed_(proxies, usage, where, positions, self.reseed_below)

    def _hyperparameters(self) -> Hyperparameters:
        return Hyperparameters(
            self.num_classes,
            self.proxies_per_class,
            self.scale,
            self.margin,
            self.pooling,
            self.temperature,
            functional.Weights(self.intra_weight, self.inter_weight, self.balance_weight),
            self.usage_momentum,
            self.views,
        )

    def _is_training(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _pooled(self, embeddings: Tensor, proxies: Tensor) -> Tensor:
        """The similarities to some of the classes, ``(B, c)``."""
        to_proxies = torch.unflatten(
            similarities(self.distance, embeddings, proxies.flatten(0, 1)), 1, proxies.shape[:2]
        )
        return functional.POOLINGS[self.pooling](to_proxies, self.scale, self.temperature)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:  # beside the keys of the state, which stay those of tensors
            metadata["settings"] = self.settings()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        saving.warn_of_other_settings(local_metadata.get("settings", {}), self.settings())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ProxyLossModule":
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
