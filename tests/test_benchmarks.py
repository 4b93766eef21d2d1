"""The benchmarks run on a small file of the same layout, and go on from what they have."""

import csv
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def data(tmp_path):
    """30 intents in 10 domains, 384 dimensions: 3 samples of each to train with, 2 to test with."""
    generator = np.random.default_rng(0)
    label = np.repeat(np.arange(30), 5)
    features = generator.normal(size=(30, 384))[label] + 0.5 * generator.normal(size=(150, 384))
    np.savez(
        tmp_path / "clinc150_minilm.npz",
        features=(features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16),
        label=label,
        superclass=label // 3,
        split=np.tile([0, 0, 0, 2, 2], 30),
    )
    return tmp_path


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(importlib.import_module("benchmarks.clinc"), "RESULTS", tmp_path)

    def main(name, *arguments):
        module = importlib.import_module(f"benchmarks.ablations.{name}")
        module.main(list(map(str, arguments)))
        return module

    return main


@pytest.mark.parametrize("name", ["dead_proxies", "kmeans_start", "miner", "regularizer"])
def test_writes_a_row_for_each_run_and_goes_on_from_them(name, data, benchmark, tmp_path):
    module = benchmark(name, "--data", data, "--seeds", 1)
    path = tmp_path / f"{name}.csv"
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["configuration"] for row in rows] == list(module.CONFIGURATIONS)
    assert all(0 <= float(row[column]) <= 100 for row in rows for column in row if column.startswith("map_at_r"))
    table = (tmp_path / f"{name}.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == list(module.CONFIGURATIONS)

    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))  # as if the last run had been interrupted
    benchmark(name, "--data", data, "--seeds", 1)
    again = path.read_text().splitlines(keepends=True)
    assert again[:-1] == lines[:-1]
    assert len(again) == len(lines)


def test_says_which_file_is_missing(benchmark, tmp_path):
    with pytest.raises(SystemExit, match=r"nowhere/clinc150_minilm\.npz is missing"):
        benchmark("miner", "--data", tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("processes", [1, 2])
def test_processes_send_what_the_formula_says(processes, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module("benchmarks.distributed.steps")
    row = module.measure("tiny", module.Shape(8, 6, 2, 4), processes, repeats=1)
    sent = sum(row[f"bytes {word}"] for word in module.KINDS.values())
    assert sent == row["bytes by formula"] > 0
    assert row["MB proxies"] == pytest.approx(6 * 2 * 4 * 4 / 1e6 / processes)


def words(numbers):
    """Of two classes."""
    text = "".join(map(str, numbers))
    return f"{text[: len(text) // 2]} {text[len(text) // 2 :]}"


def test_agreement_as_a_guide(monkeypatch, tmp_path):
    """Two settings: one finds the same three parts each time; the other only the same two outliers, and is worse."""
    monkeypatch.syspath_prepend(ROOT)
    guide = importlib.import_module("benchmarks.agreement.guide")
    good, dominated = (guide.OURS, 10, 0.1), ("SoftTriple", 5, 0.1)
    monkeypatch.setattr(guide, "GRID", [(guide.OURS, 2, 0.1), good])
    monkeypatch.setattr(guide, "UNBALANCED", [dominated])
    monkeypatch.setattr(guide, "OFTEN", [good])

    def run(key, _):
        generator = np.random.default_rng(key.seed)
        parts = np.arange(600) % 3
        if key[1:4] == good:
            parts = np.where(generator.random(600) < 0.1, generator.integers(3, size=600), (parts + key.seed) % 3)
        elif key[1:4] == dominated:
            parts = np.arange(600) % 300 < 2
        else:
            parts = generator.integers(2, size=600)
        return {"map_at_r": f"{80 if key[1:4] == good else 40}", "assigned": words(parts.astype(int))}

    monkeypatch.setattr(guide, "run", run)
    arguments = ["--task", "digits-coarse", "--seeds", "6", "--out", str(tmp_path)]
    guide.main(arguments)
    trainings = (tmp_path / "trainings.csv").read_text()
    assert len(trainings.splitlines()) == 1 + 2 + 2 + 6
    rows = [line.split(" | ") for line in (tmp_path / "guide.md").read_text().splitlines()[2:]]
    assert [(row[1], row[2], row[4].split(",")[0]) for row in rows] == [
        ("ours", "agreement, in nats", "MultiProxyEntropy"),
        ("ours", "adjusted mutual information", "MultiProxyEntropy"),
        ("and unbalanced", "agreement, in nats", "MultiProxyEntropy"),
        ("and unbalanced", "adjusted mutual information", "SoftTriple"),
    ]
    assert [row[5:] for row in rows[2:]] == [["35 %", "80.0", "80.0 |"], ["99 %", "40.0", "80.0 |"]]
    (pairs,) = (tmp_path / "pairs.md").read_text().splitlines()[2:]
    assert pairs.split(" | ")[1:3] == ["10", "3"]
    agreement, chosen = (line.split(" | ") for line in (tmp_path / "samples.md").read_text().splitlines()[2:])
    by_count = [float(cell.split()[0]) for cell in agreement[2:]]
    assert by_count[:3] == sorted(by_count[:3])  # the more samples, the more they tell
    assert chosen[2:] == ["80.0"] * 6 + ["80.0 |"]

    guide.main(arguments)
    assert (tmp_path / "trainings.csv").read_text() == trainings


@pytest.mark.parametrize(
    "loss", ["MultiProxyEntropy", "MultiProxyEntropy, no balance", "SoftTriple", "SubCenterArcFace"]
)
def test_agreement_of_a_training(loss, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    guide = importlib.import_module("benchmarks.agreement.guide")
    digits = guide.TASKS["digits-coarse"](None)
    monkeypatch.setitem(guide.TASKS, "digits-coarse", lambda _: digits._replace(epochs=1))
    row = guide.run(guide.Key("digits-coarse", loss, 3, 0.1, seed=0), None)
    assert 20 < float(row["map_at_r"]) < 100
    even, odd = row["assigned"].split()
    assert len(even) + len(odd) == 270 + 899
    assert set(even + odd) <= set("012")


@pytest.fixture
def clusters(monkeypatch):
    """On the digits, trained for one epoch."""
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module("benchmarks.inspection.clusters")
    digits = module.TASKS["digits-coarse"](None)
    monkeypatch.setitem(module.TASKS, "digits-coarse", lambda _: digits._replace(epochs=1))
    return module


def test_clusters_of_each_loss(clusters, tmp_path, capsys):
    arguments = ["--task", "digits-coarse", "--seeds", "2", "--out", str(tmp_path)]
    clusters.main(arguments)
    written = (tmp_path / "clusters.csv").read_text()
    rows = list(csv.DictReader(written.splitlines()))
    assert [(row["loss"], row["proxies_per_class"], row["seed"]) for row in rows] == [
        (loss, count, seed)
        for loss, count in (("MultiProxyEntropy", "30"), ("SoftTriple", "30"), ("SubCenterArcFace", "3"))
        for seed in "01"
    ]
    assert all(-1 <= float(row[column]) <= 100 for row in rows for column in clusters.COLUMNS)
    table = (tmp_path / "clusters.md").read_text()
    assert table in capsys.readouterr().out
    cells = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    assert [[cell.strip() for cell in line[:4]] for line in cells] == [
        ["digits-coarse", "5", row["loss"], row["proxies_per_class"]] for row in rows[::2]
    ]
    for line, pair in zip(cells, zip(rows[::2], rows[1::2], strict=True), strict=True):
        means = [np.mean([float(row[column]) for row in pair]) for column in clusters.COLUMNS]
        assert [float(cell.split()[0]) for cell in line[4:]] == pytest.approx(means, abs=0.06)
    clusters.main(arguments)
    assert (tmp_path / "clusters.csv").read_text() == written


def test_clusters_that_are_the_fine_labels_score_1(clusters):
    proxies = torch.nn.functional.normalize(torch.randn(2, 3, 8), dim=2)
    order = torch.randperm(60) % 6
    fine = torch.tensor([4, 9, 2, 7, 0, 1])[order]
    data = clusters.TASKS["digits-coarse"](None).test._replace(coarse=order // 3 + 5, fine=fine)
    assert clusters.of_proxies(proxies, proxies.flatten(0, 1)[order], data) == pytest.approx((1, 1, 1))
    assert clusters.of_proxies(proxies, proxies.flatten(0, 1)[order.flip(0)], data).accuracy < 0.9
