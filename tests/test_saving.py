"""Settings that travel with the state: files, state dicts, print."""

import copy
import io
import pickle
import re
import warnings
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import DISTANCES, make_distance
from pytorch_metric_learning import reducers, regularizers
from torch.nn.utils import parametrizations, parametrize

from pml_multiproxy import MultiProxyEntropyLoss

SETTINGS = {"scale": 7.0, "pooling": "softmax", "temperature": 0.3, "views": 2, "classes_per_chunk": 2, "margin": 0.1}

EARLIER_SETTINGS = {
    "scale": 7.0,
    "margin": 0.1,
    "pooling": "logsumexp",
    "temperature": 0.3,
    "intra_weight": 0.4,
    "inter_weight": 0.1,
    "balance_weight": 0.6,
    "usage_momentum": 0.8,
    "reseed_below": 0.05,
    "classes_per_chunk": 2,
}
"""Those of data/state_dict."""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "loss.pt"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_a_file_holds_all_that_matters(distance, dtype, path):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, distance=make_distance(distance), **SETTINGS).to(dtype)
    embeddings, labels = torch.randn(8, 8, requires_grad=True), torch.tensor([0, 1, 2, 0]).repeat(2)
    loss_func(embeddings, labels)  # which moves the usage
    loss_func.save(path)
    loaded = MultiProxyEntropyLoss.load(path, distance=make_distance(distance))
    assert loaded.settings() == loss_func.settings()
    assert loaded.proxies.dtype == dtype
    assert all(value.equal(loaded.state_dict()[name]) for name, value in loss_func.state_dict().items())
    for _ in range(2):
        assert loaded(embeddings, labels).equal(loss_func(embeddings, labels))


def test_what_a_file_cannot_hold_must_be_given_as_it_was(path):
    MultiProxyEntropyLoss(3, 8, distance=make_distance("L2"), reducer=reducers.SumReducer()).save(path)
    for wrong in ({}, {"distance": make_distance("L1 squared")}):
        with pytest.raises(ValueError, match=r"distance must be the one that was saved, LpDistance .*, got "):
            MultiProxyEntropyLoss.load(path, **wrong)
    with pytest.raises(ValueError, match="reducer must be the one that was saved, SumReducer"):
        MultiProxyEntropyLoss.load(path, distance=make_distance("L2"))
    with pytest.raises(ValueError, match=re.escape("scale is in the file as 10.0, got 3: set it after loading")):
        MultiProxyEntropyLoss.load(path, scale=3)


@pytest.mark.parametrize("prepare", ["eval", "requires_grad_", "record"])
def test_how_a_module_was_used_is_no_setting_of_it(prepare, path, batch):
    """Mode, gradients and what PML records are not what was saved."""
    options = {"collect_stats": True} if prepare == "record" else {}
    reducer = reducers.AvgNonZeroReducer(**options)
    loss_func = MultiProxyEntropyLoss(3, 8, reducer=reducer, distance=make_distance("L2"), **options)
    if prepare == "record":
        loss_func(*batch).backward()
    else:
        getattr(loss_func, prepare)()
    loss_func.save(path)
    loaded = MultiProxyEntropyLoss.load(path, distance=make_distance("L2"), reducer=reducers.AvgNonZeroReducer())
    assert loaded.eval()(*batch).equal(loss_func.eval()(*batch))


def test_what_torch_keeps_in_a_module_is_not_in_the_file(path):
    """Another version of it may call that by other names."""
    MultiProxyEntropyLoss(3, 8).save(path)
    described = torch.load(path, weights_only=True)["modules"]
    assert not [name for name in vars(torch.nn.Module()) if repr(name) in str(described)]


def test_the_weights_of_regularizers_are_in_the_file(path, batch):
    made = {"weight_regularizer": regularizers.ZeroMeanRegularizer, "embedding_regularizer": regularizers.LpRegularizer}
    weights = {"weight_reg_weight": 0.01, "embedding_reg_weight": 0.2}
    loss_func = MultiProxyEntropyLoss(3, 8, **{name: make() for name, make in made.items()}, **weights)
    loss_func.save(path)
    loaded = MultiProxyEntropyLoss.load(path, **{name: make() for name, make in made.items()})
    assert {name: getattr(loaded, name) for name in weights} == weights
    assert loaded(*batch).equal(loss_func(*batch))


def test_parametrized_proxies_are_refused(path):
    loss_func = MultiProxyEntropyLoss(3, 8, proxies_per_class=2)
    parametrizations.orthogonal(loss_func, "proxies")
    with pytest.raises(ValueError, match=r"proxies must be a parameter .* got a parametrization"):
        loss_func.save(path)
    assert not path.exists()
    parametrize.remove_parametrizations(loss_func, "proxies")
    loss_func.save(path)
    assert MultiProxyEntropyLoss.load(path).proxies.equal(loss_func.proxies)


class Scaled(reducers.MeanReducer):
    def __init__(self, values):
        super().__init__()
        self.values = values


@pytest.mark.parametrize(
    ("make", "saved", "wrong"),
    [
        (reducers.ClassWeightedReducer, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])),
        (reducers.MultipleReducers, {"loss": reducers.SumReducer()}, {"loss": reducers.MeanReducer()}),
        (reducers.MultipleReducers, {"loss": reducers.ThresholdReducer(1)}, {"loss": reducers.ThresholdReducer(2)}),
        (Scaled, (1.0, [2]), (1.0, [3])),
        (Scaled, {"a": np.arange(3)}, {"a": np.ones(3, dtype=int)}),
        (Scaled, np.float64(2), 3.0),
    ],
    ids=["tensor", "module", "setting of a module", "tuple", "array", "number of numpy"],
)
def test_what_a_module_is_made_of_must_be_as_it_was(make, saved, wrong, path):
    MultiProxyEntropyLoss(3, 8, reducer=make(saved)).save(path)
    MultiProxyEntropyLoss.load(path, reducer=make(saved))
    with pytest.raises(ValueError, match=f"reducer must be the one that was saved, {make.__name__}"):
        MultiProxyEntropyLoss.load(path, reducer=make(wrong))


class Pooling(str, Enum):
    MAX = "max"


@pytest.mark.parametrize("temperature", [np.float64(0.25), np.array(0.25), torch.tensor(0.25)], ids=repr)
def test_settings_are_plain(temperature, path):
    """A schedule sets them to whatever it computes with; with those, a state dict would not load any more."""
    loss_func = MultiProxyEntropyLoss(3, 8, 4, pooling=Pooling.MAX, scale=np.float32(20))
    loss_func.temperature = temperature
    assert {type(value) for value in loss_func.settings().values()} <= {int, float, str, type(None)}
    loss_func.save(path)
    assert MultiProxyEntropyLoss.load(path).settings() == loss_func.settings()
    file = io.BytesIO()
    torch.save(loss_func.state_dict(), file)
    file.seek(0)
    other = MultiProxyEntropyLoss(3, 8, 4, pooling="max", scale=20)
    with pytest.warns(UserWarning, match=re.escape("other settings: temperature was 0.25 and is 0.1")):
        other.load_state_dict(torch.load(file, weights_only=True))


def test_other_files_are_refused(path):
    torch.save(MultiProxyEntropyLoss(3, 8).state_dict(), path)
    with pytest.raises(ValueError, match=r"path must name a file that MultiProxyEntropyLoss\.save wrote"):
        MultiProxyEntropyLoss.load(path)
    torch.save({"format": 99}, path)
    with pytest.raises(ValueError, match="of format 99"):
        MultiProxyEntropyLoss.load(path)
    path.write_bytes(pickle.dumps(print, protocol=2))
    with pytest.raises(pickle.UnpicklingError):
        MultiProxyEntropyLoss.load(path)


@pytest.mark.parametrize("wrong", [3, None, torch.ones(2)], ids=str)
def test_what_is_no_path_is_refused(wrong):
    message = re.escape(f"path must be a str or a pathlib.Path, got {type(wrong).__name__}")
    with pytest.raises(TypeError, match=message):
        MultiProxyEntropyLoss(3, 8).save(wrong)
    with pytest.raises(TypeError, match=message):
        MultiProxyEntropyLoss.load(wrong)


def test_a_state_of_other_settings_says_so(path):
    network = torch.nn.ModuleDict({"loss": MultiProxyEntropyLoss(3, 8, 4, scale=20, pooling="softmax")})
    torch.save(network.state_dict(), path)
    state = torch.load(path, weights_only=True)
    assert sorted(state) == ["loss.proxies", "loss.proxy_usage"]
    other = torch.nn.ModuleDict({"loss": MultiProxyEntropyLoss(3, 8, 4, pooling="softmax", classes_per_chunk=1)})
    with pytest.warns(UserWarning, match=re.escape("other settings: scale was 20.0 and is 10.0")) as caught:
        other.load_state_dict(state)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network.load_state_dict(state)
        other.load_state_dict(dict(state))  # one that records none, as those of before


def test_a_state_of_an_earlier_version_loads():
    """From before settings were recorded: see data/state_dict/README.md."""
    folder = Path(__file__).parent / "data" / "state_dict"
    loss_func = MultiProxyEntropyLoss(3, 4, 2, **EARLIER_SETTINGS)
    loss_func.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    expected = torch.load(folder / "expected.pt", weights_only=True)
    embeddings, labels = expected["embeddings"], expected["labels"]
    torch.testing.assert_close(loss_func.get_logits(embeddings), expected["logits"])
    torch.testing.assert_close(loss_func(embeddings, labels), expected["training_loss"])
    torch.testing.assert_close(loss_func.proxy_usage, expected["usage_after"])


def test_print_shows_the_settings():
    text = repr(MultiProxyEntropyLoss(3, 8, 4, scale=20, views=2))
    for words in ("num_classes=3", "proxies_per_class=4", "scale=20.0", "pooling='", "views=2", "CosineSimilarity"):
        assert words in text


def test_usage_group_world_is_resolved_at_first_use(batch):
    """Before there is a process group, and with none at all; copies and pickles of it work."""
    loss_func, alone = MultiProxyEntropyLoss(3, 8, 4, usage_group="world"), MultiProxyEntropyLoss(3, 8, 4)
    alone.load_state_dict(loss_func.state_dict())
    for same in (loss_func, copy.deepcopy(loss_func), pickle.loads(pickle.dumps(loss_func))):
        assert same.usage_group == "world"
    assert loss_func(*batch).equal(alone(*batch))
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert loss_func(*batch).equal(alone(*batch))
        assert copy.deepcopy(loss_func)(*batch).equal(alone(*batch))
    finally:
        torch.distributed.destroy_process_group()
