"""A training step compiles into one graph; the logits export; traces compute the same."""

import copy

import pytest
import torch
from cases import make_distance

from pml_multiproxy import MultiProxyEntropyLoss

OF_TORCH = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
"""Warnings of torch, onnx and onnxscript among themselves."""


@pytest.mark.parametrize(
    ("pooling", "views", "backend"),
    [
        ("logsumexp", 2, "aot_eager"),
        pytest.param("max", 1, "aot_eager", marks=pytest.mark.slow),
        pytest.param("softmax", 1, "aot_eager", marks=pytest.mark.slow),
        pytest.param("logsumexp", 2, "inductor", marks=pytest.mark.slow),  # needs a C++ compiler
    ],
)
@OF_TORCH
def test_training_step_has_no_graph_breaks(pooling, views, backend, batch):
    torch._dynamo.reset()
    embeddings, labels = batch  # blocks of the same labels
    network = torch.nn.Linear(8, 8)
    loss_func = MultiProxyEntropyLoss(3, 8, 4, pooling=pooling, margin=0.1, views=views)
    eager = copy.deepcopy(loss_func)

    @torch.compile(fullgraph=True, backend=backend)
    def step(x):
        return loss_func(network(x), labels)

    for _ in range(2):
        loss = step(embeddings)
        gradients = torch.autograd.grad(loss, [embeddings, loss_func.proxies, network.weight])
        expected = eager(network(embeddings), labels)
        wanted = torch.autograd.grad(expected, [embeddings, eager.proxies, network.weight])
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients, wanted)
        torch.testing.assert_close(loss_func.proxy_usage, eager.proxy_usage)


@OF_TORCH
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("options", [{}, {"classes_per_chunk": 1}, {"distance": "L2"}], ids=str)
def test_traces_in_eval_mode(options, batch, tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    options = options | {"distance": make_distance(options.get("distance", "cosine"))}
    loss_func = MultiProxyEntropyLoss(3, 8, 4, **options).eval()
    other = torch.randn(12, 8), batch[1].flip(0)
    traced = torch.jit.trace(loss_func, batch)
    for inputs in (batch, other):
        torch.testing.assert_close(traced(*inputs), loss_func(*inputs))
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(loss_func, batch)
    assert list(tmp_path.iterdir())


class Classifier(torch.nn.Module):
    def __init__(self, pooling, distance="cosine"):
        super().__init__()
        self.network = torch.nn.Linear(8, 8)
        self.loss_func = MultiProxyEntropyLoss(5, 8, 3, pooling=pooling, distance=make_distance(distance))

    def forward(self, x):
        return self.loss_func.get_logits(self.network(x))


LESS_USED = [("max", "cosine"), ("softmax", "cosine"), ("logsumexp", "dot product"), ("logsumexp", "SNR")]


@pytest.mark.parametrize(
    ("pooling", "distance"),
    [("logsumexp", "cosine"), *(pytest.param(*case, marks=pytest.mark.slow) for case in LESS_USED)],
)
@OF_TORCH
@pytest.mark.integrations
def test_logits_export_with_a_batch_of_any_length(pooling, distance):
    model = Classifier(pooling, distance).eval()
    shapes = {"x": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(model, (torch.randn(4, 8),), dynamic_shapes=shapes)
    for count in (1, 7, 300):
        x = torch.randn(count, 8)
        torch.testing.assert_close(program.module()(x), model(x))
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    program = torch.onnx.export(model, (torch.randn(4, 8),), dynamo=True, dynamic_shapes=shapes, verbose=False)
    evaluator = ReferenceEvaluator(program.model_proto)
    for count in (1, 7, 300):
        x = torch.randn(count, 8)
        (logits,) = evaluator.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.tensor(logits), model(x).detach(), atol=1e-4, rtol=1e-4)
