"""powerful-benchmarker trains, resumes and searches with our configs, in a virtual environment of its own."""

import csv
import importlib
import json
import os
import re
import sqlite3
import subprocess
import venv
from contextlib import closing
from pathlib import Path

import pytest
import torch
from dataset_folders import cars196, cub200, stanford_online_products

from pml_multiproxy._monitor import Statistics

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "powerful_benchmarker"
OURS = "MultiProxyEntropyLoss_with_miner_and_regularizer"
EPOCHS, ITERATIONS = 2, 20

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("benchmarker")]  # one virtual environment


FORKS = f"""
import json, os, sys
sys.path.insert(0, {str(EXAMPLE)!r})
import run
from functools import partial
from powerful_benchmarker.runners import bayes_opt_runner
# With the 50 x 50 points that its contours have by default, each picture of a search takes half a minute.
bayes_opt_runner.interact_contour = partial(bayes_opt_runner.interact_contour, density=5)
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.argv[1:] = json.loads(line)
        run.main()
        os._exit(0)
    print(os.waitpid(child, 0)[1], file=answers, flush=True)
"""
"""Runs run.py with each list of options that it reads, in a process that has imported everything."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables of an environment where install.sh has run."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "VIRTUAL_ENV": str(folder), "PATH": path, "TQDM_DISABLE": "1"}
    subprocess.run(["bash", EXAMPLE / "install.sh"], check=True, env=environment)
    return environment


@pytest.fixture(scope="module")
def run(environment):
    """Calls run.py with these options."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(["python", "-c", FORKS], **pipes, env=environment, cwd=ROOT) as process:

        def run(*options):
            print(json.dumps(list(map(str, options))), file=process.stdin, flush=True)
            assert process.stdout.readline() == "0\n"

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmarker") / "out"


@pytest.fixture(scope="module")
def table(environment, out):
    """What compare_on_digits.py prints, by loss."""
    command = ["python", EXAMPLE / "compare_on_digits.py", "--out", out, "--num_epochs_train", str(EPOCHS)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT).stdout
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    return {name: cells for name, *cells in rows[2:]}


@pytest.fixture
def digits_configs(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    return importlib.import_module("even_odd_digits").configs


def folds(experiment):
    folders = sorted(experiment.glob("*Partitions2_*"))
    assert len(folders) == 2
    return folders


def records(fold, group, columns):
    """The values of these columns, row by row, which CSV and SQLite agree on."""
    with (fold / "saved_csvs" / f"{group}.csv").open() as file:
        rows = [[float(row[column]) for column in columns] for row in csv.DictReader(file)]
    with closing(sqlite3.connect(fold / "saved_csvs" / "logs.db")) as database:
        names = ", ".join(f'"{column}"' for column in columns)
        assert database.execute(f"SELECT {names} FROM {group} ORDER BY id").fetchall() == list(map(tuple, rows))
    return rows


def load(fold, name):
    return torch.load(fold / "saved_models" / f"{name}.pth")


def moved(fold, proxies, last_epoch):
    """How far each row of the proxies has moved."""
    before, after = (load(fold, f"metric_loss_{epoch}")[proxies] for epoch in ("best0", last_epoch))
    return (after - before).norm(dim=-1)


def test_prints_the_accuracy_of_each_loss(table):
    assert list(table) == ["SoftTripleLoss", "MultiProxyEntropyLoss", OURS]
    means = [float(cell.split(" ± ")[0]) for cells in table.values() for cell in cells]
    assert len(means) == 9
    assert all(20 < mean < 100 for mean in means)


def test_proxies_move_and_records_hold_our_statistics(table, out):
    for fold in folds(out / "SoftTripleLoss"):
        assert moved(fold, "fc", EPOCHS).min() > 0.01
    for fold in folds(out / OURS):
        assert moved(fold, "proxies", EPOCHS).min() > 0.01
        assert list(fold.glob("tensorboard_logs/events*"))
        rows = records(fold, "metric_loss_MultiProxyEntropyLoss", Statistics._fields)
        assert len(rows) == EPOCHS * ITERATIONS
        columns = dict(zip(Statistics._fields, zip(*rows, strict=True), strict=True))
        assert set(columns.pop("views_agree")) == {1.0}  # there is one view
        assert set(columns.pop("neighbor_loss")) == {0.0}
        assert all(len(set(column)) > 1 for column in columns.values())


def test_miner_and_regularizer_take_part(table, out):
    for fold in folds(out / OURS):
        pairs = records(fold, "tuple_miner_MultiProxyMiner", ["num_pos_pairs", "num_neg_pairs"])
        assert all(sum(column) > 0 for column in zip(*pairs, strict=True))
        regularizer = "metric_loss_MultiProxyEntropyLoss__modules_weight_regularizer_ProxyEntropyRegularizer"
        assert records(fold, regularizer, ["proxies_per_class"]) == [[10]] * (EPOCHS * ITERATIONS)


def test_resumes(run, table, out):
    options = ("--resume_training", "latest", "--merge_argparse_when_resuming", "--num_epochs_train", str(2 * EPOCHS))
    run("--root_experiment_folder", out, "--experiment_name", OURS, *options)
    for fold in folds(out / OURS):
        rows = records(fold, "metric_loss_MultiProxyEntropyLoss", ["~iteration~"])
        assert rows == [[iteration] for iteration in range(2 * EPOCHS * ITERATIONS)]
        (state,) = load(fold, f"metric_loss_optimizer_{2 * EPOCHS}")["state"].values()
        assert state["step"] == 2 * EPOCHS * ITERATIONS


@pytest.mark.parametrize("loss", ["multi_proxy", "soft_triple"])
def test_searches(run, digits_configs, tmp_path, loss):
    options = ("--root_experiment_folder", tmp_path, "--experiment_name", "search", "--bayes_opt_iters", "2")
    run(*options, *digits_configs(f"search_{loss}"), "--num_epochs_train", EPOCHS)
    with (tmp_path / "search" / "bayes_opt_record_keeper_logs" / "bayes_opt.csv").open() as file:
        first, second = csv.DictReader(file)
    assert first["trial_status"] == second["trial_status"] == "COMPLETED"
    found = {name for name in first if name.startswith("loss_funcs_metric_loss")}
    assert len(found) >= 4
    assert all(first[name] != second[name] for name in found)


SOP = "StanfordOnlineProducts"


@pytest.mark.parametrize(
    ("dataset", "generate", "general", "after_loss", "partitions", "classes"),
    [
        ("CUB200", cub200, "", "", 4, 75),
        ("Cars196", cars196, "--config_general [default, with_cars196]", ", $C/with_miner_and_regularizer", 4, 73),
        # A fourth of its classes would be thousands of images to embed.
        (SOP, stanford_online_products, "--config_general [default, with_sop]", "", 500, 11294),
    ],
)
def test_runs_on_the_data_sets_of_the_benchmarker(
    run, tmp_path, dataset, generate, general, after_loss, partitions, classes
):
    generate(tmp_path / "datasets")
    readme = (EXAMPLE / "README.md").read_text()
    assert general in readme
    command = re.search(r"```bash\n(C=.*?)\n```", readme, re.DOTALL)[1]
    command = command.replace("CUB200", dataset).replace("$C/multi_proxy", f"$C/multi_proxy{after_loss}")
    # No network whose weights would be downloaded, and as short as can be.
    options = (
        f"--dataset_root {tmp_path / 'datasets'} --root_experiment_folder {tmp_path / 'experiments'}",
        "--models {trunk~OVERRIDE~: {shufflenet_v2_x0_5: {}}}",
        "--trainer {MetricLossOnly: {iterations_per_epoch: 1, dataloader_num_workers: 0}}",
        "--tester {GlobalEmbeddingSpaceTester: {dataloader_num_workers: 0}}",
        "--split_manager {ClassDisjointSplitManager:",
        f"{{num_training_partitions: {partitions}, num_training_sets: 1}} }}",
        "--num_epochs_train 1 --save_interval 1",
    )
    words = " ".join(
        (command.replace("python examples/powerful_benchmarker/run.py", "printf '%s\n'"), general, *options)
    )
    printed = subprocess.run(["bash", "-euc", words], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    run(*printed.splitlines())
    (fold,) = (tmp_path / "experiments" / "cub_ours").glob(f"*Partitions{partitions}_0")
    distances = moved(fold, "proxies", 1)
    assert (distances.shape, distances.max() > 0.01) == ((classes, 10), True)
    group = "accuracies_normalized_GlobalEmbeddingSpaceTester_level_0_VAL_vs_self"
    *_, (epoch, accuracy) = records(fold, group, ["epoch", "precision_at_1_level0"])
    assert (epoch, 0.5 < accuracy <= 1) == (1, True)
    # Records of the proxies would fill the memory until they are written.
    assert not list(fold.glob("saved_csvs/*_parameters.csv"))
