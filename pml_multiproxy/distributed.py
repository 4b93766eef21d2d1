"""The loss with its proxies spread over processes, for more proxies than one machine holds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from . import _check as check
from ._shard import check_equal, shard_of_rank
from .losses import RESULT_SETTINGS, MultiProxyEntropyLoss

__all__ = ["ShardedMultiProxyEntropyLoss"]


class ShardedMultiProxyEntropyLoss(MultiProxyEntropyLoss):
    r"""The loss of :class:`~pml_multiproxy.losses.MultiProxyEntropyLoss`, each process holding some of the classes.

    Each rank of the group holds the proxies and the usage of a slice of the classes, and brings samples of its own. All
    ranks gather all samples, and each computes their similarities to its own proxies. Then they reduce six numbers per
    sample, all that the softmax over all classes needs; the neighbour term needs 2 K more. Nothing is approximated:
    every rank returns the loss that one process would compute from all samples, ordered by rank.

    Ranks may bring different numbers of samples, also none. The reducer sees the samples of all ranks. A miner's tuple
    refers to the rank's own samples; the loss divides its counts by the largest count on any rank.

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

    With ``views``, all views of a sample lie on the same rank: each rank brings blocks of its own. The neighbour term
    contrasts the samples of all ranks.

    Arguments that are not listed are those of the ordinary loss.

    Args:
        *args: ``num_classes`` (:math:`C`, of all ranks), ``embedding_size`` and ``proxies_per_class``. ``DTensor``
            gives each of :math:`R` ranks :math:`\lceil C / R \rceil` classes until none are left: with 9 classes,
            4 ranks hold 3, 3, 3 and none.
        process_group: a ``torch.distributed.ProcessGroup``; ``None``: all processes. All its ranks have to call the
            loss together, with the same settings and dtype of embeddings, and all in training or none.
        **kwargs: as in the ordinary loss; ``classes_per_chunk`` counts the classes of the rank. ``weight_regularizer``
            has to be ``None``, since it would have to see all proxies, and ``usage_group``, since every rank sees all
            samples. The ``distance`` must not learn.

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

    def __init__(self, *args: Any, process_group: "distributed.ProcessGroup | None" = None, **kwargs: Any) -> None:
        check.process_group("process_group", process_group)
        for name in ("usage_group", "weight_regularizer"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} must be None for proxies that are spread over processes, got {kwargs[name]}")
        group = process_group or distributed.group.WORLD
        if group is None:
            raise RuntimeError("call torch.distributed.init_process_group first: there is no process group yet")
        self._group = group  # the base class makes the proxies, which needs it
        super().__init__(*args, **kwargs)

    def _make_proxies(self) -> None:
        check_equal(self._facts(), self._group)
        self._shard = shard_of_rank(self.num_classes, self._group)
        shape = len(self.classes), self.proxies_per_class
        proxies = torch.empty(*shape, self.embedding_size)
        self._mesh = DeviceMesh.from_group(self._group, proxies.device.type)
        self.proxies = torch.nn.Parameter(self._sharded(proxies))
        self.register_buffer("proxy_usage", self._sharded(torch.empty(shape, dtype=torch.float32)))
        self.reset_parameters()

    @property
    def classes(self) -> range:
        """The classes that this rank holds."""
        return self._shard.classes

    def reset_parameters(self) -> None:
        """As in the ordinary loss; each rank draws other proxies, from a seed that the first rank draws."""
        seed = [int(torch.randint(2**62, ()))]
        distributed.broadcast_object_list(seed, distributed.get_global_rank(self._group, 0), self._group)
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):  # leaves the generators of the ranks as they are
            torch.manual_seed(seed[0] + distributed.get_rank(self._group))
            super().reset_parameters()

    def _sharded(self, local: Tensor) -> DTensor:
        """The parts ``(c', ...)`` of the ranks as one tensor over all classes."""
        shape = torch.Size((self.num_classes, *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def _facts(self) -> dict[str, Any]:
        """The settings that have to be the same on all ranks."""
        facts = {name: getattr(self, name) for name in [*RESULT_SETTINGS, "embedding_reg_weight", "collect_stats"]}
        for name in ("distance", "reducer", "embedding_regularizer"):
            facts[name] = _description(getattr(self, name))
        return {**facts, "default dtype": torch.get_default_dtype()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ShardedMultiProxyEntropyLoss":
        super()._apply(fn, recurse)
        held, made = self._local(self.proxy_usage).device.type, self._mesh.device_type
        if held != made:
            raise ValueError(f"proxies must stay on the kind of device that they were made on, {made}, got {held}")
        return self

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a sharded loss can be neither copied nor pickled: save its state_dict()")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("proxies", "proxy_usage"):
            value, whole = state_dict.get(prefix + name), getattr(self, name).shape
            if isinstance(value, Tensor) and not isinstance(value, DTensor) and value.shape == whole:
                state_dict[prefix + name] = self._sharded(value[self.classes.start : self.classes.stop])
        super()._load_from_state_dict(state_dict, prefix, *args)


def _description(module: torch.nn.Module | None) -> str:
    """A description that is the same in every process: the class, and settings that are numbers or words."""
    settings = {} if module is None else vars(module)
    plain = {name: value for name, value in settings.items() if isinstance(value, (bool, int, float, str))}
    return f"{type(module).__name__} {plain}"
