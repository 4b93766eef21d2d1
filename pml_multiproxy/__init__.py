"""Several balanced proxies per class, for PyTorch Metric Learning."""

from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml_miners
from pytorch_metric_learning import regularizers as pml_regularizers

from . import agreement, functional, inspection, losses, miners, regularizers, views
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


def register() -> None:
    """Makes the loss, the miner and the regularizer attributes of PML's ``losses``, ``miners`` and ``regularizers``.

    So code that looks classes up there by name, as powerful-benchmarker does, finds them. Calling it again changes
    nothing; importing the package alone changes nothing in PML.

    >>> import pml_multiproxy, pytorch_metric_learning.losses
    >>> pml_multiproxy.register()
    >>> pytorch_metric_learning.losses.MultiProxyEntropyLoss is pml_multiproxy.MultiProxyEntropyLoss
    True
    """
    for module, cls in (
        (pml_losses, MultiProxyEntropyLoss),
        (pml_miners, MultiProxyMiner),
        (pml_regularizers, ProxyEntropyRegularizer),
    ):
        setattr(module, cls.__name__, cls)
