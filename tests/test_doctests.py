"""The examples in the docstrings; every public function and method has one."""

import doctest
import inspect

import pytest

from pml_multiproxy import _register, functional, losses


@pytest.mark.parametrize("module", [functional, losses, _register], ids=lambda module: module.__name__)
def test_doctests(module):
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    assert attempted > 0


@pytest.mark.parametrize("module", [functional, _register], ids=lambda module: module.__name__)
def test_every_public_function_has_one(module):
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if function.__module__ == module.__name__ and not name.startswith("_"):
            assert ">>>" in (function.__doc__ or ""), name


def test_the_loss_and_its_methods_have_one():
    loss = losses.MultiProxyEntropyLoss
    assert all(">>>" in documented.__doc__ for documented in (loss, loss.get_logits, loss.assign))
