"""The loss in the places where a PML loss goes, with PML unchanged."""

import copy
import csv
import pickle
import sqlite3
import subprocess
import sys

import pytest
import torch
from pml_multiproxy._statistics import Statistics
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers, testers, trainers
from pytorch_metric_learning.utils import common_functions, logging_presets
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch.utils.data import TensorDataset

import pml_multiproxy
from pml_multiproxy import MultiProxyEntropyLoss

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


def test_metric_loss_only_trains_the_proxies(loss_func):
    arguments = trainer_arguments(loss_func)
    before = loss_func(*dataset().tensors).item()
    proxies = loss_func.proxies.detach().clone()
    trainers.MetricLossOnly(**arguments).train(num_epochs=20)
    assert loss_func(arguments["models"]["trunk"](dataset().tensors[0]), dataset().tensors[1]).item() < before
    assert not loss_func.proxies.equal(proxies)
    assert not loss_func.proxy_usage.equal(torch.full((3, 4), 0.25))


def test_trainer_without_metric_loss_optimizer_leaves_the_proxies_frozen(loss_func):
    """PML's trap that the README warns of."""
    arguments = trainer_arguments(loss_func)
    del arguments["optimizers"]["metric_loss_optimizer"]
    proxies = loss_func.proxies.detach().clone()
    trainers.MetricLossOnly(**arguments).train(num_epochs=1)
    assert loss_func.proxies.equal(proxies)


def test_train_with_classifier(loss_func):
    arguments = trainer_arguments(loss_func, classifier=torch.nn.Linear(8, 3))
    arguments["loss_funcs"]["classifier_loss"] = torch.nn.CrossEntropyLoss()
    proxies = loss_func.proxies.detach().clone()
    trainers.TrainWithClassifier(**arguments).train(num_epochs=1)
    assert not loss_func.proxies.equal(proxies)


def test_trainer_with_a_tuple_miner(loss_func):
    arguments = trainer_arguments(loss_func)
    arguments["mining_funcs"] = {"tuple_miner": miners.MultiSimilarityMiner()}
    trainers.MetricLossOnly(**arguments).train(num_epochs=1)
    assert loss_func.proxies.isfinite().all()


def test_tester_uses_embeddings_of_a_trained_trunk(loss_func):
    arguments = trainer_arguments(loss_func)
    trainers.MetricLossOnly(**arguments).train(num_epochs=10)
    tester = testers.GlobalEmbeddingSpaceTester(
        dataloader_num_workers=0,
        accuracy_calculator=AccuracyCalculator(include=("precision_at_1",), k=1),
    )
    trunk = arguments["models"]["trunk"]
    # The trained network has to retrieve the same classes that it was trained with.
    accuracies = tester.test({"train": arguments["dataset"]}, 1, trunk)
    assert accuracies["train"]["precision_at_1_level0"] > 0.9


def test_hooks_write_the_statistics(tmp_path):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, collect_stats=True)
    arguments = trainer_arguments(loss_func)
    record_keeper, _, _ = logging_presets.get_record_keeper(str(tmp_path / "csv"), str(tmp_path / "tensorboard"))
    hooks = logging_presets.get_hook_container(record_keeper, validation_split_name="test", log_freq=1)
    tester = testers.GlobalEmbeddingSpaceTester(
        end_of_testing_hook=hooks.end_of_testing_hook,
        dataloader_num_workers=0,
        accuracy_calculator=AccuracyCalculator(include=("mean_average_precision_at_r",), k="max_bin_count"),
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
    assert len(stored) == len(rows)
    for row, values in zip(rows, stored, strict=True):
        assert [float(row[name]) for name in Statistics._fields] == pytest.approx(values)
        assert 0 < float(row["classification_loss"]) < 10
        assert 0 <= float(row["intra_class_entropy"]) <= 1.387
        assert 0 <= float(row["inter_class_entropy"]) <= 1.099
        assert 0 < float(row["proxies_in_use"]) <= 1
        assert 1 <= float(row["usage_perplexity"]) <= 4.001
        assert 1 <= float(row["min_effective_proxies"]) <= float(row["effective_proxies"])
        assert row["pooling"] == "logsumexp"
        assert float(row["scale"]) == 10
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
    composed = (
        loss_func.classification_loss
        + 0.3 * loss_func.intra_class_entropy
        + 0.1 * (torch.tensor(3).log().item() - loss_func.inter_class_entropy)
        + 0.5 * loss_func.balance
    )
    assert loss == pytest.approx(composed, rel=1e-5)
    assert all(type(getattr(loss_func, name)) is float for name in Statistics._fields)


def test_share_of_proxies_in_use(batch):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, collect_stats=True, usage_momentum=1.0)
    loss_func.proxy_usage.copy_(
        torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.98, 0.0, 0.01, 0.01], [0.48, 0.48, 0.03, 0.01]])
    )
    loss_func(*batch)
    assert loss_func.proxies_in_use == pytest.approx((4 + 1 + 3) / 12)


def test_perplexity_and_effective_proxies_by_hand(batch):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, collect_stats=True).eval()
    loss_func.proxy_usage.copy_(torch.rand(3, 4).softmax(dim=1))
    labels = torch.tensor([0, 2] * 6)  # class 1 is not in the batch
    similarities = torch.nn.functional.normalize(batch[0]) @ torch.nn.functional.normalize(loss_func.proxies, dim=-1).mT
    divergences = {0: [], 2: []}
    for i, y in enumerate(labels.tolist()):
        q, u = (similarities[y, i] / loss_func.temperature).softmax(dim=0), loss_func.proxy_usage[y]
        divergences[y].append((q * (q / u).log()).sum().item())
    effective = [torch.tensor(values).mean().exp().item() for values in divergences.values()]
    loss_func(batch[0], labels)
    assert loss_func.effective_proxies == pytest.approx(sum(effective) / 2, rel=1e-4)
    assert loss_func.min_effective_proxies == pytest.approx(min(effective), rel=1e-4)
    entropies = -(loss_func.proxy_usage * loss_func.proxy_usage.log()).sum(dim=1)
    assert loss_func.usage_perplexity == pytest.approx(entropies.exp().mean().item(), rel=1e-5)


def test_effective_proxies_show_a_collapse_that_the_usage_hides(batch):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, collect_stats=True)
    loss_func.proxies.data.copy_(loss_func.proxies[:, :1].expand(3, 4, 8))
    loss_func(*batch)
    assert loss_func.usage_perplexity == pytest.approx(4)
    assert loss_func.proxies_in_use == 1
    assert loss_func.effective_proxies == pytest.approx(1)


def test_statistics_of_an_empty_batch_are_zero(batch):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, collect_stats=True)
    loss_func(*batch)
    loss_func(batch[0][:0], batch[1][:0])
    assert all(getattr(loss_func, name) == 0 for name in Statistics._fields)


def test_statistics_are_not_collected_unless_asked_for(loss_func, batch):
    loss_func(*batch)
    assert not hasattr(loss_func, "classification_loss")


def test_distance_collects_its_own_statistics(batch):
    if "initial_avg_query_norm" not in distances.CosineSimilarity(collect_stats=True)._record_these_stats:
        pytest.fail("PML renamed the statistics of its distances")
    distance = distances.CosineSimilarity(collect_stats=True)
    MultiProxyEntropyLoss(3, 8, 4, distance=distance)(*batch)
    theirs = distances.CosineSimilarity(collect_stats=True)
    theirs(batch[0], batch[0])
    assert distance.initial_avg_query_norm == pytest.approx(theirs.initial_avg_query_norm)
    assert distance.final_avg_ref_norm == pytest.approx(1)


def test_subclass_of_cosine_similarity_computes_what_it_says(batch):
    class Doubled(distances.CosineSimilarity):
        def compute_mat(self, query_emb, ref_emb):
            return 2 * super().compute_mat(query_emb, ref_emb)

    plain = MultiProxyEntropyLoss(3, 8, 4, pooling="max")
    doubled = MultiProxyEntropyLoss(3, 8, 4, pooling="max", distance=Doubled())
    doubled.load_state_dict(plain.state_dict())
    torch.testing.assert_close(doubled.get_logits(batch[0]), 2 * plain.get_logits(batch[0]))


REDUCERS = {
    "MeanReducer": reducers.MeanReducer,
    "SumReducer": reducers.SumReducer,
    "AvgNonZeroReducer": reducers.AvgNonZeroReducer,
    "ThresholdReducer": lambda: reducers.ThresholdReducer(low=0.5, high=3),
    "ClassWeightedReducer": lambda: reducers.ClassWeightedReducer(torch.tensor([1.0, 2.0, 3.0])),
    "PerAnchorReducer": reducers.PerAnchorReducer,
    "DivisorReducer": reducers.DivisorReducer,
    "MultipleReducers": lambda: reducers.MultipleReducers({"loss": reducers.SumReducer()}),
}


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reducers(name, dtype, batch):
    embeddings, labels = batch[0].detach().to(dtype).requires_grad_(), batch[1]
    loss_func = MultiProxyEntropyLoss(3, 8, 4, reducer=REDUCERS[name]()).eval()
    losses = loss_func.compute_loss(embeddings, labels, None)["loss"]["losses"]
    past = (losses > 0.5) & (losses < 3)
    assert past.any()
    assert not past.all()
    expected = {
        "MeanReducer": losses.mean(),
        "SumReducer": losses.sum(),
        "AvgNonZeroReducer": losses[losses > 0].mean(),
        "ThresholdReducer": losses[past].mean(),
        "ClassWeightedReducer": (losses * (labels + 1)).mean(),
        "PerAnchorReducer": losses.mean(),
        "DivisorReducer": losses.mean(),
        "MultipleReducers": losses.sum().to(dtype),  # which adds the sub-losses up in the dtype of the embeddings
    }[name]
    loss = loss_func(embeddings, labels)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert loss_func.proxies.grad.isfinite().all()


def test_every_reducer_of_pml_is_tried():
    assert {name for name in vars(reducers) if name.endswith("Reducer")} - {"BaseReducer"} <= {
        *REDUCERS,
        "DoNothingReducer",
        "MultipleReducers",
    }


def test_do_nothing_reducer_gives_the_losses_of_the_samples(batch):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, reducer=reducers.DoNothingReducer())
    loss_dict = loss_func(*batch)
    assert list(loss_dict) == ["loss"]
    assert loss_dict["loss"]["losses"].shape == (12,)
    assert loss_dict["loss"]["reduction_type"] == "element"


def test_weight_and_embedding_regularizers(batch):
    plain = MultiProxyEntropyLoss(3, 8, 4).eval()
    regularized = MultiProxyEntropyLoss(
        3,
        8,
        4,
        weight_regularizer=regularizers.RegularFaceRegularizer(),
        weight_reg_weight=0.3,
        embedding_regularizer=regularizers.LpRegularizer(),
        embedding_reg_weight=0.2,
    ).eval()
    regularized.proxies.data.copy_(plain.proxies)
    expected = (
        plain(*batch)
        + 0.3 * regularizers.RegularFaceRegularizer()(plain.proxies.flatten(0, 1))
        + 0.2 * regularizers.LpRegularizer()(batch[0])
    )
    loss = regularized(*batch)
    torch.testing.assert_close(loss, expected)
    assert regularized.sub_loss_names() == ["loss", "weight_reg_loss", "embedding_reg_loss"]


def test_weight_init_func_gets_all_proxies_as_rows():
    seen = []

    def init(weights):
        seen.append(weights.shape)
        torch.nn.init.constant_(weights, 2.0)

    loss_func = MultiProxyEntropyLoss(3, 8, 4, weight_init_func=init)
    assert seen == [(12, 8)]
    assert loss_func.proxies.equal(torch.full((3, 4, 8), 2.0))
    wrapped = common_functions.TorchInitWrapper(torch.nn.init.kaiming_normal_, mode="fan_out")
    assert MultiProxyEntropyLoss(3, 8, 4, weight_init_func=wrapped).proxies.norm(dim=-1).std() > 0


def test_proxies_start_at_unit_norm(loss_func):
    torch.testing.assert_close(loss_func.proxies.norm(dim=-1), torch.ones(3, 4))
    assert loss_func.proxies.shape == (3, 4, 8)
    assert isinstance(loss_func.proxies, torch.nn.Parameter)


def test_multiple_losses(loss_func, batch):
    contrastive = losses.ContrastiveLoss()
    both = losses.MultipleLosses([loss_func, contrastive], weights=[1, 0.5])
    expected = copy.deepcopy(loss_func)(*batch) + 0.5 * contrastive(*batch)
    torch.testing.assert_close(both(*batch), expected)
    assert {"losses.0.proxies", "losses.0.proxy_usage"} <= set(both.state_dict())


def test_backward_twice_gives_the_same_gradient_twice(loss_func, batch):
    loss = loss_func(*batch)
    loss.backward(retain_graph=True)
    first = loss_func.proxies.grad.clone(), batch[0].grad.clone()
    loss.backward()
    torch.testing.assert_close(loss_func.proxies.grad, 2 * first[0])
    torch.testing.assert_close(batch[0].grad, 2 * first[1])


def test_autocast_leaves_the_parameters_float32(loss_func, batch):
    network = torch.nn.Linear(8, 8)
    exact = copy.deepcopy(loss_func)(network(batch[0]), batch[1])
    optimizer = torch.optim.SGD([*network.parameters(), *loss_func.parameters()], lr=0.1)
    before = loss_func.proxies.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = network(batch[0])
        assert embeddings.dtype == torch.bfloat16
        loss = loss_func(embeddings, batch[1])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)
    loss.backward()
    assert loss_func.proxies.grad.dtype == torch.float32
    optimizer.step()
    assert loss_func.proxies.dtype == torch.float32
    assert not loss_func.proxies.equal(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_parameters_keep_their_dtype(dtype, loss_func, batch):
    loss_func(batch[0].to(dtype), batch[1]).backward()
    assert loss_func.proxies.dtype == torch.float32
    assert batch[0].grad.isfinite().all()


def test_state_dict_round_trip(loss_func, batch, tmp_path):
    loss_func(*batch)
    torch.save(loss_func.state_dict(), tmp_path / "loss.pth")
    other = MultiProxyEntropyLoss(3, 8, 4)
    other.load_state_dict(torch.load(tmp_path / "loss.pth", weights_only=True))
    assert sorted(other.state_dict()) == ["proxies", "proxy_usage"]
    assert other.eval()(*batch).equal(loss_func.eval()(*batch))


def test_copies_and_pickles(loss_func, batch):
    loss_func(*batch)
    expected = loss_func.eval()(*batch)
    for other in (copy.deepcopy(loss_func), pickle.loads(pickle.dumps(loss_func))):
        assert other(*batch).equal(expected)


def make_training():
    torch.manual_seed(3)
    network, loss_func = torch.nn.Linear(8, 8), MultiProxyEntropyLoss(3, 8, 4)
    return network, loss_func, torch.optim.Adam([*network.parameters(), *loss_func.parameters()], lr=0.01)


def train(network, loss_func, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        embeddings = network(torch.randn(10, 8, generator=generator))
        loss = loss_func(embeddings, torch.randint(3, (10,), generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_resumed_training_equals_training_straight_through(tmp_path):
    straight = make_training()
    train(*straight, range(12))

    interrupted = make_training()
    train(*interrupted, range(5))
    torch.save([part.state_dict() for part in interrupted], tmp_path / "checkpoint.pth")
    resumed = make_training()
    for part, state in zip(resumed, torch.load(tmp_path / "checkpoint.pth", weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*resumed, range(5, 12))
    for part, expected in zip(resumed[:2], straight[:2], strict=True):
        for name, value in part.state_dict().items():
            assert value.equal(expected.state_dict()[name]), name


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
assert miners.MultiProxyMiner is pml_multiproxy.miners.MultiProxyMiner
assert regularizers.ProxyEntropyRegularizer is pml_multiproxy.regularizers.ProxyEntropyRegularizer
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    assert pml_multiproxy.MultiProxyEntropyLoss is pml_multiproxy.losses.MultiProxyEntropyLoss
    positional, by_name = MultiProxyEntropyLoss(3, 8), MultiProxyEntropyLoss(num_classes=3, embedding_size=8)
    assert positional.proxies.shape == by_name.proxies.shape == (3, 30, 8)
