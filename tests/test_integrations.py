"""The recipes in examples/integrations run, and resume exactly."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from torch.distributed import fsdp
from two_processes import NO_THREAD_OF_GLOO_IS_LEFT, calls_of_main, run_on_two_processes

RECIPES = {"train_lightning": "lightning", "train_accelerate": "accelerate"}


def skip_without(*packages):
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def run(folder, module, *calls, processes=1):
    """What main() of an example prints, called with each list of arguments in turn; imported once for all."""
    path = folder / "calls.py"
    imports, sources = calls_of_main(module, *calls)
    if processes == 2:
        # FSDP2's group outlives its end: a cache of PyTorch holds it.
        end = "" if module == "train_fsdp2" else NO_THREAD_OF_GLOO_IS_LEFT
        return run_on_two_processes(path, imports, *(source + end for source in sources))
    path.write_text(imports + "".join(sources))
    # FSDP2 wants a process group even where there is one process.
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = {**os.environ, **(alone if module == "train_fsdp2" else {})}
    result = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def check_resuming(tmp_path, recipe, processes):
    """After one epoch, one more is as the second of two; returns MAP@R and the sum of the proxies."""
    extra = ["--processes", processes] if recipe == "train_lightning" else []
    whole = ["--epochs", 2, *extra]
    resumed = [["--epochs", epochs, "--checkpoints", tmp_path / "saved", *extra] for epochs in (1, 2)]
    lines = re.findall(r"MAP@R (\S+), proxies (\S+)", run(tmp_path, recipe, whole, *resumed, processes=processes))
    assert len(lines) == 3
    assert lines[2] == lines[0] != lines[1]
    assert 45 < float(lines[0][0]) < 100
    return [float(number) for number in lines[0]]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_resumes_exactly(tmp_path, recipe, processes):
    skip_without(RECIPES[recipe])
    check_resuming(tmp_path, recipe, processes)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="public from torch 2.6 on")
def test_fsdp2_resumes_exactly_and_does_the_same_on_one_and_two_processes(tmp_path):
    """Whose batches hold the same samples together, and whose network has no batch statistics."""
    results = []
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        results.append(check_resuming(tmp_path / str(processes), "train_fsdp2", processes))
    assert results[1] == pytest.approx(results[0], rel=0.03)
