"""The loss in the interface of sentence-transformers, and a trainer that saves the loss in its checkpoints.

Needs sentence-transformers 5 or newer with its training dependencies, ``pip install "sentence-transformers[train]"``,
and PyTorch 2.6 or newer: with an older one, the library cannot resume.
"""

# This module can have the same name as the library: Python never takes a module of a package for a top-level one.

import inspect
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers import SentenceTransformerTrainer as LibraryTrainer
from torch import Tensor, distributed, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from . import losses

__all__ = ["MultiProxyEntropyLoss", "SentenceTransformerTrainer"]

# PyTorch 2.13 and newer warn of the older name.
SYNC_BUFFERS = "forward_sync_buffers"
if SYNC_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    SYNC_BUFFERS = "broadcast_buffers"

LOSS_FILE = "loss.pt"
"""The file of a checkpoint that holds the state of the loss."""


class MultiProxyEntropyLoss(nn.Module):
    r""":class:`pml_multiproxy.losses.MultiProxyEntropyLoss` on the embeddings of a ``SentenceTransformer``.

    Use it with the :class:`SentenceTransformerTrainer` of this module: the library's own trainer neither saves nor
    resumes the proxies. Give the proxies a learning rate of their own through ``learning_rate_mapping``: the learning
    rate of a transformer is far too small for them.

    The dataset has a column ``label`` with integers in ``[0, C)``, and text columns:

    - ``views=1``: one text column.
    - ``views=V`` and V text columns: each column holds another wording of the same sample.
    - ``views=V`` and one text column: the model embeds the text V times, and its dropout makes the views differ (as in
      SimCSE, Gao, Yao, Chen, EMNLP 2021). Without dropout the views are equal, so evaluate on the retrieval task and
      not by this loss.

    ``AdaptiveLayerLoss``, ``MatryoshkaLoss`` and ``Matryoshka2dLoss`` of the library can wrap this loss. For embeddings
    truncated to d dimensions, it uses the first d dimensions of the proxies (as MRL-E does, Kusupati et al., NeurIPS
    2022).

    On several processes, the proxies start equal to those of the first process, their gradient is averaged over all
    processes, and all processes share the usage (``usage_group="world"``). The library does this for the model alone.

    Args:
        model: D, the size of its embeddings, becomes the size of the proxies. A ``truncate_dim`` of the model does not
            count, since the library truncates after training only.
        num_classes: C, at least 1.
        proxies_per_class: K, at least 1; ``None``: the default of the inner loss.
        scale: as in the inner loss, whose default is 10. Pretrained encoders embed sentences of a class close together:
            validation on text (``benchmarks/finetuning``) chose larger differences.
        temperature: as in the inner loss, whose default is 0.1, for the same reason.
        **kwargs: other arguments of the inner loss, for instance ``views``, ``intra_weight``.

    Attributes:
        model: the model as given.
        loss_func: the inner :class:`pml_multiproxy.losses.MultiProxyEntropyLoss`. Its parameter is called
            ``loss_func.proxies`` in ``learning_rate_mapping``.

    Calling it: the trainer passes ``sentence_features``, a list with the model's inputs for each text column, and
    ``labels`` ``(B,)``. The loss is a scalar. The model writes its outputs into the inputs, as under the library's
    losses; where dropout makes the views, the list gets the inputs of the other views, too.

    Raises:
        ValueError: for a model that does not know the size of its embeddings; in a call, if the number of text columns
            is neither 1 nor ``views``, or if there are no labels. The inner loss raises errors of its own.

    Example::

        from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
        from pml_multiproxy.sentence_transformers import MultiProxyEntropyLoss, SentenceTransformerTrainer

        model = SentenceTransformer("all-MiniLM-L6-v2")
        loss = MultiProxyEntropyLoss(model, num_classes=5, proxies_per_class=10)
        arguments = SentenceTransformerTrainingArguments("out", learning_rate_mapping={"proxies": 1e-2})
        SentenceTransformerTrainer(model, arguments, train_dataset, loss=loss).train()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        num_classes: int,
        proxies_per_class: int | None = None,
        *,
        scale: float = 20.0,
        temperature: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if proxies_per_class is not None:
            kwargs["proxies_per_class"] = proxies_per_class
        kwargs.setdefault("usage_group", "world")
        self.model = model
        size = _embedding_size(model)
        self.loss_func = losses.MultiProxyEntropyLoss(num_classes, size, scale=scale, temperature=temperature, **kwargs)
        self.loss_func.to(model.device)
        self._parallel: list[DistributedDataParallel] = []  # a list, so that the state does not hold the proxies twice

    def forward(self, sentence_features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of a batch, as described in the class docstring."""
        if labels is None:
            raise ValueError("labels must be given, got None: the dataset needs a column called label")
        views = self._views(sentence_features)
        embeddings = torch.cat([self.model(features)["sentence_embedding"] for features in views])
        return self._inner_loss(embeddings, labels.view(-1).repeat(len(views)))

    def get_config_dict(self) -> dict[str, Any]:
        """The settings; the library writes them into the model card."""
        return dict(self.loss_func.settings())

    @property
    def citation(self) -> str:
        """The paper that introduced the two entropies, in BibTeX."""
        return (
            "@inproceedings{yu-2022-multi-proxy, author = {Yu and Zhang and Li and Zhang}, year = {2022}, booktitle = "
            "{Proceedings of the Thirty-First International Joint Conference on Artificial Intelligence}, title = "
            "{Multi-Proxy Learning from an Entropy Optimization Perspective}, pages = {1594--1600}, "
            "doi = {10.24963/ijcai.2022/222}}\n"
        )

    def _views(self, columns: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        views = self.loss_func.views
        if len(columns) == 1:
            # AdaptiveLayerLoss calls with the same list once more, and reads the outputs in each dict.
            columns.extend(dict(columns[0]) for _ in range(views - 1))
        if len(columns) != views:
            raise ValueError(
                f"the dataset must have 1 text column or views={views} of them, got {len(columns)}: "
                f"pass views={len(columns)} if each holds another wording of the same sample, or remove the others"
            )
        return columns

    def _inner_loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        module = self._parallel_loss()
        name = "proxies" if module is self.loss_func else "module.proxies"
        truncated = {name: self.loss_func.proxies[..., : embeddings.shape[-1]]}  # as MatryoshkaLoss the embeddings
        loss: Tensor = functional_call(module, truncated, (embeddings, labels))
        return loss

    def _parallel_loss(self) -> losses.MultiProxyEntropyLoss | DistributedDataParallel:
        """The inner loss, wrapped on several processes so that they average its gradients."""
        several = distributed.is_available() and distributed.is_initialized()
        # DistributedDataParallel refuses a module without gradients.
        if not several or not self.loss_func.proxies.requires_grad:
            return self.loss_func
        if not self._parallel:
            # All processes update the usage together, or each keeps its own: DistributedDataParallel must not copy it.
            options: dict[str, Any] = {SYNC_BUFFERS: False}
            self._parallel.append(DistributedDataParallel(self.loss_func, **options))
        return self._parallel[0]


class SentenceTransformerTrainer(LibraryTrainer):
    """The library's trainer, except that it saves the loss in each checkpoint and resumes it.

    The library saves the model alone: after resuming, it trains fresh proxies with the optimizer state of the old ones.
    With this trainer, ``train(resume_from_checkpoint=...)`` is exact, ``load_best_model_at_end`` brings back the
    proxies that belong to the best model, and ``save_model`` writes them to ``loss.pt`` beside the model. It works with
    any loss that has parameters or buffers of its own, and with a dict of losses, but not with FSDP and DeepSpeed.

    It also clears the gradients of the loss after each step. The library does so from version 6.2 on; before, the
    gradients of all steps add up.

    To use the trained proxies without a trainer, load ``loss.pt`` into a loss with the same settings::

        from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

        state = torch.load("out/loss.pt", map_location="cpu", weights_only=True)[""]
        consume_prefix_in_state_dict_if_present(state, "loss_func.")
        loss_func.load_state_dict(state)

    Here ``loss_func`` is a :class:`pml_multiproxy.losses.MultiProxyEntropyLoss`, made with ``scale=20`` and
    ``temperature=0.05`` if you trained with the defaults, or ``loss.loss_func`` of the loss in this module. With a dict
    of losses, write its key in place of ``""``. For a loss within ``AdaptiveLayerLoss`` or ``MatryoshkaLoss``, the
    prefix is ``"loss.loss_func."``; within ``Matryoshka2dLoss``, ``"loss.loss.loss_func."``.

    Raises:
        FileNotFoundError: when resuming from a checkpoint without ``loss.pt``: the library's trainer wrote it.

    Example::

        trainer = SentenceTransformerTrainer(model, arguments, train_dataset, loss=loss)
        trainer.train(resume_from_checkpoint=True)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_ClearGradients())

    # The library's trainer overrides these three methods of transformers to save and load the model.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        state = {name: _split(loss, self.model)[1] for name, loss in self._losses()}
        torch.save(state, Path(output_dir or str(self.args.output_dir)) / LOSS_FILE)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:  # type: ignore[override, unused-ignore]
        super()._load_from_checkpoint(checkpoint_path)
        self._load_losses(Path(checkpoint_path) / LOSS_FILE)

    def _load_best_model(self) -> None:
        super()._load_best_model()  # calls _load_from_checkpoint in newer versions only
        self._load_losses(Path(str(self.state.best_model_checkpoint)) / LOSS_FILE)

    def _load_losses(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(f"{path} must exist to resume the loss: did another trainer write the checkpoint?")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for name, loss in self._losses():
            saved[name].update(_split(loss, self.model)[0])
            loss.load_state_dict(saved[name])  # strict: raises if anything of the loss is missing

    def _losses(self) -> Iterator[tuple[str, nn.Module]]:
        yield from self.loss.items() if isinstance(self.loss, dict) else [("", self.loss)]


class _ClearGradients(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["optimizer"].zero_grad()


def _split(loss: nn.Module, model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of a loss: the part that belongs to the model, and the rest."""
    shared = {id(tensor) for tensor in chain(model.parameters(), model.buffers())}
    of_model, own = {}, loss.state_dict()  # own keeps its metadata, and the settings in it
    for name, value in loss.state_dict(keep_vars=True).items():
        if id(value) in shared:
            of_model[name] = own.pop(name)
    return of_model, own


def _embedding_size(model: SentenceTransformer) -> int:
    """The size of the embeddings in training, where the library does not truncate them."""
    truncate_dim, model.truncate_dim = model.truncate_dim, None
    # Version 6 renamed the method.
    size = (getattr(model, "get_embedding_dimension", None) or model.get_sentence_embedding_dimension)()
    model.truncate_dim = truncate_dim
    if size is None:
        raise ValueError("model must know the size of its embeddings, got a model whose modules do not tell it")
    return int(size)
