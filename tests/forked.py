"""Scripts on one process, or on several as torchrun would start them, but which import once."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
FORKS = """
import os, socket, sys
import torch._dynamo  # optimizers import it, which would take each process seconds
from torch.multiprocessing import start_processes

def process(rank, processes, port, source):
    of_torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    of_torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": 0}
    if processes > 1:
        os.environ |= {name: str(value) for name, value in of_torchrun.items()}
    exec(source, globals())
    # Gloo's threads now and then abort a process in which Python ends (pytorch/pytorch#190489), when all is done.
    sys.stdout.flush()
    os._exit(0)

for processes, source in CALLS:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start_processes(process, (processes, port, source), nprocs=processes, start_method="fork")
"""
NO_THREAD_OF_GLOO_IS_LEFT = """
from pathlib import Path
names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in names if "gloo" in name], names
"""
"""Fails a script that leaves threads of gloo. On Linux only, and not with torch 2.5, whose threads have other names."""


def calls_of_main(module, *calls):
    """The source that imports an example, and one that calls its main() for each list of arguments."""
    paths = [str(EXAMPLES), str(EXAMPLES / "integrations")]
    imports = f"import sys\nsys.path[:0] = {paths!r}\nimport {module}\n"
    return imports, [f"{module}.main({list(map(str, arguments))!r})\n" for arguments in calls]


def run_forked(path, imports, *calls, **environment):
    """What processes print, started anew for each call, a number of processes and a source, by a script at ``path``."""
    path.write_text(f"{imports}\nCALLS = {calls!r}\n{FORKS}")
    environment = os.environ | environment
    result = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout
