"""README tells the truth: its code runs, its numbers are those of the committed results, its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")  # by the bar of PML's trainers
def test_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        exec(block, namespace)


def test_the_headline_table_is_the_committed_one():
    assert (ROOT / "examples/results/coarse_to_fine/table.md").read_text() in README


def test_every_number_with_a_spread_is_committed():
    committed = (ROOT / "examples/results/coarse_to_fine/table.md").read_text()
    rows = [line for line in README.splitlines() if "±" in line and line.startswith("|")]
    assert len(rows) >= 4
    assert all(row in committed for row in rows)


def test_a_newcomer_reads_it_in_five_minutes():
    assert 100 <= len(README.splitlines()) <= 250


def test_files_that_it_links_to_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
