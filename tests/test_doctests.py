"""The examples in the docstrings; every public function and method has one."""

import doctest
import importlib

import pytest

import pml_multiproxy
from pml_multiproxy._analytic import chunks

NAMES = "agreement distributed functional inspection losses miners regularizers views visualize"
MODULES = [pml_multiproxy, *(importlib.import_module(f"pml_multiproxy.{name}") for name in NAMES.split())]


@pytest.mark.parametrize("module", [*MODULES, chunks], ids=lambda module: module.__name__)
def test_doctests(module):
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    assert attempted > 0


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_function_and_class_has_one(module):
    for name in getattr(module, "__all__", dir(module)):
        member = getattr(module, name)
        if getattr(member, "__module__", None) == module.__name__ and not name.startswith("_"):
            assert ">>>" in (member.__doc__ or ""), name


def test_every_public_method_of_the_loss_has_one():
    loss = pml_multiproxy.MultiProxyEntropyLoss
    methods = (loss.get_logits, loss.assign, loss.soft_assign, loss.get_outliers, loss.init_proxies)
    assert all(">>>" in method.__doc__ for method in methods)
