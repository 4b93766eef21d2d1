"""The recipes in examples/integrations run, and resume exactly."""

import re
from importlib.util import find_spec

import pytest
from forked import NO_THREAD_OF_GLOO_IS_LEFT, calls_of_main, run_forked
from torch.distributed import fsdp

RECIPES = {"train_lightning": "lightning", "train_accelerate": "accelerate"}


def check_resuming(tmp_path, module):
    """One epoch and one more give what two give; returns MAP@R and sum of the proxies, of one process and of two."""
    # FSDP2 wants a process group even where there is one process, and a cache of PyTorch holds the group after its end.
    fsdp2 = module == "train_fsdp2"
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"} if fsdp2 else {}
    end = "" if fsdp2 else NO_THREAD_OF_GLOO_IS_LEFT
    calls = []
    for processes in (1, 2):
        extra = ["--processes", processes] if module == "train_lightning" else []
        resumed = [["--epochs", n, "--checkpoints", tmp_path / f"saved{processes}", *extra] for n in (1, 2)]
        imports, sources = calls_of_main(module, ["--epochs", 2, *extra], *resumed)
        calls += [(processes, source + end) for source in sources]
    printed = run_forked(tmp_path / "script.py", imports, *calls, **alone)
    lines = re.findall(r"MAP@R (\S+), proxies (\S+)", printed)
    assert len(lines) == 6
    for whole, first, resumed in (lines[:3], lines[3:]):
        assert resumed == whole != first
        assert 45 < float(whole[0]) < 100
    return [[float(number) for number in lines[i]] for i in (0, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_resumes_exactly(tmp_path, recipe):
    if find_spec(RECIPES[recipe]) is None:
        pytest.skip(f"{RECIPES[recipe]} is not installed")
    check_resuming(tmp_path, recipe)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="public from torch 2.6 on")
def test_fsdp2_resumes_exactly_and_does_the_same_on_one_and_two_processes(tmp_path):
    """Whose batches hold the same samples together, and whose network has no batch statistics."""
    one, two = check_resuming(tmp_path, "train_fsdp2")
    assert two == pytest.approx(one, rel=0.03)
