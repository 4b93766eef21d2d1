"""README tells the truth: its code runs, its numbers are those of the committed results, its links lead somewhere."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
RESULTS = ROOT / "benchmarks/finetuning/results/leaves.csv"


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")  # by the bar of PML's trainers
@pytest.mark.parametrize("number", range(len(CODE)))
def test_code_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some code writes files
    exec(CODE[number], {})


NAMES = {
    "MultiProxyEntropyLoss": "MultiProxyEntropy",
    "k-means of the pretrained features, NormalizedSoftmaxLoss": "k-means, NormalizedSoftmax",
    "supervised and class-conditional contrast": "supervised + class-conditional contrast",
    "NormalizedSoftmaxLoss and contrast of all samples": "NormalizedSoftmax + instance contrast",
}


def test_every_number_with_a_spread_is_committed():
    table = [line.strip("| ").split(" | ") for line in README.splitlines() if "±" in line and line.startswith("|")]
    assert len(table) == 7
    rows = [row for row in csv.DictReader(RESULTS.read_text().splitlines()) if row["phase"] == "test"]
    for name, _, *cells in table:
        loss = NAMES.get(name, name.removesuffix("Loss"))
        settings = next(row["settings"] for row in rows if row["loss"] == loss)  # its defaults came first
        own = [row for row in rows if (row["loss"], row["settings"]) == (loss, settings)]
        values = np.array(
            [[float(row[metric]) for metric in ("map_at_r", "r_precision", "precision_at_1")] for row in own]
        )
        assert len(values) == 3
        spreads = zip(values.mean(axis=0), values.std(axis=0, ddof=1), strict=True)
        assert cells == [f"{mean:.1f} ± {spread:.1f}" for mean, spread in spreads]


def test_the_strongest_rival_at_its_best_is_that_of_the_tables():
    _, rows = (RESULTS.parent / "tables.md").read_text().split("**`leaves`: every loss in the best of three", 1)
    _, _header, ours, rival, *_ = rows.split("\n| ")
    assert ours.startswith("MultiProxyEntropy |")
    name, map_at_r, _, precision, *_ = rival.split(" | ")
    sentence = f"{name.replace('+', 'and')}, has {map_at_r.split()[0]} MAP@R and {precision.split()[0]} Precision@1."
    assert f"the strongest rival, {sentence}" in " ".join(README.split())


def test_a_newcomer_reads_it_in_five_minutes():
    assert len(README.split()) <= 1200


def test_files_that_it_links_to_exist():
    for target in re.findall(r"\]\(([^)#:]+)[)#]", README):
        assert (ROOT / target).exists(), target
