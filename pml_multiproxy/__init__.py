"""Several balanced proxies per class, for PyTorch Metric Learning."""

from . import agreement, functional, inspection, losses, miners, regularizers, views
from ._register import register
from .losses import MultiProxyEntropyLoss
from .miners import MultiProxyMiner
from .regularizers import ProxyEntropyRegularizer

__version__ = "0.1.0"

__all__ = [
    "MultiProxyEntropyLoss",
    "MultiProxyMiner",
    "ProxyEntropyRegularizer",
    "__version__",
    "agreement",
    "functional",
    "inspection",
    "losses",
    "miners",
    "register",
    "regularizers",
    "views",
]
