"""The retrieval benchmark, on small data in the layout of the real ones."""

import csv
import importlib
import io
import json
import sys
import zipfile
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
SETTINGS = "--configs", "2", "--seeds", "2", "--threads", "1"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return {name: importlib.import_module(name) for name in ("retrieval", "retrieval_losses", "retrieval_tasks")}


@pytest.fixture
def tasks(modules):
    return modules["retrieval_tasks"]


@pytest.fixture
def main(modules, monkeypatch, tmp_path):
    """``retrieval.py`` with two tasks of one epoch on the digits, writing to a temporary folder."""
    tasks, losses = modules["retrieval_tasks"], modules["retrieval_losses"]
    digits = tasks.digits_coarse(None)._replace(epochs=1)
    for name in list(tasks.TASKS):
        monkeypatch.delitem(tasks.TASKS, name)
    for name in ("one-coarse", "two-coarse"):
        monkeypatch.setitem(tasks.TASKS, name, lambda folder: digits)
    few = {name: drawn[:2] for name, drawn in losses.load().items()}
    (tmp_path / "configurations.json").write_text(json.dumps(few))
    monkeypatch.setattr(losses, "FILE", tmp_path / "configurations.json")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["retrieval.py", *SETTINGS, "--out", str(tmp_path), *arguments])
        modules["retrieval"].main()
        paths = [path for path in (tmp_path / f"{name}.csv" for name in tasks.TASKS) if path.exists()]
        return [row for path in paths for row in csv.DictReader(path.read_text().splitlines())]

    return run


def test_configurations_are_those_that_were_drawn(modules):
    losses = modules["retrieval_losses"]
    drawn = {name: losses.draw(name, family) for name, family in losses.FAMILIES.items()}
    assert json.loads(json.dumps(drawn)) == losses.load()
    assert {len(configurations) for configurations in drawn.values()} == {12}
    # One draw of ours became its defaults, and stands first.
    several = {name: [c[f.several] for c in drawn[name]] for name, f in losses.FAMILIES.items() if f.several}
    several["MultiProxyEntropy"][9], several["MultiProxyEntropy"][0] = several["MultiProxyEntropy"][0], None
    assert len({tuple(counts[1:]) for counts in several.values()}) == 1


def test_every_configuration_is_a_loss(modules):
    losses = modules["retrieval_losses"]
    embeddings, labels = torch.randn(8, 4, requires_grad=True), torch.arange(8) % 2
    for name, configurations in losses.load().items():
        for configuration in configurations:
            settings = {key: value for key, value in configuration.items() if key not in ("proxies_lr", "clusters")}
            losses.FAMILIES[name].build(2, 4, **settings)(embeddings, labels).backward()
    assert embeddings.grad.isfinite().all()


def write_clinc(folder):
    generator = np.random.default_rng(0)
    label = np.repeat(np.arange(150), 6)
    features = generator.normal(size=(900, 384))
    split = np.tile([0, 0, 0, 1, 2, 2], 150)
    np.savez(folder / "clinc150_minilm.npz", features=features, label=label, superclass=label // 15, split=split)


def write_omniglot(folder):
    (folder / "omniglot").mkdir()
    generator = np.random.default_rng(0)
    for number, alphabets in ((1, ["Greek", "Korean", "Latin"]), (2, ["Greek", "Sanskrit"])):
        with zipfile.ZipFile(folder / "omniglot" / f"images_background_small{number}.zip", "w") as file:
            for alphabet in alphabets:
                for character in range(12):
                    for drawing in range(1, 21):
                        image = io.BytesIO()
                        Image.fromarray(generator.random((105, 105)) > 0.1).save(image, "png")
                        name = f"small/{alphabet}/character{character:02}/0001_{drawing:02}.png"
                        file.writestr(name, image.getvalue())


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("digits-coarse", (2, 10, 10)),
        ("clinc-coarse", (10, 150, 150)),
        ("clinc-unseen", (60, 15, 75)),
        ("omniglot-coarse", (3, 36, 36)),
        ("omniglot-unseen", (6, 30, 12)),
    ],
)
def test_parts_of_a_task_have_nothing_in_common(name, classes, tasks, tmp_path):
    if name.startswith("clinc"):
        write_clinc(tmp_path)
    if name.startswith("omniglot"):
        write_omniglot(tmp_path)
    task = tasks.TASKS[name](tmp_path)
    parts = task.train, task.validation, task.test
    assert (len(task.train.coarse.unique()), *(len(part.fine.unique()) for part in parts[1:])) == classes
    samples = [{tuple(x.flatten()[:400].tolist()) for x in part.x} for part in parts]
    assert not any(a & b for a, b in combinations(samples, 2))
    assert name.endswith("coarse") or not any(
        set(a.fine.tolist()) & set(b.fine.tolist()) for a, b in combinations(parts, 2)
    )
    train, test = task.phase("test")
    assert len(train.x) == len(task.train.x) + len(task.validation.x) == len(train.coarse)
    assert test is task.test
    assert task.make_network()(train.x[:2]).shape == (2, task.embedding_size)


def test_a_missing_file_is_named_with_its_source(tasks, tmp_path):
    with pytest.raises(SystemExit, match=r"clinc150_minilm\.npz is missing: CLINC150 \(github"):
        tasks.clinc_coarse(tmp_path / "nowhere")


def test_runs_chooses_resumes_and_reports(main, tmp_path):
    losses = "--losses", "MultiProxyEntropy", "SoftTriple"
    rows = main("--task", "one-coarse", "two-coarse", *losses, "--report")
    for task in ("one-coarse", "two-coarse"):
        of_task = [row for row in rows if row["task"] == task]
        validation = [(row["loss"], row["configuration"]) for row in of_task if row["phase"] == "validation"]
        assert sorted(validation) == [(loss, index) for loss in losses[1:] for index in "01"]
        for loss in losses[1:]:
            scores = {r["configuration"]: float(r["map_at_r"]) for r in of_task[:4] if r["loss"] == loss}
            tested = {(r["configuration"], r["seed"]) for r in of_task if (r["phase"], r["loss"]) == ("test", loss)}
            assert {(index, seed) for index in {"0", max(scores, key=scores.get)} for seed in "01"} <= tested
    text = (tmp_path / "tables.md").read_text()
    assert text.count("| task | best peer | ours | difference | ratio |") == 3
    assert {path.name for path in tmp_path.glob("*.png")} == {"best_here.png", "best_elsewhere.png", "defaults.png"}

    path = tmp_path / "two-coarse.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    main("--task", "one-coarse", "two-coarse", *losses)
    again = path.read_text().splitlines(keepends=True)
    assert again[:-1] == lines[:-1]
    assert len(again) == len(lines)


@pytest.mark.slow
def test_sweeps_are_drawn(main, monkeypatch, tmp_path):
    losses = importlib.import_module("retrieval_losses")
    for key in losses.SWEEPS:
        monkeypatch.setitem(losses.SWEEPS, key, [])
    monkeypatch.setitem(losses.SWEEPS, "proxies_per_class", [1, 30])
    monkeypatch.setitem(losses.SWEEPS, "pooling", ["softmax"])
    monkeypatch.setitem(losses.SWEEPS, "from_kmeans", [True])
    classes_only = f"{losses.CLASSES_ONLY} scale=5"
    together = {"proxies_per_class=1": {"scale": [5]}, classes_only: {"proxies_per_class": [2, 30]}}
    monkeypatch.setattr(losses, "TOGETHER", together)
    main("--task", "one-coarse", "--losses", "MultiProxyEntropy", "SoftTriple")
    rows = main("--task", "one-coarse", "--losses", "MultiProxyEntropy", "--sweep", "--report")
    swept = {}
    for row in rows:
        if row["phase"] == "sweep":
            swept.setdefault(row["configuration"], []).append(float(row["map_at_r"]))
    labels = "defaults", "proxies_per_class=1", "proxies_per_class=30", "pooling=softmax", "from_kmeans=True"
    without = [f"{classes_only} proxies_per_class={count}" for count in (2, 30)]
    assert set(swept) == {*labels, "proxies_per_class=1 scale=5", *without}
    assert swept["defaults"] == swept["proxies_per_class=30"]
    assert len({tuple(scores) for scores in swept.values()}) == len(swept) - 1
    best = max(swept, key=lambda label: sum(swept[label]))
    tested = {(row["configuration"], row["seed"]) for row in rows if row["phase"] == "test"}
    for label in (best, max(without, key=lambda label: sum(swept[label]))):
        assert {(label, "0"), (label, "1")} <= tested
        assert f"`{label}`: " in (tmp_path / "tables.md").read_text()
    assert (tmp_path / "proxies_per_class.png").exists()
    assert (tmp_path / "sensitivity.png").exists()


def test_interval_is_over_seeds_and_classes(modules):
    report = importlib.import_module("retrieval_report")
    constant = np.full((5, 20), 3.0)
    assert report.interval(constant).tolist() == [3, 3]
    by_class = constant + np.arange(20)
    low, high = report.interval(by_class)
    assert low < by_class.mean() < high
    # The mean of 20 uniform numbers: standard error 5.77 / sqrt(20).
    assert high - low == pytest.approx(2 * 1.96 * 5.77 / 20**0.5, rel=0.1)


def test_image_folders(tasks, modules, monkeypatch, tmp_path):
    """In the layout of CUB: ten classes to train with, of which two for validation, and three new ones."""
    pytest.importorskip("pytorch_metric_learning.datasets")
    root = tmp_path / "CUB_200_2011"
    numbers = [*range(1, 11), *range(101, 104)]
    names = [f"{c:03}.bird/{i}.jpg" for c in numbers for i in range(4)]
    for i, name in enumerate(names):
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (20 * (i // 4), 128, 0)).save(root / "images" / name)
    (root / "images.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names, start=1)))
    classes = "".join(f"{i} {int(name[:3])}\n" for i, name in enumerate(names, start=1))
    (root / "image_class_labels.txt").write_text(classes)

    task = tasks.IMAGE_TASKS["cub"](tmp_path)
    assert [len(part.fine.unique()) for part in (task.train, task.validation, task.test)] == [8, 2, 3]
    train, _ = task.phase("test")
    assert train.x[torch.tensor([0, 3])].shape == (2, 3, 224, 224)

    def make_network():
        return torch.nn.Sequential(torch.nn.AvgPool2d(56), torch.nn.Flatten(), torch.nn.Linear(48, 512))

    small = task._replace(make_network=make_network, epochs=1, batch_size=8)
    result = modules["retrieval"].run(small, "test", "MultiProxyEntropy", {"proxies_lr": 0.01}, seed=0)
    assert 0 < float(result["map_at_r"]) <= 100
