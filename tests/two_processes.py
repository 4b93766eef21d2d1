"""Scripts on two processes, which torchrun starts."""

import subprocess
import sys

ENDING = "\nimport os, sys; sys.stdout.flush(); os._exit(0)\n"
"""Gloo's threads now and then abort a process in which Python ends (pytorch/pytorch#190489), when all is done."""
NO_THREAD_OF_GLOO_IS_LEFT = """
from pathlib import Path
names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in names if "gloo" in name], names
"""
"""Fails a script that leaves threads of gloo. On Linux only, and not with torch 2.5, whose threads have other names."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run_on_two_processes(path, script):
    """What both print; ``path`` is where to write the script."""
    path.write_text(script + ENDING)
    result = subprocess.run([*TORCHRUN, str(path)], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout
