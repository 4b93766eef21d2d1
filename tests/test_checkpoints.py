"""save_checkpoint and load_checkpoint in one process; several ranks: test_sharded_checkpoints.py."""

import copy
import os
import pickle
import shutil
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.distributed import load_checkpoint, save_checkpoint

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "Adam, foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "Adam, lr as tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), foreach=False),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


def make_module():
    return torch.nn.ModuleDict({"network": torch.nn.Linear(5, 6), "loss_func": MultiProxyEntropyLoss(3, 6, 2)})


def make_training(name="AdamW"):
    module = make_module()
    return module, OPTIMIZERS[name](module.parameters())


def train(module, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(9, 5, generator=generator)

        def closure(inputs=inputs):
            optimizer.zero_grad()
            loss = module["loss_func"](module["network"](inputs), torch.arange(9) % 3)
            loss.backward()
            return loss

        optimizer.step(closure)


def everything(module, optimizer):
    """A copy of all that training depends on."""
    gradients = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    return copy.deepcopy(
        (module.state_dict(), optimizer.state_dict(), gradients, torch.get_rng_state(), dict(optimizer.defaults))
    )


def assert_equal(actual, expected):
    """To the last bit, with types and devices."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        actual, expected = [actual[key] for key in expected], list(expected.values())
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype
        assert actual.device == expected.device
        assert torch.equal(actual, expected)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_equal(a, e)
    else:
        assert actual == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 3])
def test_saving_changes_nothing(name, before, tmp_path):
    module, optimizer = make_training(name)
    train(module, optimizer, range(before))
    expected = everything(module, optimizer)
    groups, grads = optimizer.param_groups, [p.grad for p in module.parameters()]
    save_checkpoint(tmp_path, before, module, optimizer)
    assert_equal(everything(module, optimizer), expected)
    assert optimizer.param_groups is groups
    assert all(p.grad is grad for p, grad in zip(module.parameters(), grads, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("used", [False, True])
def test_training_goes_on_as_without_a_break(name, before, used, tmp_path):
    module, optimizer = make_training(name)
    train(module, optimizer, range(before))
    save_checkpoint(tmp_path, before, module, optimizer)
    expected = everything(module, optimizer)[:2]
    train(module, optimizer, range(before, before + 3))
    expected_end = everything(module, optimizer)[:2]

    module, optimizer = make_training(name)
    if used:
        train(module, optimizer, range(7, 9))
    assert load_checkpoint(tmp_path, module, optimizer) == before
    assert_equal(everything(module, optimizer)[:2], expected)
    train(module, optimizer, range(before, before + 3))
    assert_equal(everything(module, optimizer)[:2], expected_end)


def test_parameters_without_a_state_have_none_afterwards(tmp_path):
    """Those that never had a gradient."""
    module, optimizer = make_training("Adam")
    module["network"].requires_grad_(False)
    train(module, optimizer, range(2))
    module["network"].requires_grad_()
    save_checkpoint(tmp_path, 2, module, optimizer)
    expected = everything(module, optimizer)[1]
    module, optimizer = make_training("Adam")
    train(module, optimizer, range(2))
    load_checkpoint(tmp_path, module, optimizer)
    assert_equal(optimizer.state_dict(), expected)


@pytest.mark.parametrize("name", ["NAdam", "ASGD"])
def test_states_keep_their_dtype_beside_parameters_of_another(name, tmp_path):
    module, optimizer = make_training(name)
    module.bfloat16()
    optimizer.zero_grad()
    sum(p.sum() for p in module.parameters()).backward()
    optimizer.step()
    save_checkpoint(tmp_path, 1, module, optimizer)
    expected = everything(module, optimizer)[1]
    assert len({v.dtype for state in expected["state"].values() for v in state.values()}) == 2
    for dtype in (torch.bfloat16, torch.float32):
        module, optimizer = make_training(name)
        module.to(dtype)
        load_checkpoint(tmp_path, module, optimizer)
        if dtype == torch.bfloat16:
            assert_equal(optimizer.state_dict(), expected)
        else:  # as load_state_dict does
            dtypes = {v.dtype for state in optimizer.state_dict()["state"].values() for v in state.values()}
            assert dtypes == {torch.float32}


def test_settings_are_those_that_were_saved(tmp_path):
    module = make_module()
    groups = [
        {"params": module["network"].parameters(), "lr": np.float64(0.3)},
        {"params": module["loss_func"].proxies},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.5, 0.6), weight_decay=0.7)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    schedule.step()
    save_checkpoint(tmp_path, 0, module, optimizer)
    module = make_module()
    groups = [{"params": module["network"].parameters()}, {"params": module["loss_func"].proxies}]
    resumed = torch.optim.AdamW(groups)
    load_checkpoint(tmp_path, module, resumed)
    assert_equal(resumed.state_dict()["param_groups"], optimizer.state_dict()["param_groups"])


def test_other_settings_of_a_loss_are_noticed(tmp_path):
    module, optimizer = make_training()
    save_checkpoint(tmp_path, 0, module, optimizer)
    module["loss_func"].classes_per_chunk = 2
    assert load_checkpoint(tmp_path, module, optimizer) == 0
    module["loss_func"].scale = 20.0
    for other in (module, torch.compile(module, backend="eager")):  # which puts a wrapper's name before the loss's
        with pytest.warns(UserWarning, match=r"other settings: scale was 10\.0 and is 20\.0$"):
            load_checkpoint(tmp_path, other, optimizer)


@pytest.mark.parametrize("step", [-1, -(10**12)])
def test_negative_step(step, tmp_path):
    with pytest.raises(ValueError, match=f"^step must be an int of at least 0, got {step}$"):
        save_checkpoint(tmp_path / "new", step, *make_training())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("step", [1.0, "1", None, True])
def test_step_of_another_type(step, tmp_path):
    with pytest.raises(TypeError, match=f"^step must be an int of at least 0, got {step!r} of type"):
        save_checkpoint(tmp_path, step, *make_training())


def test_optimizer_of_another_module(tmp_path):
    _, optimizer = make_training()
    with pytest.raises(RuntimeError, match="optimizer must hold parameters of module only, got others, of shape"):
        save_checkpoint(tmp_path, 0, make_module(), optimizer)
    assert list(tmp_path.iterdir()) == []


def test_state_that_would_come_back_changed_is_refused(tmp_path):
    module, optimizer = make_training()
    optimizer.state[module["loss_func"].proxies] = {"blocks": {0: torch.zeros(2)}}
    with pytest.raises(RuntimeError, match="must have strings as keys, got 0"):
        save_checkpoint(tmp_path, 0, module, optimizer)


# Two jobs


def write(folder, barrier, value, outcomes):
    module = torch.nn.Linear(50, 50)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(STEPS):
        torch.nn.init.constant_(module.weight, value)
        torch.nn.init.constant_(module.bias, value)
        barrier.wait()
        try:
            save_checkpoint(folder, step, module, optimizer)
            outcomes.put((step, value, None))
        except FileExistsError as error:
            outcomes.put((step, value, str(error)))


STEPS = 40


def test_two_jobs_never_write_a_mixture(tmp_path):
    context = get_context("forkserver")
    context.set_forkserver_preload(["pml_multiproxy.distributed"])
    barrier, outcomes = context.Barrier(2, timeout=60), context.Queue()
    jobs = [context.Process(target=write, args=(tmp_path, barrier, value, outcomes)) for value in (1.0, 2.0)]
    for job in jobs:
        job.start()
    results = sorted((outcomes.get(timeout=60) for _ in range(2 * STEPS)), key=lambda result: result[:2])
    for job in jobs:
        job.join(60)
    module = torch.nn.Linear(50, 50)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step, (first, second) in enumerate(pairs(results)):
        errors = [error for *_, error in (first, second) if error]
        assert len(errors) == 1, (first, second)
        assert "is there already" in errors[0] or "has been written by another job meanwhile" in errors[0]
        (winner,) = (value for _, value, error in (first, second) if error is None)
        (tmp_path / "only").mkdir()
        shutil.move(tmp_path / f"step-{step:09d}", tmp_path / "only")
        assert load_checkpoint(tmp_path / "only", module, optimizer) == step
        shutil.rmtree(tmp_path / "only")
        assert (module.weight == winner).all()
        assert (module.bias == winner).all()
    assert list(tmp_path.iterdir()) == []  # the job that lost has removed what it wrote


def pairs(results):
    return zip(results[::2], results[1::2], strict=True)


def test_job_that_is_slower_fails(tmp_path, monkeypatch):
    module, optimizer = make_training()
    rename = Path.rename

    def late(self, target):
        monkeypatch.undo()
        save_checkpoint(tmp_path, 4, module, optimizer)
        torch.nn.init.zeros_(module["network"].weight)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(FileExistsError, match="step-000000004 has been written by another job meanwhile"):
        save_checkpoint(tmp_path, 4, module, optimizer)
    assert load_checkpoint(tmp_path, module, optimizer) == 4
    assert module["network"].weight.any()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000004"]


def test_partial_folder_of_another_job_is_left_alone(tmp_path):
    others = [tmp_path / name for name in ("step-000000004.partial", "step-000000004.partial-0123", "step-5.partial-4")]
    for other in others:
        other.mkdir()
        (other / ".metadata").write_text("being written")
    module, optimizer = make_training()
    assert load_checkpoint(tmp_path, module, optimizer) is None
    save_checkpoint(tmp_path, 4, module, optimizer)
    assert load_checkpoint(tmp_path, module, optimizer) == 4
    assert all(other.exists() for other in others)


# All or nothing


def test_every_flipped_bit_is_noticed(tmp_path):
    module, optimizer = make_training()
    train(module, optimizer, range(2))
    whole = save_checkpoint(tmp_path, 2, module, optimizer)
    module, optimizer = make_training()
    train(module, optimizer, range(1))
    expected = everything(module, optimizer)
    files = [path for path in whole.iterdir() if path.name != "checksums.json"]
    assert len(files) == 3
    generator = np.random.default_rng(0)
    for path in files:
        content = path.read_bytes()
        for position in generator.integers(len(content), size=40):
            changed = bytearray(content)
            changed[position] ^= 1 << generator.integers(8)
            path.write_bytes(changed)
            with pytest.raises(RuntimeError, match=f"nothing was changed.*{path.name} has changed since it was saved"):
                load_checkpoint(tmp_path, module, optimizer)
        path.write_bytes(content)
    assert_equal(everything(module, optimizer), expected)
    assert load_checkpoint(tmp_path, module, optimizer) == 2


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "settings.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_damaged_files(name, damage, tmp_path):
    module, optimizer = make_training()
    whole = save_checkpoint(tmp_path, 2, module, optimizer)
    if damage == "cut off":
        os.truncate(whole / name, (whole / name).stat().st_size // 2)
    elif name in ("__0_0.distcp", "settings.json"):
        (whole / name).unlink()
    else:
        return  # then it is no checkpoint, or one without checksums
    expected = everything(module, optimizer)
    with pytest.raises(RuntimeError, match="step-000000002 could not be loaded, nothing was changed: on rank 0"):
        load_checkpoint(tmp_path, module, optimizer)
    assert_equal(everything(module, optimizer), expected)


def without_bias():
    return torch.nn.ModuleDict({**make_module(), "network": torch.nn.Linear(5, 6, bias=False)})


def with_more():
    return torch.nn.ModuleDict({**make_module(), "more": torch.nn.Linear(1, 1)})


def wider():
    return torch.nn.ModuleDict({**make_module(), "network": torch.nn.Linear(4, 6)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (without_bias, r"the module lacks \['network.bias'\] of the checkpoint"),
        (with_more, r"the checkpoint lacks \['more.bias', 'more.weight'\] of the module"),
        (wider, r"network.weight has shape \(6, 5\) in the checkpoint, \(6, 4\) here"),
    ],
)
def test_module_that_does_not_fit(make, message, tmp_path):
    module, optimizer = make_training()
    train(module, optimizer, range(2))
    save_checkpoint(tmp_path, 2, module, optimizer)
    module = make()
    optimizer = torch.optim.AdamW(module.parameters())
    expected = everything(module, optimizer)
    with pytest.raises(RuntimeError, match=f"(?s)nothing was changed.*{message}"):
        load_checkpoint(tmp_path, module, optimizer)
    assert_equal(everything(module, optimizer), expected)


def test_optimizer_that_does_not_fit(tmp_path):
    module, optimizer = make_training()
    train(module, optimizer, range(2))
    save_checkpoint(tmp_path, 2, module, optimizer)
    for groups in (
        [{"params": module["network"].parameters()}, {"params": module["loss_func"].parameters()}],
        list(module["network"].parameters()),
    ):
        other = torch.optim.AdamW(groups)
        expected = everything(module, other)
        with pytest.raises(RuntimeError, match=r"(?s)nothing was changed.*the optimizer (must have|lacks) the param"):
            load_checkpoint(tmp_path, module, other)
        assert_equal(everything(module, other), expected)


class Picky(torch.nn.Linear):
    """Fails after everything before it has been loaded."""

    def get_extra_state(self):
        return {"name": self.name, "none": {}}

    def set_extra_state(self, state):
        if state["name"] != self.expects:
            raise KeyError("not this one")
        self.name = state["name"]


def make_picky(name, expects):
    module = torch.nn.ModuleDict(
        {"network": torch.nn.Linear(5, 6), "picky": Picky(2, 2), "last": torch.nn.Linear(1, 1)}
    )
    module["picky"].name, module["picky"].expects = name, expects
    return module, torch.optim.SGD(module.parameters(), momentum=0.9)


def test_module_that_fails_half_way(tmp_path):
    module, optimizer = make_picky("a", "a")
    sum(p.sum() for p in module.parameters()).backward()
    optimizer.step()
    save_checkpoint(tmp_path, 2, module, optimizer)
    module, optimizer = make_picky("b", "b")
    expected = everything(module, optimizer)
    with pytest.raises(RuntimeError, match=r"nothing was changed.*not this one"):
        load_checkpoint(tmp_path, module, optimizer)
    assert_equal(everything(module, optimizer), expected)
    module["picky"].expects = "a"
    assert load_checkpoint(tmp_path, module, optimizer) == 2
    assert module["picky"].name == "a"


def test_failing_disk(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="step-000000001 could not be written: on rank 0, NotADirectoryError"):
        save_checkpoint(tmp_path / "file", 1, *make_training())


# Reading


def test_checkpoint_of_an_earlier_version():
    """And without checksums: see data/checkpoint/README.md."""
    folder = Path(__file__).parent / "data" / "checkpoint"
    module = torch.nn.ModuleDict({"network": torch.nn.Linear(3, 4), "loss_func": MultiProxyEntropyLoss(3, 4, 2)})
    groups = [{"params": part.parameters()} for part in module.values()]
    optimizer = torch.optim.AdamW(groups)
    assert load_checkpoint(folder, module, optimizer) == 3
    expected = torch.load(folder / "expected.pt", weights_only=True)
    assert_equal(dict(module.state_dict()), expected["module"])
    assert_equal(optimizer.state_dict()["state"], expected["optimizer"])
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.02]
    assert optimizer.param_groups[1]["betas"] == (0.8, 0.9)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def call_of(module, name, argument):
    """A pickle that calls ``module.name(argument)``, where ``name`` may go through attributes."""
    words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
    return b"\x80\x04" + words + b"\x93\x8c" + bytes([len(argument)]) + argument.encode() + b"\x85R."


def test_metadata_of_a_stranger_execute_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, optimizer = make_training()
    whole = save_checkpoint(tmp_path, 2, module, optimizer)
    (whole / "checksums.json").unlink()
    for content in (
        pickle.dumps(Malicious("malicious")),
        pickle.dumps({"state_dict_metadata": Malicious("malicious")}),
        call_of("os", "mkdir", "malicious"),
        call_of("torch.distributed.checkpoint.metadata", "os.mkdir", "malicious"),
        call_of("torch.distributed.checkpoint.filesystem", "FileSystemWriter", "malicious"),
        call_of("torch.distributed.checkpoint.filesystem", "os.mkdir", "malicious"),
        call_of("torch", "load", "malicious"),
        call_of("pathlib", "Path.mkdir", "malicious"),
    ):
        (whole / ".metadata").write_bytes(content)
        with pytest.raises(RuntimeError, match=r"UnpicklingError: .* does not belong into the metadata of a checkp"):
            load_checkpoint(tmp_path, module, optimizer)
    assert not Path("malicious").exists()
    pickle.loads(pickle.dumps(Malicious("malicious")))
    assert Path("malicious").exists()  # so that this test can fail
    (whole / ".metadata").write_bytes(pickle.dumps({}))
    with pytest.raises(RuntimeError, match="no metadata of a checkpoint, got dict"):
        load_checkpoint(tmp_path, module, optimizer)


def test_objects_of_a_stranger_execute_nothing(tmp_path):
    module, optimizer = make_training()
    optimizer.param_groups[0]["note"] = Malicious(tmp_path / "malicious")
    save_checkpoint(tmp_path, 2, module, optimizer)
    del optimizer.param_groups[0]["note"]
    expected = everything(module, optimizer)
    with pytest.raises(RuntimeError, match=r"(?s)nothing was changed.*Weights only load failed"):
        load_checkpoint(tmp_path, module, optimizer)
    assert not (tmp_path / "malicious").exists()
    assert_equal(everything(module, optimizer), expected)


class Note:
    pass


def test_objects_of_other_classes_can_be_allowed(tmp_path):
    module, optimizer = make_training()
    optimizer.param_groups[0]["note"] = Note()
    save_checkpoint(tmp_path, 2, module, optimizer)
    with pytest.raises(RuntimeError, match="add_safe_globals"):
        load_checkpoint(tmp_path, module, optimizer)
    with torch.serialization.safe_globals([Note]):
        load_checkpoint(tmp_path, module, optimizer)
    assert type(optimizer.param_groups[0]["note"]) is Note
