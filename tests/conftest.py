import os
from importlib import metadata

import pytest
import pytorch_metric_learning
import torch
from hypothesis import HealthCheck, settings
from ranks import Pool

from pml_multiproxy import MultiProxyEntropyLoss

settings.register_profile(
    "ours",
    max_examples=60,
    deadline=None,
    derandomize=True,
    # The seed of torch is set once per test, and each example sets its own.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("ours")


def pytest_configure():
    """The workers of pytest-xdist share the cores: a worker, and a program that it starts, uses one thread."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_report_header():
    return (
        f"pytorch-metric-learning {pytorch_metric_learning.__version__}, torch {torch.__version__}, "
        f"numpy {metadata.version('numpy')}"
    )


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pool():
    """Four ranks, see :mod:`ranks`; started by the first test that needs them."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def batch():
    """Embeddings (12, 8) that want a gradient, and labels of three classes."""
    return torch.randn(12, 8, requires_grad=True), torch.arange(12) % 3


@pytest.fixture
def loss_func():
    return MultiProxyEntropyLoss(num_classes=3, embedding_size=8, proxies_per_class=4)
