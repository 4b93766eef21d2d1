"""The regularizer against its equation, its bounds, and its use inside losses."""

import math

import cases
import pytest
import pytorch_metric_learning
import reference
import torch
from pytorch_metric_learning import distances, reducers
from pytorch_metric_learning import losses as pml_losses
from torch.utils._python_dispatch import TorchDispatchMode

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy._similarity import ROWS_PER_CALL
from pml_multiproxy.regularizers import ProxyEntropyRegularizer

TEMPERATURE = 0.3
SIZE = 6


DISTANCES = {
    **{name: case for name, case in cases.DISTANCES.items() if name != "dot product"},
    "L1, power=0.5": (distances.LpDistance, {"p": 1, "power": 0.5}, reference.minus_lp(1, power=0.5)),
}
ONE_PER_WAY = ["cosine", "bent cosine", "L2"]  # the three ways in which similarities are computed


def make_distance(name):
    kind, arguments, _ = DISTANCES[name]
    return kind(**arguments)


def naive(proxies, name, temperature):
    """The penalties of proxies (C, K, D)."""
    kind, _, similarity = DISTANCES[name]
    itself = torch.eye(proxies.shape[1]) == 1
    # A distance has no gradient where it is 0, and some have no finite one.
    own = similarity(proxies, proxies) if kind is not distances.LpDistance else proxies.new_zeros(proxies.shape[:2])
    to_others = similarity(proxies.unsqueeze(2), proxies.unsqueeze(1) + itself.unsqueeze(2))
    to_siblings = torch.where(itself, own.unsqueeze(2), to_others)
    return -(to_siblings / temperature).log_softmax(dim=2).diagonal(dim1=1, dim2=2).flatten()


def penalties(regularizer, weights):
    return regularizer.compute_loss(weights)["loss"]["losses"]


def make_weights(classes, per_class, dtype=torch.float64):
    """Proxies that overlap: all of them around one direction."""
    return (2 + torch.randn(classes * per_class, SIZE, dtype=torch.float64)).div(3).to(dtype)


@pytest.mark.parametrize("distance", DISTANCES)
def test_equals_the_equation(distance):
    """Values and gradients, the latter with a weight for each proxy; also in the memory layout of SoftTripleLoss."""
    for classes, per_class in ((1, 4), (3, 1), (3, 2), (2 * ROWS_PER_CALL // 3 + 1, 3)):
        weights = make_weights(classes, per_class).T.contiguous().T.requires_grad_()
        coefficients = torch.arange(1.0, len(weights) + 1).double()
        values = penalties(ProxyEntropyRegularizer(per_class, TEMPERATURE, distance=make_distance(distance)), weights)
        (gradient,) = torch.autograd.grad(values @ coefficients, weights)
        proxies = weights.detach().reshape(classes, per_class, SIZE).requires_grad_()
        expected = naive(proxies, distance, TEMPERATURE)
        (wanted,) = torch.autograd.grad(expected @ coefficients, proxies)
        torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient, wanted.flatten(0, 1), rtol=1e-10, atol=1e-11)
        assert per_class == 1 or wanted.abs().max() > 1e-6


def test_loss_dictionary_and_reducers():
    weights, regularizer = make_weights(3, 4), ProxyEntropyRegularizer(4)
    loss_dict = regularizer.compute_loss(weights)["loss"]
    assert loss_dict["reduction_type"] == "element"
    assert loss_dict["indices"].equal(torch.arange(12))
    by_row = ProxyEntropyRegularizer(4, reducer=reducers.ClassWeightedReducer(torch.arange(12.0)))
    torch.testing.assert_close(regularizer(weights), loss_dict["losses"].mean())
    torch.testing.assert_close(by_row(weights), (loss_dict["losses"] * torch.arange(12.0)).mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_cosine_is_finite_for_every_finite_input(dtype):
    largest, smallest = torch.finfo(dtype).max / 2, torch.finfo(dtype).smallest_normal / 2
    lengths = torch.tensor([0.0, smallest, 1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e18, largest]).double().unsqueeze(1)
    for directions in (torch.rand(1, SIZE), torch.randn(9, SIZE)):
        weights = (directions * lengths).clamp(-largest, largest).to(dtype).requires_grad_()
        values = penalties(ProxyEntropyRegularizer(9), weights)
        values.sum().backward()
        assert torch.stack([*values, *weights.grad.flatten()]).isfinite().all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_and_zero_proxies_cost_log_k(distance):
    """With a gradient of zero, although distances have a corner there; a zero proxy has cosine 0 also to itself."""
    regularizer = ProxyEntropyRegularizer(3, distance=make_distance(distance))
    row = make_weights(3, 1).requires_grad_()
    values = penalties(regularizer, row.repeat_interleave(3, dim=0))
    torch.testing.assert_close(values, torch.full_like(values, math.log(3)))
    torch.testing.assert_close(torch.autograd.grad(values.sum(), row)[0], torch.zeros_like(row))
    if distance == "cosine":
        torch.testing.assert_close(penalties(regularizer, torch.zeros(3, 2)), torch.full((3,), math.log(3)))


def test_default_temperature_as_documented():
    """Ten proxies at the same cosine to each other."""
    for cosine, expected in {0.5: 0.06, 0.8: 0.8, 0.95: 1.9, 0.0: 0.0004}.items():
        weights = torch.linalg.cholesky(torch.full((10, 10), cosine).fill_diagonal_(1))
        assert ProxyEntropyRegularizer(10)(weights).item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("distance", ONE_PER_WAY)
def test_low_precision_and_autocast(distance, dtype):
    """All in float32, but for the rounding of the gradient to the dtype of the weights; autocast changes nothing."""
    regularizer = ProxyEntropyRegularizer(4, TEMPERATURE, distance=make_distance(distance))
    weights = make_weights(3, 4, dtype).requires_grad_()
    exact = weights.detach().double().requires_grad_()
    values, expected = penalties(regularizer, weights), penalties(regularizer, exact)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=2e-5, atol=2e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert penalties(regularizer, weights).equal(values)
    (values.sum() + expected.sum()).backward()
    error = (weights.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert error < max(2e-5, torch.finfo(dtype).eps)


@pytest.mark.parametrize("distance", ONE_PER_WAY)
def test_no_proxies_and_a_device_without_autocast(distance):
    for weights in (torch.zeros(0, SIZE, requires_grad=True), make_weights(3, 4).to("meta").requires_grad_()):
        ProxyEntropyRegularizer(4, distance=make_distance(distance))(weights).backward()
        assert weights.grad.shape == weights.shape


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that was made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.size = max(self.size, made.numel() if isinstance(made, torch.Tensor) else 0)
        return made


@pytest.mark.parametrize("distance", ONE_PER_WAY)
def test_no_similarities_between_classes(distance):
    weights = make_weights(400, 4).requires_grad_()
    with Largest() as largest:
        ProxyEntropyRegularizer(4, distance=make_distance(distance))(weights).backward()
    assert largest.size == max(weights.numel(), ROWS_PER_CALL**2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:copyreg")
def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    regularizer, weights = ProxyEntropyRegularizer(4), make_weights(3, 4)
    compiled = torch.compile(lambda weights: penalties(regularizer, weights), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weights), penalties(regularizer, weights))


def make_loss(name, **kwargs):
    """A loss of four classes and three proxies, its parameter, and the parameter as (C, K, D)."""
    if name == "MultiProxyEntropyLoss":
        loss_func = MultiProxyEntropyLoss(4, 16, 3, **kwargs).eval()
        return loss_func, loss_func.proxies, loss_func.proxies
    kwargs["centers_per_class" if name == "SoftTripleLoss" else "sub_centers"] = 3
    loss_func = getattr(pml_losses, name)(num_classes=4, embedding_size=16, **kwargs)
    (parameter,) = loss_func.parameters()
    return loss_func, parameter, parameter.T.reshape(4, 3, 16)


OLD_PML = tuple(map(int, pytorch_metric_learning.__version__.split(".")[:2])) < (2, 9)
DROPS_IT = pytest.mark.xfail(OLD_PML, reason="PML before 2.9.0 drops the weight_regularizer of this loss", strict=True)
LOSSES = ["MultiProxyEntropyLoss", "SoftTripleLoss", pytest.param("SubCenterArcFaceLoss", marks=DROPS_IT)]


@pytest.mark.parametrize("name", LOSSES)
def test_as_weight_regularizer(name):
    """The value and gradient that it adds to the loss; the loss itself reads the rows in the same order."""
    regularizer = ProxyEntropyRegularizer(3, TEMPERATURE)
    loss_func, parameter, proxies = make_loss(name, weight_regularizer=regularizer, weight_reg_weight=0.7)
    embeddings, labels = torch.randn(8, 16), torch.arange(8) % 4
    for c, of_class in enumerate(proxies.detach()):
        assert loss_func.get_logits(of_class).argmax(dim=1).eq(c).all()
    value = loss_func(embeddings, labels)
    loss_func.weight_reg_weight = 0
    added = value - loss_func(embeddings, labels)
    expected = 0.7 * naive(proxies, "cosine", TEMPERATURE).mean()
    gradients = [torch.autograd.grad(total, parameter)[0] for total in (added, expected)]
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [distances.LpDistance, distances.SNRDistance])
def test_the_distance_records_the_norms_of_all_proxies(kind):
    weights = make_weights(ROWS_PER_CALL, 3) * torch.arange(1, 3 * ROWS_PER_CALL + 1).unsqueeze(1)
    distance, whole = kind(collect_stats=True), kind(collect_stats=True)
    regularizer = ProxyEntropyRegularizer(3, distance=distance)
    regularizer(weights), whole(weights)
    assert regularizer._record_these == ["proxies_per_class", "temperature"]
    assert distance._record_these_stats
    for name in distance._record_these_stats:
        assert getattr(distance, name) == getattr(whole, name), name


def test_errors():
    raw = distances.DotProductSimilarity(normalize_embeddings=False)
    for arguments, error, message in (
        ({"proxies_per_class": 0}, ValueError, "proxies_per_class must be an int of at least 1, got 0"),
        ({"temperature": "1"}, TypeError, "temperature must be a finite number above 0, got '1' of type str"),
        ({"distance": raw}, ValueError, "distance must not be a DotProductSimilarity with normalize_embeddings=False"),
    ):
        with pytest.raises(error, match=message):
            ProxyEntropyRegularizer(**{"proxies_per_class": 4, **arguments})
    for weights, error, message in (
        (torch.zeros(9, 5), ValueError, r"weights must be of shape .* with proxies_per_class = 4, got \(9, 5\)"),
        (torch.zeros(8, 5).long(), TypeError, "weights must be of a floating-point dtype, got torch.int64"),
        ([[0.0]] * 4, TypeError, "weights must be a torch.Tensor of shape .*, got list"),
    ):
        with pytest.raises(error, match=message):
            ProxyEntropyRegularizer(4)(weights)
