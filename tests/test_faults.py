"""A rank that dies or hangs ends the others with an error, and what was saved before is still there."""

import os
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest
from distributed_helpers import make_training, train
from ranks import Pool
from torch import distributed
from torch.distributed.checkpoint import FileSystemWriter

from pml_multiproxy.distributed import load_checkpoint, save_checkpoint

TIMEOUT = timedelta(seconds=3)
"""Of the training, once it runs; starting it may take longer on a busy machine."""


@pytest.fixture
def two():
    """Two ranks that nothing else needs."""
    pool = Pool(2)
    yield pool
    pool.close()


def trained(group):
    """Module and optimizer after two steps, and their group, which does not wait for long."""
    train(group, *make_training(group), range(1))
    distributed.barrier(group)
    impatient = distributed.new_group([0, 1], timeout=TIMEOUT)
    model, optimizer = make_training(impatient)
    train(impatient, model, optimizer, range(2))
    return impatient, model, optimizer


def step_after(group, breaks):
    """The second rank breaks before the last step; the first one asserts that it gets an error in time."""
    group, model, optimizer = trained(group)
    if group.rank() == 1:
        time.sleep(600) if breaks == "hangs" else os._exit(1)
    with error_in_time():
        train(group, model, optimizer, range(2, 3))


def save_after(group, folder):
    group, model, optimizer = trained(group)
    save_checkpoint(folder, 2, model, optimizer, group)
    if group.rank() == 1:
        FileSystemWriter.write_data = lambda *_: os._exit(1)
    with error_in_time():
        save_checkpoint(folder, 3, model, optimizer, group)


@contextmanager
def error_in_time():
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        yield
    assert time.monotonic() - start < TIMEOUT.total_seconds() + 10


@pytest.mark.parametrize(("breaks", "outcome", "ends"), [("dies", "died", [0, 1]), ("hangs", "did not end", [0])])
def test_rank_that_fails_between_two_steps_ends_the_others(breaks, outcome, ends, two):
    assert two.outcomes(step_after, 2, grace=60, wait_for=ends, breaks=breaks) == ["", outcome]


def test_last_whole_checkpoint_loads_after_a_rank_died_writing_the_next(two, pool, tmp_path):
    assert two.outcomes(save_after, 2, grace=60, folder=tmp_path) == ["", "died"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000002"]
    pool.run(load, 1, folder=tmp_path)


def load(group, folder):
    model, optimizer = make_training(group)
    assert load_checkpoint(folder, model, optimizer, group) == 2


# The tests of several ranks themselves: a failure is that of one test.


def exits(group):
    if group.rank() == 1:
        os._exit(3)


def fails(group):
    assert group.rank() != 2, "a message of its own"


def works(group):
    pass


@pytest.mark.parametrize(
    ("function", "message"),
    [(exits, "^rank 1: died$"), (fails, r"(?s)^rank 2: Traceback.* in fails.*a message of its own")],
)
def test_failing_function_fails_its_own_test_alone(function, message):
    own = Pool()
    try:
        with pytest.raises(pytest.fail.Exception, match=message):
            own.run(function)
        own.run(works)
    finally:
        own.close()
