"""Several processes: all cases of :mod:`distributed_cases` in one spawn of ranks, and what needs a spawn of its own."""

import os
import time
from datetime import timedelta
from pathlib import Path

import distributed_cases
import pytest
import ranks
from torch import distributed


@pytest.fixture(scope="module")
def outcomes():
    return ranks.run_all(list(ranks.CASES))


@pytest.mark.parametrize("case", ranks.CASES)
def test_on_ranks(case, outcomes):
    for rank, outcome in enumerate(outcomes[case]):
        assert outcome == "", f"rank {rank}: {outcome}"


FAULTS = ["dies between two steps", "hangs between two steps", "dies while it writes a checkpoint"]
TIMEOUT = timedelta(seconds=3)


def fault(rank, folder):
    """On two ranks for each fault: something goes wrong with the second, and the first writes down what it sees."""
    ranks.join(rank, folder, size=2 * len(FAULTS))
    pairs = [distributed.new_group([2 * i, 2 * i + 1], timeout=TIMEOUT) for i in range(len(FAULTS))]
    name, group, breaks = FAULTS[rank // 2], pairs[rank // 2], rank % 2 == 1
    model, optimizer = distributed_cases.make_training(group)
    distributed_cases.train(group, model, optimizer, range(2))
    if "checkpoint" in name:
        distributed_cases.save_checkpoint(folder, 2, model, optimizer, group)
        if breaks:
            distributed_cases.FileSystemWriter.write_data = lambda *_: os._exit(1)
    elif breaks:
        time.sleep(600) if "hangs" in name else os._exit(1)
    start = time.monotonic()
    try:
        if "checkpoint" in name:
            distributed_cases.save_checkpoint(folder, 3, model, optimizer, group)
        else:
            distributed_cases.train(group, model, optimizer, range(2, 3))
        seen = "nothing"
    except RuntimeError:
        seen = f"an error after {time.monotonic() - start} s"
    Path(folder, name).write_text(seen)
    os._exit(0)


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    ranks.run(fault, folder, size=2 * len(FAULTS), limit=15, wait_for=range(0, 2 * len(FAULTS), 2))
    return folder


@pytest.mark.parametrize("name", FAULTS)
def test_a_rank_that_fails_ends_the_others_within_the_timeout(name, faults):
    words = (faults / name).read_text().split()
    assert words[:3] == ["an", "error", "after"]
    assert float(words[3]) < TIMEOUT.total_seconds() + 4


def test_the_last_whole_checkpoint_loads_after_a_rank_died_writing_the_next(faults):
    assert sorted(path.name for path in faults.glob("step-*")) == ["step-000000002", "step-000000003.partial"]
    assert ranks.run(load, faults, size=1, limit=30) == [0]


def load(rank, folder):
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    model, optimizer = distributed_cases.make_training(distributed.group.WORLD)
    assert distributed_cases.load_checkpoint(folder, model, optimizer) == 2
