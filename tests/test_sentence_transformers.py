"""The loss in sentence-transformers: views, the library's wrappers, its trainer, and exact resuming."""

import math
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

from datasets import Dataset, DatasetDict
from forked import EXAMPLES, run_forked
from sentence_transformers import SentenceTransformerTrainer as LibraryTrainer
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import TrainerCallback, set_seed

from pml_multiproxy import losses
from pml_multiproxy.sentence_transformers import LOSS_FILE, MultiProxyEntropyLoss, SentenceTransformerTrainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # newer versions have another name for it
    from sentence_transformers.losses import (
        AdaptiveLayerLoss,
        Matryoshka2dLoss,
        MatryoshkaLoss,
        MultipleNegativesRankingLoss,
    )

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("default")]  # the libraries warn

VIEWS = {"one": (1, ["text"]), "dropout": (2, ["text"]), "two columns": (2, ["text", "other_wording"])}
DEFAULTS = {"scale": 20, "temperature": 0.05}
"""Where the loss for text differs from the inner one."""
WRAPPERS = {
    "none": lambda model, loss: loss,
    "Matryoshka2dLoss": lambda model, loss: Matryoshka2dLoss(model, loss, [32, 16]),
}


@pytest.fixture
def text_data(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import text_data

    return text_data


@pytest.fixture
def model(text_data):
    set_seed(0)
    return text_data.make_model()


@pytest.fixture
def features(text_data, model):
    """The inputs that the trainer makes of two text columns, and the labels."""
    rows = text_data.load_data()[0][::40]
    preprocess = getattr(model, "preprocess", model.tokenize)  # its name in early versions 5
    columns = [preprocess([row[name] for row in rows]) for name in ("text", "other_wording")]
    return columns, torch.tensor([row["label"] for row in rows])


class Steps(TrainerCallback):
    """Records the loss of each step, and may end the training as a crash would."""

    def __init__(self, crash_after):
        self.losses, self.crash_after = [], crash_after

    def on_log(self, args, state, control, logs, **kwargs):
        self.losses += [logs["loss"]] if "loss" in logs else []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= self.crash_after:
            raise KeyboardInterrupt


def make_trainer(
    text_data, folder, views="one", make=SentenceTransformerTrainer, wrap=WRAPPERS["none"], data=None, **arguments
):
    """A trainer with dropout, gradient accumulation, and a learning rate for the proxies alone."""
    model = text_data.make_model()
    set_seed(0)  # only now: the first model of a process is drawn, later ones are copies
    count, columns = VIEWS[views]
    loss = MultiProxyEntropyLoss(model, 3, 4, views=count)
    settings = {
        "max_steps": 8, "save_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 8, "report_to": "none",
        "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "learning_rate_mapping": {r"loss_func\.proxies": 1e-2},
        "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    arguments = SentenceTransformerTrainingArguments(output_dir=str(folder), **{**settings, **arguments})
    rows = Dataset.from_list(text_data.load_data()[0]).select_columns([*columns, "label"])
    evaluation = None if data else rows.select(range(48))
    return make(model, arguments, data or rows, eval_dataset=evaluation, loss=wrap(model, loss))


def train(trainer, crash_after=math.inf, **arguments):
    steps = Steps(crash_after)
    trainer.add_callback(steps)
    with pytest.raises(KeyboardInterrupt) if crash_after < math.inf else nullcontext():
        trainer.train(**arguments)
    return steps.losses


def state(trainer):
    """A copy of all that is trained."""
    return {name: value.clone() for name, value in trainer.loss.state_dict().items() if isinstance(value, torch.Tensor)}


def proxies(trainer):
    return next(value for name, value in trainer.loss.named_parameters() if name.endswith("proxies"))


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


# The loss alone


def test_columns_are_views(model, features):
    columns, labels = features
    embeddings = torch.cat([model(dict(column))["sentence_embedding"] for column in columns])
    for views in (1, 2):
        loss = MultiProxyEntropyLoss(model, 3, 4, views=views, temperature=0.2).eval()
        expected = loss.loss_func(embeddings[: views * len(labels)], labels.repeat(views))
        assert loss.loss_func.temperature == 0.2
        assert torch.equal(loss(columns[:views], labels), expected)


def test_dropout_makes_views_of_one_column(model, features):
    (column, _), labels = features
    loss, seen = MultiProxyEntropyLoss(model, 3, 4, views=2), []
    loss.loss_func.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    for training in (True, False):
        loss.train(training)([dict(column)], labels)
        embeddings, repeated = seen.pop()
        assert torch.equal(repeated, labels.repeat(2))
        assert torch.allclose(*embeddings.chunk(2)) is not training


@pytest.mark.parametrize("views", VIEWS)
def test_within_the_librarys_wrappers(model, features, views):
    """The inner loss on each layer, and with truncated proxies on truncated embeddings."""
    (count, names), (columns, labels) = VIEWS[views], features
    columns, kwargs = columns[: len(names)], {"n_layers_per_step": -1, "kl_div_weight": 0}
    loss = MultiProxyEntropyLoss(model, 3, 4, views=count).eval()
    halved = losses.MultiProxyEntropyLoss(3, 16, 4, views=count, **DEFAULTS).eval()
    halved.proxies.data = loss.loss_func.proxies[..., :16].detach()
    model[0].auto_model.config.output_hidden_states = True
    outputs = [model(dict(column)) for column in columns]
    model[0].auto_model.config.output_hidden_states = False
    full, half = [], []
    for layer in range(3):
        inputs = [{**output, "token_embeddings": output["all_layer_embeddings"][layer]} for output in outputs]
        pooled = torch.cat([model[1](features)["sentence_embedding"] for features in inputs * (count // len(inputs))])
        full.append(loss.loss_func(pooled, labels.repeat(count)))
        half.append(halved(pooled[:, :16], labels.repeat(count)))
    for wrapped, expected in (
        (AdaptiveLayerLoss(model, loss, **kwargs), full[2] + (full[0] + full[1]) / 2),
        (MatryoshkaLoss(model, loss, [32, 16]), full[2] + half[2]),
        (
            Matryoshka2dLoss(model, loss, [32, 16], n_dims_per_step=-1, **kwargs),
            full[2] + half[2] + (full[0] + full[1] + half[0] + half[1]) / 2,
        ),
    ):
        value = wrapped([dict(column) for column in columns], labels)
        torch.testing.assert_close(value, expected)
        (gradient,) = torch.autograd.grad(value, loss.loss_func.proxies)
        assert gradient.abs().sum() > 0


def test_truncate_dim_does_not_change_the_proxies(model, features):
    columns, labels = features
    model.truncate_dim = 8
    loss = MultiProxyEntropyLoss(model, 3)
    assert loss.loss_func.embedding_size == 32
    assert model.truncate_dim == 8
    assert loss(columns[:1], labels).isfinite()


def test_errors(model, features):
    columns, labels = features
    with pytest.raises(ValueError, match=r"1 text column or views=1 of them, got 2: pass views=2"):
        MultiProxyEntropyLoss(model, 3)(columns, labels)
    with pytest.raises(ValueError, match="labels must be given, got None"):
        MultiProxyEntropyLoss(model, 3)(columns[:1], None)
    model.get_embedding_dimension = lambda: None
    with pytest.raises(ValueError, match="model must know the size of its embeddings"):
        MultiProxyEntropyLoss(model, 3)


# In the trainer


def test_the_trainer_trains_the_proxies_at_their_own_learning_rate(text_data, tmp_path):
    trainer = make_trainer(text_data, tmp_path, max_steps=2, save_strategy="no", lr_scheduler_type="constant")
    before = proxies(trainer).detach().clone()
    train(trainer)
    (group,) = [group for group in trainer.optimizer.param_groups if group["lr"] == 1e-2]
    assert [id(parameter) for parameter in group["params"]] == [id(proxies(trainer))]
    assert 1e-2 < (proxies(trainer) - before).abs().max() < 2.5e-2  # two steps of Adam
    # Cleared after each step. The library did not clear them before 6.2, and they added up.
    assert proxies(trainer).grad is None or not proxies(trainer).grad.any()


def test_model_card_and_mixed_precision(text_data, tmp_path):
    trainer = make_trainer(text_data, tmp_path / "run", bf16=True, max_steps=2, save_strategy="no")
    assert trainer.loss.get_config_dict() == trainer.loss.loss_func.settings()
    assert all(math.isfinite(loss) for loss in train(trainer))
    assert trainer.loss.loss_func.proxies.dtype == trainer.loss.loss_func.proxy_usage.dtype == torch.float32
    trainer.save_model(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert '"proxies_per_class": 4' in card
    assert "10.24963/ijcai.2022/222" in card


def test_the_saved_loss_loads_as_the_docstring_says(text_data, tmp_path):
    """Into the loss of this module and into PML's, each checking the settings."""
    trainer = make_trainer(text_data, tmp_path, max_steps=3)
    train(trainer)
    trainer.save_model(tmp_path)
    example = SentenceTransformerTrainer.__doc__.split("::\n\n")[1].split("\n\n    Here")[0]
    example = "\n".join(line.strip() for line in example.splitlines()).replace("out/loss.pt", str(tmp_path / LOSS_FILE))
    for make in (
        lambda **kwargs: losses.MultiProxyEntropyLoss(3, 32, 4, **DEFAULTS | kwargs),
        lambda **kwargs: MultiProxyEntropyLoss(text_data.make_model(), 3, 4, **kwargs).loss_func,
    ):
        loss_func = make()
        exec(example, {"torch": torch, "loss_func": loss_func})
        assert same(trainer.loss.loss_func.state_dict(), loss_func.state_dict())
        with pytest.warns(UserWarning, match=r"other settings: scale was 20\.0 and is 30\.0"):
            exec(example, {"torch": torch, "loss_func": make(scale=30)})


@pytest.mark.parametrize("views", ["one", pytest.param("dropout", marks=pytest.mark.slow), "two columns"])
@pytest.mark.parametrize("wrapper", ["none", pytest.param("Matryoshka2dLoss", marks=pytest.mark.slow)])
def test_resuming_is_exact(text_data, tmp_path, views, wrapper):
    """To the bit: losses, parameters, usage and the optimizer's moments; also if the folder has moved."""
    whole = make_trainer(text_data, tmp_path / "whole", views, wrap=WRAPPERS[wrapper])
    expected, before = train(whole), state(whole)
    assert len(expected) == 8
    train(make_trainer(text_data, tmp_path / "interrupted", views, wrap=WRAPPERS[wrapper]), crash_after=5)
    moved = (tmp_path / "interrupted").rename(tmp_path / "moved")
    resumed = make_trainer(text_data, moved, views, wrap=WRAPPERS[wrapper])
    torch.nn.init.normal_(proxies(resumed))  # as by another seed
    assert train(resumed, resume_from_checkpoint=True) == expected[4:]
    assert same(before, state(resumed))
    moments = [trainer.optimizer.state[proxies(trainer)]["exp_avg"] for trainer in (whole, resumed)]
    assert torch.equal(*moments)


def test_a_checkpoint_without_the_loss_is_refused(text_data, tmp_path):
    train(make_trainer(text_data, tmp_path, make=LibraryTrainer, max_steps=4))
    with pytest.raises(FileNotFoundError, match=f"{LOSS_FILE} must exist to resume the loss"):
        train(make_trainer(text_data, tmp_path), resume_from_checkpoint=True)


def test_the_best_model_comes_back_with_its_proxies(text_data, tmp_path):
    """And save_total_limit keeps the loss of the checkpoints that stay."""
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    # The larger loss counts as better, so that the first checkpoint is the best.
    trainer = make_trainer(text_data, tmp_path, save_total_limit=2, greater_is_better=True, **best)
    train(trainer)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert sorted(path.parent.name for path in tmp_path.glob(f"*/{LOSS_FILE}")) == ["checkpoint-2", "checkpoint-8"]
    first, last = (torch.load(tmp_path / f"checkpoint-{step}" / LOSS_FILE)[""] for step in (2, 8))
    assert same(first, state(trainer))
    assert not same(last, state(trainer))


def test_several_losses(text_data, tmp_path):
    """A dict of losses, one for each dataset."""
    rows = Dataset.from_list(text_data.load_data()[0][:160])
    data = {name: rows.select_columns(["text", column]) for name, column in (("a", "label"), ("b", "other_wording"))}
    arguments = {
        "data": DatasetDict(data), "wrap": lambda model, loss: {"a": loss, "b": MultipleNegativesRankingLoss(model)},
        "learning_rate_mapping": {r"a\.loss_func\.proxies": 1e-2},
    }  # fmt: skip
    whole, resumed = (make_trainer(text_data, tmp_path, **arguments) for _ in range(2))
    expected = train(whole)
    torch.nn.init.zeros_(resumed.loss["a"].loss_func.proxies)
    assert train(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-4")) == expected[4:]
    assert same(whole.loss["a"].state_dict(), resumed.loss["a"].state_dict())


@pytest.mark.slow
def test_another_wording_is_a_better_view_than_dropout(text_data, tmp_path):
    """As docs/guide.md says."""
    whole_batches = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 48}
    of_views = {}
    for views in VIEWS:
        trainer = make_trainer(
            text_data, tmp_path, views, max_steps=-1, num_train_epochs=8, save_strategy="no", **whole_batches
        )
        train(trainer)
        of_views[views] = text_data.map_at_r(trainer.model)
    untrained = text_data.map_at_r(text_data.make_model())
    assert of_views["two columns"] > 1.5 * of_views["one"] > 3 * untrained
    assert of_views["dropout"] < 1.2 * of_views["one"]


TWO_PROCESSES = """
import os, sys, torch, warnings
warnings.filterwarnings("error", module="pml_multiproxy")
sys.path[:0] = {paths!r}
import test_sentence_transformers as tests, text_data
from torch import distributed
"""
TRAININGS = """
for name, wrapper in tests.WRAPPERS.items():
    def with_other_proxies(model, loss):
        torch.manual_seed(int(os.environ["RANK"]))
        torch.nn.init.normal_(loss.loss_func.proxies)
        return wrapper(model, loss)

    arguments = (text_data, {folder!r} + name, "two columns")
    whole = tests.make_trainer(*arguments, wrap=with_other_proxies)
    tests.train(whole)
    for key, value in tests.state(whole).items():
        both = [torch.empty_like(value) for _ in range(2)]
        distributed.all_gather(both, value.contiguous())
        assert torch.equal(*both), (name, key)
    resumed = tests.make_trainer(*arguments, wrap=with_other_proxies)
    tests.train(resumed, resume_from_checkpoint=f"{{arguments[1]}}/checkpoint-4")
    assert tests.same(tests.state(whole), tests.state(resumed)), name
print("equal", flush=True)
"""


@pytest.mark.slow
def test_two_processes_share_proxies_and_usage_and_resume_exactly(tmp_path):
    imports = TWO_PROCESSES.format(paths=[str(EXAMPLES), str(Path(__file__).parent)])
    call = TRAININGS.format(folder=f"{tmp_path}/")
    assert run_forked(tmp_path / "script.py", imports, (2, call)).count("equal") == 2
