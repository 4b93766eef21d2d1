"""The regularizer against naive loops, its bounds and symmetries, and its use inside losses."""

import copy
import itertools
import math
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import pytorch_metric_learning
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning import distances, reducers
from pytorch_metric_learning import losses as pml_losses

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.regularizers import ROWS_PER_CALL, ProxyEntropyRegularizer

TEMPERATURE = 0.3
SIZE = 6


class HalvedCosine(distances.CosineSimilarity):
    def compute_mat(self, query_emb, ref_emb):
        return super().compute_mat(query_emb, ref_emb) / 2


class SameCosine(distances.CosineSimilarity):
    pass


class SameLp(distances.LpDistance):
    pass


# A distance, the similarity naively, and that of a proxy to itself (whose gradient the naive way has 0 / 0 in).
DISTANCES = {
    "cosine": (distances.CosineSimilarity(), reference.cosine, 1),
    "normalized dot product": (distances.DotProductSimilarity(), reference.cosine, 1),
    "cosine cubed": (distances.CosineSimilarity(power=3), lambda x, w: reference.cosine(x, w) ** 3, 1),
    "subclass of cosine": (HalvedCosine(), lambda x, w: reference.cosine(x, w) / 2, 0.5),
    "L2": (distances.LpDistance(), reference.minus_lp(2), 0),
    "L1, power=2": (distances.LpDistance(p=1, power=2), reference.minus_lp(1, power=2), 0),
    "L3": (distances.LpDistance(p=3), reference.minus_lp(3), 0),
    "L1, power=0.5": (distances.LpDistance(p=1, power=0.5), reference.minus_lp(1, power=0.5), 0),
    "L2, not normalized": (
        distances.LpDistance(normalize_embeddings=False),
        reference.minus_lp(2, normalized=False),
        0,
    ),
    "SNR": (distances.SNRDistance(), reference.minus_snr, 0),
}
# A reducer, and what it makes of the penalties.
REDUCERS = {
    "mean": (reducers.MeanReducer(), lambda values: sum(values) / len(values)),
    "sum": (reducers.SumReducer(), sum),
    "threshold": (reducers.ThresholdReducer(low=0.3), lambda values: mean_of([v for v in values if v > 0.3], values)),
    "non-zero": (reducers.AvgNonZeroReducer(), lambda values: mean_of([v for v in values if v > 0], values)),
    "weighted": (
        reducers.ClassWeightedReducer(torch.arange(1.0, 20.0)),
        lambda values: sum((i + 1) * v for i, v in enumerate(values)) / len(values),
    ),
}


def mean_of(chosen, values):
    return sum(chosen) / len(chosen) if chosen else 0 * sum(values)


def naive(proxies, similarity, own, temperature):
    """The penalties of proxies (C, K, D), one after the other."""
    penalties = []
    for of_class in proxies:
        for k, w in enumerate(of_class):
            to_siblings = [own + 0 * w.sum() if j == k else similarity(w, v) for j, v in enumerate(of_class)]
            penalties.append(-reference.softmax([s / temperature for s in to_siblings])[k].log())
    return penalties


def penalties(regularizer, weights):
    return regularizer.compute_loss(weights)["loss"]["losses"]


def make_weights(classes, per_class, dtype=torch.float64):
    """Proxies that overlap: all of them around one direction."""
    return (2 + torch.randn(classes * per_class, SIZE, dtype=torch.float64)).div(3).to(dtype)


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_equals_naive_loops(distance, reducer):
    """Values and gradients, over shapes and memory layouts."""
    kind, similarity, own = DISTANCES[distance]
    reduce, naively = REDUCERS[reducer]
    for classes, per_class, transposed in itertools.product([1, 3], [1, 2, 4], [False, True]):
        regularizer = ProxyEntropyRegularizer(per_class, TEMPERATURE, distance=kind, reducer=reduce)
        weights = make_weights(classes, per_class)
        weights = (weights.T.contiguous().T if transposed else weights).requires_grad_()
        value = regularizer(weights)
        (gradient,) = torch.autograd.grad(value, weights)

        proxies = weights.detach().reshape(classes, per_class, SIZE).requires_grad_()
        expected = naively(naive(proxies, similarity, own, TEMPERATURE))
        (wanted,) = torch.autograd.grad(expected, proxies)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient, wanted.flatten(0, 1), rtol=1e-10, atol=1e-12)
        if per_class > 1:
            assert reducer == "threshold" or wanted.abs().max() > 1e-6


@pytest.mark.parametrize("distance", DISTANCES)
def test_loss_dictionary(distance):
    kind, similarity, own = DISTANCES[distance]
    weights = make_weights(3, 4)
    regularizer = ProxyEntropyRegularizer(4, TEMPERATURE, distance=kind, reducer=reducers.DoNothingReducer())
    loss_dict = regularizer(weights)
    assert list(loss_dict) == ["loss"]
    assert loss_dict["loss"]["reduction_type"] == "element"
    assert loss_dict["loss"]["indices"].equal(torch.arange(12))
    expected = torch.stack(naive(weights.view(3, 4, SIZE), similarity, own, TEMPERATURE))
    torch.testing.assert_close(loss_dict["loss"]["losses"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradcheck(distance):
    regularizer = ProxyEntropyRegularizer(4, TEMPERATURE, distance=DISTANCES[distance][0])
    assert torch.autograd.gradcheck(regularizer, make_weights(3, 4).requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("per_class", [1, 3, ROWS_PER_CALL, ROWS_PER_CALL + 1])
@pytest.mark.parametrize(
    ("native", "general"),
    [
        (distances.CosineSimilarity(), SameCosine()),
        (distances.DotProductSimilarity(), SameCosine()),
        (distances.LpDistance(p=1, power=2), SameLp(p=1, power=2)),
    ],
)
def test_distances_called_by_chunks_equal_the_native_ones(native, general, per_class):
    """Over more than one chunk, the last of them smaller."""
    weights = make_weights(2 * ROWS_PER_CALL // min(per_class, ROWS_PER_CALL) + 3, per_class).requires_grad_()
    values, gradients = [], []
    for distance in (native, general):
        values.append(penalties(ProxyEntropyRegularizer(per_class, TEMPERATURE, distance=distance), weights))
        gradients.append(torch.autograd.grad(values[-1].square().sum(), weights))
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)


seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(1, 5)
spreads = st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 10.0])


@pytest.mark.parametrize("distance", DISTANCES)
@given(seed=seeds, classes=sizes, per_class=sizes, spread=spreads, temperature=st.floats(1e-2, 1e2))
def test_is_the_min_entropy_of_the_assignment(distance, seed, classes, per_class, spread, temperature):
    torch.manual_seed(seed)
    kind, similarity, own = DISTANCES[distance]
    proxies = torch.randn(SIZE).double() + spread * torch.randn(classes, per_class, SIZE).double()
    values = penalties(ProxyEntropyRegularizer(per_class, temperature, distance=kind), proxies.flatten(0, 1))
    assert (values >= 0).all()
    assert (values <= math.log(per_class) + 1e-9).all()
    for value, (c, k) in zip(values, itertools.product(range(classes), range(per_class)), strict=True):
        logits = [
            torch.as_tensor(own if j == k else similarity(proxies[c, k], proxies[c, j])) / temperature
            for j in range(per_class)
        ]
        most_likely = torch.stack(logits).double().log_softmax(dim=0).max()
        assert value.item() == pytest.approx(-most_likely.item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
@given(seed=seeds, classes=sizes, per_class=sizes)
def test_order_of_classes_and_siblings_does_not_matter(distance, seed, classes, per_class):
    torch.manual_seed(seed)
    regularizer = ProxyEntropyRegularizer(per_class, TEMPERATURE, distance=DISTANCES[distance][0])
    weights = make_weights(classes, per_class).requires_grad_()
    rows = torch.stack([c * per_class + torch.randperm(per_class) for c in torch.randperm(classes)]).flatten()
    permuted = weights.detach()[rows].requires_grad_()
    values, permuted_values = penalties(regularizer, weights), penalties(regularizer, permuted)
    torch.testing.assert_close(permuted_values, values[rows])
    values.square().sum().backward()
    permuted_values.square().sum().backward()
    torch.testing.assert_close(permuted.grad, weights.grad[rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@given(data=st.data(), seed=seeds, classes=sizes, per_class=sizes, same_direction=st.booleans())
def test_cosine_is_finite_for_every_finite_input(dtype, data, seed, classes, per_class, same_direction):
    torch.manual_seed(seed)
    largest, smallest = torch.finfo(dtype).max / 2, torch.finfo(dtype).smallest_normal / 2
    lengths = st.sampled_from([0.0, smallest, 1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e18, largest])
    count = classes * per_class
    chosen = torch.tensor(data.draw(st.lists(lengths, min_size=count, max_size=count)), dtype=torch.float64)
    directions = torch.empty(1 if same_direction else count, SIZE, dtype=torch.float64).uniform_(-1, 1)
    weights = (directions * chosen.unsqueeze(1)).clamp(-largest, largest).to(dtype).requires_grad_()
    value = ProxyEntropyRegularizer(per_class)(weights)
    value.backward()
    assert value.isfinite()
    assert weights.grad.isfinite().all()


@pytest.mark.parametrize("per_class", [1, 2, 5])
@pytest.mark.parametrize("distance", DISTANCES)
def test_identical_proxies_cost_log_k(distance, per_class):
    regularizer = ProxyEntropyRegularizer(per_class, distance=DISTANCES[distance][0])
    weights = make_weights(3, 1).repeat_interleave(per_class, dim=0).requires_grad_()
    values = penalties(regularizer, weights)
    values.sum().backward()
    torch.testing.assert_close(values, torch.full_like(values, math.log(per_class)))
    torch.testing.assert_close(weights.grad, torch.zeros_like(weights))


def test_zero_proxies():
    """At cosine 0 to everything, also to itself."""
    regularizer = ProxyEntropyRegularizer(3, TEMPERATURE)
    zero, one = [0.0, 0.0], [0.0, 2.0]
    values = penalties(regularizer, torch.tensor([zero, one, one, zero, zero, zero]))
    told_from_zero = math.log(2 + math.exp(-1 / TEMPERATURE))
    expected = [math.log(3), told_from_zero, told_from_zero, *[math.log(3)] * 3]
    torch.testing.assert_close(values, torch.tensor(expected))


@pytest.mark.parametrize("distance", ["cosine", "normalized dot product", "L2", "L1, power=2", "L2, not normalized"])
def test_separated_proxies_cost_almost_nothing(distance):
    weights = torch.eye(SIZE).repeat(2, 1)
    values = penalties(ProxyEntropyRegularizer(SIZE, distance=DISTANCES[distance][0]), weights)
    assert (values < 1e-3).all()


@pytest.mark.parametrize("collapse", [0.5, 0.8, 0.95])
def test_default_temperature_as_documented(collapse):
    """Ten proxies at the same cosine to each other."""
    gram = torch.full((10, 10), collapse).fill_diagonal_(1)
    weights = torch.linalg.cholesky(gram).requires_grad_()
    expected = {0.5: 0.06, 0.8: 0.8, 0.95: 1.9}[collapse]
    value = ProxyEntropyRegularizer(10)(weights)
    value.backward()
    assert value.item() == pytest.approx(expected, abs=0.05 * expected)
    assert weights.grad.norm() > 0.05


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_single_proxy_costs_nothing(distance):
    weights = make_weights(4, 1).requires_grad_()
    value = ProxyEntropyRegularizer(1, distance=DISTANCES[distance][0])(weights)
    value.backward()
    assert value == 0
    assert weights.grad.eq(0).all()


@pytest.mark.parametrize("distance", ["cosine", "subclass of cosine", "L2"])
def test_no_proxies(distance):
    weights = torch.zeros(0, SIZE, requires_grad=True)
    values = penalties(ProxyEntropyRegularizer(4, distance=DISTANCES[distance][0]), weights)
    values.sum().backward()
    assert values.shape == (0,)
    assert weights.grad.shape == (0, SIZE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_low_precision(distance, dtype):
    """All in float32, but for the rounding of the gradient to the dtype of the weights."""
    regularizer = ProxyEntropyRegularizer(4, TEMPERATURE, distance=DISTANCES[distance][0])
    weights = make_weights(3, 4, dtype).requires_grad_()
    exact = weights.detach().double().requires_grad_()
    values, expected = penalties(regularizer, weights), penalties(regularizer, exact)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=2e-5, atol=2e-6)
    values.sum().backward()
    expected.sum().backward()
    assert weights.dtype == weights.grad.dtype == dtype
    error = (weights.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert error < max(2e-5, torch.finfo(dtype).eps)


@pytest.mark.parametrize("distance", ["cosine", "subclass of cosine", "L2"])
def test_autocast_changes_nothing(distance):
    regularizer = ProxyEntropyRegularizer(4, distance=DISTANCES[distance][0])
    weights = make_weights(3, 4, torch.float32)
    expected = penalties(regularizer, weights)
    with torch.autocast("cpu", torch.bfloat16):
        values = penalties(regularizer, weights)
    assert values.equal(expected)


@pytest.mark.parametrize("distance", ["cosine", "subclass of cosine", "L2"])
def test_a_device_without_autocast(distance):
    weights = make_weights(3, 4, torch.float32).to("meta").requires_grad_()
    ProxyEntropyRegularizer(4, distance=DISTANCES[distance][0])(weights).backward()
    assert weights.grad.is_meta


LAYOUTS = {
    "transposed": lambda weights: weights.T.contiguous().T,
    "every other row": lambda weights: weights.repeat_interleave(2, dim=0)[::2],
    "every other column": lambda weights: weights.repeat_interleave(2, dim=1)[:, ::2],
    "flattened classes and proxies, swapped": lambda weights: (
        weights.view(3, 4, -1).transpose(0, 1).contiguous().transpose(0, 1).flatten(0, 1)
    ),
    "with an offset": lambda weights: torch.cat([weights[:1], weights])[1:],
}


@pytest.fixture
def nan_in_new_memory():
    """Whatever is read before it is written is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.usefixtures("nan_in_new_memory")
def test_memory_layouts(distance, layout):
    regularizer = ProxyEntropyRegularizer(4, TEMPERATURE, distance=DISTANCES[distance][0])
    plain = make_weights(3, 4).requires_grad_()
    strided = LAYOUTS[layout](plain.detach()).requires_grad_()
    values, expected = penalties(regularizer, strided), penalties(regularizer, plain)
    torch.testing.assert_close(values, expected)
    values.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(strided.grad, plain.grad)


@pytest.mark.parametrize("distance", DISTANCES)
def test_shared_memory(distance):
    """One row for all proxies, as ``expand`` has it: the gradient is the sum of theirs."""
    regularizer = ProxyEntropyRegularizer(4, TEMPERATURE, distance=DISTANCES[distance][0])
    row, copies = torch.randn(1, SIZE).requires_grad_(), torch.randn(1, SIZE)
    values = penalties(regularizer, torch.cat([row.expand(4, SIZE), copies.expand(4, SIZE)]))
    torch.testing.assert_close(values, torch.full((8,), math.log(4)))
    values.sum().backward()
    torch.testing.assert_close(row.grad, torch.zeros_like(row))
    torch.testing.assert_close(penalties(regularizer, copies.expand(8, SIZE)), values.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_an_edit_in_place_before_backward_changes_no_gradient(distance, dtype):
    """It raises where autograd still needs the weights, and changes nothing where it does not."""
    regularizer = ProxyEntropyRegularizer(4, TEMPERATURE, distance=DISTANCES[distance][0])
    weights = make_weights(3, 4, dtype).requires_grad_()
    (expected,) = torch.autograd.grad(penalties(regularizer, weights).sum(), weights)
    values = penalties(regularizer, weights)
    with torch.no_grad():
        weights.mul_(-3).add_(1)
    try:
        (gradient,) = torch.autograd.grad(values.sum(), weights)
    except RuntimeError as error:
        assert re.search("modified (by an )?inplace", str(error))  # noqa: PT017
    else:
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("distance", ["cosine", "L2"])
def test_a_proxy_that_is_not_finite_stays_within_its_class(distance):
    regularizer = ProxyEntropyRegularizer(4, TEMPERATURE, distance=DISTANCES[distance][0])
    weights = make_weights(3, 4)
    (expected,) = torch.autograd.grad(penalties(regularizer, weights.requires_grad_()).sum(), weights)
    weights = weights.detach().clone()
    weights[5, 0] = float("nan")
    values = penalties(regularizer, weights.requires_grad_()).view(3, 4)
    assert values[[0, 2]].isfinite().all()
    (gradient,) = torch.autograd.grad(values[[0, 2]].sum(), weights)
    torch.testing.assert_close(gradient.view(3, 4, SIZE)[[0, 2]], expected.view(3, 4, SIZE)[[0, 2]])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:copyreg")
def test_compiles_without_graph_breaks(autocast):
    torch._dynamo.reset()
    regularizer, weights = ProxyEntropyRegularizer(4, TEMPERATURE), make_weights(3, 4, torch.float32)
    compiled = torch.compile(lambda weights: penalties(regularizer, weights), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = compiled(weights)
    torch.testing.assert_close(found, penalties(regularizer, weights))


def multi_proxy(classes, per_class, **kwargs):
    loss_func = MultiProxyEntropyLoss(classes, 16, per_class, **kwargs)
    return loss_func.eval(), loss_func.proxies, lambda parameter: parameter


def soft_triple(classes, per_class, **kwargs):
    loss_func = pml_losses.SoftTripleLoss(classes, 16, centers_per_class=per_class, **kwargs)
    return loss_func, loss_func.fc, lambda parameter: parameter.T.reshape(classes, per_class, 16)


def sub_center_arcface(classes, per_class, **kwargs):
    loss_func = pml_losses.SubCenterArcFaceLoss(num_classes=classes, embedding_size=16, sub_centers=per_class, **kwargs)
    return loss_func, loss_func.W, lambda parameter: parameter.T.reshape(classes, per_class, 16)


OLD_PML = tuple(map(int, pytorch_metric_learning.__version__.split(".")[:2])) < (2, 9)
LOSSES = [
    multi_proxy,
    soft_triple,
    pytest.param(
        sub_center_arcface,
        marks=pytest.mark.xfail(
            OLD_PML, reason="SubCenterArcFaceLoss drops weight_regularizer before PML 2.9.0", strict=True
        ),
    ),
]


@pytest.mark.parametrize("make", LOSSES)
def test_as_weight_regularizer(make):
    """Value and gradient that it adds to the loss; that rows are laid out as the loss itself reads them."""
    regularizer = ProxyEntropyRegularizer(3, TEMPERATURE)
    seed = torch.random.get_rng_state()
    plain, *_ = make(4, 3)
    torch.random.set_rng_state(seed)
    loss_func, parameter, as_proxies = make(4, 3, weight_regularizer=regularizer, weight_reg_weight=0.7)
    embeddings, labels = torch.randn(8, 16), torch.arange(8) % 4
    for c, of_class in enumerate(as_proxies(parameter).detach()):
        assert loss_func.get_logits(of_class).argmax(dim=1).eq(c).all()

    added = loss_func(embeddings, labels) - plain(embeddings, labels)
    (gradient,) = torch.autograd.grad(loss_func(embeddings, labels), parameter)
    (without,) = torch.autograd.grad(plain(embeddings, labels), next(plain.parameters()))
    expected = 0.7 * torch.stack(naive(as_proxies(parameter), reference.cosine, 1, TEMPERATURE)).mean()
    (wanted,) = torch.autograd.grad(expected, parameter)
    assert expected > 0.01
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient - without, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", LOSSES)
def test_training_moves_collapsed_proxies_apart(make):
    loss_func, parameter, as_proxies = make(4, 3, weight_regularizer=ProxyEntropyRegularizer(3), weight_reg_weight=10)
    with torch.no_grad():
        collapsed = torch.randn(4, 1, 16) + 0.05 * torch.randn(4, 3, 16)
        parameter.copy_(collapsed if parameter.ndim == 3 else collapsed.flatten(0, 1).T)
    optimizer = torch.optim.SGD([parameter], lr=0.3)

    def cosines():
        directions = torch.nn.functional.normalize(as_proxies(parameter.detach()), dim=-1)
        return (directions @ directions.mT).sum(dim=(1, 2)).sub(3) / 6

    embeddings, labels = torch.randn(8, 16), torch.arange(8) % 4
    history = [cosines()]
    assert (history[0] > 0.99).all()
    for _ in range(30):
        optimizer.zero_grad()
        loss_func(embeddings, labels).backward()
        optimizer.step()
        history.append(cosines())
    assert (history[1] < history[0]).all()
    assert (history[-1] < 0.6).all()


def test_deepcopy_and_pickle():
    regularizer = ProxyEntropyRegularizer(4, TEMPERATURE, distance=HalvedCosine(), reducer=reducers.SumReducer())
    loss_func, *_ = multi_proxy(3, 4, weight_regularizer=regularizer)
    weights = make_weights(3, 4)
    for again in (copy.deepcopy(regularizer), pickle.loads(pickle.dumps(regularizer))):
        assert again(weights).equal(regularizer(weights))
    embeddings, labels = torch.randn(5, 16), torch.arange(5) % 3
    for again in (copy.deepcopy(loss_func), pickle.loads(pickle.dumps(loss_func))):
        assert again(embeddings, labels).equal(loss_func(embeddings, labels))


def test_has_no_state():
    regularizer = ProxyEntropyRegularizer(4)
    assert list(regularizer.parameters()) == []
    assert regularizer.state_dict() == {}


def test_what_it_records():
    regularizer = ProxyEntropyRegularizer(np.int64(4), np.float32(0.5))
    assert regularizer._record_these == ["proxies_per_class", "temperature"]
    assert (regularizer.proxies_per_class, regularizer.temperature) == (4, 0.5)


@pytest.mark.parametrize("kind", [distances.CosineSimilarity, distances.LpDistance, SameCosine, distances.SNRDistance])
def test_the_distance_records_the_norms_of_all_proxies(kind):
    weights = make_weights(ROWS_PER_CALL, 3) * torch.arange(1, 3 * ROWS_PER_CALL + 1).unsqueeze(1)
    distance, whole = kind(collect_stats=True), kind(collect_stats=True)
    ProxyEntropyRegularizer(3, distance=distance)(weights)
    whole(weights)
    assert distance._record_these_stats
    for name in distance._record_these_stats:
        assert getattr(distance, name) == getattr(whole, name), name


nan, inf = float("nan"), float("inf")
DOT_PRODUCT = (
    "distance must be a cosine, a distance or a DotProductSimilarity with normalize_embeddings=True, got {} with "
    "normalize_embeddings=False: growing norms would satisfy the penalty"
)


class RawDotProduct(distances.DotProductSimilarity):
    def __init__(self):
        super().__init__(normalize_embeddings=False)


ARGUMENTS = [
    *(
        ({"proxies_per_class": value}, TypeError, f"proxies_per_class must be an int of at least 1, got {value!r} of "
            f"type {type(value).__name__}")
        for value in (2.0, True, "2", None)
    ),
    *(
        ({"proxies_per_class": value}, ValueError, f"proxies_per_class must be an int of at least 1, got {value}")
        for value in (0, -1)
    ),
    *(
        ({"temperature": value}, ValueError, f"temperature must be a finite number above 0, got {value}")
        for value in (0, -1.0, nan, inf)
    ),
    *(
        ({"temperature": value}, TypeError, f"temperature must be a finite number above 0, got {value!r} of type "
            f"{type(value).__name__}")
        for value in ("1", None, True)
    ),
    ({"distance": distances.DotProductSimilarity(normalize_embeddings=False)}, ValueError,
        DOT_PRODUCT.format("DotProductSimilarity")),
    ({"distance": RawDotProduct()}, ValueError, DOT_PRODUCT.format("RawDotProduct")),
    ({"temprature": 1}, TypeError, "temprature"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), ARGUMENTS)
def test_constructor_refuses(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ProxyEntropyRegularizer(**{"proxies_per_class": 4, **arguments})


SHAPE = "(num_classes * proxies_per_class, embedding_size) with proxies_per_class = 4"
WEIGHTS = {
    "a row too many": (torch.zeros(9, 5), ValueError, f"weights must be of shape {SHAPE}, got (9, 5)"),
    "too few rows": (torch.zeros(3, 5), ValueError, f"weights must be of shape {SHAPE}, got (3, 5)"),
    "three dimensions": (torch.zeros(4, 4, 5), ValueError, f"weights must be of shape {SHAPE}, got (4, 4, 5)"),
    "one dimension": (torch.zeros(4), ValueError, f"weights must be of shape {SHAPE}, got (4,)"),
    "integers": (torch.zeros(8, 5).long(), TypeError, "weights must be of a floating-point dtype, got torch.int64"),
    "a list": ([[0.0]] * 4, TypeError, f"weights must be a torch.Tensor of shape {SHAPE}, got list"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_call_refuses(case):
    weights, error, message = WEIGHTS[case]
    with pytest.raises(error, match=re.escape(message) + "$"):
        ProxyEntropyRegularizer(4)(weights)


def test_a_loss_with_another_number_of_proxies_is_refused():
    loss_func, *_ = soft_triple(3, 4, weight_regularizer=ProxyEntropyRegularizer(5))
    with pytest.raises(ValueError, match=re.escape("proxies_per_class = 5, got (12, 16)")):
        loss_func(torch.randn(2, 16), torch.tensor([0, 1]))


PEAK_MEMORY = """
import re
import torch
from pytorch_metric_learning import distances
from pml_multiproxy.regularizers import ProxyEntropyRegularizer

def kilobytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", open("/proc/self/status").read())[1])

regularizer = ProxyEntropyRegularizer(10, distance=distances.DISTANCE())
regularizer(torch.randn(20, 32, requires_grad=True)).backward()  # what libraries allocate once
weights = torch.randn(1_000_000, 32, requires_grad=True)
open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again from here
before = kilobytes("VmRSS")
regularizer(weights).backward()
assert weights.grad.isfinite().all()
print((kilobytes("VmHWM") - before) / 1e6)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("distance", ["CosineSimilarity", "LpDistance"])
def test_a_million_proxies_take_less_than_a_gigabyte(distance):
    """The gradient alone takes 0.13; a matrix of all pairs would take 4000."""
    command = [sys.executable, "-c", PEAK_MEMORY.replace("DISTANCE", distance)]
    gigabytes = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0.128 < gigabytes < 1
