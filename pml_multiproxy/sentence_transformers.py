"""The loss in the interface of sentence-transformers, and a trainer whose checkpoints hold the loss.

Needs sentence-transformers 5 or newer with its training dependencies, ``pip install "sentence-transformers[train]"``,
and PyTorch 2.6 or newer, without which the library cannot resume.
"""

# This module may be called like the library since a package's own modules are not found by their bare names.

import copy
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers import SentenceTransformerTrainer as LibraryTrainer
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from . import losses
from ._data_parallel import SYNC_BUFFERS
from .losses import RECORDED as SETTINGS

__all__ = ["MultiProxyEntropyLoss", "SentenceTransformerTrainer"]

LOSS_FILE = "loss.pt"
"""Name of the file in a checkpoint that holds the state of the loss."""


class MultiProxyEntropyLoss(nn.Module):
    r""":class:`pml_multiproxy.losses.MultiProxyEntropyLoss` on the embeddings of a ``SentenceTransformer``.

    Use it with :class:`SentenceTransformerTrainer` of this module, which is the library's except that it saves and
    resumes the proxies. Name the proxies in ``learning_rate_mapping`` to give them a learning rate of their own: that
    of a transformer is far too small for them.

    The dataset has a column ``label`` with integers in ``[0, C)``, and one text column for each view:

    - ``views=1``: one text column.
    - ``views=V`` and V text columns: each holds another wording of the same sample.
    - ``views=V`` and one text column: the text goes through the model V times, and its dropout makes the views (as in
      SimCSE, Gao, Yao, Chen, EMNLP 2021). Evaluate on the retrieval task rather than by this loss then: without
      dropout, views are equal.

    On several processes, the gradient of the proxies is averaged over all of them, and they start from those of the
    first, which the library does for the model alone. The usage is that of all processes together
    (``usage_group="world"``).

    Args:
        model: its embedding size D becomes that of the proxies.
        num_classes: C, at least 1.
        proxies_per_class: K, at least 1; ``None``: the default of the inner loss.
        **kwargs: of the inner loss, for instance ``views``, ``temperature``, ``intra_weight``, ``balance_weight``.

    Attributes:
        model: the model that was given.
        loss_func: the inner :class:`pml_multiproxy.losses.MultiProxyEntropyLoss`. Its parameter is called
            ``loss_func.proxies`` in ``learning_rate_mapping``.

    Raises:
        ValueError: for a model whose embedding size is unknown; in a call, for a number of text columns that is neither
            1 nor ``views``, for missing labels, and for ``reseed_below`` on several processes, which would each move
            other proxies; and as the inner loss raises.

    Example::

        from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
        from pml_multiproxy.sentence_transformers import MultiProxyEntropyLoss, SentenceTransformerTrainer

        model = SentenceTransformer("all-MiniLM-L6-v2")
        loss = MultiProxyEntropyLoss(model, num_classes=5, proxies_per_class=10)
        arguments = SentenceTransformerTrainingArguments("out", learning_rate_mapping={"proxies": 1e-2})
        SentenceTransformerTrainer(model, arguments, train_dataset, loss=loss).train()
    """

    def __init__(
        self, model: SentenceTransformer, num_classes: int, proxies_per_class: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__()
        if proxies_per_class is not None:
            kwargs["proxies_per_class"] = proxies_per_class
        if not kwargs.get("reseed_below"):  # which the inner loss refuses together with a group
            kwargs.setdefault("usage_group", "world")
        self.model = model
        self.loss_func = losses.MultiProxyEntropyLoss(num_classes, _embedding_size(model), **kwargs)
        self.loss_func.to(model.device)
        self._parallel: list[nn.Module] = []  # in a list, so that the state does not hold the proxies twice

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of a batch, as the trainer calls it.

        Args:
            sentence_features: what the model takes, once for each text column, all of B texts.
            labels: ``(B,)`` integers in ``[0, C)``.

        Returns:
            The loss, a scalar.
        """
        if labels is None:
            raise ValueError("labels must be given, got None: the dataset needs a column called label")
        views = self._views(list(sentence_features))
        # A copy of the dict, since the modules of the model write into it.
        embeddings = torch.cat([self.model(dict(features))["sentence_embedding"] for features in views])
        loss: Tensor = self._synchronised()(embeddings, labels.view(-1).repeat(len(views)))
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, which the library writes into the model card."""
        return {name: getattr(self.loss_func, name) for name in SETTINGS}

    @property
    def citation(self) -> str:
        """What to cite, in BibTeX: the paper that the two entropies come from."""
        return """
@inproceedings{yu-2022-multi-proxy,
    title = "Multi-Proxy Learning from an Entropy Optimization Perspective",
    author = "Yu and Zhang and Li and Zhang",
    booktitle = "Proceedings of the Thirty-First International Joint Conference on Artificial Intelligence",
    year = "2022",
    pages = "1594--1600",
    doi = "10.24963/ijcai.2022/222",
}
"""

    def _views(self, columns: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        views = self.loss_func.views
        if len(columns) == views:
            return columns
        if len(columns) == 1:
            return columns * views
        raise ValueError(
            f"the dataset must have 1 text column or views={views} of them, got {len(columns)}: "
            f"pass views={len(columns)} if each holds another wording of the same sample, or remove the others"
        )

    def _synchronised(self) -> nn.Module:
        """The inner loss; on several processes, in what averages its gradients."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return self.loss_func
        if self.loss_func.reseed_below > 0:
            raise ValueError(
                f"reseed_below must be 0 on several processes, got {self.loss_func.reseed_below:g}: "
                "each would move other proxies"
            )
        if not self.loss_func.proxies.requires_grad:  # DistributedDataParallel refuses what has nothing to average
            return self.loss_func
        if not self._parallel:
            # The usage is a buffer, and either updated by all processes together or each one's own.
            options: dict[str, Any] = {SYNC_BUFFERS: False}
            self._parallel.append(DistributedDataParallel(self.loss_func, **options))
        return self._parallel[0]


class SentenceTransformerTrainer(LibraryTrainer):
    """The library's trainer, whose checkpoints hold the loss, too.

    The library saves the model alone: resumed from a checkpoint, training goes on with fresh proxies and the optimizer
    state of the old ones. Here, ``train(resume_from_checkpoint=...)`` is exact, ``load_best_model_at_end`` brings back
    the proxies that belong to the best model, and ``save_model`` writes them to ``loss.pt`` beside the model. Works
    with any loss that has parameters or buffers of its own, and with a dict of losses. Not with FSDP and DeepSpeed.

    It also clears the gradients of the loss after each step, which the library does from version 6.2 on; before, they
    add up over the whole training.

    Raises:
        FileNotFoundError: when resuming from a checkpoint without ``loss.pt``, as the library's trainer writes them.

    Example::

        trainer = SentenceTransformerTrainer(model, arguments, train_dataset, loss=loss)
        trainer.train(resume_from_checkpoint=True)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_ClearGradients())

    # These three are what the library's trainer itself overrides of transformers' to save and load a model.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        state = {name: _split(loss, self.model)[1] for name, loss in self._losses()}
        torch.save(state, Path(output_dir or str(self.args.output_dir)) / LOSS_FILE)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:  # type: ignore[override, unused-ignore]
        super()._load_from_checkpoint(checkpoint_path)
        self._load_losses(Path(checkpoint_path) / LOSS_FILE)

    def _load_best_model(self) -> None:
        super()._load_best_model()  # which calls the method above in newer versions only
        self._load_losses(Path(str(self.state.best_model_checkpoint)) / LOSS_FILE)

    def _load_losses(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(
                f"{path} must exist to resume the loss: was the checkpoint written by another trainer?"
            )
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for name, loss in self._losses():
            of_model, _ = _split(loss, self.model)
            state = copy.copy(saved[name])  # keeps its metadata, which a new dict would not
            state.update(of_model)
            loss.load_state_dict(state)  # strict: nothing of the loss may be missing

    def _losses(self) -> Iterator[tuple[str, nn.Module]]:
        yield from self.loss.items() if isinstance(self.loss, dict) else [("", self.loss)]


class _ClearGradients(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["optimizer"].zero_grad()


def _split(loss: nn.Module, model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of a loss: what it shares with the model, and its own."""
    shared = {id(tensor) for tensor in chain(model.parameters(), model.buffers())}
    state = loss.state_dict(keep_vars=True)
    of_model = {name: value for name, value in state.items() if id(value) in shared}
    own = loss.state_dict()  # with its metadata, in which the settings are
    for name in of_model:
        del own[name]
    return of_model, own


def _embedding_size(model: SentenceTransformer) -> int:
    current, before_6 = "get_embedding_dimension", "get_sentence_embedding_dimension"
    size = getattr(model, current if hasattr(model, current) else before_6)()
    if size is None:
        raise ValueError("model must have an embedding size, got one whose last module does not tell it")
    return int(size)
