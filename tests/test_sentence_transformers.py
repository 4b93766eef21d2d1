"""The loss inside of sentence-transformers' trainer: views, learning rates, several losses, exact resuming."""

import math
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformerTrainer as LibraryTrainer
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import TrainerCallback, set_seed
from two_processes import run_on_two_processes

from pml_multiproxy import losses
from pml_multiproxy.sentence_transformers import LOSS_FILE, MultiProxyEntropyLoss, SentenceTransformerTrainer

# Their own warnings are none of our business.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def text_data(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    import text_data

    return text_data


@pytest.fixture
def model(text_data):
    set_seed(0)
    return text_data.make_model()


@pytest.fixture
def features(text_data, model):
    """What the trainer makes of two text columns, and the labels."""
    rows = text_data.load_data()[0][::40]
    preprocess = getattr(model, "preprocess", model.tokenize)  # its name in early versions 5
    columns = [preprocess([row[name] for row in rows]) for name in ("text", "other_wording")]
    return columns, torch.tensor([row["label"] for row in rows])


class Steps(TrainerCallback):
    """Records the loss of each step, and may end the training as a crash would."""

    def __init__(self, crash_after=math.inf):
        self.losses, self.crash_after = [], crash_after

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= self.crash_after:
            raise KeyboardInterrupt


class PairLoss(torch.nn.Module):
    """A second loss, without parameters of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, sentence_features, labels):
        first, second = (self.model(features)["sentence_embedding"] for features in sentence_features)
        return 1 - torch.nn.functional.cosine_similarity(first, second).mean()


def make_trainer(
    text_data, folder, views=1, columns=("text",), make=SentenceTransformerTrainer, loss=None, **arguments
):
    """A trainer with dropout, gradient accumulation, and a learning rate for the proxies alone."""
    set_seed(0)
    model = text_data.make_model()
    loss = loss(model) if loss else MultiProxyEntropyLoss(model, 3, 4, views=views)
    settings = {
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "learning_rate_mapping": {r"loss_func\.proxies": 1e-2} if isinstance(loss, MultiProxyEntropyLoss) else {},
        "logging_steps": 1,
        "save_steps": 10,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
    }
    arguments = SentenceTransformerTrainingArguments(output_dir=str(folder), **{**settings, **arguments})
    data = Dataset.from_list(text_data.load_data()[0]).select_columns([*columns, "label"])
    return make(model, arguments, data, eval_dataset=data.select(range(48)), loss=loss)


def train(trainer, crash_after=math.inf, **arguments):
    steps = Steps(crash_after)
    trainer.add_callback(steps)
    if crash_after < math.inf:
        with pytest.raises(KeyboardInterrupt):
            trainer.train(**arguments)
    else:
        trainer.train(**arguments)
    return steps.losses


def state(trainer):
    """All that was trained; each is a copy."""
    return {name: value.clone() for name, value in trainer.loss.state_dict().items() if isinstance(value, torch.Tensor)}


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


# The loss alone


def test_one_column_is_what_the_inner_loss_says(model, features):
    (column, _), labels = features
    loss = MultiProxyEntropyLoss(model, 3, 4, temperature=0.2).eval()
    assert loss.loss_func.temperature == 0.2
    assert torch.equal(loss([column], labels), loss.loss_func(model(dict(column))["sentence_embedding"], labels))


def test_two_columns_are_two_views_of_a_sample(model, features):
    columns, labels = features
    loss = MultiProxyEntropyLoss(model, 3, 4, views=2).eval()
    embeddings = torch.cat([model(dict(column))["sentence_embedding"] for column in columns])
    expected = loss.loss_func(embeddings, torch.cat([labels, labels]))
    assert torch.equal(loss(columns, labels), expected)
    assert not torch.equal(loss(columns[::-1][:1], labels), expected)


def test_dropout_makes_views_of_one_column(model, features):
    (column, _), labels = features
    loss = MultiProxyEntropyLoss(model, 3, 4, views=2, intra_weight=1.0)
    seen = []
    loss.loss_func.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    loss.train()([column], labels)
    embeddings, repeated = seen.pop()
    assert torch.equal(repeated, torch.cat([labels, labels]))
    assert not torch.allclose(*embeddings.chunk(2))
    loss.eval()([column], labels)
    assert torch.equal(*seen.pop()[0].chunk(2))


def test_it_does_not_write_into_the_features(model, features):
    columns, labels = features
    keys = [set(column) for column in columns]
    MultiProxyEntropyLoss(model, 3, views=2)(columns, labels)
    assert [set(column) for column in columns] == keys


def test_errors(model, features):
    columns, labels = features
    with pytest.raises(ValueError, match=r"1 text column or views=1 of them, got 2: pass views=2"):
        MultiProxyEntropyLoss(model, 3)(columns, labels)
    with pytest.raises(ValueError, match="labels must be given, got None"):
        MultiProxyEntropyLoss(model, 3)(columns[:1], None)
    model.get_embedding_dimension = lambda: None
    with pytest.raises(ValueError, match="model must have an embedding size"):
        MultiProxyEntropyLoss(model, 3)


def test_config_and_citation(model):
    loss = MultiProxyEntropyLoss(model, 3, 7, views=2, temperature=0.3)
    config = loss.get_config_dict()
    assert config["num_classes"] == 3
    assert config["embedding_size"] == 32
    assert config["proxies_per_class"] == 7
    assert config["views"] == 2
    assert config["temperature"] == 0.3
    assert "10.24963/ijcai.2022/222" in loss.citation
    default = losses.MultiProxyEntropyLoss(3, 32).proxies_per_class
    assert MultiProxyEntropyLoss(model, 3).get_config_dict()["proxies_per_class"] == default


# In the trainer


def test_the_trainer_trains_the_proxies_at_their_own_learning_rate(text_data, tmp_path):
    trainer = make_trainer(text_data, tmp_path, max_steps=2, save_strategy="no", lr_scheduler_type="constant")
    before, proxies = state(trainer), trainer.loss.loss_func.proxies
    train(trainer)
    (group,) = [group for group in trainer.optimizer.param_groups if any(p is proxies for p in group["params"])]
    assert group["lr"] == 1e-2
    assert all(parameter is proxies for parameter in group["params"])
    assert not same(before, state(trainer))
    moved = (proxies - before["loss_func.proxies"]).abs().max()
    assert 1e-2 < moved < 2.5e-2  # two steps of Adam
    # Cleared after each step; the library did not before 6.2, and they added up.
    assert proxies.grad is None or not proxies.grad.any()


def test_model_card_shows_settings_and_citation(text_data, tmp_path):
    trainer = make_trainer(text_data, tmp_path / "run", max_steps=1, save_strategy="no")
    train(trainer)
    trainer.save_model(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert '"proxies_per_class": 4' in card
    assert "10.24963/ijcai.2022/222" in card


@pytest.mark.parametrize(
    ("views", "columns"), [(1, ["text"]), (2, ["text"]), (2, ["text", "other_wording"])], ids=["1", "dropout", "2"]
)
def test_resuming_is_exact(text_data, tmp_path, views, columns):
    """To the bit: losses, parameters, usage and the optimizer's moments."""
    kwargs = {"views": views, "columns": columns}
    whole = make_trainer(text_data, tmp_path / "whole", **kwargs)
    expected = train(whole)
    assert len(expected) == 20
    train(make_trainer(text_data, tmp_path / "interrupted", **kwargs), crash_after=13)
    resumed = make_trainer(text_data, tmp_path / "interrupted", **kwargs)
    assert train(resumed, resume_from_checkpoint=True) == expected[10:]
    assert same(state(whole), state(resumed))
    moments = [trainer.optimizer.state[trainer.loss.loss_func.proxies] for trainer in (whole, resumed)]
    assert torch.equal(moments[0]["exp_avg"], moments[1]["exp_avg"])


def test_the_librarys_trainer_resumes_with_fresh_proxies(text_data, tmp_path):
    """Which is what ours is for: without it, the same test finds other losses."""
    expected = train(make_trainer(text_data, tmp_path / "whole", make=LibraryTrainer))
    train(make_trainer(text_data, tmp_path / "interrupted", make=LibraryTrainer), crash_after=13)
    resumed = make_trainer(text_data, tmp_path / "interrupted", make=LibraryTrainer)
    torch.nn.init.normal_(resumed.loss.loss_func.proxies)  # as by another seed
    assert train(resumed, resume_from_checkpoint=True)[0] != pytest.approx(expected[10], abs=1e-2)
    with pytest.raises(FileNotFoundError, match=f"{LOSS_FILE} must exist to resume the loss"):
        train(make_trainer(text_data, tmp_path / "interrupted"), resume_from_checkpoint=True)


def test_resuming_from_another_folder(text_data, tmp_path):
    whole = make_trainer(text_data, tmp_path / "first")
    expected = train(whole)
    shutil.copytree(tmp_path / "first" / "checkpoint-10", tmp_path / "elsewhere")
    resumed = make_trainer(text_data, tmp_path / "second")
    assert train(resumed, resume_from_checkpoint=str(tmp_path / "elsewhere")) == expected[10:]


def test_resuming_with_other_settings_says_so(text_data, tmp_path):
    train(make_trainer(text_data, tmp_path, max_steps=10))
    resumed = make_trainer(text_data, tmp_path, loss=lambda model: MultiProxyEntropyLoss(model, 3, 4, scale=20))
    with pytest.warns(UserWarning, match=r"other settings: scale was 10\.0 and is 20\.0"):
        train(resumed, resume_from_checkpoint=True)


def test_the_best_model_comes_back_with_its_proxies(text_data, tmp_path):
    """And save_total_limit keeps the loss of the checkpoints that stay."""
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5, "save_steps": 5}
    # The larger loss counts as better, so that the first checkpoint is the best.
    trainer = make_trainer(text_data, tmp_path, save_total_limit=2, greater_is_better=True, **best)
    train(trainer)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-5")
    assert sorted(path.parent.name for path in tmp_path.glob(f"*/{LOSS_FILE}")) == ["checkpoint-20", "checkpoint-5"]
    first, last = (torch.load(tmp_path / f"checkpoint-{step}" / LOSS_FILE)[""] for step in (5, 20))
    assert same(first, state(trainer))
    assert not same(last, state(trainer))


def test_several_losses(text_data, tmp_path):
    """A dict of losses, one for each dataset, of which ours is one."""
    expected = None
    for attempt in ("whole", "resumed"):
        set_seed(0)
        model = text_data.make_model()
        rows = Dataset.from_list(text_data.load_data()[0][:160])
        data = {
            "topics": rows.select_columns(["text", "label"]),
            "pairs": rows.select_columns(["text", "other_wording"]),
        }
        by_dataset = {"topics": MultiProxyEntropyLoss(model, 3, 4), "pairs": PairLoss(model)}
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=8, save_steps=4, disable_tqdm=True, report_to="none",
            logging_steps=1, use_cpu=True, learning_rate_mapping={r"topics\.loss_func\.proxies": 1e-2},
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(model, arguments, DatasetDict(data), loss=by_dataset)
        if attempt == "whole":
            expected, proxies = train(trainer), by_dataset["topics"].loss_func.proxies
        else:
            torch.nn.init.zeros_(by_dataset["topics"].loss_func.proxies)
            checkpoint = str(tmp_path / "run" / "checkpoint-4")
            assert train(trainer, resume_from_checkpoint=checkpoint) == expected[4:]
            assert torch.equal(by_dataset["topics"].loss_func.proxies, proxies)


def test_mixed_precision(text_data, tmp_path):
    trainer = make_trainer(text_data, tmp_path, bf16=True, max_steps=5, save_strategy="no")
    seen = train(trainer)
    assert all(math.isfinite(loss) for loss in seen)
    assert trainer.loss.loss_func.proxies.dtype == torch.float32
    assert trainer.loss.loss_func.proxy_usage.dtype == torch.float32


TWO_PROCESSES = """
import os, sys, torch, warnings
warnings.filterwarnings("error", module="pml_multiproxy")
sys.path.insert(0, {examples!r})
from torch import distributed
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import set_seed
import text_data
from pml_multiproxy.sentence_transformers import MultiProxyEntropyLoss, SentenceTransformerTrainer

def make(folder):
    set_seed(0)
    model = text_data.make_model()
    torch.manual_seed(int(os.environ["RANK"]))  # other proxies on each process
    loss = MultiProxyEntropyLoss(model, 3, 4, views=2)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=folder, max_steps=8, save_steps=4, per_device_train_batch_size=8, learning_rate=1e-3,
        gradient_accumulation_steps=2, report_to="none", disable_tqdm=True, use_cpu=True,
    )
    data = Dataset.from_list(text_data.load_data()[0]).select_columns(["text", "other_wording", "label"])
    return SentenceTransformerTrainer(model, arguments, data, loss=loss)

whole = make({folder!r})
whole.train()
state = {{name: value for name, value in whole.loss.state_dict().items() if name.startswith("loss_func.")}}
assert set(state) >= {{"loss_func.proxies", "loss_func.proxy_usage"}}, set(state)
for name in ("loss_func.proxies", "loss_func.proxy_usage"):
    both = [torch.empty_like(state[name]) for _ in range(2)]
    distributed.all_gather(both, state[name].detach().contiguous())
    assert torch.equal(*both), name
resumed = make({folder!r})
resumed.train(resume_from_checkpoint={folder!r} + "/checkpoint-4")
for name, value in whole.model.state_dict().items():
    assert torch.equal(value, resumed.model.state_dict()[name]), name
for name in ("loss_func.proxies", "loss_func.proxy_usage"):
    assert torch.equal(state[name], resumed.loss.state_dict()[name]), name
print("equal", flush=True)
"""


@pytest.mark.slow
def test_two_processes_share_proxies_and_usage_and_resume_exactly(tmp_path):
    examples = str(Path(__file__).parent.parent / "examples")
    script = TWO_PROCESSES.format(examples=examples, folder=str(tmp_path / "run"))
    assert run_on_two_processes(tmp_path / "script.py", script).count("equal") == 2
