"""A training step compiles into one graph."""

import copy

import pytest
import torch

from pml_multiproxy import MultiProxyEntropyLoss, functional


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)  # inductor needs a C++ compiler
@pytest.mark.parametrize("pooling", functional.POOLINGS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::DeprecationWarning:copyreg")
def test_training_step_has_no_graph_breaks(backend, pooling, batch):
    torch._dynamo.reset()
    embeddings, labels = batch
    network = torch.nn.Linear(8, 8)
    loss_func = MultiProxyEntropyLoss(3, 8, 4, pooling=pooling, margin=0.1)
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
