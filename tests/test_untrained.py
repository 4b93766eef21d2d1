"""Proxies in no optimizer are noticed, once; people who froze them are left alone."""

import warnings
from functools import partial

import pytest
import torch

from pml_multiproxy import MultiProxyEntropyLoss

MESSAGE = "the proxies have had gradients in 50 training calls, but never changed"


def train(loss_func, batch, optimizer=None, steps=60, every=1):
    embeddings, labels = batch
    network = torch.nn.Linear(8, 8)
    of_network = torch.optim.SGD(network.parameters(), 0.01)
    for step in range(steps):
        loss_func(network(embeddings.detach()), labels).backward()
        if (step + 1) % every == 0:
            for each in filter(None, (of_network, optimizer)):
                each.step()
                each.zero_grad(set_to_none=False)


@pytest.mark.parametrize("options", [{}, {"classes_per_chunk": 1}], ids=str)
def test_warns_once_within_60_steps(options, batch):
    loss_func = MultiProxyEntropyLoss(3, 8, 4, **options)
    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        train(loss_func, batch, steps=60)
    assert len(caught) == 1
    torch.no_grad()(loss_func.proxies.add_)(1)
    train(loss_func, batch, steps=60)


def test_moved_while_it_counts(batch):
    """To another dtype, as to another device."""
    loss_func = MultiProxyEntropyLoss(3, 8, 4)
    train(loss_func, batch, steps=25)
    with pytest.warns(UserWarning, match=MESSAGE):
        train(loss_func.to(torch.bfloat16), batch)


class WriterToData(torch.optim.SGD):
    """As some optimizers do, which PyTorch does not see as a change."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(0.01 * parameter.grad)


OPTIMIZERS = {
    "SGD": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "Adam, foreach": partial(torch.optim.Adam, foreach=True),
    "AdamW, fused": partial(torch.optim.AdamW, fused=True),
    "writes to param.data": WriterToData,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trained_or_frozen_proxies_do_not_warn(optimizer, batch):
    loss_func = MultiProxyEntropyLoss(3, 8, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(loss_func, batch, OPTIMIZERS[optimizer](loss_func.parameters(), 0.01), steps=60)
        train(loss_func, batch, OPTIMIZERS[optimizer](loss_func.parameters(), 0.01), every=40, steps=90)
        loss_func.proxies.requires_grad_(False)
        train(loss_func, batch, steps=60)


def test_evaluation_and_calls_without_backward(batch):
    loss_func = MultiProxyEntropyLoss(3, 8, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(loss_func.eval(), batch, steps=60)
        loss_func.zero_grad()
        for _ in range(60):
            loss_func.train()(*batch)
