"""The loss with its proxies spread over processes, for more proxies than one machine holds."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from . import _reseeding as reseeding
from . import _streaming as streaming
from . import _validation as check
from . import functional
from ._checkpoints import load_checkpoint, save_checkpoint
from ._ranks import Gather, Ranks, ScaledGradient
from .losses import SETTINGS, MultiProxyEntropyLoss

try:
    from torch.distributed.tensor import DTensor, Shard
except ImportError:  # before PyTorch 2.5
    from torch.distributed._tensor import DTensor, Shard  # type: ignore[attr-defined]

__all__ = ["ShardedMultiProxyEntropyLoss", "load_checkpoint", "save_checkpoint"]


class ShardedMultiProxyEntropyLoss(MultiProxyEntropyLoss):
    r"""The loss of :class:`~pml_multiproxy.losses.MultiProxyEntropyLoss`, each process holding some of the classes.

    Each rank of the group holds the proxies and the usage of a slice of the classes, and brings samples of its own. The
    samples are gathered; each rank computes their similarities to its proxies; what the softmax over all classes needs
    of them are six numbers for each sample, which are reduced over the ranks. Nothing is approximated: every rank
    returns the loss that one process computes of all samples, in their order by rank.

    Ranks may bring different numbers of samples, also none. The reducer sees all samples: the mean is that over all
    samples of all ranks. The tuple of a miner is that of the rank's own samples; its counts are divided by the largest
    count on any rank.

    **Gradients.** ``loss.backward()`` has to run on every rank. The proxies get the gradient of the loss. The
    embeddings get it **times the number of ranks**, for ``DistributedDataParallel`` around the network, which divides
    by that number: so the network gets the gradient of the loss, too. Without it, divide. Wrapping this loss itself, or
    a module that holds it, is an error: PyTorch refuses to average a ``DTensor``.

    **Parameters.** ``proxies`` and ``proxy_usage`` are ``DTensor``, sharded by class: optimizers, ``clip_grad_norm_``
    and ``torch.distributed.checkpoint`` know what to do with them, and :func:`save_checkpoint` and
    :func:`load_checkpoint` take them from any number of ranks to any other. ``load_state_dict`` takes the state of the
    ordinary loss, too. Give them a parameter group of their own. Make the loss on the device that it is to stay on, as
    in ``with torch.device("cuda"):``.

    **Where it starts.** Each rank draws its own proxies, from a seed that the first rank draws: they differ from those
    that one process draws under the same seed, and from those of another number of ranks.

    With ``reseed_below``, each rank moves the proxies that it holds, by lots of its own.

    Args:
        num_classes: :math:`C`, of all ranks. As ``DTensor`` has it, slices are :math:`\lceil C / R \rceil` classes long
            for :math:`R` ranks while classes last: with 9 classes, 4 ranks hold 3, 3, 3 and none.
        embedding_size: as there.
        proxies_per_class: as there.
        process_group: a ``torch.distributed.ProcessGroup``; ``None``: all processes. Its ranks have to do the same:
            call, with the same settings and dtype of embeddings, in training or not.
        **kwargs: as there, except that ``weight_regularizer``, which would have to see all proxies, and
            ``usage_group``, since each usage has one place anyway, have to be ``None``. ``classes_per_chunk`` counts
            the classes of the rank.

    Attributes:
        classes: the range of classes that this rank holds.
        proxies: parameter ``(C, K, D)``; ``proxies.to_local()`` are those of ``classes``.
        proxy_usage: buffer ``(C, K)``, likewise.

    Raises:
        ValueError: on every rank: for settings that differ between the ranks, when made; for dtypes of embeddings that
            differ, or only some ranks in training, when called.
        RuntimeError: without a process group; where a rank does not answer within the timeout of the group.
        TypeError, ValueError: as the ordinary loss, on the rank that it concerns; the others wait for it until the
            timeout.

    Example:
        >>> import torch
        >>> from torch.distributed import HashStore, destroy_process_group, init_process_group
        >>> from pml_multiproxy.distributed import ShardedMultiProxyEntropyLoss
        >>> init_process_group("gloo", store=HashStore(), rank=0, world_size=1)  # torchrun sets these up
        >>> loss_func = ShardedMultiProxyEntropyLoss(num_classes=2, embedding_size=8, proxies_per_class=3)
        >>> embeddings, labels = torch.randn(6, 8, requires_grad=True), torch.tensor([0, 0, 0, 1, 1, 1])
        >>> loss_func(embeddings, labels).backward()
        >>> loss_func.classes, loss_func.proxies.to_local().shape
        (range(0, 2), torch.Size([2, 3, 8]))
        >>> destroy_process_group()
    """

    classes: range
    _ranks: Ranks

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        proxies_per_class: int = 30,
        *,
        process_group: distributed.ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        check.process_group("process_group", process_group)
        if kwargs.get("views", 1) != 1:
            raise ValueError("views must be 1 for proxies that are spread over processes")
        for name in ("usage_group", "weight_regularizer"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} must be None for proxies that are spread over processes, got {kwargs[name]}")
        group = process_group or distributed.group.WORLD
        if group is None:
            raise RuntimeError("call torch.distributed.init_process_group first: there is no process group yet")
        # Past torch.nn.Module, which is not there yet.
        object.__setattr__(self, "_ranks", Ranks(group))
        super().__init__(num_classes, embedding_size, proxies_per_class, **kwargs)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: None = None,
        ref_labels: None = None,
    ) -> Tensor:
        """The reduced loss of the samples of all ranks, the same on each; arguments as those of the ordinary loss."""
        labels = self._checked_labels(embeddings, labels, indices_tuple, ref_emb, ref_labels).to(embeddings.device)
        sizes = self._ranks.sizes(embeddings, self._learns())
        labels_and_counts = torch.stack([labels, _counts(indices_tuple, labels)], dim=1)
        all_labels, counts = self._ranks.gather(labels_and_counts, sizes).unbind(dim=1)
        all_embeddings = self._gathered(embeddings, sizes)
        loss: Tensor = super(MultiProxyEntropyLoss, self).forward(all_embeddings, all_labels, counts)
        return loss

    def get_logits(self, embeddings: Tensor) -> Tensor:
        r"""The logits of the classes that this rank holds, of its own embeddings. Tells the other ranks nothing.

        Args:
            embeddings: ``(B, D)``.

        Returns:
            ``(B, len(classes))``.
        """
        if not self.classes:
            check.embeddings(embeddings, self.proxies)
            return embeddings.new_empty(len(embeddings), 0, dtype=functional.compute_dtype(embeddings, self.proxies))
        return super().get_logits(embeddings)

    @torch.no_grad()
    def assign(self, embeddings: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The nearest proxy of each embedding of this rank, among those of all ranks. Every rank has to call it.

        Arguments and result are those of the ordinary loss. Embeddings that are equally near to several proxies go to
        the first.
        """
        check.embeddings(embeddings, self.proxies)
        sizes = self._ranks.sizes(embeddings, self._learns())
        everything = self._gathered(embeddings, sizes)
        if labels is None:
            nearest = self._ranks.nearest(*self._nearest_here(everything))
        else:
            labels = check.labels(labels, len(embeddings), self.num_classes).to(embeddings.device)
            nearest = self._nearest_of(everything, self._ranks.gather(labels.unsqueeze(1), sizes).squeeze(1))
        own = torch.split(nearest, sizes)[self._ranks.rank]
        return own // self.proxies_per_class, own % self.proxies_per_class

    def init_proxies(self, embeddings: Tensor, labels: Tensor) -> None:
        """As that of the ordinary loss, for the classes that this rank holds. Tells the other ranks nothing.

        Args:
            embeddings: ``(N, D)``, enough samples of each class that this rank holds.
            labels: ``(N,)``, integers in ``[0, C)``; samples of other classes are left out.
        """
        check.embeddings(embeddings, self.proxies)
        labels = check.labels(labels, len(embeddings), self.num_classes).to(embeddings.device)
        places = labels - self.classes.start
        here = self._are_here(places)
        super().init_proxies(embeddings[here], places[here])

    def _start(self) -> tuple[Tensor, Tensor]:
        self._ranks.agree(self._facts())
        self.classes = self._ranks.slice_of(self.num_classes)
        seed = self._ranks.first(int(torch.randint(2**62, ())))
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed + self._ranks.rank)
            proxies, usage = self._drawn(len(self.classes))
        self._mesh = DeviceMesh.from_group(self._ranks.group, proxies.device.type)
        return self._sharded(proxies), self._sharded(usage)

    def _facts(self) -> dict[str, Any]:
        """What has to be the same on all ranks."""
        facts = {name: getattr(self, name) for name in SETTINGS}
        for name in ("distance", "reducer", "embedding_regularizer"):
            facts[name] = _description(getattr(self, name))
        return {**facts, "collect_stats": self.collect_stats, "default dtype": torch.get_default_dtype()}

    def _sharded(self, local: Tensor) -> DTensor:
        shape = torch.Size((self.num_classes, *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def _gathered(self, embeddings: Tensor, sizes: list[int]) -> Tensor:
        dtype = functional.compute_dtype(embeddings, self.proxies)
        gathered: Tensor = Gather.apply(embeddings, sizes, dtype, self._ranks)  # type: ignore[no-untyped-call]
        return gathered

    def _held_proxies(self) -> Tensor:
        return cast(DTensor, self.proxies).to_local()

    @torch.no_grad()
    def _held_usage(self) -> Tensor:
        return cast(DTensor, self.proxy_usage).to_local()

    def _are_here(self, places: Tensor) -> Tensor:
        """Whether these are positions of classes among those of this rank."""
        return (places >= 0) & (places < len(self.classes))

    def _losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        dtype = functional.compute_dtype(embeddings, self.proxies)
        plan = streaming.make_plan(self.classes_per_chunk, len(embeddings), self._held_proxies(), dtype)
        # What follows knows a part of this gradient, which the ranks add up. Whatever else depends on the embeddings,
        # a regularizer, each rank computes as a whole, so that the sum is as many times as large as there are ranks.
        embeddings = ScaledGradient.apply(embeddings, self._ranks.size)  # type: ignore[no-untyped-call]
        losses, terms = self._by_hand(embeddings, labels - self.classes.start, self._lengths(dtype), plan)
        if self.collect_stats and len(labels):
            self._record(labels, terms)
        return losses

    def _settings(
        self, embeddings: Tensor, places: Tensor, lengths: Tensor | None, plan: streaming.Plan
    ) -> streaming.Settings:
        settings = super()._settings(embeddings, places, lengths, plan)
        return settings._replace(complete=partial(self._ranks.complete, here=self._are_here(places)))

    @torch.no_grad()
    def _own_usage(self, assignments: Tensor, places: Tensor, learns: bool) -> Tensor:
        if not self.classes:
            return torch.ones_like(assignments)  # which nothing takes: no sample is here
        here = self._are_here(places)
        counted = torch.where(here.unsqueeze(1), assignments, 0)
        return super()._own_usage(counted, torch.where(here, places, 0), learns)  # some place for the others

    def _reseed(self, points: Tensor, labels: Tensor) -> None:
        places = labels - self.classes.start
        here = self._are_here(places)
        with torch.no_grad():
            proxies = self._held_proxies()
        reseeding.reseed_(proxies, self._held_usage(), points[here], places[here], self.reseed_below)

    def _mined_weights(self, mined: Any, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """``mined``: how often each sample was, ``(B,)``."""
        largest = F.pad(mined, (0, 1)).max()
        return torch.where(largest > 0, mined.to(dtype) / largest.clamp_min(1), 1)

    def _usage_statistics(self) -> tuple[Tensor, Tensor]:
        sums = torch.stack(super()._usage_statistics()).sum(dim=1)
        distributed.all_reduce(sums, group=self._ranks.group)
        in_use, perplexity = sums / self.num_classes
        return in_use, perplexity

    def _nearest_here(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Of the proxies of this rank: the similarity, and the position among the proxies of all ranks."""
        similarity, position = self._nearest(embeddings)
        return similarity, position + self.classes.start * self.proxies_per_class

    def _nearest_of(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Of the proxies of the classes of the labels: the position among the proxies of all ranks."""
        places, nearest = labels - self.classes.start, torch.zeros_like(labels)
        here = self._are_here(places)
        own = self._to_own_proxies(embeddings[here], places[here])
        nearest[here] = labels[here] * self.proxies_per_class + own.argmax(dim=1)
        distributed.all_reduce(nearest, group=self._ranks.group)
        return nearest

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ShardedMultiProxyEntropyLoss":
        super()._apply(fn, recurse)
        if self._held_usage().device.type != self._mesh.device_type:
            raise ValueError(
                f"the proxies must stay on the kind of device that they were made on, {self._mesh.device_type}, got "
                f'{self._held_usage().device.type}: make the loss inside of "with torch.device(...):"'
            )
        return self

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a ShardedMultiProxyEntropyLoss can be neither copied nor pickled, since a process group belongs to its "
            "process: save its state_dict() with torch.distributed.checkpoint"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("proxies", "proxy_usage"):
            value, whole = state_dict.get(prefix + name), getattr(self, name).shape
            if isinstance(value, Tensor) and not isinstance(value, DTensor) and value.shape == whole:
                state_dict[prefix + name] = self._sharded(value[self.classes.start : self.classes.stop])
        super()._load_from_state_dict(state_dict, prefix, *args)


def _counts(indices_tuple: tuple[Tensor, ...] | None, labels: Tensor) -> Tensor:
    """How often each sample was mined, ``(B,)``, long."""
    counts = torch.zeros_like(labels)
    for indices in indices_tuple or ():
        counts.index_add_(0, indices.to(labels.device), torch.ones_like(indices, device=labels.device))
    return counts


def _description(module: torch.nn.Module | None) -> str:
    """The class and the settings of a module of PML."""
    statistics = getattr(module, "_record_these_stats", [])
    settings = {name: value for name, value in sorted(vars(module).items()) if _is_plain(value)} if module else {}
    return f"{type(module).__qualname__} { ({name: settings[name] for name in settings if name not in statistics}) }"


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
