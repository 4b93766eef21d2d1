"""README tells the truth: its code runs, its numbers are those of the committed results, its links lead somewhere."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
RESULTS = ROOT / "examples/results/coarse_to_fine"


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")  # by the bar of PML's trainers
@pytest.mark.parametrize("number", range(len(CODE)))
def test_code_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some code writes files
    exec(CODE[number], {})


def test_every_number_with_a_spread_is_committed():
    rows = json.loads((RESULTS / "metrics.json").read_text())
    table = [line.strip("| ").split(" | ") for line in README.splitlines() if "±" in line and line.startswith("|")]
    assert len(table) == len({(row["loss"], row["views"]) for row in rows})
    for loss, _, views, *cells in table:
        own = [list(row.values())[-3:] for row in rows if (row["loss"], row["views"]) == (loss, int(views))]
        values = 100 * np.array(own)
        spreads = zip(values.mean(axis=0), values.std(axis=0, ddof=1), strict=True)
        assert cells == [f"{mean:.1f} ± {spread:.1f}" for mean, spread in spreads]


def test_a_newcomer_reads_it_in_five_minutes():
    assert len(README.split()) <= 1100


def test_files_that_it_links_to_exist():
    for target in re.findall(r"\]\(([^)#:]+)[)#]", README):
        assert (ROOT / target).exists(), target
