"""MultiProxyMiner against its definition, sample by sample, and in the places where PML uses miners."""

import copy
import pickle
import re

import pytest
import torch
from cases import DISTANCES, make_distance
from pytorch_metric_learning import losses
from pytorch_metric_learning.utils import loss_and_miner_utils

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.miners import MultiProxyMiner


def similarities(loss_func, samples):
    """Of each sample to each proxy of each class, as lists."""
    shape = loss_func.proxies.shape[:2]
    for x in samples:
        values = loss_func.distance(x[None], loss_func.proxies.flatten(0, 1)).view(shape)
        yield (values if loss_func.distance.is_inverted else -values).tolist()


def nearest(values):
    return max(range(len(values)), key=values.__getitem__)


def mine_by_hand(loss_func, margin, embeddings, labels, ref_emb, ref_labels):
    positives, negatives = [], []
    references = list(zip(similarities(loss_func, ref_emb), ref_labels, strict=True))
    for i, (of_sample, y) in enumerate(zip(similarities(loss_func, embeddings), labels, strict=True)):
        k = nearest(of_sample[y])
        for j, (of_other, other_label) in enumerate(references):
            if other_label == y:
                if nearest(of_other[y]) == k and not (ref_emb is embeddings and i == j):
                    positives.append((i, j))
            elif of_other[y][k] >= of_sample[y][k] - margin:
                negatives.append((i, j))
    return positives, negatives


def pairs(mined):
    a1, p, a2, n = mined
    return list(zip(a1.tolist(), p.tolist(), strict=True)), list(zip(a2.tolist(), n.tolist(), strict=True))


@pytest.mark.parametrize("distance", DISTANCES)
@torch.no_grad()
def test_definition(distance):
    """Within a batch, among references, and for a batch that is its own references."""
    loss_func = MultiProxyEntropyLoss(4, 6, 3, distance=make_distance(distance)).double()
    embeddings, labels = torch.randn(15, 6).double(), torch.randint(4, (15,))
    for margin in (0.0, 0.3, -0.2):
        for given in ((), (torch.randn(9, 6).double(), torch.randint(3, (9,))), (embeddings, labels)):
            expected = mine_by_hand(loss_func, margin, embeddings, labels, *(given or (embeddings, labels)))
            assert pairs(MultiProxyMiner(loss_func, margin)(embeddings, labels, *given)) == expected
            assert margin < 0 or all(expected)
    copied = pairs(MultiProxyMiner(loss_func)(embeddings, labels, embeddings.clone(), labels))[0]
    assert {(i, i) for i in range(15)} < set(copied)  # another tensor: a sample and its copy are a pair


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
    # PML's own miners choose from these pairs.
    everything = pairs(loss_and_miner_utils.get_all_pairs_indices(labels, None))
    assert all(set(found) <= set(possible) for found, possible in zip(pairs(mined), everything, strict=True))


def test_mines_nothing_where_there_is_nothing(loss_func):
    loss_func.proxies.data[:2] = torch.eye(8).view(2, 4, 8)
    embeddings = torch.eye(8)[[0, 1, 4, 5]].requires_grad_()  # each at a proxy of its own
    labels = torch.tensor([0, 0, 1, 1])
    found = MultiProxyMiner(loss_func)(embeddings, labels)
    assert pairs(MultiProxyMiner(loss_func)(embeddings[:0], labels[:0])) == ([], [])
    assert [(len(indices), indices.dtype) for indices in found] == [(0, torch.long)] * 4
    assert losses.MultiSimilarityLoss()(embeddings, labels, found) == 0


def test_multiple_losses_with_its_miner(loss_func, batch):
    """The miner neither owns nor changes the loss."""
    pair_loss, miner = losses.MultiSimilarityLoss(), MultiProxyMiner(loss_func, collect_stats=True)
    before = copy.deepcopy(loss_func.state_dict())
    mined = miner(*batch)
    assert (miner.num_pos_pairs, miner.num_neg_pairs) == (len(mined[0]), len(mined[2]))
    assert all(value.equal(before[name]) for name, value in loss_func.state_dict().items())
    both = losses.MultipleLosses([loss_func, pair_loss], miners=[None, miner], weights=[1, 0.1])
    expected = copy.deepcopy(loss_func)(*batch) + 0.1 * pair_loss(*batch, mined)
    torch.testing.assert_close(both(*batch), expected)
    assert not torch.isclose(pair_loss(*batch, mined), pair_loss(*batch))
    assert sorted(name for name in both.state_dict() if "prox" in name) == ["losses.0.proxies", "losses.0.proxy_usage"]
    assert (list(miner.parameters()), miner.state_dict()) == ([], {})


def test_cross_batch_memory(loss_func):
    """The memory holds the batch itself: its pairs with itself must not be counted as positives."""
    seen = []

    class ContrastiveLoss(losses.ContrastiveLoss):  # PML goes by the name
        def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
            seen.append((embeddings, ref_emb, indices_tuple))
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)

    memory = losses.CrossBatchMemory(ContrastiveLoss(), 8, memory_size=32, miner=MultiProxyMiner(loss_func))
    for _ in range(4):
        memory(torch.randn(12, 8, requires_grad=True), torch.arange(12) % 3).backward()
    embeddings, references, (anchors, positives, _, negatives) = seen[-1]
    assert len(references) == 32
    assert not (embeddings[anchors] == references[positives]).all(dim=1).any()
    assert min(len(positives), len(negatives)) > 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copied, loss_func, batch):
    together = copied({"loss": loss_func, "miner": MultiProxyMiner(loss_func)})
    assert together["miner"].loss_func is together["loss"]
    assert pairs(together["miner"](*batch)) == pairs(MultiProxyMiner(loss_func)(*batch))


def test_errors(loss_func, batch):
    with pytest.raises(TypeError, match="loss_func must be a MultiProxyEntropyLoss, got SoftTripleLoss"):
        MultiProxyMiner(losses.SoftTripleLoss(3, 8))
    with pytest.raises(ValueError, match="negative_margin must be a finite number, got inf"):
        MultiProxyMiner(loss_func, float("inf"))
    miner, (embeddings, labels) = MultiProxyMiner(loss_func), batch
    for arguments, message in (
        ((embeddings, labels + 1), "labels must lie in [0, 2] (num_classes is 3), got values from 1 to 3"),
        ((embeddings, labels, embeddings[:5]), "ref_labels must be given, a tensor of shape (5,), got None"),
        ((embeddings, labels, embeddings[:, :5], labels), "ref_emb must be of shape (batch_size, 8), got (12, 5)"),
        ((embeddings, labels, embeddings, labels + 1), "ref_labels must lie in [0, 2] (num_classes is 3)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            miner(*arguments)
