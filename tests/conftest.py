"""Fixtures and settings of all tests. Imports torch where tests run, and not where pytest-xdist starts its workers."""

import os
from importlib import metadata

import pytest
from hypothesis import HealthCheck, settings

# The workers of pytest-xdist share the cores: a worker, and a program that it starts, uses one thread.
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile(
    "ours",
    max_examples=60,
    deadline=None,
    derandomize=True,
    # The seed of torch is set once per test, and each example sets its own.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("ours")


def pytest_report_header():
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("pytorch-metric-learning", "torch", "numpy"))


@pytest.fixture(autouse=True)
def same_start():
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)  # commands of benchmarks that tests call set more


@pytest.fixture(scope="session")
def pool():
    """Four ranks, see :mod:`ranks`; started by the first test that needs them."""
    from ranks import Pool

    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def batch():
    """Embeddings (12, 8) that want a gradient, and labels of three classes."""
    import torch

    return torch.randn(12, 8, requires_grad=True), torch.arange(12) % 3


@pytest.fixture
def loss_func():
    from pml_multiproxy import MultiProxyEntropyLoss

    return MultiProxyEntropyLoss(num_classes=3, embedding_size=8, proxies_per_class=4)
