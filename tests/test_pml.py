"""The loss in the places where a PML loss goes, with PML unchanged."""

import csv
import sqlite3
import subprocess
import sys

import pytest
import torch
from cases import make_distance
from pytorch_metric_learning import distances, miners, reducers, regularizers, testers, trainers
from pytorch_metric_learning.utils import common_functions, logging_presets
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch.utils.data import TensorDataset

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy._monitor import Statistics

# The trainer's progress bar does that with every loss.
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")


def dataset(count=48):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    centers, noise = torch.randn(3, 8, generator=generator), torch.randn(count, 8, generator=generator)
    return TensorDataset(centers[labels] + 0.3 * noise, labels)


def trainer_arguments(loss_func, **models):
    models = {"trunk": torch.nn.Linear(8, 8), **models}
    optimizers = {f"{name}_optimizer": torch.optim.Adam(model.parameters()) for name, model in models.items()}
    optimizers["metric_loss_optimizer"] = torch.optim.Adam(loss_func.parameters(), lr=0.01)
    return {
        "models": models,
        "optimizers": optimizers,
        "batch_size": 12,
        "loss_funcs": {"metric_loss": loss_func},
        "dataset": dataset(),
        "dataloader_num_workers": 0,
    }


def test_metric_loss_only_trains_the_proxies_and_the_tester_sees_it(loss_func):
    arguments = trainer_arguments(loss_func)
    before = loss_func.eval()(*dataset().tensors).item()
    proxies = loss_func.proxies.detach().clone()
    arguments["mining_funcs"] = {"tuple_miner": miners.MultiSimilarityMiner()}
    trainers.MetricLossOnly(**arguments).train(num_epochs=20)
    trunk = arguments["models"]["trunk"]
    assert loss_func(trunk(dataset().tensors[0]), dataset().tensors[1]).item() < before
    assert not loss_func.proxies.equal(proxies)
    assert not loss_func.proxy_usage.equal(torch.full((3, 4), 0.25))
    calculator = AccuracyCalculator(include=("precision_at_1",), k=1)
    tester = testers.GlobalEmbeddingSpaceTester(dataloader_num_workers=0, accuracy_calculator=calculator)
    # The trained network has to retrieve the same classes that it was trained with.
    accuracies = tester.test({"train": arguments["dataset"]}, 1, trunk)
    assert accuracies["train"]["precision_at_1_level0"] > 0.9


def test_hooks_write_the_statistics(tmp_path):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, collect_stats=True)
    arguments = trainer_arguments(loss_func)
    record_keeper, _, _ = logging_presets.get_record_keeper(str(tmp_path / "csv"), str(tmp_path / "tensorboard"))
    hooks = logging_presets.get_hook_container(record_keeper, validation_split_name="test", log_freq=1)
    calculator = AccuracyCalculator(include=("mean_average_precision_at_r",), k="max_bin_count")
    tester = testers.GlobalEmbeddingSpaceTester(
        end_of_testing_hook=hooks.end_of_testing_hook, dataloader_num_workers=0, accuracy_calculator=calculator
    )
    trainers.MetricLossOnly(
        **arguments,
        end_of_iteration_hook=hooks.end_of_iteration_hook,
        end_of_epoch_hook=hooks.end_of_epoch_hook(tester, {"test": dataset()}, str(tmp_path / "models")),
    ).train(num_epochs=2)

    table = "metric_loss_MultiProxyEntropyLoss"
    with open(tmp_path / "csv" / f"{table}.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(arguments["dataset"]) // 12
    with sqlite3.connect(tmp_path / "csv" / "logs.db") as database:
        stored = database.execute(f"select {', '.join(Statistics._fields)} from {table}").fetchall()
    for row, values in zip(rows, stored, strict=True):
        assert [float(row[name]) for name in Statistics._fields] == pytest.approx(values)
        assert (row["pooling"], float(row["scale"])) == ("logsumexp", 10)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {f"{table}/{name}" for name in Statistics._fields} <= set(events.Tags()["scalars"])
    # The models that the hooks saved load again, the loss among them.
    saved = torch.load(tmp_path / "models" / "metric_loss_2.pth", weights_only=True)
    assert saved["proxies"].equal(loss_func.proxies)


def test_statistics_are_numbers_and_zero_for_an_empty_batch(batch):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, collect_stats=True)
    loss_func(*batch)
    assert all(type(getattr(loss_func, name)) is float for name in Statistics._fields)
    loss_func(batch[0][:0], batch[1][:0])  # zero, as in PML
    assert all(getattr(loss_func, name) == 0 for name in Statistics._fields)


def recorded(distance):
    return [getattr(distance, f"{when}_avg_{what}_norm") for when in ("initial", "final") for what in ("query", "ref")]


@pytest.mark.parametrize("cls", [distances.CosineSimilarity, distances.LpDistance, distances.SNRDistance])
def test_looking_leaves_what_the_distance_recorded(cls, batch):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, distance=cls(collect_stats=True))
    loss_func(*batch)
    before, (x, y) = recorded(loss_func.distance), (5 * batch[0].detach(), batch[1])
    loss_func.assign(x)
    loss_func.assign(x, y)
    loss_func.soft_assign(x, y)
    if cls is distances.CosineSimilarity:
        loss_func.get_outliers(x, y)
    loss_func.init_proxies(x, y)
    assert recorded(loss_func.distance) == before


REDUCERS = {
    "MeanReducer": reducers.MeanReducer,
    "SumReducer": reducers.SumReducer,
    "AvgNonZeroReducer": reducers.AvgNonZeroReducer,
    "ThresholdReducer": lambda: reducers.ThresholdReducer(low=1, high=3),
    "ClassWeightedReducer": lambda: reducers.ClassWeightedReducer(torch.tensor([1.0, 2.0, 3.0])),
    "PerAnchorReducer": reducers.PerAnchorReducer,
    "DivisorReducer": reducers.DivisorReducer,
    "MultipleReducers": lambda: reducers.MultipleReducers({"loss": reducers.SumReducer()}),
}


@pytest.mark.parametrize("name", REDUCERS)
def test_reducers(name, batch):
    for dtype in (torch.float32, torch.bfloat16):
        embeddings, labels = batch[0].detach().to(dtype).requires_grad_(), batch[1]
        loss_func = MultiProxyEntropyLoss(3, 8, 4, reducer=REDUCERS[name]()).eval()
        losses = loss_func.compute_loss(embeddings, labels, None)["loss"]["losses"]
        within = (losses > 1) & (losses < 3)
        assert 0 < within.sum() < 12
        expected = {
            "SumReducer": losses.sum(),
            "AvgNonZeroReducer": losses[losses > 0].mean(),
            "ThresholdReducer": losses[within].mean(),
            "ClassWeightedReducer": (losses * (labels + 1)).mean(),
            "MultipleReducers": losses.sum().to(dtype),  # which adds the sub-losses up in the dtype of the embeddings
        }.get(name, losses.mean())
        loss = loss_func(embeddings, labels)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert loss_func.proxies.grad.isfinite().all()


@pytest.mark.parametrize("name", REDUCERS)
def test_empty_batch(name):
    regularized = {"embedding_regularizer": regularizers.LpRegularizer()}
    for options in ({}, {"classes_per_chunk": 1}, {"distance": make_distance("L2")}, {"views": 2}, regularized):
        loss_func = MultiProxyEntropyLoss(3, 8, 4, reducer=REDUCERS[name](), **options)
        embeddings = torch.empty(0, 8, requires_grad=True)
        loss = loss_func(embeddings, torch.empty(0, dtype=torch.long))
        loss.backward()
        assert loss == 0
        assert embeddings.grad.shape == (0, 8)
        assert loss_func.proxies.grad.eq(0).all()
        assert loss_func.proxy_usage.equal(torch.full((3, 4), 0.25))


def test_every_reducer_of_pml_is_tried(batch):
    names = {name for name in vars(reducers) if name.endswith(("Reducer", "Reducers"))}
    assert names - {"BaseReducer"} == {*REDUCERS, "DoNothingReducer"}
    loss_dict = MultiProxyEntropyLoss(3, 8, 4, reducer=reducers.DoNothingReducer())(*batch)
    assert list(loss_dict) == ["loss"]
    assert loss_dict["loss"]["losses"].shape == (12,)
    assert loss_dict["loss"]["reduction_type"] == "element"


@pytest.mark.parametrize("regularizer", [regularizers.RegularFaceRegularizer, regularizers.LpRegularizer])
def test_weight_and_embedding_regularizers_also_under_autocast(regularizer, batch):
    plain = MultiProxyEntropyLoss(3, 8, 4).eval()
    of_weights = {"weight_regularizer": regularizer(), "weight_reg_weight": 0.3}
    of_embeddings = {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.2}
    regularized = MultiProxyEntropyLoss(3, 8, 4, **of_weights, **of_embeddings).eval()
    regularized.load_state_dict(plain.state_dict())
    terms = 0.3 * regularizer()(plain.proxies.flatten(0, 1)) + 0.2 * regularizers.LpRegularizer()(batch[0])
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, expected = regularized(*batch), plain(*batch) + terms
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected)
    assert regularized.sub_loss_names() == ["loss", "weight_reg_loss", "embedding_reg_loss"]


def test_initial_proxies():
    seen = []

    def init(weights):
        seen.append(weights.shape)
        torch.nn.init.constant_(weights, 2.0)

    loss_func = MultiProxyEntropyLoss(3, 8, 4, weight_init_func=init)
    assert seen == [(12, 8)]
    assert loss_func.proxies.equal(torch.full((3, 4, 8), 2.0))
    wrapped = common_functions.TorchInitWrapper(torch.nn.init.kaiming_normal_, mode="fan_out")
    assert MultiProxyEntropyLoss(3, 8, 4, weight_init_func=wrapped).proxies.norm(dim=-1).std() > 0


def test_starts_on_the_meta_device(batch):
    torch.manual_seed(1)
    expected = MultiProxyEntropyLoss(3, 8, 4)
    with torch.device("meta"):
        loss_func = MultiProxyEntropyLoss(3, 8, 4)
    assert loss_func.proxies.is_meta
    loss_func.to_empty(device="cpu").proxy_usage.fill_(float("nan"))
    torch.manual_seed(1)
    loss_func.reset_parameters()
    torch.testing.assert_close(loss_func.proxies.norm(dim=-1), torch.ones(3, 4))
    assert loss_func.proxy_usage.equal(torch.full((3, 4), 0.25))
    assert loss_func.proxies.equal(expected.proxies)
    assert loss_func(*batch).equal(expected(*batch))


@pytest.mark.slow
def test_register_is_idempotent_and_importing_changes_nothing():
    code = """
from pytorch_metric_learning import losses, miners, regularizers
modules = losses, miners, regularizers
before = [set(vars(module)) for module in modules]
import pml_multiproxy
assert [set(vars(module)) for module in modules] == before
pml_multiproxy.register()
pml_multiproxy.register()
added = [set(vars(module)) - names for module, names in zip(modules, before)]
assert added == [{"MultiProxyEntropyLoss"}, {"MultiProxyMiner"}, {"ProxyEntropyRegularizer"}], added
assert losses.MultiProxyEntropyLoss is pml_multiproxy.losses.MultiProxyEntropyLoss
"""
    subprocess.run([sys.executable, "-c", code], check=True)
