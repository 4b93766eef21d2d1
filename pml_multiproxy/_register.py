"""Makes the package's classes known to PyTorch Metric Learning."""

import pytorch_metric_learning.losses

from .losses import MultiProxyEntropyLoss


def register() -> None:
    """Makes :class:`~pml_multiproxy.losses.MultiProxyEntropyLoss` an attribute of ``pytorch_metric_learning.losses``.

    So code that looks losses up there by name, as powerful-benchmarker does, finds it. Calling it again changes
    nothing; importing the package alone changes nothing in PML.

    >>> import pml_multiproxy, pytorch_metric_learning.losses
    >>> pml_multiproxy.register()
    >>> pytorch_metric_learning.losses.MultiProxyEntropyLoss is pml_multiproxy.MultiProxyEntropyLoss
    True
    """
    setattr(pytorch_metric_learning.losses, MultiProxyEntropyLoss.__name__, MultiProxyEntropyLoss)
