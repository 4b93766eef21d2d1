"""Starting the proxies by k-means."""

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning import distances
from sklearn.cluster import KMeans
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from pml_multiproxy import MultiProxyEntropyLoss, _kmeans


def clusters(per_cluster=20, spread=0.05):
    """Two classes of four well separated clusters each: embeddings, labels, centers (2, 4, 8)."""
    centers = torch.linalg.qr(torch.randn(8, 8)).Q.view(2, 4, 8)
    embeddings = centers.repeat_interleave(per_cluster, dim=1) + spread * torch.randn(2, 4 * per_cluster, 8)
    return embeddings.flatten(0, 1), torch.arange(2).repeat_interleave(4 * per_cluster), centers


def test_finds_the_clusters():
    embeddings, labels, centers = clusters()
    loss_func = MultiProxyEntropyLoss(2, 8, 4)
    loss_func.init_proxies(embeddings * 100 ** torch.rand(len(labels), 1), labels)  # lengths do not matter
    similarities = loss_func.proxies @ centers.mT
    assert (similarities.amax(dim=2) > 0.99).all()
    assert (similarities.amax(dim=1) > 0.99).all()
    torch.testing.assert_close(loss_func.proxies.norm(dim=2), torch.ones(2, 4))
    torch.testing.assert_close(loss_func.proxy_usage, torch.full((2, 4), 0.25))


def test_usage_is_the_share_of_samples():
    embeddings, labels = torch.randn(90, 8), torch.randint(2, (90,))
    loss_func = MultiProxyEntropyLoss(2, 8, 4)
    loss_func.init_proxies(embeddings, labels)
    _, proxies = loss_func.assign(embeddings, labels)
    for c in range(2):
        counts = torch.tensor([(proxies[labels == c] == k).sum() for k in range(4)])
        torch.testing.assert_close(loss_func.proxy_usage[c], counts / counts.sum())
        assert (counts > 0).all()


@given(
    seed=st.integers(0, 2**31 - 1),
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    per_class=st.integers(1, 5),
    distinct=st.integers(1, 12),
)
def test_any_numbers_of_samples(seed, counts, per_class, distinct):
    torch.manual_seed(seed)
    loss_func = MultiProxyEntropyLoss(len(counts), 4, per_class)
    before = loss_func.proxies.detach().clone()
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    loss_func.init_proxies(torch.randn(distinct, 4)[torch.randint(distinct, (len(labels),))], labels)
    torch.testing.assert_close(loss_func.proxies.norm(dim=2), torch.ones(len(counts), per_class))
    torch.testing.assert_close(loss_func.proxy_usage.sum(dim=1), torch.ones(len(counts)))
    for c, count in enumerate(counts):
        assert loss_func.proxies[c].equal(before[c]) == (count == 0)
        assert len(loss_func.proxies[c].unique(dim=0)) == per_class


def test_keeps_the_lengths_where_the_distance_does():
    embeddings, labels, centers = clusters()
    loss_func = MultiProxyEntropyLoss(2, 8, 4, distance=distances.LpDistance(normalize_embeddings=False))
    loss_func.init_proxies(3 * embeddings, labels)
    assert (torch.cdist(loss_func.proxies, 3 * centers).amin(dim=2) < 0.2).all()


def test_is_the_same_under_the_same_seed():
    embeddings, labels = torch.randn(60, 8), torch.randint(3, (60,))
    results = []
    for seed in (1, 1, 2):
        loss_func = MultiProxyEntropyLoss(3, 8, 4)
        torch.manual_seed(seed)
        loss_func.init_proxies(embeddings, labels)
        results.append(loss_func.proxies.detach())
    assert results[0].equal(results[1])
    assert not results[0].equal(results[2])


def test_few_samples_are_repeated_with_noise():
    embeddings = normalize(torch.randn(3, 8))
    loss_func = MultiProxyEntropyLoss(2, 8, 5)
    before = loss_func.proxies.detach().clone()
    loss_func.init_proxies(embeddings, torch.zeros(3, dtype=torch.long))
    similarities = loss_func.proxies[0] @ embeddings.T
    assert ((similarities > 1 - 1e-6).sum(dim=0) == 1).all()  # each sample once as it is
    assert (similarities.amax(dim=1) > 0.98).all()  # the others near one
    assert len(loss_func.proxies[0].unique(dim=0)) == 5
    assert loss_func.proxies[1].equal(before[1])  # a class without samples
    assert loss_func.proxy_usage[1].equal(torch.full((5,), 0.2))


def test_samples_that_are_all_the_same():
    loss_func = MultiProxyEntropyLoss(1, 8, 4)
    loss_func.init_proxies(torch.ones(50, 8), torch.zeros(50, dtype=torch.long))
    assert loss_func.proxies.isfinite().all()
    assert len(loss_func.proxies[0].unique(dim=0)) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype):
    embeddings, labels, centers = clusters()
    loss_func = MultiProxyEntropyLoss(2, 8, 4).to(dtype)
    loss_func.init_proxies(embeddings.to(dtype).requires_grad_(), labels.to(torch.uint8))
    assert loss_func.proxies.dtype == dtype
    assert loss_func.proxies.requires_grad
    assert loss_func.proxies.grad_fn is None
    assert ((loss_func.proxies.float() @ centers.mT).amax(dim=2) > 0.99).all()


def test_keeps_the_parameter_that_the_optimizer_holds():
    loss_func = MultiProxyEntropyLoss(2, 8, 4)
    optimizer = torch.optim.Adam(loss_func.parameters())
    embeddings, labels, _ = clusters()
    loss_func.init_proxies(embeddings, labels)
    assert optimizer.param_groups[0]["params"][0] is loss_func.proxies
    before = loss_func.proxies.detach().clone()
    loss_func(embeddings, labels).backward()
    optimizer.step()
    assert not loss_func.proxies.equal(before)


def test_lowers_the_loss_of_the_first_step():
    embeddings, labels, _ = clusters()
    loss_func = MultiProxyEntropyLoss(2, 8, 4)
    started = copy.deepcopy(loss_func)
    started.init_proxies(embeddings, labels)
    assert started(embeddings, labels) < 0.5 * loss_func(embeddings, labels)


def test_bad_arguments(loss_func, batch):
    embeddings, labels = batch
    for value in (float("nan"), float("inf")):
        bad = embeddings.detach().clone()
        bad[0, 0] = value
        with pytest.raises(ValueError, match="embeddings must be finite, got NaN or infinite values"):
            loss_func.init_proxies(bad, labels)
    with pytest.raises(ValueError, match=re.escape("labels must lie in [0, 2]")):
        loss_func.init_proxies(embeddings, labels + 1)
    with pytest.raises(ValueError, match=re.escape("labels must be given, a tensor of shape (12,), got None")):
        loss_func.init_proxies(embeddings, None)


def inertia(points, centroids):
    """The mean squared distance to the nearest centroid."""
    return torch.cdist(points.double(), centroids.double()).amin(dim=-1).square().mean()


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize(("classes", "size", "per_class"), [(100, 12, 4), (100, 15, 10), (40, 100, 10), (10, 600, 20)])
def test_as_good_as_scikit_learn(classes, size, per_class, clustered, spherical):
    samples = torch.randn(classes, size, 16)
    if clustered:
        centers = torch.randn(classes, per_class, 16)
        samples = centers[torch.arange(classes).unsqueeze(1), torch.randint(per_class, (classes, size))] + samples / 2
    samples = normalize(samples, dim=2) if spherical else samples
    _, ours = _kmeans.start(samples.flatten(0, 1), torch.arange(classes).repeat_interleave(size), per_class, spherical)
    runs = [KMeans(per_class, n_init=3, random_state=0).fit(of_class.numpy()) for of_class in samples]
    theirs = torch.stack([torch.from_numpy(run.cluster_centers_) for run in runs])
    theirs = normalize(theirs, dim=2) if spherical else theirs
    assert inertia(samples, ours) < 1.01 * inertia(samples, theirs)


def test_classes_of_any_size_together_are_as_good_as_alone():
    """Padding and batches change nothing: each class of well separated clusters is solved exactly."""
    sizes = [*range(1, 40), 500, 7, 7]
    labels = torch.arange(len(sizes)).mul(3).repeat_interleave(torch.tensor(sizes))
    centers = 10 * torch.randn(len(sizes), 3, 6)
    numbers = torch.cat([torch.arange(size) % 3 for size in sizes])
    samples = centers[labels // 3, numbers] + 0.01 * torch.randn(len(labels), 6)
    order = torch.randperm(len(labels))
    classes, centroids = _kmeans.start(samples[order], labels[order], 3, spherical=False)
    assert classes.tolist() == [3 * c for c in range(len(sizes))]
    for c, size in enumerate(sizes):
        of_class = samples[labels == 3 * c]
        expected = [of_class[k::3].mean(dim=0) for k in range(min(size, 3))]
        assert (torch.cdist(torch.stack(expected), centroids[c]).amin(dim=1) < 1e-3).all()


class Work(TorchDispatchMode):
    """Counts the numbers that all operations return."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.total += sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


def test_work_is_linear_in_the_classes():
    work = []
    for num_classes in (300, 3000):
        loss_func = MultiProxyEntropyLoss(num_classes, 8, 4)
        labels = (torch.arange(10 * num_classes) % num_classes)[torch.randperm(10 * num_classes)]
        with Work() as counted:
            loss_func.init_proxies(torch.randn(len(labels), 8), labels)
        work.append(counted.total / num_classes)
    assert work[1] < 1.5 * work[0]


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e18, 1e30])
def test_lengths_of_any_size(scale):
    embeddings, labels, centers = clusters()
    _, centroids = _kmeans.start(embeddings * scale, labels, 4, spherical=False)
    assert (torch.cdist(centroids / scale, centers).amin(dim=2) < 0.1).all()
    loss_func = MultiProxyEntropyLoss(2, 8, 4)
    loss_func.init_proxies(embeddings * scale, labels)
    if scale > 1e-12:  # shorter ones are shortened by the loss itself
        torch.testing.assert_close(loss_func.proxy_usage, torch.full((2, 4), 0.25))
    assert ((loss_func.proxies @ centers.mT).amax(dim=2) > 0.99).all()


def test_lengths_that_the_distance_cannot_hold():
    loss_func = MultiProxyEntropyLoss(2, 8, 4, distance=distances.LpDistance(normalize_embeddings=False))
    embeddings, labels, _ = clusters()
    loss_func.init_proxies(embeddings * 1e18, labels)
    torch.testing.assert_close(loss_func.proxy_usage, torch.full((2, 4), 0.25))
    before = copy.deepcopy(loss_func.state_dict())
    message = re.escape("embeddings must be small enough for LpDistance in torch.float32, got values up to ")
    with pytest.raises(ValueError, match=message):
        loss_func.init_proxies(embeddings * 1e25, labels)
    with pytest.raises(ValueError, match=re.escape("whose distances to proxies in torch.float16 overflow")):
        loss_func.half().init_proxies(embeddings * 1e18, labels)
    for name, value in loss_func.state_dict().items():
        assert value.equal(before[name].to(value.dtype)), name


def test_embeddings_without_a_direction_are_left_out():
    embeddings, labels, centers = clusters()
    loss_func = MultiProxyEntropyLoss(3, 8, 4)
    before = copy.deepcopy(loss_func)
    embeddings = torch.cat([embeddings, torch.zeros(100, 8)])
    loss_func.init_proxies(embeddings, torch.cat([labels, torch.arange(100) % 2 + 1]))
    assert ((loss_func.proxies[:2] @ centers.mT).amax(dim=2) > 0.99).all()
    torch.testing.assert_close(loss_func.proxy_usage, torch.full((3, 4), 0.25))
    assert loss_func.proxies[2].equal(before.proxies[2])


@pytest.mark.parametrize("pairs", [1, 5])
@pytest.mark.parametrize("per_class", [1, 2, 3])
def test_opposite_samples_give_proxies_of_unit_length(per_class, pairs):
    directions = normalize(torch.randn(pairs, 8))
    loss_func = MultiProxyEntropyLoss(1, 8, per_class)
    loss_func.init_proxies(torch.cat([directions, -directions]), torch.zeros(2 * pairs, dtype=torch.long))
    torch.testing.assert_close(loss_func.proxies.norm(dim=2), torch.ones(1, per_class))
    assert len(loss_func.proxies[0].unique(dim=0)) == per_class


def test_zeros_are_as_good_as_other_samples_where_lengths_count():
    loss_func = MultiProxyEntropyLoss(1, 8, 4, distance=distances.LpDistance(normalize_embeddings=False))
    loss_func.init_proxies(torch.zeros(9, 8), torch.zeros(9, dtype=torch.long))
    assert loss_func.proxies.isfinite().all()
    assert len(loss_func.proxies[0].unique(dim=0)) == 4


def test_close_samples_far_from_the_origin_are_told_apart():
    """Squared distances of 1e-6 between vectors of length 1, whose product is exact to 1e-7."""
    centers = torch.nn.functional.pad(1e-3 * torch.eye(4), (1, 3), value=0)
    centers[:, 0] = 1
    embeddings = centers.repeat_interleave(20, dim=0) + 1e-5 * torch.randn(80, 8)
    for spherical in (False, True):
        _, (centroids,) = _kmeans.start(embeddings, torch.zeros(80, dtype=torch.long), 4, spherical)
        distances_to_centers = torch.cdist(normalize(centers) if spherical else centers, centroids)
        assert (distances_to_centers.amin(dim=1) < 1e-4).all()


def test_duplicates_do_not_hide_rare_samples():
    rare = torch.randn(3, 8)
    embeddings = torch.cat([torch.randn(1, 8).expand(500, 8), rare])
    _, (centroids,) = _kmeans.start(embeddings, torch.zeros(503, dtype=torch.long), 4, spherical=False)
    to_nearest = torch.cdist(embeddings, centroids, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)
    assert (to_nearest < 1e-5).all()


@pytest.mark.parametrize("labels_dtype", [torch.int32, torch.uint8, torch.int16], ids=str)
def test_any_layout_and_dtype_of_labels(labels_dtype):
    embeddings, labels, _ = clusters()
    results = []
    for x, y in (
        (embeddings, labels),
        (embeddings.T.contiguous().T, labels.to(labels_dtype)),
        (embeddings.repeat_interleave(2, dim=1)[:, ::2], labels.repeat_interleave(2)[::2]),
    ):
        torch.manual_seed(1)
        loss_func = MultiProxyEntropyLoss(2, 8, 4)
        loss_func.init_proxies(x, y)
        results.append(loss_func.proxies.detach())
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_no_samples_change_nothing(loss_func):
    before = copy.deepcopy(loss_func.state_dict())
    loss_func.init_proxies(torch.empty(0, 8), torch.empty(0, dtype=torch.long))
    for name, value in loss_func.state_dict().items():
        assert value.equal(before[name]), name


def test_autocast_changes_nothing():
    embeddings, labels, _ = clusters()
    results = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(_kmeans.start(embeddings, labels, 4, spherical=True)[1])
    assert results[1].equal(results[0])


def test_long_work_shows_progress(capsys, monkeypatch):
    monkeypatch.setattr(_kmeans, "tqdm", lambda **options: tqdm(**{**options, "delay": 0}))
    _kmeans.start(torch.randn(20, 3), torch.arange(20) % 5, 2, spherical=False)
    assert "k-means per class: 100%" in capsys.readouterr().err
