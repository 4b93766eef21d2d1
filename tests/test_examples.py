"""The examples run, and show what they are there to show."""

import importlib
import json
import math
from pathlib import Path
from statistics import mean

import matplotlib.image
import pytest
import torch
from forked import NO_THREAD_OF_GLOO_IS_LEFT, calls_of_main, run_forked
from pytorch_metric_learning import reducers

from pml_multiproxy import MultiProxyEntropyLoss

ROOT = Path(__file__).parent.parent
OURS = "MultiProxyEntropyLoss"
K_MEANS = "k-means of the pixels, NormalizedSoftmaxLoss"
RUNS = [("SoftTripleLoss", 2), ("SubCenterArcFaceLoss", 2), ("ProxyAnchorLoss", 2), (K_MEANS, 2), (OURS, 1), (OURS, 2)]
"""Losses, and how many views of each sample they see."""
METRICS = ["precision_at_1", "r_precision", "mean_average_precision_at_r"]


@pytest.fixture
def example(monkeypatch):
    """Imports an example by name."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("coarse_to_fine", "--seeds"),
        ("pair_loss_with_miner", "--epochs"),
        ("pair_loss_with_miner", "--seeds"),
        ("start_from_kmeans", "--epochs"),
        ("start_from_kmeans", "--seeds"),
        ("look_at_proxies", "--epochs"),
    ],
)
def test_no_training_is_no_result(name, argument, example, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        example(name).main([argument, "0"])
    assert "must be at least 1, got " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def check_coarse_to_fine(out, seeds):
    rows = json.loads((out / "metrics.json").read_text())
    assert sorted((row["loss"], row["views"], row["seed"]) for row in rows) == sorted(
        (*of_run, seed) for of_run in RUNS for seed in range(seeds)
    )
    assert all(list(row) == ["loss", "seed", "views", *METRICS] for row in rows)
    assert all(0 < row[metric] <= 1 for row in rows for metric in METRICS)
    picture = matplotlib.image.imread(out / "embedding.png")
    assert picture.shape[0] > 600
    assert picture.std() > 0.05
    return {
        of_run: mean(row["mean_average_precision_at_r"] for row in rows if (row["loss"], row["views"]) == of_run)
        for of_run in RUNS
    }


def ratio_to_the_best_peer(map_at_r):
    """Ours with two views to the best of PML's losses, which see the same views."""
    return map_at_r[OURS, 2] / max(value for (loss, _), value in map_at_r.items() if loss not in (OURS, K_MEANS))


@pytest.mark.slow
def test_coarse_to_fine(example, monkeypatch, tmp_path, capsys):
    """Writes its files, and shows all losses the same views."""
    digits, coarse_to_fine = example("digits"), example("coarse_to_fine")
    random_views, train_and_test, seen = digits.random_views, coarse_to_fine.train_and_test, []

    def recorded_views(images):
        views = random_views(images)
        seen[-1].append(views)
        return views

    def recorded_training(*arguments):
        seen.append([])
        return train_and_test(*arguments)

    monkeypatch.setattr(digits, "random_views", recorded_views)
    monkeypatch.setattr(coarse_to_fine, "train_and_test", recorded_training)
    coarse_to_fine.main(["--out", str(tmp_path), "--epochs", "1", "--seeds", "2"])

    printed = capsys.readouterr().out
    check_coarse_to_fine(tmp_path, seeds=2)
    table = (tmp_path / "table.md").read_text()
    assert table in printed
    names = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert names == [*(loss for loss, _ in RUNS), "no training: the pixels"]
    for loss, views in RUNS:
        (csv_folder,) = tmp_path.glob(f"logs/*/{loss.replace(' ', '_')}_views{views}_seed1/csv")
        assert list(csv_folder.glob("metric_loss_*.csv"))
        assert (csv_folder / "logs.db").exists()
        assert list(csv_folder.parent.glob("tensorboard/events*"))

    augmented = [torch.cat(views) for views in seen if views]
    assert len(augmented) == 2 * (len(RUNS) - 1)  # ours with one view sees the images as they are
    assert all(len(views) == 2 * 14 * 64 for views in augmented)  # two views, and as many whole batches as there are
    assert len({views.numpy().tobytes() for views in augmented}) == 2  # one for each seed


def test_a_view_is_a_slight_change_of_its_image(example):
    digits = example("digits")
    images, _ = digits.load_data()[0].tensors
    views = digits.random_views(images)
    assert views.shape == images.shape
    assert 0.02 < (views - images).abs().mean() < (images.roll(1, dims=0) - images).abs().mean()
    assert torch.nn.functional.cosine_similarity(views.flatten(1), images.flatten(1)).mean() > 0.8


@pytest.mark.parametrize("folder", ["examples/results", "runs"])
def test_coarse_to_fine_reaches_what_the_readme_says(folder):
    """The committed result, and that of README's command, which .ci/run runs before the tests."""
    out = ROOT / folder / "coarse_to_fine"
    if folder == "runs" and not (
        (out / "metrics.json").exists() and (out / "metrics.json").read_text().count('"seed": 2')
    ):
        pytest.skip("README's command has not run")
    assert ratio_to_the_best_peer(check_coarse_to_fine(out, seeds=3)) >= 1.6


class WithoutConstants(MultiProxyEntropyLoss):
    def compute_loss(self, *args):
        loss_dict = super().compute_loss(*args)
        constants = self.inter_weight * math.log(self.num_classes)
        constants += self.balance_weight * math.log(self.proxies_per_class)
        loss_dict["loss"]["losses"] = loss_dict["loss"]["losses"] - constants
        return loss_dict


@pytest.mark.slow
def test_avg_non_zero_reducer_loses_no_quality(example):
    """The constants in the loss keep samples above 0; without them, this reducer would drop most."""
    digits = example("digits")

    def quality(cls, reducer):
        torch.manual_seed(0)
        network, loss_func = torch.nn.Sequential(*digits.make_models().values()), cls(2, 64, reducer=reducer)
        optimizer = digits.make_optimizer(network, loss_func)
        for _ in range(5):
            digits.train_epoch(network, loss_func, optimizer, digits.load_batches())
        return digits.map_at_r(network)

    expected = quality(MultiProxyEntropyLoss, reducers.MeanReducer())
    assert quality(MultiProxyEntropyLoss, reducers.AvgNonZeroReducer()) > 0.93 * expected
    assert quality(WithoutConstants, reducers.AvgNonZeroReducer()) < 0.85 * expected


def numbers(printed):
    """The cells of a Markdown table that hold numbers, row by row."""
    rows = [line.strip("|").split("|")[1:] for line in printed.splitlines()[2:]]
    return [[float(cell) for cell in row] for row in rows]


@pytest.mark.slow
def test_pair_loss_with_miner(example, capsys):
    example("pair_loss_with_miner").main(["--epochs", "1", "--seeds", "1"])
    table = numbers(capsys.readouterr().out)
    assert [len(row) for row in table] == [1, 1, 1, 1]
    assert all(0 < value < 100 for row in table for value in row)


@pytest.mark.slow
def test_start_from_kmeans(example, capsys):
    example("start_from_kmeans").main(["--epochs", "2", "--seeds", "1"])
    table = numbers(capsys.readouterr().out)
    assert [len(row) for row in table] == [2, 2]
    assert all(0 < value < 100 for row in table for value in row)


@pytest.mark.slow
def test_train_ddp(tmp_path):
    imports, (call,) = calls_of_main("train_ddp", ["--epochs", 2, "--batch-size", 60])
    lines = run_forked(tmp_path / "script.py", imports, (2, call + NO_THREAD_OF_GLOO_IS_LEFT)).splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 1", "epoch 2"]
    assert all(20 < float(line.split()[-1]) < 100 for line in lines)


def scores(table):
    """By row of a table of ACC, NMI and ARI."""
    rows = [line.strip("|\n").split("|") for line in table.splitlines()[2:]]
    return {name.strip(): [float(cell) for cell in cells] for name, *cells in rows}


@pytest.mark.slow
def test_look_at_proxies(example, tmp_path, capsys):
    example("look_at_proxies").main(["--out", str(tmp_path / "new"), "--epochs", "1"])
    table = (tmp_path / "new" / "scores.md").read_text()
    assert table in capsys.readouterr().out
    found = scores(table)
    assert list(found) == ["even", "odd", "mean"]
    assert found["mean"] == pytest.approx(
        [mean(pair) for pair in zip(found["even"], found["odd"], strict=True)], abs=0.1
    )
    assert matplotlib.image.imread(tmp_path / "new" / "nearest.png").std() > 0.05


def test_committed_proxies_found_the_digits_to_a_good_part():
    folder = ROOT / "examples" / "results" / "look_at_proxies"
    accuracy, nmi, ari = scores((folder / "scores.md").read_text())["mean"]
    assert min(accuracy, nmi, ari) > 50
    assert (folder / "nearest.png").exists()


def choices(out):
    rows = json.loads((out / "trials.json").read_text())
    assert [row["agreement"] for row in rows] == sorted((row["agreement"] for row in rows), reverse=True)
    assert matplotlib.image.imread(out / "agreement.png").std() > 0.05
    return rows


@pytest.mark.slow
def test_choose_proxies(example, tmp_path, capsys):
    choose = example("choose_proxies")
    arguments = ["--out", str(tmp_path), "--epochs", "1"]
    choose.main([*arguments, "--trials", "2"])
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    first = choices(tmp_path)
    assert len(first) == 2
    choose.main([*arguments, "--trials", "3"])  # goes on from the two
    assert len(choices(tmp_path)) == 3
    assert all(row in choices(tmp_path) for row in first)


def test_committed_choice_is_nearly_the_best_there_was():
    rows = choices(ROOT / "examples" / "results" / "choose_proxies")
    assert rows[0]["map_at_r"] >= 0.9 * max(row["map_at_r"] for row in rows)
