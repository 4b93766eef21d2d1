"""The loss with its proxies spread over processes, for more proxies than one machine holds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from . import _validation as check
from ._module import SETTINGS, ProxyLossModule
from ._saving import describe
from ._sharding.layout import ShardedLayout
from ._sharding.ranks import Ranks

__all__ = ["ShardedMultiProxyEntropyLoss"]


class ShardedMultiProxyEntropyLoss(ProxyLossModule):
    r"""The loss of :class:`~pml_multiproxy.losses.MultiProxyEntropyLoss`, each process holding some of the classes.

    Each rank of the group holds the proxies and the usage of a slice of the classes, and brings samples of its own. The
    samples are gathered, and each rank computes their similarities to its proxies. Then six numbers per sample are
    reduced over the ranks: the softmax over all classes needs no more. Nothing is approximated: every rank returns the
    loss that one process would compute of all samples, ordered by rank.

    Ranks may bring different numbers of samples, also none. The reducer sees all samples: the mean is that over all
    samples of all ranks. The tuple of a miner is that of the rank's own samples; its counts are divided by the largest
    count on any rank.

    **Gradients.** ``loss.backward()`` has to run on every rank. The proxies get the gradient of the loss. The
    embeddings get it **times the number of ranks**, for ``DistributedDataParallel`` around the network, which divides
    by that number: so the network gets the gradient of the loss, too. Without ``DistributedDataParallel``, divide by it
    yourself. Wrapping this loss itself, or a module that holds it, is an error: PyTorch refuses to average a
    ``DTensor``.

    **Parameters.** ``proxies`` and ``proxy_usage`` are ``DTensor``, sharded by class. Optimizers, ``clip_grad_norm_``
    and ``torch.distributed.checkpoint`` handle them; a checkpoint goes from any number of ranks to any other
    (``examples/train_sharded.py``). ``load_state_dict`` takes the state of the ordinary loss, too. Give the proxies a
    parameter group of their own. Make the loss on the device that it is to stay on, as in
    ``with torch.device("cuda"):``.

    **Initial proxies.** Each rank draws its own, from a seed that the first rank draws: they differ from those that one
    process draws under the same seed, and from those of another number of ranks.

    With ``reseed_below``, each rank moves the proxies that it holds, by random choices of its own.

    With ``views``, the views of a sample lie on the same rank: each rank brings blocks of its own, and the loss is that
    of the blocks of all ranks, first view, second view and so on.

    Arguments that are not listed are those of the ordinary loss.

    Args:
        num_classes: :math:`C`, of all ranks. ``DTensor`` gives each of :math:`R` ranks
            :math:`\lceil C / R \rceil` classes until none are left: with 9 classes, 4 ranks hold 3, 3, 3 and none.
        process_group: a ``torch.distributed.ProcessGroup``; ``None``: all processes. All its ranks have to call the
            loss together, with the same settings and dtype of embeddings, and all in training or none.
        classes_per_chunk: as in the ordinary loss, of the classes of the rank.
        **kwargs: as in the ordinary loss, but ``weight_regularizer``, which would have to see all proxies, and
            ``usage_group``, which the sharded loss does not need, have to be ``None``. Parameters of the ``distance``
            have to start equal on all ranks; they get the same gradient on each.

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

    _layout: ShardedLayout

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
        reseed_below: float = 0.0,
        views: int = 1,
        classes_per_chunk: int | None = None,
        process_group: distributed.ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        check.process_group("process_group", process_group)
        for name in ("usage_group", "weight_regularizer"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} must be None for proxies that are spread over processes, got {kwargs[name]}")
        kwargs.pop("usage_group", None)
        group = process_group or distributed.group.WORLD
        if group is None:
            raise RuntimeError("call torch.distributed.init_process_group first: there is no process group yet")
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
        ranks = Ranks(group)
        ranks.agree(self._facts())
        proxies, usage = self._drawn_on(ranks)
        layout = ShardedLayout(self.num_classes, ranks, proxies.device.type)
        self._start(layout, layout.sharded(proxies), layout.sharded(usage))

    @property
    def classes(self) -> range:
        """Those that this rank holds."""
        classes: range = self._layout.classes
        return classes

    def _drawn_on(self, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """From a seed of the first rank, other proxies on each rank; the generators of the ranks stay as they are."""
        seed = ranks.first(int(torch.randint(2**62, ())))
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed + ranks.rank)
            return self._drawn(len(ranks.slice_of(self.num_classes)))

    def _facts(self) -> dict[str, Any]:
        """What has to be the same on all ranks."""
        facts = {name: getattr(self, name) for name in SETTINGS}
        for name in ("distance", "reducer", "embedding_regularizer"):
            facts[name] = describe(getattr(self, name))
        facts["parameters of the distance"] = [float(p.detach().double().sum()) for p in self.distance.parameters()]
        for name in ("embedding_reg_weight", "collect_stats"):
            facts[name] = getattr(self, name)
        return {**facts, "default dtype": torch.get_default_dtype()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ShardedMultiProxyEntropyLoss":
        super()._apply(fn, recurse)
        held, made = self._layout.local(self.proxy_usage).device.type, self._layout.mesh.device_type
        if held != made:
            raise ValueError(
                f"the proxies must stay on the kind of device that they were made on, {made}, got {held}: make the "
                'loss inside of "with torch.device(...):"'
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
                state_dict[prefix + name] = self._layout.sharded(value[self.classes.start : self.classes.stop])
        super()._load_from_state_dict(state_dict, prefix, *args)
