"""Settings that travel with the state: files, state dicts, print."""

import copy
import errno
import io
import os
import pickle
import re
import signal
import subprocess
import sys
import warnings
from enum import Enum
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from cases import make_distance
from pytorch_metric_learning import reducers, regularizers

from pml_multiproxy import MultiProxyEntropyLoss

SETTINGS = {"scale": 7.0, "pooling": "softmax", "temperature": 0.3, "views": 2, "classes_per_chunk": 2, "margin": 0.1}
EARLIER_SETTINGS = {
    **{"scale": 7.0, "margin": 0.1, "pooling": "logsumexp", "temperature": 0.3, "usage_momentum": 0.8},
    **{"intra_weight": 0.4, "inter_weight": 0.1, "balance_weight": 0.6, "classes_per_chunk": 2},
}
"""Those of data/state_dict."""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "loss.pt"


@pytest.mark.parametrize(
    ("distance", "dtype"),
    [("cosine", torch.float16), ("cosine", torch.float32), ("L1 squared", torch.float32), ("SNR", torch.float64)],
    ids=str,
)
def test_a_file_holds_all_that_matters(distance, dtype, path):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, distance=make_distance(distance), **SETTINGS).to(dtype)
    embeddings, labels = torch.randn(8, 8, requires_grad=True), torch.tensor([0, 1, 2, 0]).repeat(2)
    loss_func(embeddings, labels)  # which moves the usage
    loss_func.save(path)
    loaded = MultiProxyEntropyLoss.load(str(path), distance=make_distance(distance))
    assert loaded.settings() == loss_func.settings()
    assert loaded.proxies.dtype == dtype
    assert all(value.equal(loaded.state_dict()[name]) for name, value in loss_func.state_dict().items())
    for _ in range(2):
        assert loaded(embeddings, labels).equal(loss_func(embeddings, labels))
    assert MultiProxyEntropyLoss.load(path, "meta", distance=make_distance(distance)).proxies.is_meta


@pytest.mark.parametrize("changed", [False, True])
def test_a_file_holds_how_the_loss_is_used(changed, path):
    loss_func = MultiProxyEntropyLoss(3, 8, collect_stats=changed)
    loss_func.train(not changed).proxies.requires_grad_(not changed)
    loss_func.save(path)
    loaded = MultiProxyEntropyLoss.load(path)
    assert loaded.training == (not changed)
    assert loaded.proxies.requires_grad == (not changed)
    assert loaded.collect_stats == changed


REDUCERS = {
    "DivisorReducer": reducers.DivisorReducer,
    "ClassWeightedReducer": lambda: reducers.ClassWeightedReducer(torch.tensor([1, 2, 3], dtype=torch.float64)),
    "ThresholdReducer": lambda: reducers.ThresholdReducer(low=1, collect_stats=True),
    "MultipleReducers": lambda: reducers.MultipleReducers({"loss": reducers.SumReducer()}),
}


@pytest.mark.parametrize("name", REDUCERS)
def test_a_used_reducer_may_be_given_again_or_made_anew(name, path, batch):
    reducer = REDUCERS[name]()
    loss_func = MultiProxyEntropyLoss(3, 8, reducer=reducer)
    loss_func(*batch).backward()
    loss_func.save(path)
    for same in (reducer, REDUCERS[name](), copy.deepcopy(loss_func.reducer)):
        loaded = MultiProxyEntropyLoss.load(path, reducer=same)
        assert loaded.eval()(*batch).equal(loss_func.eval()(*batch))


def test_what_a_file_cannot_hold_must_be_given_again(path, batch):
    made = {"distance": lambda: make_distance("L2"), "reducer": reducers.SumReducer}
    made |= {"weight_regularizer": regularizers.ZeroMeanRegularizer}
    made |= {"embedding_regularizer": regularizers.LpRegularizer}
    weights = {"weight_reg_weight": 0.01, "embedding_reg_weight": 0.2}
    loss_func = MultiProxyEntropyLoss(3, 8, **{name: make() for name, make in made.items()}, **weights)
    loss_func.save(path)
    loaded = MultiProxyEntropyLoss.load(path, **{name: make() for name, make in made.items()})
    assert {name: getattr(loaded, name) for name in weights} == weights
    assert loaded(*batch).equal(loss_func(*batch))
    with pytest.raises(TypeError, match="multiple values for keyword argument 'scale'"):
        MultiProxyEntropyLoss.load(path, scale=3)


REGULARIZED = {"embedding_regularizer": regularizers.LpRegularizer()}


@pytest.mark.parametrize(
    ("name", "saved", "wrong", "others"),
    [
        ("distance", make_distance("L2"), make_distance("SNR"), {}),
        ("reducer", reducers.SumReducer(), reducers.DivisorReducer(), {}),
        ("reducer", reducers.SumReducer(), reducers.DivisorReducer(), REGULARIZED),
        ("weight_regularizer", regularizers.LpRegularizer(), regularizers.RegularFaceRegularizer(), {}),
        ("embedding_regularizer", regularizers.LpRegularizer(), regularizers.ZeroMeanRegularizer(), {}),
    ],
)
def test_what_is_forgotten_or_of_another_class_is_refused(name, saved, wrong, others, path):
    MultiProxyEntropyLoss(3, 8, **{name: saved}, **others).save(path)
    MultiProxyEntropyLoss.load(path, **{name: saved}, **others)
    for arguments in ({}, {name: wrong}):
        with pytest.raises(ValueError, match="must be of the class that was saved"):
            MultiProxyEntropyLoss.load(path, **arguments, **others)


class Pooling(str, Enum):
    MAX = "max"


@pytest.mark.parametrize("temperature", [np.float64(0.25), np.float32(0.25)], ids=repr)
def test_settings_are_plain(temperature, path):
    """A schedule sets them to numbers of NumPy or torch; with those, a state dict would not load any more."""
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


FOREIGN = {
    "empty": lambda whole: b"",
    "half": lambda whole: whole[: len(whole) // 2],
    "text": lambda whole: b"not a file of torch",
    "code": lambda whole: pickle.dumps(print, protocol=2),
    "state dict": lambda whole: saved_bytes(MultiProxyEntropyLoss(3, 8).state_dict()),
    "another format": lambda whole: saved_bytes({"format": 99}),
    "list": lambda whole: saved_bytes([1]),
}


def saved_bytes(contents):
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_files_are_refused(kind, path):
    MultiProxyEntropyLoss(3, 8).save(path)
    path.write_bytes(FOREIGN[kind](path.read_bytes()))
    with pytest.raises(ValueError, match=r"path must name a (whole file of|file of format 2)"):
        MultiProxyEntropyLoss.load(path)
    with pytest.raises(FileNotFoundError):
        MultiProxyEntropyLoss.load(path.with_name("missing.pt"))


OVERWRITE = """
import os, signal, sys
from pml_multiproxy import MultiProxyEntropyLoss
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
MultiProxyEntropyLoss(3, 8, scale=20).save(sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_process_leaves_the_old_file(path):
    MultiProxyEntropyLoss(3, 8, scale=5).save(path)
    before = path.read_bytes()
    assert subprocess.run([sys.executable, "-c", OVERWRITE, str(path)]).returncode == -signal.SIGKILL
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_old_file_and_no_other(path):
    loss_func = MultiProxyEntropyLoss(3, 8, scale=5)
    loss_func.save(path)
    for module, name in ((torch, "save"), (os, "fsync"), (os, "replace")):
        full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        with mock.patch.object(module, name, full), pytest.raises(OSError, match="No space left"):
            MultiProxyEntropyLoss(3, 8, scale=20).save(path)
        assert [file.name for file in path.parent.iterdir()] == ["loss.pt"]
        assert MultiProxyEntropyLoss.load(path).scale == 5
    MultiProxyEntropyLoss(3, 8, scale=20).save(path)
    assert [file.name for file in path.parent.iterdir()] == ["loss.pt"]
    assert MultiProxyEntropyLoss.load(path).scale == 20


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


def test_usage_group_world_is_resolved_at_first_use(batch):
    """Before there is a process group, and with none at all; copies and pickles of it work."""
    loss_func, alone = MultiProxyEntropyLoss(3, 8, 4, usage_group="world"), MultiProxyEntropyLoss(3, 8, 4)
    alone.load_state_dict(loss_func.state_dict())
    for same in (loss_func, copy.deepcopy(loss_func), pickle.loads(pickle.dumps(loss_func))):
        assert same.usage_group == "world"
    assert loss_func(*batch).equal(alone(*batch))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert loss_func(*batch).equal(alone(*batch))
        assert copy.deepcopy(loss_func)(*batch).equal(alone(*batch))
        loss_func.usage_group = torch.distributed.group.WORLD
        with pytest.raises(TypeError, match="ProcessGroup"):
            copy.deepcopy(loss_func)
    finally:
        torch.distributed.destroy_process_group()
