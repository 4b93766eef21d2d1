"""README tells the truth: its code runs, and its numbers are those of the committed results."""

import inspect
import re
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot as plt
from torch import distributed

from pml_multiproxy import MultiProxyEntropyLoss

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")  # by the bar of PML's trainers
def test_code_runs():
    matplotlib.use("Agg")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    try:
        for block in blocks:
            exec(block, namespace)
    finally:
        plt.close("all")
        if distributed.is_initialized():
            distributed.destroy_process_group()


RESULTS = [*ROOT.glob("examples/results/*/table.md"), *ROOT.glob("benchmarks/results/**/*.md")]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_the_committed_ones(path):
    assert path.read_text() in README


def test_every_table_of_numbers_is_committed():
    committed = "".join(path.read_text() for path in RESULTS)
    rows = [line for line in README.splitlines() if line.startswith("|") and "±" in line]
    assert len(rows) >= 4
    assert all(row in committed for row in rows)


def test_table_of_parameters_holds_every_parameter_and_its_default():
    documented = dict(re.findall(r"^\| `(\w+)` \| `?\"?([\w.]+)\"?`? \|", README, re.MULTILINE))
    parameters = inspect.signature(MultiProxyEntropyLoss).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    assert documented == {
        name: f"{default:g}" if isinstance(default, (int, float)) else str(default)
        for name, default in defaults.items()
    }


def test_files_that_it_links_to_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
