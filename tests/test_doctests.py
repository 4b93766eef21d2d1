"""The examples in the docstrings; every public function and method has one."""

import doctest

import pytest

import pml_multiproxy
from pml_multiproxy import (
    agreement,
    distributed,
    functional,
    inspection,
    losses,
    miners,
    regularizers,
    views,
    visualize,
)
from pml_multiproxy._analytic import chunks

MODULES = [
    pml_multiproxy,
    agreement,
    chunks,
    distributed,
    functional,
    inspection,
    losses,
    miners,
    regularizers,
    views,
    visualize,
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_doctests(module):
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    assert attempted > 0


@pytest.mark.parametrize(
    "module", [module for module in MODULES if module is not chunks], ids=lambda module: module.__name__
)
def test_every_public_function_and_class_has_one(module):
    for name in getattr(module, "__all__", dir(module)):
        member = getattr(module, name)
        if getattr(member, "__module__", None) == module.__name__ and not name.startswith("_"):
            assert ">>>" in (member.__doc__ or ""), name


def test_every_public_method_of_the_loss_has_one():
    loss = losses.MultiProxyEntropyLoss
    methods = (loss.get_logits, loss.assign, loss.soft_assign, loss.get_outliers, loss.init_proxies)
    assert all(">>>" in method.__doc__ for method in methods)
