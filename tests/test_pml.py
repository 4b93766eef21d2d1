"""The loss in the places where a PML loss goes, with PML unchanged."""

import copy
import csv
import math
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


def test_statistics_are_means_of_the_terms(batch):
    weights = {"intra_weight": 0.3, "inter_weight": 0.1, "balance_weight": 0.5}
    loss_func = MultiProxyEntropyLoss(3, 8, 4, collect_stats=True, **weights)
    loss = loss_func(*batch).item()
    inter = math.log(3) - loss_func.inter_class_entropy
    terms = 0.3 * loss_func.intra_class_entropy + 0.1 * inter + 0.5 * loss_func.balance
    assert loss == pytest.approx(loss_func.classification_loss + terms, rel=1e-5)
    assert all(type(getattr(loss_func, name)) is float for name in Statistics._fields)
    loss_func(batch[0][:0], batch[1][:0])  # an empty batch has none: they are zero, as in PML
    assert all(getattr(loss_func, name) == 0 for name in Statistics._fields)


def test_share_of_proxies_in_use(batch):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, collect_stats=True, usage_momentum=1.0)
    usage = [[0.25, 0.25, 0.25, 0.25], [0.98, 0.0, 0.01, 0.01], [0.48, 0.48, 0.03, 0.01]]
    loss_func.proxy_usage.copy_(torch.tensor(usage))
    loss_func(*batch)
    assert loss_func.proxies_in_use == pytest.approx((4 + 1 + 3) / 12)


def test_perplexity_and_effective_proxies_by_hand(batch):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, collect_stats=True).eval()
    loss_func.proxy_usage.copy_(torch.rand(3, 4).softmax(dim=1))
    labels = torch.tensor([0, 2] * 6)  # class 1 is not in the batch
    q, u = loss_func.soft_assign(batch[0], labels), loss_func.proxy_usage[labels]
    divergences = (q * (q / u).log()).sum(dim=1)
    effective = [divergences[labels == c].mean().exp().item() for c in (0, 2)]
    loss_func(batch[0], labels)
    assert loss_func.effective_proxies == pytest.approx(sum(effective) / 2, rel=1e-4)
    assert loss_func.min_effective_proxies == pytest.approx(min(effective), rel=1e-4)
    entropies = -(loss_func.proxy_usage * loss_func.proxy_usage.log()).sum(dim=1)
    assert loss_func.usage_perplexity == pytest.approx(entropies.exp().mean().item(), rel=1e-5)


def recorded(distance):
    return [getattr(distance, f"{when}_avg_{what}_norm") for when in ("initial", "final") for what in ("query", "ref")]


@pytest.mark.parametrize("cls", [distances.CosineSimilarity, distances.LpDistance])
def test_distances_record_the_norms_of_all_proxies_dense_and_streamed(cls, batch):
    for per_chunk in (None, 1):
        torch.manual_seed(1)
        loss_func = MultiProxyEntropyLoss(3, 8, 4, distance=cls(collect_stats=True), classes_per_chunk=per_chunk)
        loss_func.proxies.data *= torch.rand(3, 4, 1)
        theirs = cls(collect_stats=True)
        theirs(batch[0], loss_func.proxies.flatten(0, 1))
        loss_func(*batch)
        assert recorded(loss_func.distance) == pytest.approx(recorded(theirs))
        loss_func.distance.reset_stats()
        loss_func.get_logits(batch[0])
        assert recorded(loss_func.distance) == pytest.approx(recorded(theirs))


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


class Doubled(MultiProxyEntropyLoss):
    def compute_loss(self, *args, **kwargs):
        loss_dict = super().compute_loss(*args, **kwargs)
        loss_dict["loss"]["losses"] = 2 * loss_dict["loss"]["losses"]
        return loss_dict


class DoubledCosine(distances.CosineSimilarity):
    def compute_mat(self, query_emb, ref_emb):
        return 2 * super().compute_mat(query_emb, ref_emb)


def test_subclasses_of_loss_and_distance_are_honoured(loss_func, batch):
    for options in ({}, {"classes_per_chunk": 1}, {"distance": make_distance("L2")}):
        plain, doubled = (cls(3, 8, 4, **options) for cls in (MultiProxyEntropyLoss, Doubled))
        doubled.load_state_dict(plain.state_dict())
        torch.testing.assert_close(doubled(*batch), 2 * plain(*batch))
        assert doubled.proxy_usage.equal(plain.proxy_usage)
    loss_func.pooling = "max"
    other = copy.deepcopy(loss_func)
    other.distance = DoubledCosine()
    torch.testing.assert_close(other.get_logits(batch[0]), 2 * loss_func.get_logits(batch[0]))


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


def empty_loss_and_gradients(**options):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, **options)
    embeddings = torch.empty(0, 8, requires_grad=True)
    loss = loss_func(embeddings, torch.empty(0, dtype=torch.long))
    loss.backward()
    assert embeddings.grad.shape == (0, 8)
    assert loss_func.proxy_usage.equal(torch.full((3, 4), 0.25))
    return loss.item(), loss_func.proxies.grad


@pytest.mark.parametrize("name", REDUCERS)
def test_empty_batch(name):
    for options in ({}, {"classes_per_chunk": 1}, {"distance": make_distance("L2")}, {"views": 2}):
        loss, gradient = empty_loss_and_gradients(reducer=REDUCERS[name](), **options)
        assert loss == 0
        assert gradient.eq(0).all()


def test_empty_batch_with_an_embedding_regularizer():
    loss, gradient = empty_loss_and_gradients(embedding_regularizer=regularizers.LpRegularizer())
    assert loss == 0
    assert gradient.eq(0).all()


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_parameters_keep_their_dtype(dtype, loss_func, batch):
    embeddings = batch[0].detach().to(dtype).requires_grad_()
    exact = copy.deepcopy(loss_func)(*batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = loss_func(embeddings, batch[1])
    torch.testing.assert_close(loss.float(), exact, rtol=0.05, atol=0.05)
    loss.backward()
    torch.optim.SGD(loss_func.parameters(), 0.1).step()
    assert loss_func.proxies.dtype == loss_func.proxies.grad.dtype == torch.float32
    assert embeddings.grad.dtype == dtype


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
