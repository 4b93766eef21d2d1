"""The examples run, and show what they are there to show."""

import importlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import matplotlib.image
import pytest
import torch
from pytorch_metric_learning import reducers
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from pml_multiproxy import MultiProxyEntropyLoss

ROOT = Path(__file__).parent.parent
LOSSES = ["SoftTripleLoss", "SubCenterArcFaceLoss", "ProxyAnchorLoss", "MultiProxyEntropyLoss"]
METRICS = ["precision_at_1", "r_precision", "mean_average_precision_at_r"]


def run(name, *arguments):
    command = [sys.executable, "-W", "error::FutureWarning", str(ROOT / "examples" / name), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def check_coarse_to_fine(out, seeds):
    rows = json.loads((out / "metrics.json").read_text())
    assert sorted((row["loss"], row["seed"]) for row in rows) == sorted(
        (loss, seed) for loss in LOSSES for seed in range(seeds)
    )
    assert all(list(row) == ["loss", "seed", *METRICS] for row in rows)
    assert all(0 < row[metric] <= 1 for row in rows for metric in METRICS)
    picture = matplotlib.image.imread(out / "embedding.png")
    assert picture.shape[0] > 600
    assert picture.std() > 0.05
    return {loss: mean(row["mean_average_precision_at_r"] for row in rows if row["loss"] == loss) for loss in LOSSES}


def ratio_to_the_best_peer(map_at_r):
    return map_at_r["MultiProxyEntropyLoss"] / max(map_at_r[loss] for loss in LOSSES[:-1])


def test_coarse_to_fine(tmp_path):
    printed = run("coarse_to_fine.py", "--out", tmp_path, "--epochs", 1, "--seeds", 2)
    check_coarse_to_fine(tmp_path, seeds=2)
    table = (tmp_path / "table.md").read_text()
    assert table in printed
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [*LOSSES, "no training: the pixels"]
    for loss in LOSSES:
        (csv_folder,) = tmp_path.glob(f"logs/*/{loss}_seed1/csv")
        assert (csv_folder / f"metric_loss_{loss}.csv").exists()
        assert (csv_folder / "logs.db").exists()
        assert list(csv_folder.parent.glob("tensorboard/events*"))


@pytest.mark.slow
def test_coarse_to_fine_reaches_what_the_readme_says(tmp_path):
    start = time.perf_counter()
    run("coarse_to_fine.py", "--out", tmp_path)
    assert time.perf_counter() - start < 180
    assert ratio_to_the_best_peer(check_coarse_to_fine(tmp_path, seeds=3)) >= 1.2


def test_committed_result_reaches_what_the_readme_says():
    committed = check_coarse_to_fine(ROOT / "examples" / "results" / "coarse_to_fine", seeds=3)
    assert ratio_to_the_best_peer(committed) >= 1.2


def map_at_r(example, make_loss, seed):
    """Trained as in the example, without PML's trainer."""
    torch.manual_seed(seed)
    loss_func = make_loss()
    train_set, test_set = example.load_data()
    network = torch.nn.Sequential(*example.make_models().values())
    optimizer = torch.optim.AdamW(
        [{"params": network.parameters(), "lr": 1e-3}, {"params": loss_func.parameters()}], 1e-2
    )
    for _ in range(10):
        for images, labels in torch.utils.data.DataLoader(train_set, 64, shuffle=True):
            optimizer.zero_grad()
            loss_func(network(images), labels).backward()
            optimizer.step()
    with torch.no_grad():
        embeddings = torch.nn.functional.normalize(network.eval()(test_set.tensors[0]))
    calculator = AccuracyCalculator(include=("mean_average_precision_at_r",), k="max_bin_count")
    return calculator.get_accuracy(embeddings, test_set.tensors[1])["mean_average_precision_at_r"]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return importlib.import_module("coarse_to_fine")


class WithoutConstants(MultiProxyEntropyLoss):
    def _losses(self, embeddings, labels):
        constants = self.inter_weight * math.log(self.num_classes) + self.balance_weight * math.log(10)
        return super()._losses(embeddings, labels) - constants


def test_avg_non_zero_reducer_loses_no_quality(example):
    """The constants in the loss keep samples above 0; without them, this reducer would drop most."""

    def quality(cls, reducer):
        return mean(map_at_r(example, lambda: cls(2, 64, reducer=reducer), seed) for seed in range(2))

    expected = quality(MultiProxyEntropyLoss, reducers.MeanReducer())
    assert quality(MultiProxyEntropyLoss, reducers.AvgNonZeroReducer()) > 0.93 * expected
    assert quality(WithoutConstants, reducers.AvgNonZeroReducer()) < 0.85 * expected
