"""MultiProxyMiner against its definition, sample by sample, and in the places where PML uses miners."""

import copy
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning import distances, losses, trainers
from pytorch_metric_learning.utils import loss_and_miner_utils
from torch.utils.data import TensorDataset

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.miners import MultiProxyMiner

DISTANCES = {
    "cosine": distances.CosineSimilarity,
    "dot product": lambda: distances.DotProductSimilarity(normalize_embeddings=False),
    "L2": distances.LpDistance,
    "L1 squared, not normalized": lambda: distances.LpDistance(p=1, power=2, normalize_embeddings=False),
    "SNR": distances.SNRDistance,
}


def similarity(loss_func, x, w):
    value = loss_func.distance(x[None], w[None]).item()
    return value if loss_func.distance.is_inverted else -value


def nearest(loss_func, x, y):
    """(proxy, similarity) of the nearest proxy of class y."""
    values = [similarity(loss_func, x, w) for w in loss_func.proxies[y]]
    return max(range(len(values)), key=values.__getitem__), max(values)


def mine_by_hand(loss_func, margin, embeddings, labels, ref_emb, ref_labels):
    positives, negatives = [], []
    for i, (x, y) in enumerate(zip(embeddings, labels, strict=True)):
        k, own = nearest(loss_func, x, y)
        for j, (other, other_label) in enumerate(zip(ref_emb, ref_labels, strict=True)):
            if other_label == y:
                if nearest(loss_func, other, y)[0] == k and not (ref_emb is embeddings and i == j):
                    positives.append((i, j))
            elif similarity(loss_func, other, loss_func.proxies[y, k]) >= own - margin:
                negatives.append((i, j))
    return positives, negatives


def pairs(tuple_of_four):
    a1, p, a2, n = tuple_of_four
    return list(zip(a1.tolist(), p.tolist(), strict=True)), list(zip(a2.tolist(), n.tolist(), strict=True))


@pytest.mark.parametrize("with_references", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.3, -0.2])
@pytest.mark.parametrize("distance", DISTANCES)
@torch.no_grad()
def test_definition(distance, margin, with_references):
    loss_func = MultiProxyEntropyLoss(4, 6, 3, distance=DISTANCES[distance]()).double()
    embeddings, labels = torch.randn(15, 6).double(), torch.randint(4, (15,))
    references = (torch.randn(9, 6).double(), torch.randint(3, (9,))) if with_references else (embeddings, labels)
    expected = mine_by_hand(loss_func, margin, embeddings, labels, *references)
    given = references if with_references else ()
    assert pairs(MultiProxyMiner(loss_func, margin)(embeddings, labels, *given)) == expected
    assert expected[0]
    assert expected[1]


@given(
    seed=st.integers(0, 2**31 - 1),
    batch=st.integers(0, 9),
    classes=st.integers(1, 4),
    per_class=st.integers(1, 4),
    margin=st.floats(-1, 1),
)
@torch.no_grad()
def test_definition_for_any_sizes(seed, batch, classes, per_class, margin):
    torch.manual_seed(seed)
    loss_func = MultiProxyEntropyLoss(classes, 3, per_class).double()
    embeddings, labels = torch.randn(batch, 3).double(), torch.randint(classes, (batch,))
    expected = mine_by_hand(loss_func, margin, embeddings, labels, embeddings, labels)
    assert pairs(MultiProxyMiner(loss_func, margin)(embeddings, labels)) == expected


@torch.no_grad()
def test_embeddings_as_their_own_references(loss_func, batch):
    miner = MultiProxyMiner(loss_func)
    alone, referred = miner(*batch), miner(*batch, *batch)
    assert all(a.equal(b) for a, b in zip(alone, referred, strict=True))
    a1, p, _, _ = miner(*batch, batch[0].clone(), batch[1])
    assert (a1 == p).sum() == 12  # another tensor: a sample and its copy are a pair


@torch.no_grad()
def test_references_without_labels_have_those_of_the_batch_as_in_pml():
    loss_func = MultiProxyEntropyLoss(4, 6, 3).double()
    embeddings, labels = torch.randn(15, 6).double(), torch.randint(4, (15,))
    references = embeddings + 0.1 * torch.randn(15, 6).double()
    positives, negatives = mine_by_hand(loss_func, 0.2, embeddings, labels, references, labels)
    alone = [(i, j) for i, j in positives if i != j]
    assert 0 < len(alone) < len(positives)
    mined = MultiProxyMiner(loss_func, 0.2)(embeddings, labels, references)
    assert pairs(mined) == (alone, negatives)
    # Of all pairs that PML's own miners choose from.
    everything = pairs(loss_and_miner_utils.get_all_pairs_indices(labels, None))
    assert all(set(found) <= set(possible) for found, possible in zip(pairs(mined), everything, strict=True))


def test_mines_nothing_where_there_is_nothing(loss_func):
    loss_func.proxies.data[0] = torch.eye(8)[:4]
    loss_func.proxies.data[1] = torch.eye(8)[4:]
    embeddings = torch.eye(8)[[0, 1, 4, 5]].requires_grad_()  # each at a proxy of its own
    labels = torch.tensor([0, 0, 1, 1])
    found = MultiProxyMiner(loss_func)(embeddings, labels)
    assert [len(indices) for indices in found] == [0, 0, 0, 0]
    assert all(indices.dtype == torch.long for indices in found)
    for pair_loss in (losses.ContrastiveLoss(), losses.MultiSimilarityLoss(), losses.TripletMarginLoss()):
        assert pair_loss(embeddings, labels, found) == 0


def test_does_not_touch_the_loss(loss_func, batch):
    before = copy.deepcopy(loss_func.state_dict())
    MultiProxyMiner(loss_func)(*batch)
    assert all(value.equal(before[name]) for name, value in loss_func.state_dict().items())
    assert loss_func.training
    assert loss_func.proxies.grad is None


PAIR_LOSSES = {
    "MultiSimilarityLoss": losses.MultiSimilarityLoss,
    "ContrastiveLoss": lambda: losses.ContrastiveLoss(neg_margin=2),
    "TripletMarginLoss": lambda: losses.TripletMarginLoss(margin=1),
    "NTXentLoss": losses.NTXentLoss,
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_pair_and_triplet_losses(name, loss_func, batch):
    pair_loss = PAIR_LOSSES[name]()
    mined = MultiProxyMiner(loss_func, negative_margin=1.0)(*batch)
    loss = pair_loss(*batch, mined)
    loss.backward()
    assert loss > 0
    assert batch[0].grad.abs().sum() > 0
    assert not torch.isclose(loss, pair_loss(*batch))


def test_multiple_losses_with_its_miner(loss_func, batch):
    pair_loss, miner = losses.MultiSimilarityLoss(), MultiProxyMiner(loss_func)
    both = losses.MultipleLosses([loss_func, pair_loss], miners=[None, miner], weights=[1, 0.1])
    expected = copy.deepcopy(loss_func)(*batch) + 0.1 * pair_loss(*batch, miner(*batch))
    torch.testing.assert_close(both(*batch), expected)
    assert len(list(both.parameters())) == 1
    assert sorted(name for name in both.state_dict() if "prox" in name) == ["losses.0.proxies", "losses.0.proxy_usage"]


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")  # by the bar of PML's trainers
def test_trainer(loss_func):
    trunk = torch.nn.Linear(8, 8)
    both = losses.MultipleLosses([loss_func, losses.MultiSimilarityLoss()])
    before = trunk.weight.detach().clone()
    trainers.MetricLossOnly(
        models={"trunk": trunk},
        optimizers={
            "trunk_optimizer": torch.optim.Adam(trunk.parameters()),
            "metric_loss_optimizer": torch.optim.Adam(both.parameters()),
        },
        batch_size=12,
        loss_funcs={"metric_loss": both},
        mining_funcs={"tuple_miner": MultiProxyMiner(loss_func, collect_stats=True)},
        dataset=TensorDataset(torch.randn(24, 8), torch.arange(24) % 3),
        dataloader_num_workers=0,
    ).train(num_epochs=1)
    assert not trunk.weight.equal(before)


def test_cross_batch_memory(loss_func):
    """The memory holds the batch itself: its pairs with itself must not be counted as positives."""
    seen = []

    class Recording(losses.ContrastiveLoss):
        def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
            seen.append((embeddings, ref_emb, indices_tuple))
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)

    Recording.__name__ = "ContrastiveLoss"  # PML goes by the name
    memory = losses.CrossBatchMemory(Recording(), 8, memory_size=32, miner=MultiProxyMiner(loss_func))
    for _ in range(4):
        memory(torch.randn(12, 8, requires_grad=True), torch.arange(12) % 3).backward()
    embeddings, references, (anchors, positives, _, negatives) = seen[-1]
    assert len(references) == 32
    assert not (embeddings[anchors] == references[positives]).all(dim=1).any()
    assert len(positives) > 0
    assert len(negatives) > 0


def test_statistics(loss_func, batch):
    miner = MultiProxyMiner(loss_func, negative_margin=0.1, collect_stats=True)
    found = miner(*batch)
    assert (miner.num_pos_pairs, miner.num_neg_pairs) == (len(found[0]), len(found[2]))
    assert "negative_margin" in miner._record_these


def test_does_not_own_the_loss(loss_func):
    miner = MultiProxyMiner(loss_func)
    assert list(miner.parameters()) == []
    assert miner.state_dict() == {}
    assert miner.loss_func is loss_func


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copied, loss_func, batch):
    miner = MultiProxyMiner(loss_func)
    together = copied({"loss": loss_func, "miner": miner})
    assert together["miner"].loss_func is together["loss"]
    alone = copied(miner)
    assert alone.loss_func is not loss_func
    assert all(a.equal(b) for a, b in zip(alone(*batch), miner(*batch), strict=True))


def test_bad_arguments(loss_func, batch):
    with pytest.raises(TypeError, match="loss_func must be a MultiProxyEntropyLoss, got SoftTripleLoss"):
        MultiProxyMiner(losses.SoftTripleLoss(3, 8))
    for margin in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"negative_margin must be a finite number, got {margin}"):
            MultiProxyMiner(loss_func, margin)
    with pytest.raises(TypeError, match="negative_margin must be a finite number, got '1' of type str"):
        MultiProxyMiner(loss_func, "1")
    with pytest.raises(TypeError, match="distance"):
        MultiProxyMiner(loss_func, distance=distances.LpDistance())
    miner, (embeddings, labels) = MultiProxyMiner(loss_func), batch
    for arguments, message in (
        ((embeddings[:, :5], labels), "embeddings must be of shape (batch_size, 8), got (12, 5)"),
        ((embeddings, labels + 1), "labels must lie in [0, 2] (num_classes is 3), got values from 1 to 3"),
        ((embeddings, labels, embeddings[:5]), "ref_labels must be given, a tensor of shape (5,), got None"),
        ((embeddings[:5], labels), "labels must be of shape (5,), one for each embedding, got (12,)"),
        ((embeddings[0, 0], labels), "embeddings must be of shape (batch_size, 8), got ()"),
        ((embeddings, labels[0]), "labels must be of shape (12,), one for each embedding, got ()"),
        ((embeddings, None), "labels must be given, a tensor of shape (12,), got None"),
        ((embeddings, labels, embeddings[:, :5], labels), "ref_emb must be of shape (batch_size, 8), got (12, 5)"),
        ((embeddings, labels, embeddings, labels + 1), "ref_labels must lie in [0, 2] (num_classes is 3)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            miner(*arguments)
    for arguments, message in (
        ((embeddings.tolist(), labels), "embeddings must be a torch.Tensor of shape (batch_size, 8), got list"),
        ((embeddings, labels.numpy()), "labels must be a torch.Tensor of shape (12,), got ndarray"),
        ((embeddings, labels, embeddings.tolist(), labels), "ref_emb must be a torch.Tensor of shape (batch_size, 8)"),
        ((embeddings, labels, embeddings, labels.numpy()), "ref_labels must be a torch.Tensor of shape (12,)"),
    ):
        with pytest.raises(TypeError, match=re.escape(message)):
            miner(*arguments)
