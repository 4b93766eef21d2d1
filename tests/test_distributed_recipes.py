"""What docs/training.md and examples/train_sharded.py tell users to do."""

import re
import sys
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from distributed_helpers import Model, assert_close, batches, local, make_training, pair_of_losses, train
from forked import EXAMPLES, calls_of_main, run_forked
from ranks import on
from torch import distributed
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(EXAMPLES))

from train_sharded import complete, load, save


def whole_state(model, optimizer):
    """Parameters, buffers and moments by name, of all ranks together."""
    state, of_optimizer = get_state_dict(model, optimizer)
    for name, moments in of_optimizer["state"].items():
        state |= {f"{name}: {kind}": value for kind, value in moments.items()}
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone() for name, value in state.items()
    }


@on(4)
@pytest.mark.parametrize("num_classes", [7, 2])
def test_training_resumes_on_any_number_of_ranks(group, num_classes, tmp_path):
    """Saved on two ranks; with two classes, the third of three ranks holds none."""
    states = []
    for size, sharded in ((2, True), (2, True), (3, True), (1, True), (1, False)):
        ranks = distributed.new_group(list(range(size)))
        if distributed.get_rank() < size:
            model, optimizer = make_training(ranks, num_classes, sharded)
            if complete(tmp_path):
                load(tmp_path / "saved", model, optimizer, ranks)
            else:
                train(ranks, model, optimizer, range(3))
                save(tmp_path / "saved", model, optimizer, ranks)
            before = whole_state(model, optimizer)
            train(ranks, model, optimizer, range(3, 8))
            states.append([before, whole_state(model, optimizer)])
        distributed.barrier(group)
    if distributed.get_rank() == 0:
        (saved, expected), (loaded, resumed), *others = states
        assert len(saved) == 4 + 3 * 3  # parameters and usage; of each parameter, two moments and the number of steps
        for name, value in saved.items():
            assert loaded[name].equal(value), name
            assert resumed[name].equal(expected[name]), name
            assert name == "loss_func.proxy_usage" or not expected[name].equal(value)
            for of_loaded, of_resumed in others:
                assert of_loaded[name].equal(value), name
                assert_close(of_resumed[name], expected[name], 1e-8)


@on(2)
def test_buffers_are_saved_from_the_first_rank(group, tmp_path):
    model = torch.nn.Sequential(*(torch.nn.BatchNorm1d(8) for _ in range(3)))
    optimizer = torch.optim.SGD(model.parameters())
    for buffer in model.buffers():
        buffer.fill_(1 + distributed.get_rank())
    save(tmp_path, model, optimizer, group)
    for buffer in model.buffers():
        buffer.fill_(0)
    load(tmp_path, model, optimizer, group)
    assert [buffer.unique().item() for buffer in model.buffers()] == [1] * 9


@on(2)
def test_failed_save_is_an_error_on_every_rank_and_not_complete(group, tmp_path):
    model, optimizer = make_training(group)
    train(group, model, optimizer, range(1))
    save(tmp_path / "step-1", model, optimizer, group)
    fails = mock.patch.object(FileSystemWriter, "write_data", side_effect=OSError("disk full"))
    with fails if distributed.get_rank(group) else nullcontext(), pytest.raises(CheckpointException, match="disk full"):
        save(tmp_path / "step-2", model, optimizer, group)
    assert not issubclass(CheckpointException, Exception)  # as the page says
    assert complete(tmp_path) == [tmp_path / "step-1"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-1", "step-2"]


@on(2)
def test_other_shapes_are_refused(group, tmp_path):
    model, optimizer = make_training(group)
    save(tmp_path, model, optimizer, group)
    with pytest.raises(CheckpointException, match="Size mismatch"):
        load(tmp_path, *make_training(group, num_classes=8), group)


@on(2)
def test_optimizer_without_state_is_saved_as_after_a_step(group, tmp_path):
    """By PyTorch, as the page says."""
    model, optimizer = make_training(group)
    save(tmp_path, model, optimizer, group)
    assert {state["step"].item() for state in optimizer.state.values()} == {1}


def both_losses(group):
    """One process's loss and network, and those of this rank, each in one module; their losses of the same batch."""
    rank = distributed.get_rank(group)
    one, sharded = (Model(loss_func).double() for loss_func in pair_of_losses(group))
    sharded.network.load_state_dict(one.network.state_dict())
    parallel = DistributedDataParallel(sharded.network, process_group=group)
    ((inputs, labels),) = batches(1, [4, 9])
    losses = [one(torch.cat(inputs), torch.cat(labels)), sharded.loss_func(parallel(inputs[rank]), labels[rank])]
    return one, sharded, losses, parallel  # which has to live until backward


@on(2)
@pytest.mark.skipif(not hasattr(torch.nn.utils, "get_total_norm"), reason="from PyTorch 2.6 on")
def test_gradients_are_clipped_by_their_common_norm(group):
    one, sharded, losses, _parallel = both_losses(group)
    for loss in losses:
        loss.backward()
    expected = torch.nn.utils.clip_grad_norm_(one.parameters(), 0.1)
    assert expected > 0.2
    parts = list(sharded.network.parameters()), list(sharded.loss_func.parameters())
    norms = [torch.nn.utils.get_total_norm([p.grad for p in part]) for part in parts]
    total = torch.stack([norms[0], norms[1].full_tensor()]).norm()
    for part in parts:
        torch.nn.utils.clip_grads_with_norm_(part, 0.1, total)
    assert_close(total, expected, 1e-10)
    assert_close(sharded.network.weight.grad, one.network.weight.grad, 1e-10)
    assert_close(sharded.loss_func.proxies.grad.full_tensor(), one.loss_func.proxies.grad, 1e-10)
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        torch.nn.utils.clip_grad_norm_(sharded.parameters(), 0.1)


@on(2)
@pytest.mark.parametrize("overflows", [False, True])
def test_one_scaler_for_two_optimizers(group, overflows):
    """An overflow on one rank: no rank moves its proxies, and every rank lowers the scale."""
    one, sharded, losses, _parallel = both_losses(group)
    before = local(sharded.loss_func.proxies).clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    losses[0].backward()
    scaler.scale(losses[1]).backward()
    if overflows and distributed.get_rank(group) == 1:
        local(sharded.loss_func.proxies.grad)[0] = torch.inf
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (one, sharded.network, sharded.loss_func)]
    optimizers[0].step()
    for optimizer in optimizers[1:]:
        scaler.step(optimizer)
    scaler.update()
    if overflows:
        assert scaler.get_scale() == 32
        assert local(sharded.loss_func.proxies).equal(before)
    else:
        assert scaler.get_scale() == 64
        assert_close(sharded.loss_func.proxies.full_tensor(), one.loss_func.proxies, 1e-8)
        assert_close(sharded.network.weight, one.network.weight, 1e-8)
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        scaler.unscale_(torch.optim.SGD(sharded.parameters()))


@pytest.mark.slow
def test_example_resumes_exactly(tmp_path):
    arguments = [["--epochs", 2], *(["--epochs", n, "--checkpoints", tmp_path / "saved"] for n in (1, 2))]
    imports, calls = calls_of_main("train_sharded", *arguments)
    printed = run_forked(tmp_path / "script.py", imports, *((2, call) for call in calls))
    whole, first, resumed = re.findall(r"MAP@R (\S+), proxies (\S+)\n", printed)
    assert resumed == whole != first
    assert 45 < float(whole[0]) < 100
