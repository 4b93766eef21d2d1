"""Several balanced proxies per class, for PyTorch Metric Learning."""

from . import functional, losses
from ._register import register
from .losses import MultiProxyEntropyLoss

__version__ = "0.1.0"

__all__ = ["MultiProxyEntropyLoss", "__version__", "functional", "losses", "register"]
