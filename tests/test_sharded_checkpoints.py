"""Checkpoints of several ranks; of one process: test_checkpoints.py."""

import inspect
import time
from pathlib import Path

import pytest
import torch
from distributed_helpers import assert_close, make_training, train
from ranks import TIMEOUT, on
from torch import distributed
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.utils import _DistWrapper
from torch.nn.parallel import DistributedDataParallel

from pml_multiproxy.distributed import load_checkpoint, save_checkpoint


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def local(tensor):
    return tensor.to_local().detach() if hasattr(tensor, "to_local") else tensor.detach()


def whole_state(model):
    return {name: whole(value) for name, value in model.state_dict().items()}


@on(4)
@pytest.mark.parametrize("num_classes", [7, 5])
def test_training_resumes_on_any_number_of_ranks(group, num_classes, tmp_path):
    model, optimizer = make_training(group, num_classes)
    train(group, model, optimizer, range(3))
    save_checkpoint(tmp_path, 3, model, optimizer, group)
    # A new wrapper sums its first gradients in another order than one that has made a step, so the run without a break
    # gets one here, too.
    model["network"] = DistributedDataParallel(model["network"].module, process_group=group)
    train(group, model, optimizer, range(3, 10))
    expected = whole_state(model)

    for size in (4, 2, 1):
        some = distributed.new_group(list(range(size)))
        if distributed.get_rank() >= size:
            continue
        for sharded in (True, False) if size == 1 else (True,):
            model, optimizer = make_training(some, num_classes, sharded)
            assert load_checkpoint(tmp_path, model, optimizer, some) == 3
            train(some, model, optimizer, range(3, 10))
            actual = whole_state(model)
            assert list(actual) == list(expected)
            for name, value in actual.items():
                if size == 4:
                    assert value.equal(expected[name]), name
                assert_close(value, expected[name], 1e-8)
            if not sharded:  # and on
                again = tmp_path / "ordinary"
                save_checkpoint(again, 10, model, optimizer, some)
                train(some, model, optimizer, range(10, 12))
                expected_end = whole_state(model)
                model, optimizer = make_training(some, num_classes)
                assert load_checkpoint(again, model, optimizer, some) == 10
                train(some, model, optimizer, range(10, 12))
                assert_close(whole_state(model), expected_end, 1e-8)


OPTIMIZERS = {
    "SGD": {},
    "SGD with momentum": {"momentum": 0.9},
    "AdamW": {},
    "Adagrad": {},  # has a state from the start
    "NAdam": {},  # has a number in float32 beside parameters in float64
    "Adafactor": {},  # has states of other shapes, and is not the same for a DTensor and a tensor
}


@on(4)
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_as_without_a_break(group, name, before, tmp_path):
    def make(some, sharded=True):
        model, _ = make_training(some, 7, sharded)
        return model, getattr(torch.optim, name.split()[0])(model.parameters(), lr=0.01, **OPTIMIZERS[name])

    def state_of(model, optimizer):
        state = {f"{i} {key}": value for i, s in optimizer.state_dict()["state"].items() for key, value in s.items()}
        return {name: whole(value) for name, value in {**model.state_dict(), **state}.items()}

    model, optimizer = make(group)
    train(group, model, optimizer, range(before))
    expected = state_of(model, optimizer)
    save_checkpoint(tmp_path, before, model, optimizer, group)
    assert_close(state_of(model, optimizer), expected, 0)
    train(group, model, optimizer, range(before, 4))
    expected_end = state_of(model, optimizer)
    for size in (4, 1):
        some = distributed.new_group(list(range(size)))
        if distributed.get_rank() >= size:
            continue
        model, optimizer = make(some, sharded=size > 1)
        train(some, model, optimizer, range(1))  # which is to leave no trace
        assert load_checkpoint(tmp_path, model, optimizer, some) == before
        assert_close(state_of(model, optimizer), expected, 0)
        train(some, model, optimizer, range(before, 4))
        if size > 1 or name != "Adafactor":
            assert_close(state_of(model, optimizer), expected_end, 1e-10)


@on(4)
def test_checkpoint_that_is_not_whole_is_never_taken(group, tmp_path):
    model, optimizer = make_training(group)
    assert load_checkpoint(tmp_path, model, optimizer, group) is None
    train(group, model, optimizer, range(2))
    save_checkpoint(tmp_path, 2, model, optimizer, group)
    expected = whole_state(model)
    train(group, model, optimizer, range(2, 3))
    with (
        failing(group, 1, FileSystemWriter, "write_data"),
        error_at_once(group, r"(?s)000003 could not be written.*rank 1.*No space left on device"),
    ):
        save_checkpoint(tmp_path, 3, model, optimizer, group)
    model, optimizer = make_training(group)
    assert load_checkpoint(tmp_path, model, optimizer, group) == 2
    assert_close(whole_state(model), expected, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000002"]
    save_checkpoint(tmp_path, 3, model, optimizer, group)
    assert load_checkpoint(tmp_path, model, optimizer, group) == 3
    with pytest.raises(FileExistsError, match="step-000000003 is there already"):
        save_checkpoint(tmp_path, 3, model, optimizer, group)


# Errors: of one rank, on all


class failing:  # noqa: N801
    """On one rank, a method fails as with a full disk."""

    def __init__(self, group, rank, owner, name):
        self.patch, self.here = pytest.MonkeyPatch(), group.rank() == rank
        self.owner, self.name = owner, name

    def __enter__(self):
        def fail(*_, **__):
            raise OSError("No space left on device")

        if self.here:
            self.patch.setattr(self.owner, self.name, fail)

    def __exit__(self, *_):
        self.patch.undo()


class error_at_once:  # noqa: N801
    """Long before the timeout, on every rank."""

    def __init__(self, group, message, error=RuntimeError):
        self.group, self.expected = group, pytest.raises(error, match=message)

    def __enter__(self):
        distributed.barrier(self.group)
        self.start = time.monotonic()
        self.expected.__enter__()

    def __exit__(self, *error):
        expected = self.expected.__exit__(*error)
        assert time.monotonic() - self.start < TIMEOUT.total_seconds() / 2
        distributed.barrier(self.group)
        return expected


@on(2)
@pytest.mark.parametrize("name", ["mkdir", "rename"])
def test_first_rank_that_cannot_write(group, name, tmp_path):
    model, optimizer = make_training(group)
    with failing(group, 0, Path, name), error_at_once(group, "could not be written: on rank 0, OSError: No space left"):
        save_checkpoint(tmp_path, 1, model, optimizer, group)
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(tmp_path, 1, model, optimizer, group)
    assert load_checkpoint(tmp_path, model, optimizer, group) == 1


@on(2)
def test_step_that_cannot_be(group, tmp_path):
    model, optimizer = make_training(group)
    for steps, error, message in (
        ((-1, -1), ValueError, "^step must be an int of at least 0, got -1$"),
        ((3, -1), ValueError, "^step must be an int of at least 0, got -1$"),
        ((3.5, 3), TypeError, "^step must be an int of at least 0, got 3.5 of type float$"),
        ((3, 4), ValueError, r"^step must be the same on all ranks, got \[3, 4\], from rank 0 on$"),
    ):
        with error_at_once(group, message, error):
            save_checkpoint(tmp_path, steps[group.rank()], model, optimizer, group)
    assert list(tmp_path.iterdir()) == []


def saved(group, folder):
    """A checkpoint, and other contents for what it is loaded into, as a copy."""
    model, optimizer = make_training(group)
    train(group, model, optimizer, range(2))
    folder = save_checkpoint(folder, 2, model, optimizer, group)
    model, optimizer = make_training(group)
    train(group, model, optimizer, range(1))
    return folder, model, optimizer, local_state(model, optimizer)


def local_state(model, optimizer):
    states = [model.state_dict(), *optimizer.state_dict()["state"].values()]
    return [{name: local(value).clone() for name, value in state.items()} for state in states]


@on(4)
@pytest.mark.parametrize("place", ["open", "optimizer", "network", "loss_func"])
@pytest.mark.parametrize("rank", [0, 2])
def test_load_that_fails_on_one_rank_loads_nothing_anywhere(group, place, rank, tmp_path):
    _, model, optimizer, expected = saved(group, tmp_path)
    owner, name = {
        "open": (FileSystemReader, "read_data"),
        "optimizer": (optimizer, "load_state_dict"),
        "network": (model["network"], "_load_from_state_dict"),
        "loss_func": (model["loss_func"], "_load_from_state_dict"),
    }[place]
    message = f"000002 could not be loaded, nothing was changed: on rank (0|{rank}), .*No space left on device"
    with failing(group, rank, owner, name), error_at_once(group, f"(?s){message}"):
        load_checkpoint(tmp_path, model, optimizer, group)
    assert_close(local_state(model, optimizer), expected, 0)
    assert load_checkpoint(tmp_path, model, optimizer, group) == 2


@on(4)
def test_flipped_bit_is_noticed_on_all_ranks(group, tmp_path):
    whole_checkpoint, model, optimizer, expected = saved(group, tmp_path)
    for path in sorted(whole_checkpoint.glob("*.distcp")):
        distributed.barrier(group)
        content = path.read_bytes()
        distributed.barrier(group)
        if group.rank() == 0:
            path.write_bytes(content[:999] + bytes([content[999] ^ 16]) + content[1000:])
        with error_at_once(group, f"nothing was changed: .* {path.name} has changed since it was saved"):
            load_checkpoint(tmp_path, model, optimizer, group)
        if group.rank() == 0:
            path.write_bytes(content)
    distributed.barrier(group)
    assert_close(local_state(model, optimizer), expected, 0)
    assert load_checkpoint(tmp_path, model, optimizer, group) == 2


@on(4)
@pytest.mark.skipif(
    "global_coordinator_rank" not in inspect.getsource(_DistWrapper),
    reason="this PyTorch, as 2.5, cannot save from a group without process 0",
)
def test_two_jobs_of_several_ranks_never_write_a_mixture(group, tmp_path):
    """Each of two ranks."""
    jobs = [distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    number = group.rank() // 2
    model, optimizer = make_training(jobs[number])
    for step in range(15):
        for parameter in model.parameters():
            torch.nn.init.constant_(local(parameter), number + 1)
        distributed.barrier(group)
        try:
            save_checkpoint(tmp_path, step, model, optimizer, jobs[number])
            won = 1
        except FileExistsError:
            won = 0
        outcomes = [None] * 4
        distributed.all_gather_object(outcomes, won, group)
        assert outcomes in ([1, 1, 0, 0], [0, 0, 1, 1])
        assert load_checkpoint(tmp_path, model, optimizer, jobs[number]) == step
        for parameter in model.parameters():
            assert (local(parameter) == 1 + outcomes.index(1) // 2).all()
